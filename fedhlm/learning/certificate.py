"""The certificate: R-hat, the estimated harm per token of kept tokens, with anytime-valid upper and lower limits.

X_t in [0, 1] is the harm of token t; it is 0 where the target settled the token. mu_t is its mean given everything
before t. Both limits are for the plain mean of the mu_t over the tokens so far. They hold however the threshold moves.
The certificates of several devices add up to the certificate of all of them (docs/algorithms.md, section 3).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Annotated, Final, Self

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from fedhlm.errors import ProtocolError

# Slopes and weights are fixed in advance. The first slope is best for the first hundred texts, the last for thousands.
SLOPES: Final = np.array([0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625])  # (K,) float64
_LOG_WEIGHTS: Final = np.log([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])  # (K,) float64, of weights that sum to 1
_ROOM: Final = 1.05  # a slope needs audits with a chance per token of this many times the slope
AUDIT_LEAST: Final = 0.21
"""The chance of an audit per token of a tail from which on every slope counts; no setting of `audit` is below it."""
AUDIT_CHANCES: Final = (0.02625, 0.0525, 0.105)
"""The lower chances that evidence may allow. Each is just above a slope."""
_TIGHT: Final = 0.8  # share of the budget below which a rarer audit must keep the limit
_RETIRED: Final = -1e18  # the log-sum of a slope that counts no more; l n mu is always smaller
_ALWAYS: Final = 64  # a tail of this many tokens is always audited
_ROUNDING: Final = 1e-9  # a chance may be below its slope's by rounding
_MOST: Final = 1e15
_STEPS: Final = 60  # steps of bisection, each of which halves the interval

Sums = NDArray[np.float64]  # (K,) one logarithm per slope


def audit_probability(chance: float, tail: int) -> float:
    """The probability that a tail of `tail` unscored tokens is audited, as if each token tossed a coin of `chance`."""
    return tail_probability([chance] * tail)


def tail_probability(chances: Sequence[float]) -> float:
    """The probability that a tail is audited whose tokens toss coins with these chances, one of which is enough.

    The chances may depend on the finished text, because the coin is tossed when the text is finished.
    """
    if len(chances) >= _ALWAYS:
        return 1.0
    missed = math.prod(1.0 - chance for chance in chances)
    return 1.0 - missed


@cache
def _needed(tail: int) -> NDArray[np.float64]:
    """The least probability of an audit of a tail with which each slope counts, less a rounding error; shape (K,)."""
    return np.array([audit_probability(_ROOM * slope, tail) for slope in SLOPES.tolist()]) - _ROUNDING


def audit_chance(most: float, tokens: float, harm: float, *, budget: float, confidence: float) -> float:
    """The chance per token with which a harmless token is audited: the least one that keeps the limit below the budget.

    `tokens` and `harm` are those of the evidence so far, `harm` as a mean per token. A chance is enough if the limit of
    a certificate of that many tokens would be below 0.8 of the budget with slopes that the chance allows, and with
    wrong tokens that were audited with the chance `most`. If none of AUDIT_CHANCES is enough, the result is `most`.

    The result depends on the past only, so a certificate stays valid. What a lower chance costs is power: the largest
    slopes retire (see `Certificate`).
    """
    goal = _log_odds(confidence)
    for chance in AUDIT_CHANCES:
        if chance >= most:
            break
        live = chance >= _ROOM * SLOPES * (1.0 - _ROUNDING)  # (K,) bool
        slopes, weights = SLOPES[live], _LOG_WEIGHTS[live]
        each = -most * np.log1p(-slopes / most) / slopes  # what a wrong token costs, in units of harm
        if float((tokens * harm * each + (goal - weights) / slopes).min()) < _TIGHT * budget * tokens:
            return chance
    return most


class CertificateState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A certificate to send or to store: tokens, texts, harm (the sum behind R-hat), its square, and the log-sums."""

    tokens: Annotated[float, Meta(ge=0.0, le=1e15)]
    texts: Annotated[float, Meta(ge=0.0, le=1e15)]
    harm: Annotated[float, Meta(ge=0.0, le=1e15)]
    square: Annotated[float, Meta(ge=0.0, le=1e18)]
    upper: tuple[float, ...]
    lower: tuple[float, ...]


