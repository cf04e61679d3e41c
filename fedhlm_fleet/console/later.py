"""What the LLM says of tokens that a device has committed without it: in later blocks of the text, and in its audit.

No clock, no I/O, and bounded like everything that the console keeps.
"""

from collections import OrderedDict
from typing import Final

from fedhlm.protocol.messages import Verdict
from fedhlm.protocol.packing import unpack_bits
from fedhlm.protocol.sources import SOURCES

SESSIONS_MAX: Final = 256
POSITIONS_MAX: Final = 2_048  # of one session
_BYTES: Final = 2  # of one target probability


class LaterVerdicts:
    """Keeps, for each session, whether the LLM would have written the token at a position of it."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[tuple[str, int], dict[int, bool]] = OrderedDict()

    def hear(self, agent: str, verdict: Verdict) -> None:
        """Take a verdict for an agent. Only the LLM's count, and of them what it has looked at."""
        if verdict.status != "settled" or not SOURCES[verdict.source].verified:
            return
        looked = min(len(verdict.target_probs) // _BYTES, verdict.accepted, POSITIONS_MAX)
        known = self._sessions.setdefault((agent, verdict.session), {})
        self._sessions.move_to_end((agent, verdict.session))
        for offset, wrong in enumerate(unpack_bits(verdict.missed, looked)):
            if len(known) < POSITIONS_MAX:
                known[verdict.base + offset] = not wrong
        while len(self._sessions) > SESSIONS_MAX:
            self._sessions.popitem(last=False)

    def of(self, agent: str, session: int) -> dict[int, bool]:
        """What is known of a session's positions, those of the prompt included."""
        return self._sessions.get((agent, session), {})
