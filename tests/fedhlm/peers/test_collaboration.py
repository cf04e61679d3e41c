"""Asking peers follows from measured means, agrees with eqs. (12)-(14), and is tried again after it was given up."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedhlm.peers.collaboration import (
    Collaboration,
    Prices,
    fit_hit_ratio,
    simulate_hit_ratio,
    worthwhile,
)
from fedhlm.peers.neighbours import Memory

shares = st.floats(0.0, 1.0)
costs = st.floats(0.0, 1e6)


def expected_cost(p_hit: float, c_p2p: float, c_llm: float) -> float:
    """Mean cost of a token that asks its peers first and the LLM after a miss, eq. (12)."""
    return (1.0 - p_hit) * (c_p2p + c_llm) + p_hit * c_p2p


@given(shares, costs, st.floats(1e-3, 1e6))
def test_without_errors_the_rule_is_equation_13(p_hit: float, c_p2p: float, c_llm: float) -> None:
    assume(abs(p_hit - c_p2p / c_llm) > 1e-12)
    assert worthwhile(p_hit, 0.0, c_p2p=c_p2p, c_llm=c_llm, c_error=1e9) == (p_hit >= c_p2p / c_llm)


@given(shares, costs, costs)
def test_the_rule_minimises_equation_12(p_hit: float, c_p2p: float, c_llm: float) -> None:
    asking, escalating = expected_cost(p_hit, c_p2p, c_llm), c_llm
    assume(abs(asking - escalating) > 1e-9 * (c_p2p + c_llm))
    assert worthwhile(p_hit, 0.0, c_p2p=c_p2p, c_llm=c_llm) == (asking < escalating)


@given(shares, shares, costs, costs, costs)
def test_the_rule_minimises_the_mean_cost_with_wrong_hits(
    p_hit: float, error: float, c_p2p: float, c_llm: float, c_error: float
) -> None:
    """Enumerates what can happen to one token: a right hit, a wrong hit, a miss."""
    asking = sum(
        probability * cost
        for probability, cost in (
            (p_hit * (1 - error), c_p2p),
            (p_hit * error, c_p2p + c_error),
            (1 - p_hit, c_p2p + c_llm),
        )
    )
    assume(abs(asking - c_llm) > 1e-9 * (c_p2p + c_llm + c_error))
    assert worthwhile(p_hit, error, c_p2p=c_p2p, c_llm=c_llm, c_error=c_error) == (asking < c_llm)


@given(costs, costs, st.sampled_from((0.0, 1.0)))
def test_the_ends_of_equation_12(c_p2p: float, c_llm: float, p_hit: float) -> None:
    assert expected_cost(p_hit, c_p2p, c_llm) == (c_p2p if p_hit else c_p2p + c_llm)


def feed(
    collaboration: Collaboration, *, hits: int = 0, misses: int = 0, right: int = 0, wrong: int = 0, each: int = 1
) -> None:
    for _ in range(each):
        for count, hit in ((hits, True), (misses, False)):
            for _ in range(count):
                collaboration.looked_up(hit=hit)
        for count, bad in ((right, False), (wrong, True)):
            for _ in range(count):
                collaboration.audited(wrong=bad)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_without_forgetting_the_means_are_shares_with_one_prior_observation(
    hits: int, misses: int, right: int, wrong: int
) -> None:
    collaboration = Collaboration(forgetting=1.0)
    feed(collaboration, hits=hits, misses=misses, right=right, wrong=wrong)
    assert collaboration.hit_ratio == pytest.approx((hits + 1) / (hits + misses + 1))
    assert collaboration.error == pytest.approx(wrong / (right + wrong + 1))


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=30), st.floats(0.5, 1.0))
def test_byte_means_weigh_the_past_by_powers_of_the_forgetting(sizes: list[int], forgetting: float) -> None:
    collaboration = Collaboration(forgetting=forgetting)
    for size in sizes:
        collaboration.published(size)
        collaboration.escalated(2 * size)
    weights = forgetting ** np.arange(len(sizes))[::-1]
    assert collaboration.p2p_bytes == pytest.approx(np.average(sizes, weights=weights))
    assert collaboration.llm_bytes == pytest.approx(2 * np.average(sizes, weights=weights))


def test_while_bytes_are_unknown_it_asks() -> None:
    collaboration = Collaboration()
    assert collaboration.p2p_bytes is None
    assert collaboration.llm_bytes is None
    feed(collaboration, misses=1000)
    collaboration.published(100)
    assert collaboration.asks(Prices())
    collaboration.escalated(100)
    assert not collaboration.asks(Prices())


def test_the_decision_follows_hits_prices_and_errors() -> None:
    collaboration = Collaboration(forgetting=1.0)
    collaboration.published(100)
    collaboration.escalated(400)
    feed(collaboration, hits=2, misses=8, right=1, wrong=1, each=100)
    assert collaboration.hit_ratio == pytest.approx(0.2, abs=1e-3)
    assert not collaboration.asks(Prices())
    assert collaboration.asks(Prices(p2p_byte=0.5))
    assert collaboration.asks(Prices(llm_byte=2.0))
    feed(collaboration, hits=10, each=500)
    assert collaboration.asks(Prices())
    assert collaboration.asks(Prices(wrong_hit=100.0))
    assert not collaboration.asks(Prices(wrong_hit=1_000.0))


@pytest.mark.parametrize("forgetting", [0.0, -1.0, 1.5, math.nan])
def test_a_forgetting_that_is_no_factor_is_named(forgetting: float) -> None:
    with pytest.raises(ValueError, match="forgetting must be"):
        Collaboration(forgetting=forgetting)


@given(
    st.floats(-4.0, 0.0), st.lists(st.floats(1.0, 1e4), min_size=2, max_size=12, unique_by=lambda s: round(math.log(s)))
)
def test_the_fit_finds_the_alpha_the_points_were_made_with(log10_alpha: float, sizes: list[float]) -> None:
    alpha = 10.0**log10_alpha
    ratios = [-math.expm1(-alpha * s) for s in sizes]
    assume(any(1e-3 < r < 0.999 for r in ratios))
    assume(np.ptp(ratios) > 1e-6)
    fit = fit_hit_ratio(sizes, ratios)
    assert fit.alpha == pytest.approx(alpha, rel=1e-3)
    assert fit.r_squared == pytest.approx(1.0, abs=1e-6)
    assert fit.worst < 1e-6
    assert fit.ratio(sizes[0]) == pytest.approx(ratios[0], abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 5_000), shares), min_size=2, max_size=8), st.floats(-12.0, 2.0))
def test_no_other_alpha_is_closer_to_the_points(points: list[tuple[int, float]], log10_other: float) -> None:
    sizes, ratios = [p[0] for p in points], [p[1] for p in points]

    def squares(alpha: float) -> float:
        return sum((-math.expm1(-alpha * s) - h) ** 2 for s, h in points)

    assert squares(fit_hit_ratio(sizes, ratios).alpha) <= squares(10.0**log10_other) + 1e-3


def test_the_fit_says_when_the_curve_is_wrong() -> None:
    falling = fit_hit_ratio([10, 100, 1_000], [0.9, 0.5, 0.1])
    assert falling.r_squared < 0.0
    assert falling.worst > 0.3
    assert math.isnan(fit_hit_ratio([10, 100], [0.3, 0.3]).r_squared)


def test_nothing_or_everything_hit_is_fitted_too() -> None:
    assert fit_hit_ratio([10, 100], [0.0, 0.0]).ratio(100) == pytest.approx(0.0, abs=1e-6)
    assert fit_hit_ratio([10, 100], [1.0, 1.0]).ratio(10) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("sizes", "ratios"),
    [([], []), ([1], [0.1, 0.2]), ([0], [0.1]), ([1], [1.1]), ([1], [math.nan]), ([math.inf], [0.5])],
)
def test_points_that_cannot_be_fitted_are_refused(sizes: list[float], ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        fit_hit_ratio(sizes, ratios)


def one_hot(kinds: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.int8]]:
    return (100 * np.eye(6)[kinds]).astype(np.int8)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 7))
def test_with_one_vote_the_simulation_is_an_lru_cache(kinds: list[int], size: int) -> None:
    cache: list[int] = []
    hits = 0
    for kind in kinds:
        hits += kind in cache
        cache = [*(k for k in cache if k != kind), kind][-size:]
    found = simulate_hit_ratio(one_hot(kinds), kinds, [size], theta=0.9, votes=1)
    assert found == [hits / len(kinds)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_a_larger_lru_memory_hits_at_least_as_often(kinds: list[int]) -> None:
    found = simulate_hit_ratio(one_hot(kinds), kinds, [1, 2, 4, 8], theta=0.9, votes=1)
    assert found == sorted(found)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_the_simulation_agrees_with_a_memory_that_never_fills(seed: int, votes: int) -> None:
    rng = np.random.default_rng(seed)
    keys, tokens = rng.integers(-9, 10, (30, 2)).astype(np.int8), rng.integers(0, 2, 30).tolist()
    memory, hits = Memory(30, 2), 0
    for key, token in zip(keys, tokens, strict=True):
        match = memory.nearest(key, votes)
        hits += match is not None and match.similarity >= 0.95
        memory.add(key, token, "peer")
    assert simulate_hit_ratio(keys, tokens, [30], theta=0.95, votes=votes) == [hits / 30]


def test_an_empty_log_never_hits_and_an_uneven_one_is_refused() -> None:
    assert simulate_hit_ratio(np.zeros((0, 4), np.int8), [], [1, 2], theta=0.5, votes=1) == [0.0, 0.0]
    with pytest.raises(ValueError, match="got 1 and 0"):
        simulate_hit_ratio(np.zeros((1, 4), np.int8), [], [1], theta=0.5, votes=1)
