"""What the console draws over time: shares of routing, threshold and learnt curve by round, and the bytes to the cloud.

No clock, no I/O, and bounded like everything that the console keeps.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from fedhlm.choices import PEERS
from fedhlm.errors import ProtocolError
from fedhlm.learning.curve import BINS, Curve, isotonic
from fedhlm.protocol.messages import Learned
from fedhlm.protocol.sources import SOURCES

BUCKET_S: Final = 10
BUCKETS_MAX: Final = 60
ROUNDS_MAX: Final = 60  # of one cluster
READ_AT: Final = (0.1, 0.5, 0.9)  # the doubts at which curves are shown
LAW_BYTES: Final = 2  # of one token of the vocabulary, in a whole law (the preset hlm)


class Routing:
    """Tokens by source in each ten seconds."""

    def __init__(self) -> None:
        self._buckets: deque[dict[str, Any]] = deque(maxlen=BUCKETS_MAX)

    def count(self, sources: Iterable[str], now_s: float) -> None:
        """Count tokens that were committed at `now_s`."""
        at = int(now_s) // BUCKET_S * BUCKET_S
        if not self._buckets or self._buckets[-1]["at"] < at:
            self._buckets.append({"at": at, **dict.fromkeys(SOURCES, 0)})
        for source in sources:
            self._buckets[-1][source] += 1

    def since(self, at: int) -> list[dict[str, Any]]:
        """Return copies of the buckets that began at `at` or later, oldest first."""
        return [dict(bucket) for bucket in self._buckets if bucket["at"] >= at]

    @property
    def newest(self) -> int:
        """When the newest bucket began; 0 without any."""
        return int(self._buckets[-1]["at"]) if self._buckets else 0


class RoundsSeen:
    """Threshold and curve of one cluster, by round."""

    def __init__(self) -> None:
        self._rounds: deque[dict[str, Any]] = deque(maxlen=ROUNDS_MAX)

    def note(self, learned: Learned, taus: Sequence[float]) -> None:
        """Note a round, and the thresholds of the cluster's agents at that time. What comes again replaces the former.

        The threshold is that of the round, if rounds learn one, or else the mean of the agents'.
        """
        mean = sum(taus) / len(taus) if taus else None
        told = {
            "round": learned.round,
            "tau": max((t.threshold for t in learned.thresholds.values()), default=mean),
            "m": curve_of(learned),
        }
        if self._rounds and self._rounds[-1]["round"] >= learned.round:
            self._rounds.pop()
        self._rounds.append(told)

    def told(self) -> list[dict[str, Any]]:
        """Return the rounds, oldest first."""
        return list(self._rounds)


def curve_of(learned: Learned) -> list[float] | None:
    """Return m(u) at READ_AT of the curve of the drafts' doubts with the most evidence; None without any.

    The curves of what peers know are left out. A malformed curve is none.
    """
    own = [data for name, data in learned.curves.items() if name.partition("/")[0] not in PEERS]
    try:
        curves = [Curve.from_bytes(data) for data in own]
    except ProtocolError:
        return None
    best = max(curves, key=lambda curve: curve.total_weight, default=None)
    if best is None or not best.total_weight:
        return None
    m = isotonic(best)
    return [round(float(m[int(u * BINS)]), 4) for u in READ_AT]


class Cost:
    """What finished texts sent to the cloud, beside what two other ways would have sent for the same tokens."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(("tokens", "sent", "trips", "law", "text"), 0.0)

    def add(self, count: int, text: str, statistics: Mapping[str, float], vocabulary: int) -> None:
        """Add a finished text of `count` tokens, written by a model with this vocabulary."""
        if "uplink_bytes" not in statistics:
            return
        sums = self._sums
        sums["tokens"] += count
        sums["sent"] += statistics["uplink_bytes"]
        sums["trips"] += statistics.get("round_trips", 0.0)
        sums["law"] += count * vocabulary * LAW_BYTES
        sums["text"] += len(text.encode())

    def told(self) -> dict[str, float]:
        """Return the sums: tokens, bytes sent, round trips, bytes of whole laws (0: unknown) and of the texts."""
        return dict(self._sums)
