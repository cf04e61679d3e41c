"""Who settled a token, by the names that outputs and verdicts carry, and what is true of each."""

from typing import Final, NamedTuple


class SourceTraits(NamedTuple):
    """`verified`: the LLM settled it. `by_peers`: other agents' verified tokens did; `from_afar`: those of other clusters.
    `kept`: the gate kept the draft. `unreachable`: it was kept because no verdict came in time."""

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
