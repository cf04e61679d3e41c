"""Encodings of a draft law: in full at 16 bits, as a packed lattice point, or as CU-HLM's top k at 8 bits.

Each `decode` function returns a law that sums to 1, or raises ProtocolError. The coupling decides from which law the
draft is drawn.
"""

import math
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.sampling import largest
from fedhlm.errors import ProtocolError
from fedhlm.protocol.packing import id_bytes, pack_ids, unpack_ids

U_TV_LIMIT: Final = 0.1  # theta of CU-HLM's online truncation
BETA_SLOPE: Final = 0.82  # beta = a u + b, U-HLM's regression
BETA_INTERCEPT: Final = -0.06
_LEVELS: Final = 255  # an 8-bit probability is a multiple of 1 / 255
_K_MAX: Final = 0xFFFF
_HALF_NORMAL: Final = 2.0**-14  # the least half whose bits are not a multiple of 2^-24
_HALF_STEPS: Final = 2.0**24
_HALF_INFINITE: Final = 0x7C00  # the bits of a half from which on it is infinite, no number or negative
_HALF_MINUS_ZERO: Final = 0x8000

Law = NDArray[np.float64]  # (V,) probabilities


def encode_full(q: Law) -> bytes:
    """Encode all V probabilities, shape (V,), as float16 in 2 V bytes (HLM, U-HLM)."""
    # A half below 2^-14 is its bits times 2^-24, and a law has few probabilities above: numpy's own way is slow.
    bits = np.minimum(q, _HALF_NORMAL)
    bits *= _HALF_STEPS
    halves = np.rint(bits, out=bits).astype("<u2")
    normal = np.flatnonzero(np.greater_equal(q, _HALF_NORMAL))
    halves[normal] = q[normal].astype("<f2").view("<u2")
    return halves.tobytes()


def decode_full(data: bytes, vocab_size: int) -> Law:
    """Decode the law that both ends use: the float16 values, renormalised; shape (V,).

    Raises:
        ProtocolError: the length is wrong, a value is negative or not finite, or all values are 0.
    """
    if len(data) != 2 * vocab_size:
        raise ProtocolError(f"draft law must be {2 * vocab_size} bytes (got {len(data)})")
    halves = np.frombuffer(data, "<u2")  # (V,)
    # Check before any arithmetic, in which a signalling NaN would cause a warning.
    if halves.max() >= _HALF_INFINITE:  # or negative; -0 is let through
        halves = np.where(halves == _HALF_MINUS_ZERO, np.uint16(0), halves)
    if halves.max() >= _HALF_INFINITE or not halves.any():
        raise ProtocolError("draft law has a negative or non-finite probability, or no mass")
    values: Law = _halves()[halves]
    values /= values.sum()
    return values


@cache
def _halves() -> NDArray[np.float64]:
    """The number of each of the finite positive halves by its bits."""
    return np.arange(_HALF_INFINITE, dtype="<u2").view("<f2").astype(np.float64)


class LatticeLaw(NamedTuple):
    """The law q-hat = counts / counts.sum() on the sorted `support`; both are (k,) int64."""

    support: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def shares(self) -> NDArray[np.float64]:
        """The probabilities of the support; shape (k,)."""
        return np.asarray(self.counts / self.counts.sum())

    def dense(self, vocab_size: int) -> NDArray[np.float64]:
        """Return all V probabilities; shape (vocab_size,)."""
        law = np.zeros(vocab_size)
        law[self.support] = self.shares
        return law


def quantise(q: NDArray[np.float64], k: int, resolution: int) -> LatticeLaw:
    """Round q, shape (V,), to a lattice point on its k likeliest tokens.

    Counts are rounded first. Their sum is then corrected where rounding was farthest off. With S the support,
    TV(q, q-hat) <= (1 - q(S)) + k / (4 resolution).
    """
    k = min(k, q.size)
    support = largest(q, k)
    wanted = q[support] / q[support].sum() * resolution  # (k,) float64
    counts = np.floor(wanted + 0.5).astype(np.int64)
    surplus = int(counts.sum()) - resolution
    if surplus:
        # A surplus is taken from the counts that were rounded up most; a deficit goes to those rounded down most.
        error = (counts - wanted) * np.sign(surplus)
        counts[np.argsort(-error, kind="stable")[: abs(surplus)]] -= int(np.sign(surplus))
    return LatticeLaw(support, counts)


def coded_bytes(vocab_size: int, k: int, resolution: int) -> int:
    """Bytes of `encode_lattice`: log2 of the number of laws, rounded up to whole bytes."""
    k = min(k, vocab_size)
    laws = math.comb(vocab_size, k) * math.comb(resolution + k - 1, k - 1)
    return ((laws - 1).bit_length() + 7) // 8


def encode_lattice(law: LatticeLaw, vocab_size: int) -> bytes:
    """Encode the number of the law among all laws of its V, k and resolution, little-endian."""
    k, resolution = len(law.support), int(law.counts.sum())
    # Stars and bars: counts that sum to the resolution correspond to k - 1 bars among resolution + k - 1 places.
    bars = np.cumsum(law.counts[:-1] + 1) - 1
    number = _rank(law.support) * math.comb(resolution + k - 1, k - 1) + _rank(bars)
    return number.to_bytes(coded_bytes(vocab_size, k, resolution), "little")


