"""What a federation knows of one member; no I/O."""

from collections.abc import Mapping
from typing import NamedTuple

from fedhlm.learning.curve import Curve
from fedhlm.learning.thresholds import PaperUpdate
from fedhlm.protocol.fields import Pair
from fedhlm.protocol.messages import Contribution


class KnownMember(NamedTuple):
    """A member's latest contribution, with its curves by measure."""

    message: Contribution
    curves: Mapping[str, Curve]

    def update(self, pair: Pair) -> PaperUpdate | None:
        """The threshold for a pair of models, with what it counts for; None if it contributes none."""
        t = self.message.thresholds.get(pair)
        return None if t is None else PaperUpdate(t.threshold, t.count, t.control, t.steps)

    def repeats(self, other: Contribution) -> bool:
        """Whether `other` is a duplicate of this message."""
        mine = self.message
        return (mine.round, mine.sequence, mine.sent_ms) == (other.round, other.sequence, other.sent_ms)

    def precedes(self, other: Contribution) -> bool:
        """Whether `other` was made later than this message.

        A higher round is later if its time is not earlier or its sequence number is higher; the sequence number decides
        where the sender's clock went back. A lower round with a later time is later as well: its sender has restarted and lost
        its count of rounds.
        """
        mine = self.message
        if other.round > mine.round:
            return other.sent_ms >= mine.sent_ms or other.sequence > mine.sequence
        return other.round < mine.round and other.sent_ms > mine.sent_ms
