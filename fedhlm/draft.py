"""A draft law in few bits: truncate to the likeliest tokens, quantise on a lattice, pack bit-exactly (ALGORITHMS 2.2).

The law that travels is the law that drafts are drawn from, so verification stays exact for every k and resolution.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.errors import ProtocolError


class LatticeLaw(NamedTuple):
    """q-hat = counts / counts.sum() on `support`, which is sorted; both (k,) int64."""

    support: NDArray[np.int64]
    counts: NDArray[np.int64]

    def dense(self, vocab_size: int) -> NDArray[np.float64]:
        """All V probabilities; shape (vocab_size,)."""
        law = np.zeros(vocab_size)
        law[self.support] = self.counts / self.counts.sum()
        return law


def quantise(q: NDArray[np.float64], k: int, resolution: int) -> LatticeLaw:
    """The lattice point of the k likeliest tokens' law: round, then repair the sum where rounding erred most.

    TV(q, q-hat) <= (1 - q(S)) + k / (4 resolution), S being the support.
    """
    k = min(k, q.size)
    support = np.sort(np.argsort(-q, kind="stable")[:k])
    wanted = q[support] / q[support].sum() * resolution  # (k,) float64
    counts = np.floor(wanted + 0.5).astype(np.int64)
    surplus = int(counts.sum()) - resolution
    if surplus:
        # Too much is taken where it was rounded up most, too little is given where it was rounded down most.
        error = (counts - wanted) * np.sign(surplus)
        counts[np.argsort(-error, kind="stable")[: abs(surplus)]] -= int(np.sign(surplus))
    return LatticeLaw(support, counts)


def coded_bits(vocab_size: int, k: int, resolution: int) -> float:
    """log2 C(V, k) + log2 C(resolution + k - 1, k - 1): the information in a lattice law."""
    k = min(k, vocab_size)
    return math.log2(math.comb(vocab_size, k)) + math.log2(math.comb(resolution + k - 1, k - 1))


def coded_bytes(vocab_size: int, k: int, resolution: int) -> int:
    """Bytes of `encode`: the whole number next above `coded_bits`."""
    k = min(k, vocab_size)
    laws = math.comb(vocab_size, k) * math.comb(resolution + k - 1, k - 1)
    return ((laws - 1).bit_length() + 7) // 8


def encode(law: LatticeLaw, vocab_size: int) -> bytes:
    """The law's number among all laws of its V, k and resolution, little-endian."""
    k, resolution = len(law.support), int(law.counts.sum())
    # Stars and bars: counts that sum to the resolution are a choice of k - 1 bars among resolution + k - 1 places.
    bars = np.cumsum(law.counts[:-1] + 1) - 1
    number = _rank(law.support) * math.comb(resolution + k - 1, k - 1) + _rank(bars)
    return number.to_bytes(coded_bytes(vocab_size, k, resolution), "little")


def decode(data: bytes, vocab_size: int, k: int, resolution: int) -> LatticeLaw:
    """Inverse of `encode`.

    Raises:
        ProtocolError: the wrong length, or a number that is no law's.
    """
    k = min(k, vocab_size)
    if len(data) != (expected := coded_bytes(vocab_size, k, resolution)):
        raise ProtocolError(f"draft law of {len(data)} bytes: {expected} expected")
    compositions = math.comb(resolution + k - 1, k - 1)
    subset, composition = divmod(int.from_bytes(data, "little"), compositions)
    if subset >= math.comb(vocab_size, k):
        raise ProtocolError("draft law is not the number of a law")
    bars = np.array([-1, *_unrank(composition, resolution + k - 1, k - 1), resolution + k - 1])
    return LatticeLaw(np.array(_unrank(subset, vocab_size, k), np.int64), np.diff(bars) - 1)


def _rank(chosen: NDArray[np.int64]) -> int:
    """Number of a sorted subset in the combinatorial number system."""
    return sum(math.comb(int(c), i) for i, c in enumerate(chosen, start=1))


def _unrank(number: int, size: int, count: int) -> list[int]:
    """The sorted `count`-subset of range(size) with this number."""
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
