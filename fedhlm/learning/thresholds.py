"""Two ways to learn the threshold tau. A token is kept iff u <= tau, so KEEP_NONE sends everything.

Published: FedHLM, eqs. [4]-[8], verbatim, except for a guard where [7] divides by zero. The gradient [5] is never
positive. Under fedavg and fednova tau therefore only rises, up to 1, or stays when no token is sent any more.

Calibrated: from the learnt curve (`learning.curve`), keep what costs less than its price, or as much as a budget
allows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fedhlm.learning.curve import BINS, Bins, Curve, bin_of, isotonic, upper_edges
from fedhlm.settings import Learning

KEEP_NONE: Final = -1.0
TRUST: Final = 0.5  # confidence of the own limits that bound how far the curve of others counts

Pairs = NDArray[np.float64]  # (n, 2): u and beta of the transmitted tokens


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))  # tanh saturates where exp would overflow


def _as_pairs(pairs: Pairs) -> Pairs:
    array = np.asarray(pairs, np.float64).reshape(-1, 2)  # (n, 2) float64
    if not ((array >= 0.0) & (array <= 1.0)).all():
        raise ValueError(
            f"pairs must be rows of (u, beta) within [0, 1] (got values from {array.min():g} to {array.max():g})"
        )
    return array


def paper_gradient(pairs: Pairs, tau: float, gamma: float, lam: float) -> float:
    """dL/dtau, FedHLM eq. (5). It is never positive: all factors are >= 0 and the sign is minus.

    `pairs` is (n, 2): u and beta of the transmitted tokens.

    Raises:
        ValueError: a value of `pairs` is outside [0, 1].
    """
    u, beta = _as_pairs(pairs).T
    s = _sigmoid(gamma * (u - tau))
    return -gamma * float((s * (1.0 - s) * ((1.0 - beta) ** 2 + lam)).sum())


class PaperSettings(NamedTuple):
    """Constants of the published rule. The paper states only lam (0.01, read from Fig. 5).

    Attributes:
        gamma: steepness of [4].
        learning_rate: eta in round t is learning_rate / (1 + decay t).
        decay: see `learning_rate`.
        lam: weight of the regulariser.
        mu: weight of FedProx's proximal term.
        optimiser: a key of OPTIMISERS.
        local_steps: gradient steps per round (fednova: passes over the tokens).
    """

    gamma: float = 10.0
    learning_rate: float = 0.01
    decay: float = 0.1
    lam: float = 0.01
    mu: float = 1.0
    optimiser: str = "fedavg"
    local_steps: int = 1

    @classmethod
    def of(cls, learning: Learning) -> Self:
        """The constants that the settings give."""
        return cls(
            gamma=learning.gamma,
            learning_rate=learning.learning_rate,
            decay=learning.decay,
            lam=learning.regularisation,
            mu=learning.proximal,
            optimiser=learning.optimiser,
            local_steps=learning.local_steps,
        )

    def rate(self, round_number: int) -> float:
        """eta of a round. It diminishes, as the paper's convergence proof requires (section IV-E)."""
        return self.learning_rate / (1.0 + self.decay * round_number)


class PaperUpdate(NamedTuple):
    """The update of a client: its threshold, n_k of [7], its control variate (scaffold) and its number of steps."""

    threshold: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which is not used here
    control: float
    steps: int


class LocalRound(NamedTuple):
    """What a client has for its update of a round.

    `pairs` holds u and beta of the tokens that it transmitted, shape (n, 2). `local` is its threshold and
    `global_threshold` the one that its cluster published last. The controls are those of SCAFFOLD.
    """

    pairs: Pairs
    local: float
    global_threshold: float
    client_control: float
    server_control: float
    number: int
    settings: PaperSettings

    @property
    def rate(self) -> float:
        """The learning rate of this round."""
        return self.settings.rate(self.number)

    def gradient(self, pairs: Pairs, tau: float) -> float:
        """dL/dtau over some pairs."""
        return paper_gradient(pairs, tau, self.settings.gamma, self.settings.lam)

    def unchanged(self) -> PaperUpdate:
        """The update of a client that transmitted nothing."""
        return PaperUpdate(self.local, 0, self.client_control, 0)


Optimiser = Callable[[LocalRound], PaperUpdate]


def _clip(tau: float) -> float:
    return min(1.0, max(0.0, tau))


def fedavg(given: LocalRound) -> PaperUpdate:
    """FedHLM eq. (6): tau <- tau - eta dL/dtau, repeated `local_steps` times."""
    return fedprox(given._replace(settings=given.settings._replace(mu=0.0)))


