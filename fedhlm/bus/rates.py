"""Limits on how much each party may send: a token bucket for each name. No I/O.

A bucket holds what a party may send in BURST_S seconds, and fills at the party's rate. Only an idle party has a full one.
"""

from collections import OrderedDict
from typing import Final

BURST_S: Final = 4.0
NAMES_MAX: Final = 4_096
REFUSALS_S: Final = 50.0  # refusals a second that a party is told of


class PartyRates:
    """Whether parties keep to `per_s` units a second each (0: no limit). The names heard last are remembered."""

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # level, and when it was that, in seconds

    def __len__(self) -> int:
        return len(self._buckets)

    def allow(self, name: str, units: float, now_s: float) -> bool:
        """Take `units` from a party's bucket, or return False if it holds less. A full bucket allows any message."""
        if not self.per_s:
            return True
        full = self.per_s * BURST_S
        level, then_s = self._buckets.pop(name, (full, now_s))
        level = min(full, level + max(0.0, now_s - then_s) * self.per_s)
        allowed = level >= min(units, full)
        self._buckets[name] = (max(0.0, level - units) if allowed else level, now_s)
        while len(self._buckets) > NAMES_MAX:
            self._buckets.popitem(last=False)
        return allowed


class Allowance:
    """Rates of messages or blocks (`units_s`) and of bytes, and how often a party is told that it exceeds them."""

    def __init__(self, units_s: float, bytes_s: float) -> None:
        self.units = PartyRates(units_s)
        self.bytes = PartyRates(bytes_s)
        self._refusals = PartyRates(REFUSALS_S)

    def exceeds(self, name: str, units: float, size_bytes: int, now_s: float) -> bool:
        """Whether a party sends more than it may."""
        return not (self.units.allow(name, units, now_s) and self.bytes.allow(name, size_bytes, now_s))

    def tells(self, name: str, now_s: float) -> bool:
        """Whether to tell a party of a refusal. Whoever sends thousands of messages a second is not told of each."""
        return self._refusals.allow(name, 1.0, now_s)
