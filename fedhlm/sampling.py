"""Target laws, keyed noise, and the couplings that test a draft against the target.

All randomness is a function of (seed, position): a counter-based generator and IEEE-754 operations that every
platform rounds alike, so device and cloud draw the same noise, and a position visited twice draws it twice.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.draft import coded_bytes, decode, encode, quantise
from fedhlm.errors import ProtocolError
from fedhlm.messages import Sampling

NOISE: Final = "philox-gumbel/1"

Logits = NDArray[Any]  # (V,) floating
Law = NDArray[np.float64]  # (V,) probabilities

LATTICE_K: Final = 30
LATTICE_RESOLUTION: Final = 100

_LN2: Final = 0.6931471805599453
_SQRT_HALF: Final = 0.7071067811865476
_GUMBEL, _DRAFT, _ACCEPT, _RESAMPLE, GATE_STREAM = range(5)


def _raw(seed: int, position: int, stream: int, count: int) -> NDArray[np.uint64]:
    # One Philox key per seed; position and stream are upper words of the counter, so no two draws overlap.
    return np.random.Philox(key=[seed, 0], counter=[0, position, stream, 0]).random_raw(count)


def _open_unit(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    # 52 bits plus a half: exact in float64, never 0 and never 1.
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def portable_ln(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive numbers, bit-equal on every IEEE-754 platform, within 2 ulp of the true value.

    The platform's own log may differ in its last bit; here only frexp, +, -, * and / are used.
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, mantissa + mantissa, mantissa)
    exponent = exponent - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    series = np.full_like(z, 1.0 / 23.0)
    for odd in range(21, 0, -2):
        series = series * z + 1.0 / odd
    return exponent * _LN2 + (s + s) * series


def _gumbel_of(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    return -portable_ln(-portable_ln(_open_unit(raw)))


def gumbel(seed: int, position: int, vocab_size: int) -> NDArray[np.float64]:
    """Standard Gumbel noise of one position; shape (vocab_size,)."""
    return _gumbel_of(_raw(seed, position, _GUMBEL, vocab_size))


def uniform(seed: int, position: int, stream: int) -> float:
    """One number in the open unit interval."""
    return float(_open_unit(_raw(seed, position, stream, 1))[0])


def scores(logits: Logits, temperature: float, top_p: float = 1.0) -> NDArray[np.float64]:
    """Unnormalised log-law after temperature and top-p; -inf outside the kept set; shape (V,).

    Temperature 0 keeps the largest logit alone (the lowest id among equals).
    """
    wide = np.asarray(logits, np.float64)
    if temperature == 0.0:
        only = np.full(wide.shape, -np.inf)
        only[int(np.argmax(wide))] = 0.0
        return only
    scaled = wide / temperature
    if top_p < 1.0:
        order = np.argsort(-scaled, kind="stable")
        mass = np.cumsum(_softmax(scaled)[order])
        keep = order[: int(np.searchsorted(mass, top_p)) + 1]
        kept = np.full(wide.shape, -np.inf)
        kept[keep] = scaled[keep]
        return kept
    return scaled


def _softmax(x: NDArray[np.float64]) -> Law:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum())


def law(logits: Logits, sampling: Sampling) -> Law:
    """The next-token law after temperature and top-p; shape (V,), sums to 1."""
    return _softmax(scores(logits, sampling.temperature, sampling.top_p))


def perturbed_argmax(log_law: NDArray[np.float64], seed: int, position: int) -> int:
    """argmax(log_law + gumbel(seed, position, V)), computing the noise only of tokens that can win."""
    raw = _raw(seed, position, _GUMBEL, log_law.size)
    favourite = int(np.argmax(log_law))
    largest, own = _gumbel_of(np.array([raw.max(), raw[favourite]]))
    able = np.flatnonzero(log_law + largest >= log_law[favourite] + own)
    return int(able[np.argmax(log_law[able] + _gumbel_of(raw[able]))])


def rejection_probability(draft_prob: float, target_prob: float) -> float:
    """beta = max(0, 1 - p(d)/q(d)), FedHLM eq. (3); 0 when q(d) is 0."""
    return max(0.0, 1.0 - target_prob / draft_prob) if draft_prob > 0.0 else 0.0


class Draft(NamedTuple):
    """A drafted token, its probability under the law it was drawn from, and that law's bytes if they must travel."""

    token: int
    prob: float
    law: bytes


class Coupling(NamedTuple):
    """How device and cloud agree on a token.

    `draft(logits, sampling, position)` runs on the device. `settle(logits, sampling, position, draft, law)` runs in the
    cloud and returns the emitted token: the draft was accepted iff it is that token. With draft None (nothing was
    drafted there) it returns the target's own token. `law_bytes(vocab_size)` is what each draft adds to the uplink.
    """

    draft: Callable[[Logits, Sampling, int], Draft]
    settle: Callable[[Logits, Sampling, int, int | None, bytes], int]
    law_bytes: Callable[[int], int]


