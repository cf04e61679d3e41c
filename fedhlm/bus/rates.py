"""Limits on how much each party may send: a token bucket for each name. No I/O.

A bucket holds what a party may send in BURST_S seconds, and fills at the party's rate. Only an idle party has a full one.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

BURST_S: Final = 4.0
NAMES_MAX: Final = 4_096
REFUSALS_S: Final = 50.0  # refusals a second that a party is told of
UNREAD_BYTES: Final = 1.25  # bytes that are read, for each byte that is allowed


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


class UnreadLimit:
    """Which messages a part drops before it reads them: those far beyond what their parties may send.

    Beyond its allowance a party is still read REFUSALS_S times a second, so that it can be told. `owner` returns the
    party that a topic belongs to, or "" for a topic without a limit.
    """

    def __init__(self, allowance: Allowance, owner: Callable[[str], str], clock_s: Callable[[], float]) -> None:
        self.unread = 0  # messages dropped so far
        self._owner, self._clock_s = owner, clock_s
        self._owners: dict[bytes, str] = {}
        units_s, bytes_s = allowance.units.per_s, allowance.bytes.per_s
        self._read = Allowance(units_s and units_s + REFUSALS_S, bytes_s * UNREAD_BYTES)

    def sheds(self, topic: bytes, size_bytes: int) -> bool:
        """Whether to drop a message unread; see `fedhlm.bus.gate.Sheds`."""
        owner = self._owners.get(topic)
        if owner is None:
            if len(self._owners) >= NAMES_MAX:
                self._owners.clear()
            owner = self._owners[topic] = self._owner(topic.decode(errors="replace"))
        drops = bool(owner) and self._read.exceeds(owner, 1.0, size_bytes, self._clock_s())
        self.unread += drops
        return drops
