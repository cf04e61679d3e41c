"""Decides whether asking peers is worth its cost (FedHLM eqs. 12-14), from means that a device measures itself.

All costs share one unit, such as bytes or seconds of the link. The hit ratio as a function of memory size is fitted to
an access log, or simulated on it.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.peers.neighbours import Memory

# A hundredth of the weight is left after 4,600 observations, which one agent makes in a few minutes.
FORGETTING: Final = 0.999
# Weight, in observations, of the prior that asking always hits and never errs. Without it, an agent that never asks
# would never learn that asking helps.
PRIOR_WEIGHT: Final = 1.0


def worthwhile(p_hit: float, error: float, *, c_p2p: float, c_llm: float, c_error: float = 0.0) -> bool:
    """Whether asking first costs at most as much as escalating at once (FedHLM eq. 13).

    A hit saves `c_llm`. It is wrong with probability `error`, which costs `c_error`. Asking is worth its cost iff
    p_hit (c_llm - error c_error) >= c_p2p. Equation (13) is the case error = 0. All costs have the same unit.
    """
    return p_hit * (c_llm - error * c_error) >= c_p2p


class Prices(NamedTuple):
    """Costs of a byte to the peers, a byte to the cloud and a wrong hit, in one unit. The defaults count bytes only."""

    p2p_byte: float = 1.0
    llm_byte: float = 1.0
    wrong_hit: float = 0.0


class _Mean:
    """A mean in which old values lose weight."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.total = 0.0

    def fade(self, factor: float) -> None:
        self.weight *= factor
        self.total *= factor

    def see(self, value: float, factor: float) -> None:
        self.fade(factor)
        self.weight += 1.0
        self.total += value

    def towards(self, prior: float) -> float:
        return (self.total + PRIOR_WEIGHT * prior) / (self.weight + PRIOR_WEIGHT)

    def plain(self) -> float | None:
        return self.total / self.weight if self.weight > 0.0 else None


class Collaboration:
    """Running means of one device, and the decision that follows from them.

    Each observation multiplies the weight of the earlier ones by `forgetting`.

    Raises:
        ValueError: `forgetting` is not in (0, 1].
    """

    def __init__(self, *, forgetting: float = FORGETTING) -> None:
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting must be a factor within (0, 1] (got {forgetting})")
        self._forgetting = forgetting
        self._published = _Mean()
        self._escalated = _Mean()
        self._hits = _Mean()
        self._wrong = _Mean()

    @property
    def hit_ratio(self) -> float:
        """The share of lookups that were hits; 1 before the first lookup."""
        return self._hits.towards(1.0)

    @property
    def error(self) -> float:
        """The share of audited hits that were wrong; 0 before the first audit."""
        return self._wrong.towards(0.0)

    @property
    def p2p_bytes(self) -> float | None:
        """Mean bytes of a publication to the peers; None before the first one."""
        return self._published.plain()

    @property
    def llm_bytes(self) -> float | None:
        """Mean bytes of an escalated token; None before the first one."""
        return self._escalated.plain()

    def published(self, payload_bytes: int) -> None:
        """Record that one doubtful token was published to the peers."""
        self._published.see(payload_bytes, self._forgetting)

    def escalated(self, payload_bytes: float) -> None:
        """Record that one token went to the cloud. The bytes of a block are divided among its tokens."""
        self._escalated.see(payload_bytes, self._forgetting)

    def looked_up(self, *, hit: bool) -> None:
        """Record a lookup at the peers."""
        self._hits.see(float(hit), self._forgetting)

    def audited(self, *, wrong: bool) -> None:
        """Record the LLM's verdict on a hit."""
        self._wrong.see(float(wrong), self._forgetting)

    def asks(self, prices: Prices) -> bool:
        """Whether to ask the peers first about the next doubtful token; True while the bytes of a way are unknown."""
        if self.p2p_bytes is None or self.llm_bytes is None:
            return True
        return worthwhile(
            self.hit_ratio,
            self.error,
            c_p2p=prices.p2p_byte * self.p2p_bytes,
            c_llm=prices.llm_byte * self.llm_bytes,
            c_error=prices.wrong_hit,
        )


