"""The learnt curve m(score) = E[harm | score] for scores in [0, 1], and the sums per bin to which it is fitted.

The score is the doubt u, or 1 - cosine similarity. Harm is beta in [0, 1], or a mismatch, which is 0 or 1. The sums of
members can be added, so an edge and a cloud pool them by addition. Where nothing was observed, a fit is pessimistic.
"""

import math
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from fedhlm.errors import ProtocolError

BINS: Final = 64

Bins = NDArray[np.float64]  # (BINS,)

_BITMAP_BYTES: Final = BINS // 8
_FLOAT32_SLACK: Final = 1.0 + 1e-6
# No member has counted this many tokens. The cap keeps float32 finite.
_LARGEST_SUM: Final = 1e30


def bin_of(score: float) -> int:
    """The bin of a score: bin 0 is [0, 1/64], and bin j is (j/64, (j + 1)/64].

    Bins are closed on the right, because thresholds are upper edges and a token is kept iff its score is at most the
    threshold. A score outside [0, 1], such as a rounded cosine, counts as the nearer end.

    Raises:
        ValueError: the score is NaN.
    """
    if math.isnan(score):
        raise ValueError("score must be a number in [0, 1] (got nan)")
    return math.ceil(min(1.0, max(2.0**-53, score)) * BINS) - 1


def upper_edges() -> Bins:
    """The largest score of each bin; shape (BINS,), from 1/64 to 1."""
    return np.arange(1, BINS + 1, dtype=np.float64) / BINS  # (BINS,) float64, exact


def midpoints() -> Bins:
    """The middle of each bin; shape (BINS,)."""
    return (np.arange(BINS, dtype=np.float64) + 0.5) / BINS  # (BINS,) float64, exact


