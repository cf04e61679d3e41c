"""Two ways to a threshold tau; a token is kept iff u <= tau, so KEEP_NONE sends everything.

Published (FedHLM [4]-[8], verbatim, guarded where [7] divides by zero): the gradient [5] is never positive, so under
fedavg and fednova tau only rises, at last to 1 where nothing is sent, or freezes when no token is sent any more.
Calibrated: keep what costs less than its price, or as much as a budget of harm allows, from the curve of `rejection`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.learning.curve import BINS, Bins, Curve, isotonic, upper_edges

KEEP_NONE: Final = -1.0
TRUST: Final = 0.5  # confidence of the limits beyond which what others say is not believed

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
    """dL/dtau, FedHLM eq. (5): a sum of products of factors >= 0 with a minus before it, hence never positive."""
    u, beta = _as_pairs(pairs).T
    s = _sigmoid(gamma * (u - tau))
    return -gamma * float((s * (1.0 - s) * ((1.0 - beta) ** 2 + lam)).sum())


class PaperSettings(NamedTuple):
    """Constants of the published rule. The paper states none but lam (0.01, read from Fig. 5).

    gamma: steepness of [4]; learning_rate / (1 + decay t) is eta in round t; mu: pull of FedProx;
    optimiser: a key of OPTIMISERS; local_steps: gradient steps (fednova: passes over the tokens) per round.
    """

    gamma: float = 10.0
    learning_rate: float = 0.01
    decay: float = 0.1
    lam: float = 0.01
    mu: float = 1.0
    optimiser: str = "fedavg"
    local_steps: int = 1

    def rate(self, round_number: int) -> float:
        """eta of a round, diminishing as the paper's convergence argument asks (section IV-E)."""
        return self.learning_rate / (1.0 + self.decay * round_number)


class PaperUpdate(NamedTuple):
    """A client's answer: its threshold, n_k of [7], its control variate (scaffold) and the steps it took."""

    threshold: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls here
    control: float
    steps: int


Optimiser = Callable[[Pairs, float, float, float, float, int, PaperSettings], PaperUpdate]


def _clip(tau: float) -> float:
    return min(1.0, max(0.0, tau))


def fedavg(
    pairs: Pairs,
    local: float,
    _global_threshold: float,
    client_control: float,
    _server_control: float,
    round_number: int,
    settings: PaperSettings,
) -> PaperUpdate:
    """[6]: tau <- tau - eta dL/dtau, local_steps times."""
    if len(pairs) == 0:
        return PaperUpdate(local, 0, client_control, 0)
    tau, rate = local, settings.rate(round_number)
    for _ in range(settings.local_steps):
        tau = _clip(tau - rate * paper_gradient(pairs, tau, settings.gamma, settings.lam))
    return PaperUpdate(tau, len(pairs), client_control, settings.local_steps)


def fedprox(
    pairs: Pairs,
    local: float,
    global_threshold: float,
    client_control: float,
    _server_control: float,
    round_number: int,
    settings: PaperSettings,
) -> PaperUpdate:
    """[6] on L + mu/2 (tau - global)^2 (Li et al. 2020, eq. 2): the pull may lower a tau above the global one."""
    if len(pairs) == 0:
        return PaperUpdate(local, 0, client_control, 0)
    tau, rate = local, settings.rate(round_number)
    for _ in range(settings.local_steps):
        gradient = paper_gradient(pairs, tau, settings.gamma, settings.lam)
        tau = _clip(tau - rate * (gradient + settings.mu * (tau - global_threshold)))
    return PaperUpdate(tau, len(pairs), client_control, settings.local_steps)


def scaffold(
    pairs: Pairs,
    local: float,
    _global_threshold: float,
    client_control: float,
    server_control: float,
    round_number: int,
    settings: PaperSettings,
) -> PaperUpdate:
    """[6] with gradient - c_k + c; the new c_k is the mean gradient of the steps (Karimireddy et al. 2020, option II).

    Their (start - end) / (K eta) is that mean as long as tau is not clipped; the mean itself stays right when it is.
    """
    if len(pairs) == 0 or settings.local_steps == 0:
        return PaperUpdate(local, 0, client_control, 0)
    tau, rate, total = local, settings.rate(round_number), 0.0
    for _ in range(settings.local_steps):
        gradient = paper_gradient(pairs, tau, settings.gamma, settings.lam)
        total += gradient
        tau = _clip(tau - rate * (gradient - client_control + server_control))
    return PaperUpdate(tau, len(pairs), total / settings.local_steps, settings.local_steps)


def fednova(
    pairs: Pairs,
    local: float,
    _global_threshold: float,
    client_control: float,
    _server_control: float,
    round_number: int,
    settings: PaperSettings,
) -> PaperUpdate:
    """One step per token, then the move divided by the number of steps (Wang et al. 2020, eq. 7).

    A client with more tokens takes more steps; normalised, it no longer moves further for that. The effective number
    of steps, which theirs leaves free, is local_steps, so that [7] needs no change.
    """
    steps = len(pairs) * settings.local_steps
    if steps == 0:
        return PaperUpdate(local, 0, client_control, 0)
    tau, rate = local, settings.rate(round_number)
    for step in range(steps):
        pair = pairs[step % len(pairs)][None, :]  # (1, 2)
        tau = _clip(tau - rate * paper_gradient(pair, tau, settings.gamma, settings.lam))
    move = (tau - local) / len(pairs)
    return PaperUpdate(_clip(local + move), len(pairs), client_control, steps)