class HitRatioFit(NamedTuple):
    """H(S) = 1 - exp(-alpha S), FedHLM eq. (14), and the quality of its fit.

    `r_squared` is 1 for a perfect fit. It is negative where the mean of the points fits better than the curve, and nan
    where all points are equal. `worst` is the largest distance of a point from the curve.
    """

    alpha: float
    r_squared: float
    worst: float

    def ratio(self, size: float) -> float:
        """H(size), the hit ratio of a memory of `size` entries."""
        return float(-np.expm1(-self.alpha * size))


def fit_hit_ratio(sizes: Sequence[float], ratios: Sequence[float]) -> HitRatioFit:
    """Fit the alpha of FedHLM eq. (14) by least squares.

    alpha is sought between 1e-9 / max(sizes) and 40 / min(sizes). Outside of this range the curve is 0 or 1 at every
    size. Ratios that are all 0 or all 1 give one of these limits.

    Raises:
        ValueError: there are no points, or not as many sizes as ratios; a size is not positive, or a ratio is outside
            [0, 1].
    """
    s, h = np.asarray(sizes, np.float64), np.asarray(ratios, np.float64)  # both (n,)
    if s.ndim != 1 or s.shape != h.shape or not s.size:
        raise ValueError(f"sizes and ratios must be two equally long lists (got {s.shape} and {h.shape})")
    if not (np.isfinite(s).all() and (s > 0.0).all() and (h >= 0.0).all() and (h <= 1.0).all()):
        raise ValueError(f"sizes must be positive and ratios within 0..1 (got {s.tolist()} and {h.tolist()})")

    def squares(log_alpha: NDArray[np.float64]) -> NDArray[np.float64]:
        residuals = -np.expm1(-np.exp(log_alpha)[:, None] * s) - h  # (alphas, n)
        return np.asarray((residuals**2).sum(axis=1))

    # The sum of squares may have several minima, so each round searches the whole of a narrower interval.
    low, high = float(np.log(1e-9 / s.max())), float(np.log(40.0 / s.min()))
    for _ in range(8):
        grid = np.linspace(low, high, 257)
        best = int(np.argmin(squares(grid)))
        low, high = float(grid[max(0, best - 1)]), float(grid[min(256, best + 1)])
    alpha = float(np.exp((low + high) / 2.0))
    residuals = -np.expm1(-alpha * s) - h  # (n,)
    spread = float(((h - h.mean()) ** 2).sum())
    r_squared = 1.0 - float((residuals**2).sum()) / spread if spread > 0.0 else float("nan")
    return HitRatioFit(alpha, r_squared, float(np.abs(residuals).max()))


def simulate_hit_ratio(
    keys: NDArray[np.int8], tokens: Sequence[int], sizes: Sequence[int], *, theta: float, votes: int
) -> list[float]:
    """Hit ratios of memories of each of `sizes` entries on an access log. Each token is looked up and then added.

    `keys` is (n, dims) and `tokens` (n,), in the order of the log. A hit needs `votes` agreeing neighbours of cosine
    `theta` or more; it counts whether or not their token is right. An empty log has ratio 0.

    Raises:
        ValueError: `keys` and `tokens` differ in length.
    """
    if len(keys) != len(tokens):
        raise ValueError(f"keys must be as many as tokens (got {len(keys)} and {len(tokens)})")
    if not len(keys):
        return [0.0] * len(sizes)
    ratios = []
    for size in sizes:
        memory, hits = Memory(size, keys.shape[1]), 0
        for key, token in zip(keys, tokens, strict=True):
            match = memory.nearest(key, votes, theta=theta)
            hits += match is not None and match.similarity >= theta
            memory.add(key, token, "peer")
        ratios.append(hits / len(keys))
    return ratios