def check_lattice(data: bytes, vocab_size: int, k: int, resolution: int) -> tuple[int, int]:
    """Read the numbers of the support and of the counts, without unpacking them.

    Raises:
        ProtocolError: the length is wrong, or no law has this number.
    """
    k = min(k, vocab_size)
    if len(data) != (expected := coded_bytes(vocab_size, k, resolution)):
        raise ProtocolError(f"draft law must be {expected} bytes (got {len(data)})")
    subset, composition = divmod(int.from_bytes(data, "little"), math.comb(resolution + k - 1, k - 1))
    if subset >= math.comb(vocab_size, k):
        raise ProtocolError("draft law must be the number of a lattice law (got a larger number)")
    return subset, composition


def decode_lattice(data: bytes, vocab_size: int, k: int, resolution: int) -> LatticeLaw:
    """Decode the bytes of `encode_lattice`.

    Raises:
        ProtocolError: as in `check_lattice`.
    """
    subset, composition = check_lattice(data, vocab_size, k, resolution)
    k = min(k, vocab_size)
    bars = np.array([-1, *_unrank(composition, resolution + k - 1, k - 1), resolution + k - 1])
    return LatticeLaw(np.array(_unrank(subset, vocab_size, k), np.int64), np.diff(bars) - 1)


def _rank(chosen: NDArray[np.int64]) -> int:
    """The number of a sorted subset in the combinatorial number system."""
    return sum(math.comb(int(c), i) for i, c in enumerate(chosen, start=1))


def _unrank(number: int, size: int, count: int) -> list[int]:
    """The sorted subset of range(size) that has `count` elements and this number."""
    chosen: list[int] = []
    high = size
    for i in range(count, 0, -1):
        low = i - 1
        while high - low > 1:
            middle = (low + high) // 2
            if math.comb(middle, i) <= number:
                low = middle
            else:
                high = middle
        number -= math.comb(low, i)
        chosen.append(low)
        high = low
    return chosen[::-1]


def online_k(ordered: Law, *, draft_prob: float, uncertainty: float) -> int:
    """CU-HLM's k of one token: the smallest k with U_TV <= 0.1 (its eqs. 23-26). The draft's u stands for the LLM.

    U_TV = sum_{i>k} |q_i - mean of the tail| / ((1 - q_d) l(-1) + q_d l(-beta_d)), l(z) = ln(1 + e^z),
    beta_d = clip(a u + b, 0, 1). `ordered` is q in falling order, shape (V,); `draft_prob` is q_d; `uncertainty` is u.
    """
    size = ordered.size
    k = np.arange(1, size)  # (V-1,) k = V truncates nothing
    mass = np.cumsum(ordered)  # (V,)
    mean = np.maximum(0.0, mass[-1] - mass[:-1]) / (size - k)  # (V-1,) mean of the tail after each k
    above = np.maximum(k, np.searchsorted(-ordered, -mean))  # (V-1,) tokens likelier than that mean
    # The values above the mean exceed it by as much as the others fall short of it.
    distance = 2.0 * (mass[above - 1] - mass[:-1] - (above - k) * mean)  # (V-1,)
    beta = min(1.0, max(0.0, BETA_SLOPE * uncertainty + BETA_INTERCEPT))
    weight = (1.0 - draft_prob) * math.log1p(math.exp(-1.0)) + draft_prob * math.log1p(math.exp(-beta))
    fitting = np.flatnonzero(distance <= U_TV_LIMIT * weight)
    return min(int(fitting[0]) + 1 if fitting.size else size, _K_MAX)


def encode_top_k(q: Law, support: NDArray[np.int64]) -> bytes:
    """Encode CU-HLM's pairs for the ids of `support`, shape (k,), 1 <= k < 65536: u16 k, the ids, q at 8 bits each."""
    levels = np.floor(q[support] * _LEVELS + 0.5).astype(np.uint8)  # (k,)
    return len(support).to_bytes(2, "little") + pack_ids(support.tolist(), q.size) + levels.tobytes()


def top_k_size(laws: bytes | memoryview, vocab_size: int) -> int:
    """Bytes of the first law of `encode_top_k` in a buffer of such laws.

    Raises:
        ProtocolError: the buffer is shorter than 2 bytes.
    """
    if len(laws) < 2:
        raise ProtocolError(f"draft law must be at least 2 bytes (got {len(laws)})")
    return 2 + int.from_bytes(laws[:2], "little") * (id_bytes(vocab_size) + 1)


def decode_top_k(data: bytes, vocab_size: int) -> Law:
    """Decode x-hat (CU-HLM eq. 16): the top k as sent, and the rest of the mass spread evenly; shape (V,).

    If rounding has lifted the mass of the top k above 1, it is scaled to 1. Where k = V it is always scaled to 1.

    Raises:
        ProtocolError: the length is wrong, k is outside 1..V, an id is outside the vocabulary or occurs twice, or k = V
            and all values are 0.
    """
    if len(data) != (expected := top_k_size(data, vocab_size)):
        raise ProtocolError(f"draft law must be {expected} bytes (got {len(data)})")
    k = int.from_bytes(data[:2], "little")
    if not 1 <= k <= vocab_size:
        raise ProtocolError(f"draft law must be of 1 to {vocab_size} tokens (got {k})")
    ids = unpack_ids(data[2:-k], vocab_size)
    if len(set(ids)) != k:
        raise ProtocolError("draft law names a token twice")
    top = np.frombuffer(data[-k:], np.uint8) / _LEVELS  # (k,) float64
    mass = float(top.sum())
    if k == vocab_size and mass == 0.0:
        raise ProtocolError("draft law has no mass")
    if k == vocab_size or mass > 1.0:
        top, mass = top / mass, 1.0
    law = np.full(vocab_size, (1.0 - mass) / max(1, vocab_size - k))  # (V,)
    law[ids] = top
    return law