class Certificate:
    """Evidence about the harm per token, in constant memory.

    For each slope l the log-sums are the logarithms of prod (1 - l X_t) and prod (1 + l X_t) over the scored tokens. A
    tail that is audited with probability p contributes the factor 1 + (prod (1 -+ l X_t) - 1) / p if it is audited and
    1 otherwise. The mean of this factor over the coin is the product itself.

    Multiplied by exp(l n mu) and exp(-l n mu), the weighted sums are supermartingales that start at 1, because
    1 - x <= exp(-x).

    An audit with a chance per token below 1.05 l could make the upper factor of the slope l negative. From such a tail
    on, this slope is retired: it adds nothing to the mixture. A smaller mixture reaches 1 / delta later, so the limit
    stays valid.
    """

    def __init__(self) -> None:
        self.tokens = 0.0
        self.texts = 0.0
        self._harm = 0.0  # unbiased for the sum of the X_t
        self._square = 0.0  # sum over texts of the squared harm of a text
        self._upper = np.zeros(SLOPES.size)  # (K,) float64
        self._lower = np.zeros(SLOPES.size)  # (K,) float64

    def add(
        self,
        tokens: int,
        scored: Sequence[float],
        tail: int = 0,
        audited: Sequence[float] | None = None,
        *,
        probability: float = 1.0,
    ) -> None:
        """Add one finished text.

        Args:
            tokens: the number of committed tokens, whoever settled them. A text without tokens changes nothing.
            scored: the harm of each kept token that was scored whatever the audit's coin said.
            tail: the number of kept tokens that only an audit scores.
            audited: the harm of each token of the tail; None if it was not audited.
            probability: the probability of the audit.

        Raises:
            ValueError: a harm is outside [0, 1], `audited` does not hold `tail` values, more tokens were kept than
                committed, or the probability is below that of the least of AUDIT_CHANCES for the tail.
        """
        if tail < 0 or len(scored) + tail > tokens:
            raise ValueError(f"scored and tail must be at most {tokens} tokens (got {len(scored)} and {tail})")
        if audited is not None and len(audited) != tail:
            raise ValueError(f"audited must hold {tail} values (got {len(audited)})")
        least = audit_probability(AUDIT_CHANCES[0], tail) - _ROUNDING if tail else 0.0
        if not least <= probability <= 1.0:
            raise ValueError(f"probability must be in {least:g}..1 (got {probability!r})")
        seen, tails = _harms(scored), _harms(audited or ())  # (s,), (a,)
        if tokens == 0:
            return
        harm = float(seen.sum())
        self._upper += _factor(-SLOPES, seen, 1.0)
        self._lower += _factor(SLOPES, seen, 1.0)
        if tail and probability < 1.0:
            retired = probability < _needed(tail)  # (K,) bool
            self._upper[retired] = _RETIRED  # whether or not the coin came up
        if tails.size:
            harm += float(tails.sum()) / probability
            live = self._upper > _RETIRED  # (K,) bool
            self._upper[live] += _factor(-SLOPES[live], tails, probability)
            self._lower += _factor(SLOPES, tails, probability)
        self.tokens += tokens
        self.texts += 1.0
        self._harm += harm
        self._square += harm * harm

    @property
    def estimate(self) -> float:
        """R-hat, the unbiased estimate of the mean harm per token; 0 before the first text."""
        return self._harm / self.tokens if self.tokens else 0.0

    @property
    def standard_error(self) -> float:
        """The standard error of `estimate`, with texts as the independent units; 0 before the second text."""
        if self.texts < 2.0:
            return 0.0
        spread = max(0.0, self._square - self._harm**2 / self.texts)
        return math.sqrt(spread * self.texts / (self.texts - 1.0)) / self.tokens

    def limit(self, confidence: float) -> float:
        """The anytime-valid upper limit of the harm per token, in [0, 1]; 1 without evidence.

        With the probability `confidence`, the true harm per token is below the limit at all times at once. The limit is
        the mu at which the supermartingale of `upper` reaches 1 / delta, where delta = 1 - confidence. By Ville's
        inequality it ever reaches this value at the true mu with a probability of at most delta.
        """
        if not self.tokens:
            return 1.0
        exponents, rates = (self._upper + _LOG_WEIGHTS).tolist(), (SLOPES * self.tokens).tolist()
        return _root(lambda mu: _log_sum(exponents, rates, mu), _log_odds(confidence))

    def floor(self, confidence: float) -> float:
        """The anytime-valid lower limit of the harm per token, in [0, 1]; 0 without evidence. See `limit`."""
        goal = _log_odds(confidence)
        exponents, rates = (self._lower + _LOG_WEIGHTS).tolist(), (-SLOPES * self.tokens).tolist()
        if not self.tokens or _log_sum(exponents, rates, 0.0) <= goal:
            return 0.0
        return _root(lambda mu: -_log_sum(exponents, rates, mu), -goal)

    def __add__(self, other: "Certificate") -> "Certificate":
        """Add the evidence of two devices. The product of independent supermartingales is a supermartingale."""
        both = Certificate()
        both.tokens, both.texts = self.tokens + other.tokens, self.texts + other.texts
        both._harm, both._square = self._harm + other._harm, self._square + other._square
        both._upper, both._lower = self._upper + other._upper, self._lower + other._lower
        return both

    def __sub__(self, other: "Certificate") -> "Certificate":
        """Take away evidence that is part of this one. The rest is evidence of its own: products have factors."""
        both = Certificate()
        both.tokens, both.texts = self.tokens - other.tokens, self.texts - other.texts
        both._harm, both._square = self._harm - other._harm, self._square - other._square
        live = np.minimum(self._upper, other._upper) > _RETIRED / 2.0  # (K,) bool
        both._upper = np.where(live, self._upper - other._upper, _RETIRED)  # a slope that is retired stays so
        both._lower = self._lower - other._lower
        return both

    def dearer(self, choices: float) -> Self:
        """The evidence at 1 / `choices` of the error probability: it was chosen among so many, whichever looked best."""
        return self._made(self.tokens, self.texts, self._harm, self._upper - math.log(choices))

    def bounded(self, tokens: float, harm: float) -> Self:
        """The evidence with `tokens` tokens, at most those it has, and at least `harm` and at most `tokens` wrong ones.

        The limit is never below that of this evidence, alone or in a sum whose limit is at most 1: fewer tokens and
        more harm raise it, and evidence whose tokens are all wrong raises any sum.
        """
        upper = np.clip(self._upper, tokens * np.log1p(-SLOPES), harm * np.log1p(-SLOPES))
        return self._made(tokens, min(self.texts, tokens), min(tokens, max(harm, self._harm)), upper)

    def to_bytes(self) -> bytes:
        """What gives the limit of a sum, as little-endian float64: tokens, texts, harm, K log-sums."""
        return np.array([self.tokens, self.texts, self._harm, *self._upper], "<f8").tobytes()

    @classmethod
    def _made(cls, tokens: float, texts: float, harm: float, upper: Sums) -> Self:
        """Evidence with these numbers, for limits of sums."""
        found = cls()
        found.tokens, found.texts = tokens, texts
        found._harm, found._upper = harm, upper
        return found

    def tidy(self) -> Self:
        """The evidence without what the rounding of sums and differences leaves on the wrong side of zero."""
        tokens = max(0.0, self.tokens)
        return self._made(tokens, min(tokens, max(0.0, self.texts)), max(0.0, self._harm), np.minimum(0.0, self._upper))

    @classmethod
    def from_bytes(cls, data: bytes, *, part: bool = False) -> Self:
        """Make a certificate from the bytes of `to_bytes`. Its `floor` and `standard_error` are not valid.

        A `part` of a sum may have numbers that no evidence has.

        Raises:
            ProtocolError: the bytes are of another size, or hold impossible numbers.
        """
        if len(data) != 8 * (3 + SLOPES.size):
            raise ProtocolError(f"evidence must be {8 * (3 + SLOPES.size)} bytes (got {len(data)})")
        tokens, texts, harm, *upper = np.frombuffer(data, "<f8").tolist()
        if part and np.isfinite(np.frombuffer(data, "<f8")).all():
            return cls._made(tokens, texts, harm, np.array(upper))
        if not (0.0 <= texts <= tokens <= _MOST and 0.0 <= harm <= _MOST):
            raise ProtocolError(
                f"evidence must be of 0..{_MOST:g} tokens and harm (got {tokens:g}, {texts:g}, {harm:g})"
            )
        return cls.of(CertificateState(tokens, texts, harm, 0.0, tuple(upper), (0.0,) * SLOPES.size))

    def figures(self) -> dict[str, float]:
        """Named numbers that give the limit of a sum: tokens, texts, harm and the log-sums `upper_0`, `upper_1`, ..."""
        named = {f"upper_{k}": float(value) for k, value in enumerate(self._upper)}
        return {"tokens": self.tokens, "texts": self.texts, "harm": self._harm, **named}

    @classmethod
    def of_figures(cls, figures: Mapping[str, float]) -> Self:
        """Make a certificate from the numbers of `figures`. Its `floor` and `standard_error` are not valid.

        Raises:
            ProtocolError: a number is missing or impossible.
        """
        try:
            upper = tuple(figures[f"upper_{k}"] for k in range(SLOPES.size))
            kept = (figures["tokens"], figures["texts"], figures["harm"])
        except KeyError as exc:
            raise ProtocolError(f"certificate must hold the figure {exc}") from exc
        return cls.of(CertificateState(*kept, 0.0, upper, (0.0,) * SLOPES.size))

    def copy(self) -> "Certificate":
        """Return a copy with the same evidence."""
        return self + Certificate()

    def state(self) -> CertificateState:
        """Return the state to store or to send."""
        return CertificateState(
            self.tokens,
            self.texts,
            self._harm,
            self._square,
            tuple(map(float, self._upper)),
            tuple(map(float, self._lower)),
        )

    @classmethod
    def of(cls, state: CertificateState) -> Self:
        """Make a certificate from a state.

        Raises:
            ProtocolError: the state has log-sums of the wrong number, sign or size, or more texts than tokens.
        """
        upper, lower = (np.array(sums) for sums in (state.upper, state.lower))  # (K,) float64
        if upper.shape != SLOPES.shape or lower.shape != SLOPES.shape:
            raise ProtocolError(f"certificate must hold {SLOPES.size} sums each (got {upper.size} and {lower.size})")
        if not (np.isfinite(upper).all() and np.isfinite(lower).all() and upper.max() <= 0.0 <= lower.min()):
            raise ProtocolError("certificate.upper must be finite and at most 0, certificate.lower at least 0")
        if state.texts > state.tokens:
            raise ProtocolError(f"certificate.texts must be at most {state.tokens:g} (got {state.texts:g})")
        found = cls()
        found.tokens, found.texts, found._harm, found._square = state.tokens, state.texts, state.harm, state.square
        found._upper, found._lower = upper, lower
        return found


