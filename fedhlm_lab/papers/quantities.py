"""The figures that experiments tell of what agents have written."""

from collections.abc import Callable
from typing import Final, NamedTuple

from fedhlm.protocol.sources import SOURCES
from fedhlm_lab.papers.desk import WrittenTexts


class Quantity(NamedTuple):
    """A figure of texts: its name, how it follows, whether more is better, and whether it is a share of 1."""

    name: str
    of: Callable[[WrittenTexts], float]
    more: bool = False
    share: bool = False


AGREES: Final = Quantity("tokens as the LLM", lambda w: w.agreed / w.tokens, more=True, share=True)
SENT: Final = Quantity("messages up a token", lambda w: w.sent / w.tokens)
UP: Final = Quantity("bytes up a token", lambda w: w.up_bytes / w.tokens)
DOWN: Final = Quantity("bytes down a token", lambda w: w.down_bytes / w.tokens)
SPEED: Final = Quantity("tokens a second", lambda w: w.tokens / w.seconds, more=True)
CALLS: Final = Quantity("LLM calls a token", lambda w: w.calls / w.tokens)
POSITIONS: Final = Quantity("LLM positions a token", lambda w: w.positions / w.tokens)
FIRST: Final = Quantity("seconds to the first token", lambda w: w.first_s / w.texts)
SAME: Final = Quantity("texts as the LLM", lambda w: w.same / w.texts, more=True, share=True)
KEPT: Final = Quantity(
    "kept on the device",
    lambda w: sum(n for s, n in w.settled.items() if SOURCES[s].kept) / w.tokens,
    more=True,
    share=True,
)
BY_PEERS: Final = Quantity(
    "settled by peers",
    lambda w: sum(n for s, n in w.settled.items() if SOURCES[s].by_peers) / w.tokens,
    more=True,
    share=True,
)
