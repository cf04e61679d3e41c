"""The budget counts harm without bias, its limit covers although tau adapts, and harm bounds the TV distance."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.decoding.couplings import COUPLINGS, rejection_probability
from fedhlm.decoding.sampling import law
from fedhlm.errors import ConfigError
from fedhlm.learning.budget import Budget, empirical_bernstein
from fedhlm.protocol.messages import Sampling

Law = NDArray[np.float64]

# The equality of docs/algorithms.md, section 3, the bound on sequences, and the mismatch bound of the gumbel coupling.


def random_law(rng: np.random.Generator, size: int) -> Law:
    weights = rng.exponential(size=size) ** 2 * (rng.random(size) < 0.8)
    weights[rng.integers(size)] += 0.1  # never without mass, often with zeros
    return np.asarray(weights / weights.sum())


def emitted(q: Law, p: Law, verified: Law) -> Law:
    """The law of one step: draft from q, with probability verified[d] accept or resample from the residual."""
    beta = np.array([rejection_probability(a, b) for a, b in zip(q.tolist(), p.tolist(), strict=True)])
    residual = np.maximum(0.0, p - q)
    out = q * (1.0 - verified * beta)
    if residual.sum() > 0.0:
        out += float(q @ (verified * beta)) * residual / residual.sum()
    return np.asarray(out)


def risk(q: Law, p: Law, verified: Law) -> float:
    beta = np.array([rejection_probability(a, b) for a, b in zip(q.tolist(), p.tolist(), strict=True)])
    return float(q @ ((1.0 - verified) * beta))


@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_what_skipping_costs_in_one_step_is_an_equality(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    q, p = random_law(rng, size), random_law(rng, size)
    verified = rng.random(size)
    assert abs(0.5 * np.abs(emitted(q, p, verified) - p).sum() - risk(q, p, verified)) <= 1e-12
    assert np.abs(emitted(q, p, np.ones(size)) - p).max() <= 1e-12  # verified always: exact


@given(st.integers(0, 2**32 - 1))
def test_over_a_sequence_the_total_variation_is_at_most_the_risk(seed: int) -> None:
    """All 27 sequences of length 3 over three tokens; every prefix has its own laws and its own gate."""
    rng = np.random.default_rng(seed)
    prefixes = [s for length in range(3) for s in itertools.product(range(3), repeat=length)]
    laws = {h: (random_law(rng, 3), random_law(rng, 3), (rng.random(3) < 0.5).astype(float)) for h in prefixes}
    system: dict[tuple[int, ...], float] = {(): 1.0}
    target: dict[tuple[int, ...], float] = {(): 1.0}
    total = 0.0
    for h in prefixes:
        q, p, verified = laws[h]
        total += system[h] * risk(q, p, verified)
        for v, (out, wanted) in enumerate(zip(emitted(q, p, verified), p, strict=True)):
            system[(*h, v)] = system[h] * float(out)
            target[(*h, v)] = target[h] * float(wanted)
    leaves = list(itertools.product(range(3), repeat=3))
    assert 0.5 * sum(abs(system[s] - target[s]) for s in leaves) <= total + 1e-12


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.tuples(st.booleans(), st.booleans()))
def test_mismatch_bounds_the_gumbel_coupling_exactly_on_two_tokens(a: float, b: float, skip: tuple[bool, bool]) -> None:
    """The coupling agrees on v with probability 1 / sum_w max(q_w/q_v, p_w/p_v); two tokens fix the rest."""
    q, p = np.array([a, 1 - a]), np.array([b, 1 - b])
    same = np.array([1.0 / np.maximum(q / q[v], p / p[v]).sum() for v in (0, 1)])
    joint = np.array([[same[0], q[0] - same[0]], [q[1] - same[1], same[1]]])  # (2, 2): draft, target
    assert joint.min() >= -1e-12
    assert joint.sum(axis=0) == pytest.approx(p)
    out = np.zeros(2)
    for d, y in itertools.product((0, 1), repeat=2):
        out[d if skip[d] else y] += joint[d, y]
    mismatch = sum(joint[d, 1 - d] for d in (0, 1) if skip[d])
    assert 0.5 * np.abs(out - p).sum() <= mismatch + 1e-12


def test_mismatch_bounds_the_gumbel_coupling_as_it_is_shipped() -> None:
    rng, coupling, draws = np.random.default_rng(8), COUPLINGS["gumbel"], 8_000
    small, large = rng.normal(size=(2, 6)) * 1.5
    sampling = Sampling(seed=5, temperature=1.0)
    kept = {0, 2, 5}
    out, mismatches = np.zeros(6), 0
    for position in range(draws):
        d = coupling.draft(small, sampling, position).token
        y = coupling.settle(large, sampling, position, d, b"")
        out[d if d in kept else y] += 1
        mismatches += d in kept and d != y
    distance = 0.5 * np.abs(out / draws - law(large, sampling)).sum()
    noise = 0.5 * 6 * 4.0 * math.sqrt(0.25 / draws)  # four standard deviations in each of six cells
    assert mismatches / draws > 0.1
    assert distance <= mismatches / draws + noise


# The estimator.


def sessions(length: int) -> Iterator[tuple[float, list[tuple[bool, float]]]]:
    """All paths of a small tree: probability, and (skipped, harm) per token. Gate and harm depend on the path."""
    for path in itertools.product((0, 1, 2), repeat=length):
        probability, tokens = 1.0, []
        for t, token in enumerate(path):
            key = sum((x + 1) * 5**i for i, x in enumerate(path[:t]))
            weights = np.random.default_rng(key).random(3)
            probability *= float(weights[token] / weights.sum())
            harm, gate = np.random.default_rng(1_000 + 7 * key + token).random(2)
            tokens.append((bool(gate < 0.6), float(harm)))
        yield probability, tokens


def report(budget: Budget, tokens: list[tuple[bool, float]], audited: bool) -> None:
    """What an agent would report of a session: an upload scores every skipped token before it."""
    last = max((i for i, (skipped, _) in enumerate(tokens) if not skipped), default=-1)
    seen = [harm for skipped, harm in tokens[: last + 1] if skipped]
    tail = [harm for _, harm in tokens[last + 1 :]]
    budget.add_session(len(tokens), seen, tail if audited else None, len(tail))


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0])
def test_the_estimate_is_unbiased_by_enumeration(epsilon: float) -> None:
    expected = truth = 0.0
    for probability, tokens in sessions(4):
        truth += probability * sum(harm for skipped, harm in tokens if skipped) / 4
        for audited, coin in ((True, epsilon), (False, 1.0 - epsilon)):
            budget = Budget(epsilon)
            report(budget, tokens, audited)
            expected += probability * coin * budget.estimate
    assert truth > 0.1
    assert expected == pytest.approx(truth, abs=1e-12)


def test_the_estimate_over_many_sessions_nears_the_truth() -> None:
    rng, epsilon = np.random.default_rng(4), 0.25
    paths = list(sessions(4))
    weights = np.array([probability for probability, _ in paths])
    truth = sum(w * sum(h for skipped, h in tokens if skipped) / 4 for w, tokens in paths)
    budget = Budget(epsilon)
    values = []
    for index in rng.choice(len(paths), 6_000, p=weights / weights.sum()).tolist():
        single = Budget(epsilon)
        audited = bool(rng.random() < epsilon)
        report(single, paths[index][1], audited)
        report(budget, paths[index][1], audited)
        values.append(single.estimate)
    assert budget.estimate == pytest.approx(float(np.mean(values)), abs=1e-12)
    assert abs(budget.estimate - truth) <= 4 * float(np.std(values)) / math.sqrt(len(values))


def test_a_session_by_hand() -> None:
    budget = Budget(0.2)
    budget.add_session(10, [0.5, 0.1], None, 3)
    assert budget.estimate == pytest.approx(0.06)
    budget.add_session(10, [], [0.4, 0.0], 2)
    assert budget.estimate == pytest.approx((0.06 + 0.4 / 0.2 / 10) / 2)
    budget.add_session(0, [], None, 0)
    assert budget.sessions == 2


@given(st.floats(0.01, 1.0), st.lists(st.tuples(st.lists(st.floats(0, 1), max_size=5), st.booleans()), max_size=20))
def test_estimate_and_limit_stay_in_range(epsilon: float, runs: list[tuple[list[float], bool]]) -> None:
    budget = Budget(epsilon)
    for harms, audited in runs:
        budget.add_session(len(harms), [], harms if audited else None, len(harms))
    assert 0.0 <= budget.estimate <= 1.0 / epsilon + 1e-9
    assert min(1.0, budget.estimate) <= budget.limit() <= 1.0


def test_no_session_no_claim() -> None:
    assert (Budget(0.1).estimate, Budget(0.1).limit()) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("tokens", "seen", "tail_harms", "tail"),
    [
        (2, [0.1, 0.1], None, 1),
        (2, [1.1], None, 0),
        (2, [float("nan")], None, 0),
        (2, [], [0.1], 2),
        (2, [], [-0.1], 1),
        (2, [], None, -1),
    ],
)
def test_impossible_sessions_are_refused(
    tokens: int, seen: list[float], tail_harms: list[float] | None, tail: int
) -> None:
    budget = Budget(0.5)
    with pytest.raises(ValueError, match="must be"):
        budget.add_session(tokens, seen, tail_harms, tail)
    assert budget.sessions == 0


# The limit.


def adaptive_run(seed: int, *, epsilon: float, count: int, tau_of: Callable[[Budget], float]) -> tuple[bool, bool]:
    """One life: harm of a token is 1 with probability u/2, so a session's risk is tau^2/4 per token given the past.

    Whether limit, and whether estimate, was ever below the running mean of those risks.
    """
    rng = np.random.default_rng(seed)
    budget, length, risks = Budget(epsilon, 0.1), 8, 0.0
    limit_broken = estimate_broken = False
    for n in range(1, count + 1):
        tau = tau_of(budget)
        u = rng.random(length)
        harms = (rng.random(length) < 0.5 * u).astype(float)
        report(budget, list(zip((u <= tau).tolist(), harms.tolist(), strict=True)), bool(rng.random() < epsilon))
        risks += tau * tau / 4
        limit_broken |= budget.limit() < risks / n
        estimate_broken |= budget.estimate < risks / n
    return limit_broken, estimate_broken


@pytest.mark.parametrize(
    "tau_of",
    [
        lambda budget: 0.9 if budget.estimate < 0.15 else 0.2,  # skips most when it looks safest
        lambda budget: min(1.0, 0.3 + 0.01 * budget.sessions),  # the risk only grows
    ],
    ids=["opportunist", "rising"],
)
def test_the_limit_covers_at_all_times_although_tau_adapts(tau_of: Callable[[Budget], float]) -> None:
    lives = [adaptive_run(seed, epsilon=0.5, count=80, tau_of=tau_of) for seed in range(300)]
    assert sum(limit for limit, _ in lives) <= 0.1 * 300
    assert sum(estimate for _, estimate in lives) > 0.5 * 300  # without its margin it would fail


def test_the_limit_covers_when_only_rare_audits_tell() -> None:
    """One-token sessions that are all tail: Y is 0 but for one audit in five, and then 0 or 5."""
    broken = 0
    for seed in range(300):
        rng, budget, low = np.random.default_rng(seed), Budget(0.2, 0.1), False
        for _ in range(150):
            budget.add_session(1, [], [float(rng.random() < 0.3)] if rng.random() < 0.2 else None, 1)
            low |= budget.limit() < 0.3
        broken += low
    assert broken <= 0.1 * 300


def test_the_limit_by_hand() -> None:
    """Sessions with X = 0.4, 0.1, 0.1; each is predicted by the sum of those before over their number plus one."""
    budget = Budget(0.5, 0.2)
    for harm in (0.8, 0.2, 0.2):
        budget.add_session(1, [harm], None, 0)
    drift = 0.4**2 + (0.1 - 0.4 / 2) ** 2 + (0.1 - 0.5 / 3) ** 2
    assert budget.snapshot()["drift"] == pytest.approx(drift)
    for _ in range(997):
        budget.add_session(1, [0.2], None, 0)
    drift = budget.snapshot()["drift"]
    candidates = []
    for k in range(10):
        slope = 0.95 / 2**k
        share = 0.2 / ((k + 1) * (k + 2))
        candidates.append((math.log(1 / share) + (math.log(1 / (1 - slope)) - slope) * drift) / (slope * 1_000))
    assert budget.limit() == pytest.approx(budget.estimate + min(candidates) / 0.5)


def test_the_limit_shrinks_towards_the_estimate() -> None:
    rng, budget, gaps = np.random.default_rng(2), Budget(0.5), []
    for n in range(1, 20_001):
        budget.add_session(10, [float(rng.random() < 0.1)], None, 0)
        if n in (200, 2_000, 20_000):
            gaps.append(budget.limit() - budget.estimate)
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0.0
    assert budget.limit() < 0.015  # estimate near 0.01


def test_at_a_time_fixed_in_advance_the_limit_is_near_maurer_and_pontil() -> None:
    """Holding at all times costs little: less than 1.6 times the margin of the bound for one time."""
    rng, budget, values = np.random.default_rng(9), Budget(1.0), []
    for _ in range(3_000):
        x = float(rng.beta(1.0, 4.0))
        budget.add_session(1, [x], None, 0)
        values.append(x)
    fixed = empirical_bernstein(float(np.mean(values)), float(np.var(values, ddof=1)), len(values), 1.0, 0.05)
    assert budget.limit() - budget.estimate < 1.6 * (fixed - budget.estimate)


def test_maurer_and_pontil_by_hand_and_in_coverage() -> None:
    assert empirical_bernstein(0.2, 0.04, 101, 2.0, 0.1) == pytest.approx(
        0.2 + math.sqrt(2 * 0.04 * math.log(20) / 101) + 14 * math.log(20) / 300
    )
    assert empirical_bernstein(0.2, 0.04, 1, 1.0, 0.1) == math.inf
    samples = np.random.default_rng(6).beta(0.5, 2.0, size=(300, 60))  # mean 0.2
    limits = [empirical_bernstein(float(x.mean()), float(x.var(ddof=1)), 60, 1.0, 0.1) for x in samples]
    assert sum(limit < 0.2 for limit in limits) <= 30


# State.


def test_a_restored_budget_goes_on_as_if_nothing_had_happened() -> None:
    rng = np.random.default_rng(1)
    whole, first = Budget(0.3, 0.02), Budget(0.3, 0.02)
    rows = [rng.random(4).tolist() for _ in range(20)]
    for harms in rows:
        whole.add_session(6, harms[:2], harms[2:], 2)
    for harms in rows[:9]:
        first.add_session(6, harms[:2], harms[2:], 2)
    second = Budget.restore(first.snapshot())
    for harms in rows[9:]:
        second.add_session(6, harms[:2], harms[2:], 2)
    assert second.snapshot() == whole.snapshot()
    assert (second.estimate, second.limit(), second.sessions) == (whole.estimate, whole.limit(), 20)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.0},
        {"delta": 1.0},
        {"sessions": 1.5},
        {"sessions": -1.0},
        {"total": 9.0},
        {"total": float("nan")},
        {"drift": float("inf")},
        {"drift": "0.1"},
        {"sessions": True},
    ],
)
def test_a_damaged_snapshot_is_refused_by_name(change: dict[str, object]) -> None:
    budget = Budget(0.5)
    budget.add_session(4, [0.5], None, 0)
    with pytest.raises(ConfigError, match=f"budget.{next(iter(change))}"):
        Budget.restore(budget.snapshot() | change)
    incomplete = budget.snapshot()
    del incomplete["drift"]
    with pytest.raises(ConfigError, match=r"budget\.drift"):
        Budget.restore(incomplete)


def test_two_devices_budgets_add_up_to_that_of_all_sessions() -> None:
    rng = np.random.default_rng(4)
    sessions = [(4, rng.random(2).tolist(), None, 1) for _ in range(40)]
    whole, parts = Budget(0.5), [Budget(0.5), Budget(0.5)]
    for i, session in enumerate(sessions):
        whole.add_session(*session)
        parts[i % 2].add_session(*session)
    both = parts[0] + parts[1]
    assert both.sessions == 40
    assert both.estimate == pytest.approx(whole.estimate)
    assert both.limit() == pytest.approx(whole.limit(), abs=0.02)
    assert both.limit() < min(part.limit() for part in parts)
    with pytest.raises(ValueError, match="must be equal"):
        Budget(0.5) + Budget(0.25)


def test_the_standard_error_is_that_of_independent_sessions() -> None:
    rng = np.random.default_rng(5)
    estimates, errors = [], []
    for _ in range(300):
        budget = Budget(0.5)
        for _ in range(100):
            audited = rng.random() < 0.5
            harm = float(rng.random() < 0.3)
            budget.add_session(1, [], [harm] if audited else None, 1)
        estimates.append(budget.estimate)
        errors.append(budget.standard_error)
    assert float(np.mean(errors)) == pytest.approx(float(np.std(estimates)), rel=0.15)
    assert Budget(0.5).standard_error == 0.0


def test_a_snapshot_whose_estimate_would_be_infinite_is_refused() -> None:
    kept = Budget(0.5).snapshot()
    for epsilon in (5e-324, 1e-200):
        with pytest.raises(ConfigError, match="budget.epsilon"):
            Budget.restore(kept | {"epsilon": epsilon})
