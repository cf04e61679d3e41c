"""The sources of committed tokens, as outputs and verdicts name them, and the properties of each."""

from typing import Final, NamedTuple


class SourceTraits(NamedTuple):
    """Properties of a source.

    Attributes:
        verified: the LLM settled the token.
        by_peers: verified tokens of other agents settled it.
        from_afar: those agents belong to other clusters.
        kept: the gate kept the draft.
        unreachable: the draft was committed because no verdict came in time.
    """

    verified: bool = False
    by_peers: bool = False
    from_afar: bool = False
    kept: bool = False
    unreachable: bool = False


SOURCES: Final[dict[str, SourceTraits]] = {
    "local": SourceTraits(kept=True),
    "peer": SourceTraits(by_peers=True),
    "neighbour": SourceTraits(by_peers=True, from_afar=True),
    "cloud": SourceTraits(verified=True),
    "unverified": SourceTraits(unreachable=True),
}
