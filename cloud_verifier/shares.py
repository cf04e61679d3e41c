"""Decides who is served next, without I/O: clusters share the model equally, and agents share their cluster's part.

This is start-time fair queueing on two levels. Service is counted in tokens, and whoever has received the least is
first. A name that was idle returns with at most `burst` tokens of credit. A light user is therefore served at once
beside any number of heavy ones. Inventing a new name for every request gains nothing beyond the cluster's share.
"""

from collections.abc import Iterable
from typing import Final

NAMES_MAX: Final = 16_384


class Level:
    """The service that each name has received, in tokens.

    `now` is the least service of any busy name; it never decreases.
    """

    def __init__(self, burst: float) -> None:
        self.now = 0.0
        self._burst = burst
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._served)

    def of(self, name: str) -> float:
        """The service of a name. A new name, or one that was idle for long, has its whole credit."""
        return max(self._served.get(name, 0.0), self.now - self._burst)

    def charge(self, name: str, tokens: float) -> None:
        """Add `tokens` to the service of a name."""
        served = self.of(name) + tokens
        self._served.pop(name, None)
        self._served[name] = served

    def advance(self, busy: Iterable[str]) -> None:
        """Move `now` to the least served busy name.

        Names whose entry no longer changes the result of `of` are forgotten.
        """
        self.now = max(self.now, min((self.of(name) for name in busy), default=self.now))
        if len(self._served) > NAMES_MAX // 2:
            floor = self.now - self._burst
            self._served = {name: served for name, served in self._served.items() if served > floor}
        while len(self._served) > NAMES_MAX:
            del self._served[next(iter(self._served))]
