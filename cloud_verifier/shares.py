"""Who is served next, without I/O: clusters share the model equally, and the agents of each share its part.

Start-time fair queueing on two levels. Service is counted in tokens; whoever had less of it is first. A name that was
idle comes back with at most `burst` tokens of credit, so who asks for little is served at once beside any number of
hogs, and a name that is invented for every request gains nothing over the cluster's part.
"""

from collections.abc import Iterable
from typing import Final

NAMES_MAX: Final = 16_384


class Level:
    """Service received by name. `now` is that of the least served name that is busy; it never decreases."""

    def __init__(self, burst: float) -> None:
        self.now = 0.0
        self._burst = burst
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._served)

    def of(self, name: str) -> float:
        """What a name has received; one that was idle for long, or is new, has its whole credit."""
        return max(self._served.get(name, 0.0), self.now - self._burst)

    def charge(self, name: str, tokens: float) -> None:
        """A name was served."""
        served = self.of(name) + tokens
        self._served.pop(name, None)
        self._served[name] = served

    def advance(self, busy: Iterable[str]) -> None:
        """Time goes on to the least served of the busy names; what says no more than `of` without it is forgotten."""
        self.now = max(self.now, min((self.of(name) for name in busy), default=self.now))
        if len(self._served) > NAMES_MAX // 2:
            floor = self.now - self._burst
            self._served = {name: served for name, served in self._served.items() if served > floor}
        while len(self._served) > NAMES_MAX:
            del self._served[next(iter(self._served))]