# Each: (pairs, local threshold, global threshold, client control, server control, round, settings) -> PaperUpdate.
# Without pairs the threshold and the control stay as they are and the count is 0.
OPTIMISERS: Final[dict[str, Optimiser]] = {
    "fedavg": fedavg,
    "fedprox": fedprox,
    "scaffold": scaffold,
    "fednova": fednova,
}


def cluster_mean(updates: Sequence[PaperUpdate]) -> float | None:
    """Mean threshold weighted by n_k, [7]; None when no client sent a token: keep the old one."""
    total = sum(update.count for update in updates)
    return _clip(sum(update.count * update.threshold for update in updates) / total) if total > 0 else None


def global_mean(thresholds: Sequence[float]) -> float | None:
    """Plain mean over clusters, [8]; None when no cluster has one: keep the old one."""
    return _clip(sum(thresholds) / len(thresholds)) if thresholds else None


def mean_control(updates: Sequence[PaperUpdate]) -> float:
    """SCAFFOLD's server control: the mean of the clients' controls; 0 without clients."""
    return sum(update.control for update in updates) / len(updates) if updates else 0.0


def shares(curve: Curve) -> Bins:
    """Share of gate decisions in each bin; of scored weight if none were counted, uniform if nothing was; (BINS,)."""
    for sums in (curve.seen, curve.weight):
        if (total := float(sums.sum())) > 0.0:
            return np.asarray(sums / total)
    return np.full(BINS, 1.0 / BINS)


def tau_of_price(m: Bins, price: float) -> float:
    """The largest edge such that m of its bin and of all below is <= price; KEEP_NONE if there is none.

    price is c/w, what a transmission costs in units of harm; m is non-decreasing, (BINS,).
    """
    dear = np.flatnonzero(m > price)
    kept = int(dear[0]) if dear.size else BINS
    return float(upper_edges()[kept - 1]) if kept else KEEP_NONE


def tau_of_budget(own: Curve, m: Bins, rho: float, delta: float) -> float:
    """The largest edge tau with E[h 1{u <= tau}] + margin <= rho, or KEEP_NONE.

    The expectation is the sum of share_j m_j over the bins kept, the margin that of `mean_allowed` (confidence 1 - delta
    at one tau). Shares and the number of scored tokens are those of `own`, a device's own decisions, so a device without
    evidence sends everything and earns the right to skip. m may come from others: it counts as far as `own` does not
    contradict it, that is within the limits of the expectation that `own` alone gives, at confidence TRUST.
    """
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be a probability in (0, 1) (got {delta!r})")
    count = own.total_weight
    if not (math.isfinite(count) and count >= 1.0):
        return KEEP_NONE
    mine = np.cumsum(shares(own) * isotonic(own))  # (BINS,) expected harm per token up to each edge
    risk = np.clip(np.cumsum(shares(own) * m), *mean_limits(mine, count, 1.0 - TRUST))  # (BINS,)
    known = np.flatnonzero(own.weight)[-1]  # beyond the most doubtful token that was scored nothing is known
    allowed = np.flatnonzero(risk[: known + 1] <= mean_allowed(rho, count, delta))
    return float(upper_edges()[allowed[-1]]) if allowed.size else KEEP_NONE


def mean_limits(means: Bins, count: float, delta: float) -> tuple[Bins, Bins]:
    """Lower and upper limit of the true mean for each observed mean of `count` values in [0, 1], (BINS,) each.

    Each holds with probability 1 - delta for one mean (Hoeffding 1963, theorem 1, as in `mean_allowed`); the lower one
    is never above the mean, the upper one never below.
    """
    bound = math.log(1.0 / delta) / count
    observed = np.clip(means, 0.0, 1.0)
    limits = []
    for end in (0.0, 1.0):
        inside, outside = observed.copy(), np.full(BINS, end)
        for _ in range(40):
            middle = (inside + outside) / 2.0
            far = _divergences(observed, middle) > bound
            inside, outside = np.where(far, inside, middle), np.where(far, middle, outside)
        limits.append(inside)
    return limits[0], limits[1]


def _divergences(p: Bins, q: Bins) -> Bins:
    """KL(p, q) of coins in nats, (BINS,); infinite where q rules out what p has."""
    with np.errstate(divide="ignore", invalid="ignore"):
        head = np.where(p > 0.0, p * np.log(p / q), 0.0)
        tail = np.where(p < 1.0, (1.0 - p) * np.log((1.0 - p) / (1.0 - q)), 0.0)
    return np.asarray(head + tail)


def mean_allowed(limit: float, count: float, delta: float) -> float:
    """The largest mean of `count` independent values in [0, 1] whose upper confidence limit is still `limit`; -1: none.

    By Chernoff's bound in Hoeffding's form (1963, theorem 1): with probability 1 - delta the true mean exceeds `limit`
    only if count x KL(mean, limit) <= ln(1/delta). For rare harm it needs a fraction of the evidence that bounds
    with an additive term of order 1/count need.
    """
    if limit >= 1.0:
        return 1.0
    bound = math.log(1.0 / delta) / count
    if -math.log1p(-limit) < bound:  # not even a mean of 0 is evidence enough
        return -1.0
    low, high = 0.0, limit
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _kl(middle, limit) >= bound else (low, middle)
    return low


def _kl(p: float, q: float) -> float:
    """Divergence of two coins, in nats; 0 < q < 1."""
    head = p * math.log(p / q) if p > 0.0 else 0.0
    return head + ((1.0 - p) * math.log((1.0 - p) / (1.0 - q)) if p < 1.0 else 0.0)
