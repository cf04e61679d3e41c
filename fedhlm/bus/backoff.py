"""How long to wait before the next attempt to connect, and whether a rival for our place is behind it; no I/O."""

import random
from typing import Final, Literal, NamedTuple

# Full jitter: the delay is uniform in 0..min(cap, base * 2^failures), so that a fleet does not come back in step.
BASE_S: Final = 0.25
CAP_S: Final = 30.0
# A link that broke sooner than this counts as one more failure, else a broker that accepts and drops is hammered.
STABLE_S: Final = 5.0
# Two clients of one id throw each other out. The first wait is long enough for a doctor's look or one prompt with the
# same certificate; each further one is twice as long, so that two which mean to stay leave each other in peace.
YIELD_BASE_S: Final = 8.0
YIELD_CAP_S: Final = 600.0
# Who held its place so many times longer than it last waited, and this long besides, has it for itself.
_HELD: Final = 3.0
_SHORT_S: Final = 60.0
# MQTT 3.1.1 has no reasons, and mosquitto 2.0 closes without one. A broker that takes us at once and hangs up again,
# so many times in links that were not held, has probably another client of our id.
SUSPICIOUS: Final = 2
EVIDENT: Final = 3

Rival = Literal["no", "perhaps", "yes"]


class Wait(NamedTuple):
    """Seconds until the next attempt; whether another client of the same id is to blame."""

    seconds: float
    rival: Rival = "no"


class Backoff:
    """Delays between attempts; `cap_s` bounds those after ordinary failures."""

    def __init__(self, rng: random.Random, cap_s: float = CAP_S) -> None:
        self._rng = rng
        self._cap_s = cap_s
        self._failures = 0
        self._hung_up = 0
        self._yields = 0
        self._waited_s = 0.0

    def failed(self) -> Wait:
        """After an attempt that did not succeed."""
        self._hung_up = 0
        self._failures += 1
        return self._retry()

    def broken(self, lasted_s: float, *, taken_over: bool = False, abrupt: bool = False) -> Wait:
        """After a link that broke; `abrupt`: the broker ended it without a reason while nothing was under way."""
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
