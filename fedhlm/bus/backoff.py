"""Delays between attempts to connect, and detection of another client with the same client id; no I/O."""

import random
from typing import Final, Literal, NamedTuple

# Full jitter: the delay is uniform in 0..min(cap, base * 2^failures), so that a fleet does not reconnect all at once.
BASE_S: Final = 0.25
CAP_S: Final = 30.0
# A link that broke sooner than this counts as a failure. Otherwise a broker that accepts and drops would be flooded.
STABLE_S: Final = 5.0
# Two clients with one id disconnect each other. The first wait is long enough for a run of `fedhlm doctor` or for one
# prompt with the same certificate. Each further wait is twice as long, so that two permanent clients rarely collide.
YIELD_BASE_S: Final = 8.0
YIELD_CAP_S: Final = 600.0
# A link that lasted longer than _HELD times the last wait plus _SHORT_S shows that no other client uses the id now.
_HELD: Final = 3.0
_SHORT_S: Final = 60.0
# MQTT 3.1.1 has no reason codes, and mosquitto 2.0 closes without one. If the broker accepts the connection and closes
# it again this many times in a row, another client with the same id is suspected, and then assumed.
SUSPICIOUS: Final = 2
EVIDENT: Final = 3

Rival = Literal["no", "perhaps", "yes"]


class Wait(NamedTuple):
    """Seconds until the next attempt, and whether another client with the same id caused the wait."""

    seconds: float
    rival: Rival = "no"


class Backoff:
    """Computes the delay before each attempt. `cap_s` bounds the delay after an ordinary failure, in seconds."""

    def __init__(self, rng: random.Random, cap_s: float = CAP_S) -> None:
        self._rng = rng
        self._cap_s = cap_s
        self._failures = 0
        self._hung_up = 0
        self._yields = 0
        self._waited_s = 0.0

    def failed(self) -> Wait:
        """Return the wait after an attempt that did not succeed."""
        self._hung_up = 0
        self._failures += 1
        return self._retry()

    def broken(self, lasted_s: float, *, taken_over: bool = False, abrupt: bool = False) -> Wait:
        """Return the wait after a link that broke after `lasted_s` seconds.

        Args:
            lasted_s: how long the link was up, in seconds.
            taken_over: the broker said that another client took the session over.
            abrupt: the broker ended the link without a reason while no message was in flight.
        """
        held = lasted_s > _HELD * self._waited_s + _SHORT_S
        if abrupt:
            self._hung_up = 1 if held else self._hung_up + 1
        elif not taken_over:
            self._hung_up = 0
        if taken_over or self._hung_up >= EVIDENT:
            return Wait(self._give_way(held=held), "yes" if taken_over else "perhaps")
        self._failures = 0 if lasted_s >= STABLE_S else self._failures + 1
        return self._retry()._replace(rival="perhaps" if self._hung_up >= SUSPICIOUS else "no")

    def _retry(self) -> Wait:
        return Wait(self._rng.uniform(0.0, min(self._cap_s, BASE_S * 2 ** min(self._failures, 16))))

    def _give_way(self, *, held: bool) -> float:
        if held:
            self._yields = 0
        longest_s = min(YIELD_CAP_S, YIELD_BASE_S * 2 ** min(self._yields, 16))
        self._yields += 1
        self._waited_s = self._rng.uniform(longest_s / 2.0, longest_s)
        return self._waited_s