def _none(_vocab_size: int) -> int:
    return 0


def _draft_gumbel(logits: Logits, sampling: Sampling, position: int) -> Draft:
    log_law = scores(logits, sampling.temperature, sampling.top_p)
    token = perturbed_argmax(log_law, sampling.seed, position)
    return Draft(token, float(_softmax(log_law)[token]), b"")


def _settle_gumbel(logits: Logits, sampling: Sampling, position: int, _draft: int | None, _law: bytes) -> int:
    return perturbed_argmax(scores(logits, sampling.temperature, sampling.top_p), sampling.seed, position)


def _draft_greedy(logits: Logits, sampling: Sampling, _position: int) -> Draft:
    token = int(np.argmax(logits))
    # The proposal is a point mass, but beta of [3] is defined with the softmax probability.
    return Draft(token, float(law(logits, sampling)[token]), b"")


def _settle_greedy(logits: Logits, _sampling: Sampling, _position: int, _draft: int | None, _law: bytes) -> int:
    return int(np.argmax(logits))


def encode_full_law(q: Law) -> bytes:
    """All V probabilities as float16, 2 V bytes (HLM, U-HLM)."""
    return np.asarray(q, "<f2").tobytes()


def decode_full_law(data: bytes, vocab_size: int) -> Law:
    """The law both ends use: the float16 values, renormalised; shape (V,).

    Raises:
        ProtocolError: wrong length, a negative or non-finite value, or no mass.
    """
    if len(data) != 2 * vocab_size:
        raise ProtocolError(f"draft law of {len(data)} bytes: {2 * vocab_size} expected")
    values = np.frombuffer(data, "<f2").astype(np.float64)
    total = float(values.sum())
    if not (np.isfinite(total) and total > 0.0 and float(values.min()) >= 0.0):
        raise ProtocolError("draft law has a negative or non-finite probability, or no mass")
    return np.asarray(values / total)


def inverse_cdf(q: Law, u: float) -> int:
    """The token at quantile u of a law; only tokens with positive probability are returned."""
    cumulative = np.cumsum(q)
    return int(min(np.searchsorted(cumulative, u * cumulative[-1], side="right"), np.flatnonzero(q)[-1]))


def _draft_from(q: Law, encoded: bytes, sampling: Sampling, position: int) -> Draft:
    token = inverse_cdf(q, uniform(sampling.seed, position, _DRAFT))
    return Draft(token, float(q[token]), encoded)


def _accept_or_resample(p: Law, q: Law, sampling: Sampling, position: int, draft: int) -> int:
    """The draft with probability min(1, p(d)/q(d)), else a token of max(0, p - q) normalised: the result follows p."""
    if q[draft] > 0.0 and uniform(sampling.seed, position, _ACCEPT) * q[draft] < p[draft]:
        return draft
    residual = np.maximum(0.0, p - q)
    if residual.sum() <= 0.0:
        return draft  # p equals q up to rounding: nothing is left to resample
    return inverse_cdf(residual, uniform(sampling.seed, position, _RESAMPLE))


def _draft_full(logits: Logits, sampling: Sampling, position: int) -> Draft:
    encoded = encode_full_law(law(logits, sampling))
    # The draft comes from the law that travels, which keeps HLM exact.
    return _draft_from(decode_full_law(encoded, len(logits)), encoded, sampling, position)


def _settle_full(logits: Logits, sampling: Sampling, position: int, draft: int | None, encoded: bytes) -> int:
    p = law(logits, sampling)
    if draft is None:
        return inverse_cdf(p, uniform(sampling.seed, position, _RESAMPLE))
    return _accept_or_resample(p, decode_full_law(encoded, len(logits)), sampling, position, draft)


def _draft_lattice(logits: Logits, sampling: Sampling, position: int) -> Draft:
    point = quantise(law(logits, sampling), LATTICE_K, LATTICE_RESOLUTION)
    return _draft_from(point.dense(len(logits)), encode(point, len(logits)), sampling, position)


def _settle_lattice(logits: Logits, sampling: Sampling, position: int, draft: int | None, encoded: bytes) -> int:
    p = law(logits, sampling)
    if draft is None:
        return inverse_cdf(p, uniform(sampling.seed, position, _RESAMPLE))
    q = decode(encoded, len(logits), LATTICE_K, LATTICE_RESOLUTION).dense(len(logits))
    return _accept_or_resample(p, q, sampling, position, draft)


COUPLINGS: Final[dict[str, Coupling]] = {
    "gumbel": Coupling(_draft_gumbel, _settle_gumbel, _none),
    "greedy": Coupling(_draft_greedy, _settle_greedy, _none),
    "full": Coupling(_draft_full, _settle_full, lambda vocab_size: 2 * vocab_size),
    "lattice": Coupling(
        _draft_lattice, _settle_lattice, lambda vocab_size: coded_bytes(vocab_size, LATTICE_K, LATTICE_RESOLUTION)
    ),
}
