"""The published threshold only rises; the calibrated one is where harm meets its price, from any start."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from fedhlm.learning.curve import BINS, Curve, bin_of, isotonic, midpoints, upper_edges
from fedhlm.learning.thresholds import (
    KEEP_NONE,
    OPTIMISERS,
    LocalRound,
    PaperSettings,
    PaperUpdate,
    cluster_mean,
    global_mean,
    harm_up_to,
    mean_allowed,
    mean_control,
    mean_limit,
    paper_gradient,
    shares,
    tau_of_budget,
    tau_of_price,
)

UNIT = st.floats(0.0, 1.0)
PAIRS = st.lists(st.tuples(UNIT, UNIT), max_size=20).map(lambda rows: np.array(rows, np.float64).reshape(-1, 2))
NO_PAIRS = np.empty((0, 2))


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -700.0, 700.0)))


def calibrated_objective(curve: Curve, tau: float, price: float) -> float:
    """E[price 1{u > tau} + h 1{u <= tau}] in units of harm, with E[h | u] from the isotonic fit.

    A bin counts as kept when its upper edge is <= tau.
    """
    kept = upper_edges() <= tau
    return float(shares(curve) @ np.where(kept, isotonic(curve), price))


def calibrated_gradient(curve: Curve, tau: float, price: float, gamma: float) -> float:
    """d/dtau of the same with a sigmoid of steepness gamma for the step, all of a bin at its middle.

    Unlike [5] it has both signs. The logistic density is log-concave and m - price changes sign once, so this does
    too: every start descends to the same tau.
    """
    s = sigmoid(gamma * (midpoints() - tau))
    return gamma * float((shares(curve) * s * (1.0 - s)) @ (isotonic(curve) - price))


def paper_loss(pairs: NDArray[np.float64], tau: float, gamma: float, lam: float) -> float:
    """L = sum over pairs of sigmoid(gamma (u - tau)) ((1 - beta)^2 + lam), FedHLM eq. (4); pairs (n, 2): u, beta."""
    u, beta = np.asarray(pairs).T
    return float((sigmoid(gamma * (u - tau)) * ((1.0 - beta) ** 2 + lam)).sum())


@given(st.lists(st.tuples(UNIT, st.booleans()), min_size=1, max_size=60), UNIT)
def test_the_harm_of_what_is_kept_adds_up_to_that_of_all(tokens: list[tuple[float, bool]], score: float) -> None:
    curve = Curve.empty()
    for u, wrong in tokens:
        curve.see(u)
        curve.add(u, float(wrong))
    m = isotonic(curve)
    assert harm_up_to(curve, m, KEEP_NONE) == 0.0
    assert harm_up_to(curve, m, score) <= harm_up_to(curve, m, 1.0) + 1e-12
    # The isotonic fit keeps the sum; bins that mix kept and other tokens count as kept.
    assert harm_up_to(curve, m, 1.0) == pytest.approx(np.mean([wrong for _, wrong in tokens]))
    kept = [m[bin_of(u)] for u, _ in tokens if bin_of(u) <= bin_of(score)]
    assert harm_up_to(curve, m, score) == pytest.approx(sum(kept) / len(tokens))


@given(PAIRS, st.floats(-1.0, 2.0), st.floats(0.01, 1e4), st.floats(0.0, 10.0))
def test_the_published_gradient_is_never_positive(
    pairs: NDArray[np.float64], tau: float, gamma: float, lam: float
) -> None:
    assert paper_gradient(pairs, tau, gamma, lam) <= 0.0


@given(PAIRS, UNIT, st.floats(0.5, 30.0), st.floats(0.0, 1.0))
def test_the_published_gradient_is_the_derivative_of_the_loss(
    pairs: NDArray[np.float64], tau: float, gamma: float, lam: float
) -> None:
    step = 1e-5
    slope = (paper_loss(pairs, tau + step, gamma, lam) - paper_loss(pairs, tau - step, gamma, lam)) / (2 * step)
    assert paper_gradient(pairs, tau, gamma, lam) == pytest.approx(slope, abs=1e-3, rel=1e-4)


def test_the_published_loss_by_hand() -> None:
    pairs = np.array([[0.5, 0.2], [0.9, 1.0]])
    expected = 0.5 * (0.64 + 0.01) + 1 / (1 + math.exp(-4.0)) * 0.01
    assert paper_loss(pairs, 0.5, 10.0, 0.01) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bad", [[[1.5, 0.0]], [[0.5, -0.1]], [[float("nan"), 0.5]]])
def test_pairs_outside_the_unit_square_are_refused(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="must be rows"):
        paper_gradient(np.array(bad), 0.5, 10.0, 0.01)


@given(PAIRS, UNIT, st.integers(1, 4), st.sampled_from(["fedavg", "fednova"]))
def test_published_thresholds_only_rise(pairs: NDArray[np.float64], start: float, steps: int, name: str) -> None:
    settings = PaperSettings(local_steps=steps, optimiser=name)
    update = OPTIMISERS[name](LocalRound(pairs, start, start, 0.0, 0.0, 3, settings))
    assert start <= update.threshold <= 1.0


def test_trained_on_all_tokens_the_published_threshold_ends_at_one() -> None:
    pairs = np.random.default_rng(1).random((50, 2))
    tau = 0.3
    for round_number in range(300):
        tau = OPTIMISERS["fedavg"](
            LocalRound(pairs, tau, tau, 0.0, 0.0, round_number, PaperSettings(decay=0.0))
        ).threshold
    assert tau == 1.0


def test_trained_on_transmitted_tokens_it_freezes_when_they_run_out() -> None:
    pairs = np.random.default_rng(2).random((50, 2)) * [0.8, 1.0]
    tau, counts = 0.3, []
    for round_number in range(300):
        update = OPTIMISERS["fedavg"](
            LocalRound(pairs[pairs[:, 0] > tau], tau, tau, 0.0, 0.0, round_number, PaperSettings())
        )
        tau = update.threshold
        counts.append(update.count)
    assert counts[0] > 0
    assert counts[-1] == 0
    assert pairs[:, 0].max() <= tau < 1.0


@given(st.sampled_from(sorted(OPTIMISERS)), UNIT, UNIT, st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 99))
def test_a_client_without_pairs_changes_nothing(
    name: str, local: float, overall: float, own: float, server: float, round_number: int
) -> None:
    settings = PaperSettings(optimiser=name, local_steps=3)
    update = OPTIMISERS[name](LocalRound(NO_PAIRS, local, overall, own, server, round_number, settings))
    assert update == PaperUpdate(local, 0, own, 0)


@given(PAIRS, st.sampled_from(sorted(OPTIMISERS)), UNIT, UNIT, st.floats(-500, 500), st.floats(-500, 500))
def test_every_optimiser_stays_in_the_unit_interval(
    pairs: NDArray[np.float64], name: str, local: float, overall: float, own: float, server: float
) -> None:
    settings = PaperSettings(learning_rate=5.0, local_steps=2)
    update = OPTIMISERS[name](LocalRound(pairs, local, overall, own, server, 0, settings))
    assert 0.0 <= update.threshold <= 1.0
    assert update.count == len(pairs)


def test_one_step_by_hand() -> None:
    pairs = np.array([[0.7, 0.4], [0.6, 0.9]])
    settings = PaperSettings(gamma=5.0, learning_rate=0.02, decay=0.5, mu=2.0)
    g = paper_gradient(pairs, 0.5, 5.0, 0.01)
    rate = 0.02 / (1.0 + 0.5 * 2)
    run = {name: step(LocalRound(pairs, 0.5, 0.3, -0.7, -0.2, 2, settings)) for name, step in OPTIMISERS.items()}
    assert run["fedavg"] == pytest.approx((0.5 - rate * g, 2, -0.7, 1))
    assert run["fedprox"] == pytest.approx((0.5 - rate * (g + 2.0 * 0.2), 2, -0.7, 1))
    assert run["scaffold"] == pytest.approx((0.5 - rate * (g + 0.7 - 0.2), 2, g, 1))
    first = 0.5 - rate * paper_gradient(pairs[:1], 0.5, 5.0, 0.01)
    second = first - rate * paper_gradient(pairs[1:], first, 5.0, 0.01)
    assert run["fednova"] == pytest.approx((0.5 + (second - 0.5) / 2, 2, -0.7, 2))


def test_fedprox_without_pull_and_scaffold_without_controls_are_fedavg() -> None:
    pairs = np.random.default_rng(3).random((6, 2))
    settings = PaperSettings(mu=0.0, local_steps=4)
    average, prox, scaffold = (
        OPTIMISERS[name](LocalRound(pairs, 0.2, 0.8, 0.0, 0.0, 1, settings)).threshold
        for name in ("fedavg", "fedprox", "scaffold")
    )
    assert average == prox == scaffold


def test_fedprox_stays_nearer_to_the_global_threshold() -> None:
    pairs = np.random.default_rng(4).random((6, 2))
    free, pulled = (
        OPTIMISERS["fedprox"](LocalRound(pairs, 0.5, 0.2, 0.0, 0.0, 0, PaperSettings(mu=mu))).threshold
        for mu in (0.0, 5.0)
    )
    assert abs(pulled - 0.2) < abs(free - 0.2)


def test_scaffold_removes_the_drift_between_clients() -> None:
    """With controls at their fixed point, clients of different data take the same step: the mean gradient."""
    rng = np.random.default_rng(5)
    clients = [rng.random((n, 2)) for n in (3, 6)]
    gradients = [paper_gradient(pairs, 0.4, 10.0, 0.01) for pairs in clients]
    server = float(np.mean(gradients))
    ends = [
        OPTIMISERS["scaffold"](LocalRound(pairs, 0.4, 0.4, g, server, 0, PaperSettings(learning_rate=1e-3))).threshold
        for pairs, g in zip(clients, gradients, strict=True)
    ]
    assert ends[0] == pytest.approx(ends[1], abs=1e-12)
    assert ends[0] == pytest.approx(0.4 - 1e-3 * server, abs=1e-12)


def test_fednova_does_not_move_further_for_more_of_the_same_tokens() -> None:
    pair = np.array([[0.6, 0.3]])
    settings = PaperSettings(learning_rate=1e-5)
    moves = {
        name: [
            OPTIMISERS[name](LocalRound(np.repeat(pair, n, axis=0), 0.4, 0.4, 0.0, 0.0, 0, settings)).threshold - 0.4
            for n in (1, 20)
        ]
        for name in ("fedavg", "fednova")
    }
    assert moves["fedavg"][1] == pytest.approx(20 * moves["fedavg"][0], rel=1e-9)
    assert moves["fednova"][1] == pytest.approx(moves["fednova"][0], rel=0.02)


def test_averages_and_their_empty_cases() -> None:
    updates = [PaperUpdate(0.2, 3, -1.0, 1), PaperUpdate(0.6, 1, -3.0, 1), PaperUpdate(0.9, 0, 1.0, 0)]
    assert cluster_mean(updates) == pytest.approx((3 * 0.2 + 0.6) / 4)
    assert cluster_mean(updates[2:]) is None
    assert cluster_mean([]) is None
    assert global_mean([0.2, 0.4]) == pytest.approx(0.3)
    assert global_mean([]) is None
    assert mean_control(updates) == pytest.approx(-1.0)
    assert mean_control([]) == 0.0


def test_the_learning_rate_diminishes() -> None:
    settings = PaperSettings(learning_rate=0.4, decay=0.5)
    assert [settings.rate(t) for t in (0, 2, 6)] == pytest.approx([0.4, 0.2, 0.1])


def random_curve(seed: int) -> Curve:
    """Every bin seen and scored, m strictly increasing."""
    rng = np.random.default_rng(seed)
    m = np.sort(rng.random(BINS))
    weight = rng.uniform(0.5, 1.5, BINS)
    return Curve(rng.uniform(5.0, 15.0, BINS), weight, weight * m, weight * m**2)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_calibrated_threshold_is_the_same_from_any_start_and_is_where_harm_meets_its_price(
    seed: int, price: float
) -> None:
    curve = random_curve(seed)
    m = isotonic(curve)
    assume(np.abs(m - price).min() > 1e-6)
    ends = []
    for start in (0.05, 0.9):
        tau, step = start, 0.1
        direction = 0.0
        for _ in range(60):
            now = -math.copysign(1.0, calibrated_gradient(curve, tau, price, 4_000.0))
            step = step / 2 if direction * now < 0 else step
            direction = now
            tau = min(1.0, max(0.0, tau + direction * step))
        ends.append(tau)
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)
    exact = tau_of_price(m, price)
    # The smoothed root lies between the middles of the last cheap and the first dear bin.
    assert abs(ends[0] - max(0.0, exact)) <= 0.5 / BINS + 1e-6


@given(st.integers(0, 2**32 - 1), UNIT)
def test_the_price_threshold_minimises_the_objective_and_descent_over_edges_finds_it(seed: int, price: float) -> None:
    curve = random_curve(seed)
    candidates = [KEEP_NONE, *upper_edges().tolist()]
    values = [calibrated_objective(curve, tau, price) for tau in candidates]
    best = calibrated_objective(curve, tau_of_price(isotonic(curve), price), price)
    assert best == pytest.approx(min(values), abs=1e-12)
    for start in (0.05, 0.9):
        at = bin_of(start) + 1
        while True:
            near = [j for j in (at - 1, at + 1) if 0 <= j < len(values) and values[j] < values[at]]
            if not near:
                break
            at = min(near, key=values.__getitem__)
        assert values[at] == pytest.approx(best, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.floats(0.05, 0.9))
def test_the_calibrated_gradient_is_a_derivative(seed: int, price: float, tau: float) -> None:
    curve, gamma, step = random_curve(seed), 20.0, 1e-5

    def smoothed(at: float) -> float:
        sent = 1.0 / (1.0 + np.exp(-gamma * (midpoints() - at)))
        return float(shares(curve) @ (price * sent + isotonic(curve) * (1.0 - sent)))

    slope = (smoothed(tau + step) - smoothed(tau - step)) / (2 * step)
    assert calibrated_gradient(curve, tau, price, gamma) == pytest.approx(slope, abs=1e-6)


def test_price_thresholds_at_the_ends() -> None:
    assert tau_of_price(np.ones(BINS), 0.99) == KEEP_NONE
    assert tau_of_price(np.ones(BINS), 1.0) == 1.0
    assert tau_of_price(np.zeros(BINS), 0.0) == 1.0
    assert tau_of_price(np.where(np.arange(BINS) < 32, 0.1, 0.5), 0.2) == 0.5
    # A curve that is not monotone: nothing beyond the first dear bin is kept.
    assert tau_of_price(np.where(np.arange(BINS) == 3, 0.9, 0.1), 0.2) == 3 / BINS


def evidence(count: int, harm: float, seed: int = 0) -> Curve:
    rng = np.random.default_rng(seed)
    curve = Curve.empty()
    for u in rng.random(count).tolist():
        curve.see(u)
        curve.add(u, float(rng.random() < harm * u))
    return curve


def test_a_fleet_without_evidence_sends_everything_and_earns_the_right_to_skip() -> None:
    taus = [
        tau_of_budget(c, isotonic(c), 0.1, 0.05) for c in (Curve.empty(), *(evidence(n, 0.5) for n in (1, 40, 30_000)))
    ]
    assert taus[:2] == [KEEP_NONE, KEEP_NONE]
    assert KEEP_NONE < taus[2] < taus[3] < 1.0
    seen_only = Curve.empty()
    seen_only.see(0.1, 1e6)
    assert tau_of_budget(seen_only, isotonic(seen_only), 0.5, 0.05) == KEEP_NONE


@given(st.integers(0, 2**32 - 1), st.floats(1.0, 1e4), st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_budget_threshold_grows_with_the_budget_and_holds_it(seed: int, scale: float, rho: float, more: float) -> None:
    curve = random_curve(seed).scaled(scale)
    m = isotonic(curve)
    small, large = (tau_of_budget(curve, m, r, 0.05) for r in (rho, rho + more))
    assert small <= large
    kept = upper_edges() <= large
    assert float(shares(curve)[kept] @ m[kept]) <= rho + more


def lower_limit(mean: float, count: float, delta: float) -> float:
    """The mirror image of `mean_limit`: what it says of the values 1 - x."""
    return 1.0 - mean_limit(1.0 - mean, count, delta)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.floats(1.0, 1e4), st.floats(0.0, 1.0))
def test_the_claims_of_others_count_within_the_limits_of_what_a_device_saw(
    seed: int, others: int, scale: float, rho: float
) -> None:
    own, m = random_curve(seed).scaled(scale), isotonic(random_curve(others))
    count = own.total_weight
    expected = KEEP_NONE
    most = mean_allowed(rho, count, 0.05) if count >= 1.0 else -1.0
    means, claims = np.cumsum(shares(own) * isotonic(own)), np.cumsum(shares(own) * m)
    for edge, mean, claimed, rest in zip(upper_edges(), means, claims, own.weight[::-1].cumsum()[::-1], strict=True):
        low, high = lower_limit(mean, count, 0.5), mean_limit(mean, count, 0.5)
        believed = min(max(claimed, low), high)
        if abs(believed - most) < 1e-9:  # a matter of rounding
            return
        if believed <= most and rest > 0.0:
            expected = float(edge)
    assert tau_of_budget(own, m, rho, 0.05) == expected


@given(st.floats(0.0, 1.0), st.integers(1, 100_000))
def test_the_limit_of_a_mean_is_where_its_divergence_is_the_bound(mean: float, count: int) -> None:
    limit = mean_limit(mean, count, 0.05)
    assert mean <= limit <= 1.0
    if limit < 1.0 - 1e-6:
        assert mean_allowed(limit + 1e-9, count, 0.05) >= mean - 1e-6
        assert mean_allowed(limit - 1e-9, count, 0.05) <= mean + 1e-6


@given(st.floats(0.001, 0.999), st.integers(1, 100_000))
def test_a_coin_exceeds_its_limit_no_more_often_than_stated(limit: float, count: int) -> None:
    """Exact binomial tail: with the true mean at the limit, so small a sample mean has probability delta at most."""
    allowed = mean_allowed(limit, count, 0.05)
    tail = binom.cdf(math.floor(allowed * count + 1e-9), count, limit) if allowed >= 0.0 else 0.0
    assert tail <= 0.05 + 1e-9
    assert allowed <= limit


def test_budget_threshold_by_hand() -> None:
    """1,000 tokens, half in bin 0 without harm, half in bin 63 with harm 0.4 each."""
    curve = Curve.empty()
    for _ in range(500):
        for score, harm in ((0.0, 0.0), (1.0, 0.4)):
            curve.see(score)
            curve.add(score, harm)
    m = isotonic(curve)
    floor = 1.0 - 0.05 ** (1 / 1000)  # a mean of 0: nothing in 1,000 tokens, with probability (1 - limit)^1000
    # The upper limit of a mean of 0.2: the root of KL(0.2, limit) = ln(20) / 1000 above it, 0.23212.
    assert mean_allowed(0.23212, 1_000, 0.05) == pytest.approx(0.2, abs=1e-5)
    all_kept = next(x for x in np.arange(0.2, 0.3, 1e-4).tolist() if mean_allowed(x, 1_000, 0.05) >= 0.2)
    assert tau_of_budget(curve, m, all_kept + 1e-9, 0.05) == 1.0
    # Empty bins take the right one's m but no token falls there, so all but the last bin cost nothing.
    assert tau_of_budget(curve, m, all_kept - 2e-4, 0.05) == 63 / 64
    assert tau_of_budget(curve, m, floor + 1e-9, 0.05) == 63 / 64
    assert tau_of_budget(curve, m, floor - 1e-9, 0.05) == KEEP_NONE


def test_the_budget_holds_in_truth_when_tokens_follow_the_law_that_was_learned() -> None:
    """True risk of the chosen tau, E[h 1{u <= tau}] = 0.5 tau^2 / 2, stays under rho in at least 1 - delta of runs."""
    taus = [tau_of_budget(c, isotonic(c), 0.05, 0.1) for c in (evidence(1_500, 0.5, seed) for seed in range(60))]
    broken = sum(0.25 * max(0.0, tau) ** 2 > 0.05 for tau in taus)
    assert max(taus) > 0.1
    assert broken <= 6


def test_shares_fall_back_from_decisions_to_weight_to_uniform() -> None:
    curve = Curve.empty()
    assert shares(curve) == pytest.approx(np.full(BINS, 1 / BINS))
    curve.add(0.5, 0.0)
    assert shares(curve)[bin_of(0.5)] == 1.0
    curve.see(1.0, 4.0)
    assert shares(curve)[-1] == 1.0


def test_optimisers_agree_on_one_token_and_one_step() -> None:
    pair = np.array([[0.6, 0.3]])
    ends = [
        OPTIMISERS[name](LocalRound(pair, 0.4, 0.4, 0.0, 0.0, 0, PaperSettings())).threshold
        for name in ("fedavg", "fedprox", "fednova")
    ]
    assert all(a == pytest.approx(b, abs=1e-12) for a, b in itertools.pairwise(ends))


def test_fedprox_pulls_towards_the_global_threshold_from_either_side() -> None:
    """mu/2 (tau - global)^2 (Li et al. 2020): without other forces the step is rate mu (global - local)."""
    settings = PaperSettings(mu=2.0, learning_rate=0.1, gamma=0.0, optimiser="fedprox")
    pairs = np.array([[0.5, 0.5]])
    for start, anchor in ((0.4, 0.8), (0.8, 0.4)):
        moved = OPTIMISERS["fedprox"](LocalRound(pairs, start, anchor, 0.0, 0.0, 0, settings))
        assert moved.threshold == pytest.approx(start + 0.1 * 2.0 * (anchor - start))


def test_scaffold_corrects_by_the_difference_of_the_controls() -> None:
    """Karimireddy et al. 2020: the step is against gradient - c_k + c."""
    settings = PaperSettings(learning_rate=0.1, gamma=0.0, optimiser="scaffold")
    pairs = np.array([[0.5, 0.5]])
    moved = OPTIMISERS["scaffold"](LocalRound(pairs, 0.5, 0.9, 0.7, 0.2, 0, settings))
    assert moved.threshold == pytest.approx(0.5 - 0.1 * (0.0 - 0.7 + 0.2))
