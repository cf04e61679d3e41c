"""The error budget: an unbiased running estimate of the harm that skipping does, and an upper limit on it.

Per session s, Y_s = (sum over skipped tokens of omega_t h_t) / T_s in [0, 1/epsilon]; omega is 1 for tokens that a
later upload had scored anyway and, for the tail after the last upload, 1/epsilon if the session's audit coin came up
and 0 if not. Then the mean of Y is unbiased for the risk per token, R / T (docs/algorithms.md, 3).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final, Self

from fedhlm.errors import ConfigError

# Slopes of the limit, geometric: some member is within a factor sqrt(2) of the best slope from 1 to 10^6 sessions.
# Slope k has the part 1 / ((k + 1) (k + 2)) of delta; the parts sum to less than 1, and few sessions need the first.
_SLOPES: Final = tuple(0.95 * 2.0**-k for k in range(10))
_SMALLEST: Final = 1e-100  # of epsilon in a snapshot: its inverse must stay finite
_KEYS: Final = ("epsilon", "delta", "sessions", "total", "drift")


def empirical_bernstein(mean: float, variance: float, count: float, span: float, delta: float) -> float:
    """Upper confidence limit of a mean from `count` independent values in an interval of length span.

    mean + sqrt(2 V ln(2/delta) / n) + 7 span ln(2/delta) / (3 (n - 1)) with V the unbiased sample variance (Maurer and
    Pontil 2009, theorem 4); infinite below two values. It is for a number of values fixed in advance.
    """
    if count < 2.0:
        return math.inf
    log = math.log(2.0 / delta)
    return mean + math.sqrt(2.0 * max(0.0, variance) * log / count) + 7.0 * span * log / (3.0 * (count - 1.0))


def _share(key: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{key} must be a number in [0, 1] (got {value!r})")
    return value


class Budget:
    """Running estimate of the risk per token and its upper limit, in constant memory.

    epsilon in (0, 1] is the probability of the tail audit, 1 - delta the confidence of `limit`.
    """

    def __init__(self, epsilon: float, delta: float = 0.05) -> None:
        if not 0.0 < epsilon <= 1.0:
            raise ConfigError("budget.epsilon", epsilon, "a probability in (0, 1]")
        if not 0.0 < delta < 1.0:
            raise ConfigError("budget.delta", delta, "a probability in (0, 1)")
        self.epsilon = epsilon
        self.delta = delta
        self.sessions = 0
        self._total = 0.0  # sum of X = epsilon Y, in [0, 1] each
        self._drift = 0.0  # sum of (X_i - prediction of X_i)^2

    def add_session(
        self, tokens: int, seen_harms: Sequence[float], tail_harms: Sequence[float] | None, tail: int
    ) -> None:
        """Adds one finished session.

        Args:
            tokens: committed tokens T; a session without any is not counted.
            seen_harms: harm of each skipped token that a later upload had scored.
            tail_harms: harm of each of the tail's tokens if the audit coin came up, None if it did not.
            tail: skipped tokens after the last upload, whether audited or not.

        Raises:
            ValueError: a harm outside [0, 1], a tail that is not what tail_harms holds, or more skipped than tokens.
        """
        if tail < 0 or len(seen_harms) + tail > tokens:
            raise ValueError(f"scored and tail tokens must be 0..{tokens} together (got {len(seen_harms)} and {tail})")
        if tail_harms is not None and len(tail_harms) != tail:
            raise ValueError(f"tail_harms must be {tail} values (got {len(tail_harms)})")
        scored = math.fsum(_share("harm", h) for h in seen_harms)
        audited = math.fsum(_share("harm", h) for h in tail_harms or ())
        if tokens == 0:
            return
        x = min(1.0, (self.epsilon * scored + audited) / tokens)
        # The prediction uses earlier sessions only, which is what makes the limit valid at every time.
        self._drift += (x - self._total / (self.sessions + 1)) ** 2
        self._total += x
        self.sessions += 1

    @property
    def estimate(self) -> float:
        """R-hat per token: the mean of Y, in [0, 1/epsilon]; 0 before the first session."""
        return self._total / (self.epsilon * self.sessions) if self.sessions else 0.0

    @property
    def standard_error(self) -> float:
        """Of `estimate`, from the spread of the sessions; 0 before the first. For control, not for promises."""
        return math.sqrt(self._drift) / (self.epsilon * self.sessions) if self.sessions else 0.0

    @property
    def surely(self) -> float:
        """What the risk per token is at least, as far as two standard errors tell. For control, not for promises."""
        return max(0.0, self.estimate - 2.0 * self.standard_error)

    def limit(self) -> float:
        """Upper limit of the mean, over the sessions so far, of each session's risk given the past; in [0, 1].

        With probability 1 - delta it holds at all times at once, also when the threshold of a session depends on all
        sessions before it. For predictable x-hat, exp(a (mu - X) - psi(a) (X - x-hat)^2) with psi(a) = -ln(1 - a) - a
        has expectation at most 1: the process behind the empirical-Bernstein sequence of Waudby-Smith and Ramdas (2024,
        theorem 2). There a changes with time and the limit is for a mean that stays; here the risk moves with the
        threshold, so a few constant slopes share delta, and the limit is for the plain mean, as the estimate is.
        """
        if self.sessions == 0:
            return 1.0
        margin = min(
            (math.log((k + 1) * (k + 2) / self.delta) + (-math.log1p(-a) - a) * self._drift) / (a * self.sessions)
            for k, a in enumerate(_SLOPES)
        )
        return min(1.0, self.estimate + margin / self.epsilon)

    def __add__(self, other: Self) -> Self:
        """The budget of both devices' sessions together: its limit is as valid as theirs and nearer to the estimate.

        Raises:
            ValueError: they differ in epsilon or delta.
        """
        if (self.epsilon, self.delta) != (other.epsilon, other.delta):
            raise ValueError(
                f"(epsilon, delta) of two budgets must be equal (got {self.epsilon, self.delta} and {other.epsilon, other.delta})"
            )
        both = type(self)(self.epsilon, self.delta)
        both.sessions = self.sessions + other.sessions
        both._total = self._total + other._total
        both._drift = self._drift + other._drift
        return both

    def snapshot(self) -> dict[str, float]:
        """All there is to keep over a restart."""
        return dict(zip(_KEYS, (self.epsilon, self.delta, float(self.sessions), self._total, self._drift), strict=True))

    @classmethod
    def restore(cls, state: Mapping[str, object]) -> Self:
        """The budget that a snapshot was taken of.

        Raises:
            ConfigError: a key is missing or has a value that no budget can reach.
        """
        values: dict[str, float] = {}
        for key in _KEYS:
            value = state.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0.0:
                raise ConfigError(f"budget.{key}", value, "a finite number that is not negative")
            values[key] = float(value)
        sessions = values["sessions"]
        if sessions != int(sessions):
            raise ConfigError("budget.sessions", sessions, "a whole number")
        for key in ("total", "drift"):
            if values[key] > sessions:
                raise ConfigError(f"budget.{key}", values[key], f"at most {sessions:g}, the number of sessions")
        if values["epsilon"] < _SMALLEST:
            raise ConfigError("budget.epsilon", values["epsilon"], f"at least {_SMALLEST:g}")
        budget = cls(values["epsilon"], values["delta"])
        budget.sessions = int(sessions)
        budget._total = values["total"]
        budget._drift = values["drift"]
        return budget