def fedprox(given: LocalRound) -> PaperUpdate:
    """FedHLM eq. (6) on L + mu/2 (tau - global)^2 (Li et al. 2020, eq. 2). It may lower a tau above the global one."""
    settings = given.settings
    if len(given.pairs) == 0:
        return given.unchanged()
    tau = given.local
    for _ in range(settings.local_steps):
        gradient = given.gradient(given.pairs, tau)
        tau = _clip(tau - given.rate * (gradient + settings.mu * (tau - given.global_threshold)))
    return PaperUpdate(tau, len(given.pairs), given.client_control, settings.local_steps)


def scaffold(given: LocalRound) -> PaperUpdate:
    """FedHLM eq. (6) with gradient - c_k + c (Karimireddy et al. 2020, option II).

    The new c_k is the mean gradient of the steps. It equals the paper's (start - end) / (K eta) as long as tau is not
    clipped, and stays right when tau is clipped.
    """
    steps = given.settings.local_steps
    if len(given.pairs) == 0 or steps == 0:
        return given.unchanged()
    tau, total = given.local, 0.0
    for _ in range(steps):
        gradient = given.gradient(given.pairs, tau)
        total += gradient
        tau = _clip(tau - given.rate * (gradient - given.client_control + given.server_control))
    return PaperUpdate(tau, len(given.pairs), total / steps, steps)


def fednova(given: LocalRound) -> PaperUpdate:
    """One step per token, then the move divided by the number of tokens (Wang et al. 2020, eq. 7).

    A client with more tokens takes more steps, but normalised it moves no further. The effective number of steps, which
    the paper leaves free, is `local_steps`, so that [7] needs no change.
    """
    count = len(given.pairs)
    steps = count * given.settings.local_steps
    if steps == 0:
        return given.unchanged()
    tau = given.local
    for step in range(steps):
        pair = given.pairs[step % count][None, :]  # (1, 2)
        tau = _clip(tau - given.rate * given.gradient(pair, tau))
    move = (tau - given.local) / count
    return PaperUpdate(_clip(given.local + move), count, given.client_control, steps)


# Without pairs the threshold and the control stay as they are, and the count is 0.
OPTIMISERS: Final[dict[str, Optimiser]] = {
    "fedavg": fedavg,
    "fedprox": fedprox,
    "scaffold": scaffold,
    "fednova": fednova,
}


def cluster_mean(updates: Sequence[PaperUpdate]) -> float | None:
    """The mean threshold weighted by n_k, FedHLM eq. (7); None when no client sent a token, to keep the old one."""
    total = sum(update.count for update in updates)
    return _clip(sum(update.count * update.threshold for update in updates) / total) if total > 0 else None


def global_mean(thresholds: Sequence[float]) -> float | None:
    """The plain mean over clusters, FedHLM eq. (8); None when no cluster has a threshold, to keep the old one."""
    return _clip(sum(thresholds) / len(thresholds)) if thresholds else None


def fleet_threshold(updates: Sequence[PaperUpdate], clusters: int) -> float | None:
    """Eq. (7) in each cluster, then (8); None when no client sent a token. Client k belongs to cluster k modulo `clusters`."""
    means = [cluster_mean(updates[c::clusters]) for c in range(clusters)]
    return global_mean([mean for mean in means if mean is not None])


def mean_control(updates: Sequence[PaperUpdate]) -> float:
    """SCAFFOLD's server control: the mean of the clients' controls; 0 without clients."""
    return sum(update.control for update in updates) / len(updates) if updates else 0.0


def shares(curve: Curve) -> Bins:
    """The share of gate decisions in each bin, shape (BINS,).

    It is the share of scored weight if no decisions were counted, and uniform if there is no weight either.
    """
    for sums in (curve.seen, curve.weight):
        if (total := float(sums.sum())) > 0.0:
            return np.asarray(sums / total)
    return np.full(BINS, 1.0 / BINS)


def harm_up_to(own: Curve, m: Bins, score: float) -> float:
    """The expected harm per token while the tokens with at most this score are kept; 0 for KEEP_NONE.

    It is the sum of share_j m_j over the bins up to that of `score`. The shares are those of `own`. `m` has the shape
    (BINS,).
    """
    return 0.0 if score < 0.0 else float((shares(own) * m)[: bin_of(score) + 1].sum())


def tau_of_price(m: Bins, price: float) -> float:
    """The largest upper edge such that m is at most `price` in its bin and all bins below; KEEP_NONE if there is none.

    `price` is the cost of a transmission in units of harm. `m` is non-decreasing, shape (BINS,).
    """
    dear = np.flatnonzero(m > price)
    kept = int(dear[0]) if dear.size else BINS
    return float(upper_edges()[kept - 1]) if kept else KEEP_NONE


