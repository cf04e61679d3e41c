"""A few liars move a pooled curve by a bounded amount; without liars and below `enough` clients pooling is addition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.learning.curve import BINS, Curve, isotonic
from fedhlm.learning.robust import NEAR, capped, pool, robust_mean, trimmed_count, winsorised

HUGE = 1e12


def honest(rng: np.random.Generator, bins: int = 4) -> Curve:
    curve = Curve.empty()
    curve.weight[:bins] = rng.uniform(0.1, 30.0, bins)
    curve.harm[:bins] = curve.weight[:bins] * rng.uniform(0.2, 0.4, bins)
    curve.square[:bins] = curve.harm[:bins] * rng.uniform(0.5, 1.0, bins)
    curve.seen[:bins] = rng.uniform(1.0, 90.0, bins)
    return curve


def of_size(curve: Curve, size: float) -> Curve:
    factor = size / curve.total_weight
    return Curve(curve.weight * factor, curve.weight * factor, curve.harm * factor, curve.square * factor)


def liar(rng: np.random.Generator, bins: int = 4) -> Curve:
    """Any valid sums: all harm or none, vast or tiny weight."""
    curve = Curve.empty()
    curve.weight[:bins] = rng.choice([1e-9, 1.0, 1e9], bins)
    curve.harm[:bins] = curve.weight[:bins] * rng.choice([0.0, 0.5, 1.0], bins)
    curve.square[:bins] = curve.harm[:bins] * rng.choice([0.0, 1.0], bins)
    curve.seen[:bins] = rng.choice([0.0, 1e9], bins)
    return curve


def ratios(curves: list[Curve], bins: int = 4) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array([c.harm[:bins] / c.weight[:bins] for c in curves])  # (n, bins) float64


@given(st.integers(0, 2**32 - 1), st.integers(5, 15), st.sampled_from([0.1, 0.2, 0.35, 0.5]), st.data())
def test_liars_up_to_the_trimmed_count_leave_every_ratio_in_the_honest_range(
    seed: int, n: int, trim: float, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    f = data.draw(st.integers(0, trimmed_count(n, trim)))
    good = [honest(rng) for _ in range(n - f)]
    everyone = {f"h{i}": c for i, c in enumerate(good)} | {f"l{i}": liar(rng) for i in range(f)}
    pooled = pool(everyone, weight_cap=50.0, trim=trim).curve
    assert pooled.flaw() is None
    got = pooled.harm[:4] / pooled.weight[:4]
    assert (got >= ratios(good).min(axis=0) - 1e-9).all()
    assert (got <= ratios(good).max(axis=0) + 1e-9).all()
    assert (pooled.harm[:4] ** 2 <= pooled.square[:4] * pooled.weight[:4] * (1 + 1e-9)).all()


def test_one_liar_more_than_the_trimmed_count_can_leave_the_honest_range() -> None:
    rng = np.random.default_rng(0)
    everyone = {f"h{i}": honest(rng) for i in range(6)}
    shout = Curve(np.ones(BINS), np.ones(BINS), np.ones(BINS), np.ones(BINS))
    one, two = ({f"l{i}": shout for i in range(k)} for k in (1, 2))
    assert (trimmed_count(7, 0.15), trimmed_count(8, 0.15)) == (1, 1)
    mild = pool(everyone | one, weight_cap=50.0, trim=0.15).curve
    gross = pool(everyone | two, weight_cap=50.0, trim=0.15).curve
    top = ratios(list(everyone.values())).max(axis=0)
    assert (mild.harm[:4] / mild.weight[:4] <= top).all()
    assert (gross.harm[:4] / gross.weight[:4] > mild.harm[:4] / mild.weight[:4]).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3), st.floats(0.5, 50.0))
def test_where_sums_are_added_the_cap_bounds_what_liars_move(seed: int, n: int, f: int, cap: float) -> None:
    rng = np.random.default_rng(seed)
    good = {f"h{i}": honest(rng) for i in range(n)}
    bad = {f"l{i}": liar(rng) for i in range(f)}
    clean = pool(good, weight_cap=cap, trim=0.5, enough=99).curve
    dirty = pool(good | bad, weight_cap=cap, trim=0.5, enough=99).curve
    moved = np.abs(dirty.harm[:4] / dirty.weight[:4] - clean.harm[:4] / clean.weight[:4])
    assert (moved <= f * cap / (clean.weight[:4] + f * cap) + 1e-9).all()
    assert (dirty.weight - clean.weight <= f * cap * (1 + 1e-9)).all()
    assert (dirty.seen - clean.seen <= f * cap * (1 + 1e-9)).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 16), st.data())
def test_no_liar_weighs_more_than_the_largest_honest_client_allows(seed: int, n: int, data: st.DataObject) -> None:
    """Fewer than half lie: the median is between two honest ones. Of two one may lie: then it is the smaller of both."""
    rng = np.random.default_rng(seed)
    f = data.draw(st.integers(0, max(1 if n == 2 else 0, (n - 1) // 2)))
    good = {f"h{i}": honest(rng) for i in range(n - f)}
    bad = {f"l{i}": liar(rng) for i in range(f)}
    dirty = pool(good | bad, weight_cap=HUGE, trim=0.1, enough=99).curve
    for name in ("weight", "seen"):
        sizes = [float(getattr(curve, name).sum()) for curve in good.values()]
        honest_sum = min(sum(sizes), n * NEAR * max(sizes))
        assert getattr(dirty, name).sum() <= (honest_sum + f * NEAR * max(sizes)) * (1 + 1e-9)


def test_a_client_of_many_agents_may_weigh_as_much_as_they_do() -> None:
    small, large = (of_size(honest(np.random.default_rng(1)), size) for size in (100.0, 900.0))
    everyone = {"one": small, "nine": large}
    alone = pool(everyone, weight_cap=HUGE, trim=0.1).curve
    counted = pool(everyone, weight_cap=HUGE, trim=0.1, agents={"nine": 9}).curve
    assert alone.total_weight == pytest.approx(100.0 + NEAR * 100.0)
    assert counted.total_weight == pytest.approx(1_000.0)


@given(st.lists(st.floats(0.0, 1.0), min_size=5, max_size=20), st.data())
def test_winsorised_values_stay_among_the_honest(good: list[float], data: st.DataObject) -> None:
    bad = data.draw(st.lists(st.sampled_from([-1e9, 0.0, 1.0, 1e9]), max_size=2))
    trim = 0.3
    values = winsorised([*good, *bad], trim=trim)
    assert len(bad) <= trimmed_count(len(values), trim) or len(bad) > 1
    if len(bad) <= trimmed_count(len(values), trim):
        assert min(good) <= min(values) <= max(values) <= max(good)
    assert winsorised(good[:4], trim=0.5) == good[:4]


@given(st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_below_enough_clients_of_like_size_and_under_the_cap_pooling_is_addition(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    everyone = {f"h{i}": of_size(honest(rng), rng.uniform(50.0, 190.0)) for i in range(n)}
    pooled = pool(everyone, weight_cap=HUGE, trim=0.2)
    assert pooled.refused == ()
    np.testing.assert_allclose(pooled.curve.rows(), sum(everyone.values(), Curve.empty()).rows())


def test_equal_clients_keep_their_curve_and_silent_ones_add_nothing() -> None:
    curve = honest(np.random.default_rng(3))
    everyone = {f"h{i}": curve for i in range(7)}
    pooled = pool(everyone, weight_cap=HUGE, trim=0.3).curve
    np.testing.assert_allclose(pooled.rows(), curve.scaled(7.0).rows())
    silent = {f"s{i}": Curve.empty() for i in range(20)}
    np.testing.assert_array_equal(pool(everyone | silent, weight_cap=HUGE, trim=0.3).curve.rows(), pooled.rows())


def test_a_moment_below_the_squared_ratio_does_not_make_the_pooled_variance_negative() -> None:
    curve = Curve.empty()
    curve.weight[0], curve.harm[0], curve.square[0] = 10.0, 5.0, 0.0
    pooled = pool({f"l{i}": curve for i in range(5)}, weight_cap=HUGE, trim=0.2).curve
    assert (pooled.weight[0], pooled.harm[0], pooled.square[0]) == (50.0, 25.0, 12.5)


def test_the_order_of_arrival_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    everyone = {f"h{i}": honest(rng) for i in range(8)}
    backwards = dict(reversed(everyone.items()))
    one, two = (pool(x, weight_cap=20.0, trim=0.2).curve.rows() for x in (everyone, backwards))
    assert np.array_equal(one, two)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1e3))
def test_a_capped_client_keeps_its_ratios_but_not_its_weight(seed: int, cap: float) -> None:
    curve = honest(np.random.default_rng(seed))
    small = capped(curve, cap)
    assert small.total_weight <= cap * (1 + 1e-12)
    assert small.total_seen <= cap * (1 + 1e-12)
    np.testing.assert_allclose(small.harm[:4] / small.weight[:4], curve.harm[:4] / curve.weight[:4])
    if curve.total_weight <= cap:
        assert np.array_equal(small.harm, curve.harm)


def broken(**sums: float) -> Curve:
    curve = honest(np.random.default_rng(5))
    for name, value in sums.items():
        getattr(curve, name)[2] = value
    return curve


def test_impossible_contributions_are_refused_by_name_and_do_not_count() -> None:
    rng = np.random.default_rng(6)
    good = {f"h{i}": honest(rng) for i in range(5)}
    bad = {
        "nan": broken(harm=float("nan")),
        "inf": broken(weight=float("inf")),
        "negative": broken(seen=-1.0),
        "harm": broken(harm=1e6),
        "square": broken(square=29.0),
        "shape": Curve(*np.zeros((4, BINS + 1))),
    }
    pooled = pool(good | bad, weight_cap=50.0, trim=0.2)
    assert pooled.refused == tuple(sorted(bad))
    assert np.array_equal(pooled.curve.rows(), pool(good, weight_cap=50.0, trim=0.2).curve.rows())


def rare_harm(rng: np.random.Generator, tokens: int, trim: float) -> float:
    """Mean over 100 fleets of the pooled ratio of 20 honest clients whose tokens do harm 1 with probability 0.1."""
    found = []
    for harmful in rng.binomial(tokens, 0.1, (100, 20)):
        curve = [Curve.empty() for _ in harmful]
        for one, harms in zip(curve, harmful.tolist(), strict=True):
            one.weight[5], one.harm[5], one.square[5] = tokens, harms, harms
        pooled = pool({f"h{i}": one for i, one in enumerate(curve)}, weight_cap=HUGE, trim=trim).curve
        found.append(pooled.harm[5] / pooled.weight[5])
    return float(np.mean(found))


def test_trimming_underrates_rare_harm_when_clients_have_few_tokens_as_documented() -> None:
    rng = np.random.default_rng(7)
    assert [rare_harm(rng, 3, trim) for trim in (0.0, 0.2, 0.5)] == pytest.approx([0.1, 0.05, 0.01], abs=0.015)
    assert [rare_harm(rng, 10, trim) for trim in (0.0, 0.2, 0.5)] == pytest.approx([0.1, 0.09, 0.09], abs=0.015)


def test_nobody_gives_an_empty_curve() -> None:
    pooled = pool({}, weight_cap=1.0, trim=0.2)
    assert not pooled.curve.rows().any()
    assert (isotonic(pooled.curve) == 1.0).all()
    assert pool({"a": broken(seen=-1.0)}, weight_cap=1.0, trim=0.2, enough=0).refused == ("a",)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.0, 0.5), st.data())
def test_robust_mean_stays_in_the_honest_range(good: list[float], trim: float, data: st.DataObject) -> None:
    bad = data.draw(st.lists(st.sampled_from([0.0, 1.0, 1e9, -1e9, float("nan"), float("inf")]), max_size=8))
    finite = sum(np.isfinite(x) for x in bad)
    if finite <= trimmed_count(len(good) + finite, trim):
        got = robust_mean([*good, *bad], trim=trim)
        assert got is not None
        assert min(good) <= got <= max(good)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_robust_mean_ends_are_the_mean_and_the_median(values: list[float]) -> None:
    assert robust_mean(values, trim=0.0) == pytest.approx(np.mean(values), abs=1e-12)
    assert robust_mean(values, trim=0.5) == pytest.approx(np.median(values), abs=1e-12)


def test_robust_mean_of_nothing_and_bad_settings() -> None:
    assert robust_mean([], trim=0.5) is None
    assert robust_mean([float("nan")], trim=0.5) is None
    with pytest.raises(ValueError, match="trim must be"):
        robust_mean([0.1], trim=0.6)
    with pytest.raises(ValueError, match="weight_cap"):
        pool({}, weight_cap=0.0, trim=0.1)
