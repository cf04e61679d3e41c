"""Next-token laws and keyed noise.

All randomness is a function of (seed, position). It comes from a counter-based generator and from IEEE-754 operations
that every platform rounds in the same way. Device and cloud therefore draw the same noise, and so does a second visit
to a position.
"""

import math
import threading
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedhlm.protocol.messages import Sampling

NOISE: Final = "philox-gumbel/1"
COLDEST: Final = 1e-6  # a lower temperature would separate logits that differ by rounding only, or overflow

Logits = NDArray[Any]  # (V,) floating
Law = NDArray[np.float64]  # (V,) probabilities

_LN2: Final = 0.6931471805599453
_SQRT_HALF: Final = 0.7071067811865476
_ROUGH_ERROR: Final = 1e-9  # far above the error of any platform's log, far below the usual distance of two tokens
# The numbers of the streams are part of the noise. They must never change their meaning.
_GUMBEL, DRAFT_STREAM, ACCEPT_STREAM, RESAMPLE_STREAM, GATE_STREAM, DOUBT_STREAM, AUDIT_STREAM = range(7)
_GROUPS: Final = 4_096  # of elements whose largest ones bound the k-th largest from below
_NUCLEUS: Final = 1_024  # of the likeliest tokens that are sorted first; most nuclei are smaller
_local = threading.local()
_EMPTY_BUFFER: Final = np.zeros(4, np.uint64)


def _raw(seed: int, position: int, stream: int, count: int) -> NDArray[np.uint64]:
    # Each seed has its own Philox key. Position and stream are upper words of the counter, so no two draws overlap.
    # Setting the state of a generator takes a quarter of the time of building one, so each thread keeps its generator.
    try:
        philox: np.random.Philox = _local.philox
    except AttributeError:
        philox = _local.philox = np.random.Philox(key=0)
    philox.state = {
        "bit_generator": "Philox",
        "state": {
            "counter": np.array([0, position, stream, 0], np.uint64),
            "key": np.array([seed, 0], np.uint64),
        },
        "buffer": _EMPTY_BUFFER,
        "buffer_pos": _EMPTY_BUFFER.size,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return philox.random_raw(count)


def _open_unit(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    # 52 bits plus one half are exact in float64, and never 0 or 1.
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def portable_ln(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive numbers, bit-equal on every IEEE-754 platform, within 2 ulp of the true value.

    Only frexp, +, -, * and / are used, because the logarithms of two platforms may differ in their last bit.
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
    """Standard Gumbel noise at one position; shape (vocab_size,)."""
    return _gumbel_of(_raw(seed, position, _GUMBEL, vocab_size))


def uniforms(seed: int, position: int, stream: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in the open unit interval; shape (count,)."""
    return _open_unit(_raw(seed, position, stream, count))


def uniform(seed: int, position: int, stream: int) -> float:
    """One uniform number in the open unit interval, the first one of `uniforms`."""
    return float(uniforms(seed, position, stream, 1)[0])


def scores(logits: Logits, sampling: Sampling) -> NDArray[np.float64]:
    """Unnormalised log-law after temperature and filters; shape (V,), -inf for tokens that a filter removes.

    A temperature below COLDEST keeps only the largest logit, and the lowest id among equal ones. The filters are those
    of vLLM in its order. `min_p` keeps what is at least that share of the largest probability, `top_k` the k largest
    (lower ids first among equal ones), `top_p` the fewest that hold this mass of what is left.
    """
    wide = np.array(logits, np.float64)  # a copy, which is changed in place
    if sampling.temperature < COLDEST:
        only = np.full(wide.shape, -np.inf)
        only[int(np.argmax(wide))] = 0.0
        return only
    wide /= sampling.temperature
    scaled = wide
    if sampling.min_p:
        scaled = _only(scaled, np.flatnonzero(scaled >= scaled.max() + math.log(sampling.min_p)))
    if sampling.top_k and sampling.top_k < scaled.size:
        scaled = _only(scaled, largest(scaled, sampling.top_k))
    if sampling.top_p < 1.0:
        scaled = _only(scaled, _nucleus(scaled, sampling.top_p))
    return scaled


def _only(x: NDArray[np.float64], ids: NDArray[np.intp]) -> NDArray[np.float64]:
    kept = np.full(x.shape, -np.inf)
    kept[ids] = x[ids]
    return kept


def largest(x: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """The places of the k largest elements of x, shape (V,), in rising order; of equal ones the first count."""
    if k >= x.size:
        return np.arange(x.size)
    able = np.arange(x.size)
    if 4 * k <= _GROUPS < x.size // 4:
        # k groups have an element that is at least the k-th largest of the groups' largest elements.
        peaks = x[: x.size // _GROUPS * _GROUPS].reshape(-1, _GROUPS).max(axis=0)
        able = np.flatnonzero(x >= np.partition(peaks, _GROUPS - k)[_GROUPS - k])
    few = x[able]
    last = np.partition(few, few.size - k)[few.size - k]
    above = able[few > last]
    return np.sort(np.concatenate((above, able[few == last][: k - above.size])))


def _nucleus(x: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """The fewest tokens that hold this mass of the law exp(x), the likeliest first, and lower ids first among equals."""
    q, count = _softmax(x), _NUCLEUS
    while True:
        ids = largest(x, count)
        order = ids[np.argsort(-x[ids], kind="stable")]
        mass = np.cumsum(q[order])
        if count >= x.size or mass[-1] >= top_p:
            return order[: int(np.searchsorted(mass, top_p)) + 1]
        count *= 8


def _softmax(x: NDArray[np.float64]) -> Law:
    weights: Law = x - x.max()  # one array for all steps: a large one costs more to allocate than to fill
    np.exp(weights, out=weights)
    weights /= weights.sum()
    return weights


def law(logits: Logits, sampling: Sampling) -> Law:
    """The next-token law after temperature and filters; shape (V,), sums to 1."""
    return _softmax(scores(logits, sampling))


def probability(log_law: NDArray[np.float64], token: int) -> float:
    """The probability of one token under a law whose unnormalised logarithm is given, shape (V,), to float32."""
    weights = (log_law - log_law.max()).astype(np.float32)
    np.exp(weights, out=weights)
    return float(weights[token] / weights.sum())


def perturbed_argmax(log_law: NDArray[np.float64], seed: int, position: int) -> int:
    """argmax(log_law + gumbel(seed, position, V)). Noise is computed only for tokens that can win.

    The platform's logarithm finds the winner. Portable noise decides between tokens that it cannot separate.
    """
    raw = _raw(seed, position, _GUMBEL, log_law.size)
    favourite = int(np.argmax(log_law))
    slack = _ROUGH_ERROR * (1.0 + abs(float(log_law[favourite])))
    largest, own = (-math.log(-math.log(((int(x) >> 12) + 0.5) * 2.0**-52)) for x in (raw.max(), raw[favourite]))
    able = np.flatnonzero(log_law >= log_law[favourite] + own - largest - slack)
    rough = log_law[able] - np.log(-np.log(_open_unit(raw[able])))
    near = able[rough >= rough.max() - slack]
    if near.size == 1:
        return int(near[0])
    return int(near[np.argmax(log_law[near] + _gumbel_of(raw[near]))])


def inverse_cdf(q: Law, u: float) -> int:
    """The token at quantile u of a law, shape (V,), which need not sum to 1. Its probability is always positive."""
    cumulative = np.cumsum(q)
    # The sum rises at the token that is found, so that its probability is positive, except at the very end.
    found = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return found if found < q.size else int(np.flatnonzero(q)[-1])