def tau_of_budget(own: Curve, m: Bins, rho: float, delta: float) -> float:
    """The largest upper edge tau with E[h 1{u <= tau}] + margin <= rho; KEEP_NONE if there is none.

    The expectation is the sum of share_j m_j over the kept bins. The margin is that of `mean_allowed`, with confidence
    1 - delta at one tau.

    Shares and the number of scored tokens come from `own`, the device's own decisions. A device without evidence
    therefore sends everything. `m`, shape (BINS,), may come from others. It counts only within the limits that `own`
    alone gives for the expectation, at confidence TRUST.

    Raises:
        ValueError: `delta` is not in (0, 1).
    """
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be a probability in (0, 1) (got {delta!r})")
    count = own.total_weight
    if not (math.isfinite(count) and count >= 1.0):
        return KEEP_NONE
    most = mean_allowed(rho, count, delta)
    if most < 0.0:
        return KEEP_NONE
    mine = np.cumsum(shares(own) * isotonic(own))  # (BINS,) expected harm per token up to each edge
    claimed = np.cumsum(shares(own) * m)  # (BINS,)
    known = np.flatnonzero(own.weight)[-1]  # nothing is known beyond the most doubtful scored token
    kept = np.flatnonzero(_at_most(most, claimed, mine, count, 1.0 - TRUST)[: known + 1])
    return float(upper_edges()[kept[-1]]) if kept.size else KEEP_NONE


def _at_most(most: float, claimed: Bins, mine: Bins, count: float, delta: float) -> NDArray[np.bool_]:
    """Where the claimed means, held within the limits of the observed ones, are at most `most` in [0, 1]; (BINS,).

    The limits are those of `mean_limit` and its mirror image, of means of `count` values. `most` is above the lower one
    iff the observed mean is below `most` or near it, and above the upper one iff it is below and far from it. The
    limits themselves are not needed.
    """
    observed = np.clip(mine, 0.0, 1.0)
    divergences = _divergences(observed, most)  # (BINS,)
    bound = math.log(1.0 / delta) / count
    below = observed <= most
    return (below & ((divergences >= bound) | (most >= 1.0))) | ((claimed <= most) & (below | (divergences <= bound)))


def mean_limit(mean: float, count: float, delta: float) -> float:
    """The upper limit of the true mean of `count` values in [0, 1] whose mean is `mean`; never below that.

    It holds with probability 1 - delta (Hoeffding 1963, theorem 1, as in `mean_allowed`).
    """
    bound = math.log(1.0 / delta) / count
    inside = observed = min(1.0, max(0.0, mean))
    outside = 1.0
    for _ in range(40):
        middle = (inside + outside) / 2.0
        inside, outside = (inside, middle) if middle >= 1.0 or _kl(observed, middle) > bound else (middle, outside)
    return inside


def _divergences(p: Bins, q: float) -> Bins:
    """KL(p, q) of Bernoulli laws in nats, shape (BINS,); infinite where q excludes an outcome that p has."""
    with np.errstate(divide="ignore", invalid="ignore"):
        head = np.where(p > 0.0, p * np.log(p / q), 0.0)
        tail = np.where(p < 1.0, (1.0 - p) * np.log((1.0 - p) / (1.0 - q)), 0.0)
    return np.asarray(head + tail)


def mean_allowed(limit: float, count: float, delta: float) -> float:
    """The largest mean of `count` independent values in [0, 1] with an upper confidence limit of `limit`; -1: none.

    By Chernoff's bound in Hoeffding's form (1963, theorem 1), with probability 1 - delta the true mean exceeds `limit`
    only if count x KL(mean, limit) <= ln(1/delta). For rare harm, this needs only a fraction of the evidence that
    bounds with an additive term of order 1/count need.
    """
    if limit >= 1.0:
        return 1.0
    bound = math.log(1.0 / delta) / count
    if -math.log1p(-limit) < bound:  # even a mean of 0 is not enough evidence
        return -1.0
    low, high = 0.0, limit
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _kl(middle, limit) >= bound else (low, middle)
    return low


def _kl(p: float, q: float) -> float:
    """KL divergence of two Bernoulli laws in nats; 0 < q < 1."""
    head = p * math.log(p / q) if p > 0.0 else 0.0
    return head + ((1.0 - p) * math.log((1.0 - p) / (1.0 - q)) if p < 1.0 else 0.0)