@dataclass(eq=False, slots=True)
class Curve:
    """Sums per bin, each (BINS,) float64: gate decisions seen, and sums of w, w h and w h^2 over scored tokens.

    w is the weight of a token and h its harm.
    """

    seen: Bins
    weight: Bins
    harm: Bins
    square: Bins

    @classmethod
    def empty(cls) -> Self:
        return cls(*np.zeros((4, BINS)))  # four (BINS,) float64

    def see(self, score: float, count: float = 1.0) -> None:
        """Count gate decisions, whether or not their harm will be known.

        Raises:
            ValueError: `count` is negative or not finite, or the score is NaN.
        """
        if not (math.isfinite(count) and count >= 0.0):
            raise ValueError(f"count must be finite and not negative (got {count!r})")
        self.seen[bin_of(score)] += count

    def add(self, score: float, harm: float, weight: float = 1.0) -> None:
        """Add one scored token.

        Raises:
            ValueError: harm is outside [0, 1], weight is negative or not finite, or the score is NaN.
        """
        if not 0.0 <= harm <= 1.0:
            raise ValueError(f"harm must be a number in [0, 1] (got {harm!r})")
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"weight must be finite and not negative (got {weight!r})")
        j = bin_of(score)
        self.weight[j] += weight
        self.harm[j] += weight * harm
        self.square[j] += weight * harm * harm

    def scaled(self, factor: float) -> Self:
        """Return a copy whose sums are multiplied by a factor >= 0.

        Raises:
            ValueError: the factor is negative or not finite.
        """
        if not (math.isfinite(factor) and factor >= 0.0):
            raise ValueError(f"factor must be finite and not negative (got {factor!r})")
        return type(self)(self.seen * factor, self.weight * factor, self.harm * factor, self.square * factor)

    def decayed(self, factor: float) -> Self:
        """Return a copy whose sums have decayed by a factor in [0, 1].

        Raises:
            ValueError: the factor is outside [0, 1].
        """
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"factor must be a number in [0, 1] (got {factor!r})")
        return self.scaled(factor)

    def copy(self) -> Self:
        return self.scaled(1.0)

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.seen + other.seen, self.weight + other.weight, self.harm + other.harm, self.square + other.square
        )

    @property
    def total_seen(self) -> float:
        return float(self.seen.sum())

    @property
    def total_weight(self) -> float:
        return float(self.weight.sum())

    def rows(self) -> NDArray[np.float64]:
        """Return a copy of the sums as one array, shape (BINS, 4): seen, weight, harm, square."""
        return np.stack([self.seen, self.weight, self.harm, self.square], axis=1)  # (BINS, 4) float64

    def flaw(self) -> str | None:
        """Say what makes these sums impossible; None if they are valid.

        Sums have the shape (BINS,), are finite and not negative, and square <= harm <= weight in each bin.
        """
        sums = {"seen": self.seen, "weight": self.weight, "harm": self.harm, "square": self.square}
        for name, values in sums.items():
            if values.shape != (BINS,):
                return f"{name} must be of shape ({BINS},) (got {values.shape})"
            if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > _LARGEST_SUM:
                return f"{name} has a sum that is negative, not finite or above {_LARGEST_SUM:g}"
        if (self.harm > self.weight * _FLOAT32_SLACK).any():
            return "harm exceeds weight: harm of a token is at most 1"
        if (self.square > self.harm * _FLOAT32_SLACK).any():
            return "square exceeds harm: harm of a token is at most 1"
        return None

    def to_bytes(self) -> bytes:
        """Encode a bitmap of the non-empty bins, then four little-endian float32 for each of them; 8 to 1,032 bytes.

        Rounding to float32 preserves order, so valid sums stay valid.
        """
        rows = np.minimum(self.rows(), _LARGEST_SUM).astype("<f4")  # (BINS, 4) float32
        used = rows.any(axis=1)  # (BINS,) bool
        return np.packbits(used, bitorder="little").tobytes() + rows[used].tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode the bytes of `to_bytes`, at the precision of float32.

        Raises:
            ProtocolError: the length is wrong, or the sums are impossible (see `flaw`).
        """
        if len(data) < _BITMAP_BYTES:
            raise ProtocolError(f"curve must be at least {_BITMAP_BYTES} bytes (got {len(data)})")
        used = np.unpackbits(np.frombuffer(data, np.uint8, _BITMAP_BYTES), bitorder="little").astype(bool)  # (BINS,)
        expected = _BITMAP_BYTES + 16 * int(used.sum())
        if len(data) != expected:
            raise ProtocolError(f"curve must be {expected} bytes, as its bitmap says (got {len(data)})")
        rows = np.zeros((BINS, 4))  # (BINS, 4) float64
        with np.errstate(invalid="ignore"):  # a signalling NaN is rejected below and needs no warning
            rows[used] = np.frombuffer(data, "<f4", offset=_BITMAP_BYTES).reshape(-1, 4)
        curve = cls(*rows.T.copy())
        if (flaw := curve.flaw()) is not None:
            raise ProtocolError(f"curve: {flaw}")
        curve.harm = np.minimum(curve.harm, curve.weight)
        curve.square = np.minimum(curve.square, curve.harm)
        return curve


def isotonic(curve: Curve) -> Bins:
    """m(score): the non-decreasing fit of harm/weight by weighted least squares (pool adjacent violators).

    Shape (BINS,), in [0, 1]. An empty bin takes the value of the next non-empty bin to its right, which is the largest
    value that keeps m non-decreasing. It is 1 if there is none. Without evidence m is 1 everywhere.

    The fit is a mean and no limit: a few lucky tokens give a low curve. `shrunk(curve, Curve.empty(), kappa)` adds
    kappa tokens of harm 1 to each bin first.
    """
    return _monotone(curve.harm, curve.weight)


def shrunk(own: Curve, cluster: Curve, kappa: float) -> Bins:
    """m of one device, shrunk towards its cluster: (W_k m_k + kappa m_cluster) / (W_k + kappa) per bin, made isotonic.

    Shape (BINS,). kappa is the number of own tokens in a bin that weigh as much as the cluster; 0 ignores the cluster.

    Raises:
        ValueError: kappa is negative or not finite.
    """
    if not (math.isfinite(kappa) and kappa >= 0.0):
        raise ValueError(f"kappa must be finite and not negative (got {kappa!r})")
    return _monotone(own.harm + kappa * isotonic(cluster), own.weight + kappa)


def _monotone(harm: Bins, weight: Bins) -> Bins:
    # Blocks of (harm, weight, first bin). A block whose ratio is not above its left neighbour's is merged into it.
    blocks: list[tuple[float, float, int]] = []
    for j in np.flatnonzero(weight > 0.0).tolist():
        block = (float(harm[j]), float(weight[j]), j)
        while blocks and blocks[-1][0] / blocks[-1][1] >= block[0] / block[1]:
            left = blocks.pop()
            block = (left[0] + block[0], left[1] + block[1], left[2])
        blocks.append(block)
    m = np.ones(BINS)  # (BINS,) float64
    observed = np.flatnonzero(weight > 0.0)
    if observed.size == 0:
        return m
    starts = [first for _, _, first in blocks]
    ends = [*(int(observed[observed < first][-1]) for first in starts[1:]), int(observed[-1])]
    lower = 0
    for (h, w, _), end in zip(blocks, ends, strict=True):
        m[lower : end + 1] = h / w
        lower = end + 1
    return np.clip(m, 0.0, 1.0)


def affine(curve: Curve) -> tuple[float, float]:
    """(a, b) of the weighted least-squares line harm = a score + b through the midpoints of the bins (U-HLM's form).

    The result is (0, mean harm) when all tokens are in one bin, and (0, 1) when there are none.
    """
    total = curve.total_weight
    if total <= 0.0:
        return 0.0, 1.0
    score = midpoints() - float(midpoints() @ curve.weight) / total
    spread = float(curve.weight @ score**2)
    mean = float(curve.harm.sum()) / total
    slope = float(curve.harm @ score) / spread if spread > 0.0 else 0.0
    return slope, mean - slope * float(midpoints() @ curve.weight) / total


def correlation(curve: Curve) -> float:
    """Pearson's r of score (the midpoint of its bin) and harm, from the sums; 0 when either does not vary."""
    total = curve.total_weight
    if total <= 0.0:
        return 0.0
    score = midpoints() - float(midpoints() @ curve.weight) / total
    score_spread = float(curve.weight @ score**2)
    harm_spread = float(curve.square.sum()) - float(curve.harm.sum()) ** 2 / total
    # A spread below the rounding error of the subtraction counts as none.
    if score_spread <= 1e-12 * total or harm_spread <= 1e-12 * total:
        return 0.0
    return float(np.clip(float(curve.harm @ score) / math.sqrt(score_spread * harm_spread), -1.0, 1.0))