def _harms(values: Sequence[float]) -> NDArray[np.float64]:
    harms = np.asarray(values, np.float64)  # (n,) float64
    if harms.size and not (harms.min() >= 0.0 and harms.max() <= 1.0):
        raise ValueError(f"harm must be in 0..1 (got {harms[~((harms >= 0.0) & (harms <= 1.0))][0]!r})")
    return harms


def _factor(slopes: Sums, harms: NDArray[np.float64], probability: float) -> Sums:
    """ln(1 + (prod (1 + l h) - 1) / p) for each slope l; shape (K,)."""
    product = np.log1p(np.outer(slopes, harms)).sum(axis=1)  # (K,) its logarithm
    return np.asarray(product if probability == 1.0 else np.log1p(np.expm1(product) / probability))


def _log_odds(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1 (got {confidence!r})")
    return -math.log1p(-confidence)


def _log_sum(exponents: Sequence[float], rates: Sequence[float], mu: float) -> float:
    """ln of the sum of exp(exponent + rate mu), in Python numbers: NumPy takes five times as long for six of them."""
    terms = [exponent + rate * mu for exponent, rate in zip(exponents, rates, strict=True)]
    top = max(terms)
    return top + math.log(sum(math.exp(term - top) for term in terms))


def _root(rising: Callable[[float], float], goal: float) -> float:
    """The smallest mu in [0, 1] at which a rising function reaches `goal`, or 1. The result is rounded up."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if rising(middle) >= goal else (middle, high)
    return high
