"""Target laws and keyed noise.

All randomness is a function of (seed, position): a counter-based generator and IEEE-754 operations that every
platform rounds alike, so device and cloud draw the same noise, and a position visited twice draws it twice.
"""

import math
import threading
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedhlm.protocol.messages import Sampling

NOISE: Final = "philox-gumbel/1"
COLDEST: Final = 1e-6  # a lower temperature tells logits apart that differ by rounding, and at last divides to infinity

Logits = NDArray[Any]  # (V,) floating
Law = NDArray[np.float64]  # (V,) probabilities

_LN2: Final = 0.6931471805599453
_SQRT_HALF: Final = 0.7071067811865476
_ROUGH_ERROR: Final = 1e-9  # far above the error of any platform's log, far below what separates two tokens
# Streams are part of the noise: a number once given keeps its meaning.
_GUMBEL, DRAFT_STREAM, ACCEPT_STREAM, RESAMPLE_STREAM, GATE_STREAM, DOUBT_STREAM, AUDIT_STREAM = range(7)
_local = threading.local()
_EMPTY_BUFFER: Final = np.zeros(4, np.uint64)


def _raw(seed: int, position: int, stream: int, count: int) -> NDArray[np.uint64]:
    # One Philox key per seed; position and stream are upper words of the counter, so no two draws overlap.
    # Setting the state of one generator per thread takes a quarter of the time of building a generator.
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


def uniforms(seed: int, position: int, stream: int, count: int) -> NDArray[np.float64]:
    """Numbers in the open unit interval; shape (count,)."""
    return _open_unit(_raw(seed, position, stream, count))


def uniform(seed: int, position: int, stream: int) -> float:
    """One number in the open unit interval, the first of `uniforms`."""
    return float(uniforms(seed, position, stream, 1)[0])


def scores(logits: Logits, temperature: float, top_p: float = 1.0) -> NDArray[np.float64]:
    """Unnormalised log-law after temperature and top-p; -inf outside the kept set; shape (V,).

    Temperature 0, or one below COLDEST, keeps the largest logit alone (the lowest id among equals).
    """
    wide = np.asarray(logits, np.float64)
    if temperature < COLDEST:
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


def probability(log_law: NDArray[np.float64], token: int) -> float:
    """One entry of the law whose unnormalised logarithm is given, without the others."""
    peak = log_law.max()
    return float(np.exp(log_law[token] - peak) / np.exp(log_law - peak).sum())


def perturbed_argmax(log_law: NDArray[np.float64], seed: int, position: int) -> int:
    """argmax(log_law + gumbel(seed, position, V)), computing the noise only of tokens that can win.

    The platform's own log finds the winner; portable noise is computed where it cannot tell two tokens apart.
    """
    raw = _raw(seed, position, _GUMBEL, log_law.size)
    favourite = int(np.argmax(log_law))
    slack = _ROUGH_ERROR * (1.0 + abs(float(log_law[favourite])))
    largest, own = (-math.log(-math.log(u)) for u in _open_unit(np.array([raw.max(), raw[favourite]])))
    able = np.flatnonzero(log_law >= log_law[favourite] + own - largest - slack)
    rough = log_law[able] - np.log(-np.log(_open_unit(raw[able])))
    near = able[rough >= rough.max() - slack]
    if near.size == 1:
        return int(near[0])
    return int(near[np.argmax(log_law[near] + _gumbel_of(raw[near]))])


def inverse_cdf(q: Law, u: float) -> int:
    """The token at quantile u of a law; only tokens with positive probability are returned."""
    cumulative = np.cumsum(q)
    return int(min(np.searchsorted(cumulative, u * cumulative[-1], side="right"), np.flatnonzero(q)[-1]))
