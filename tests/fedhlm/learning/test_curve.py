"""Per-bin sums: they add, survive the wire, refuse the impossible, and their fit is monotone and never optimistic."""

import itertools
import struct

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.errors import ProtocolError
from fedhlm.learning.curve import BINS, Curve, affine, bin_of, correlation, isotonic, midpoints, shrunk, upper_edges

UNIT = st.floats(0.0, 1.0)
TOKENS = st.lists(st.tuples(UNIT, UNIT, st.floats(0.0, 20.0)), max_size=60)


def curve_of(tokens: list[tuple[float, float, float]]) -> Curve:
    curve = Curve.empty()
    for score, harm, weight in tokens:
        curve.see(score)
        curve.add(score, harm, weight)
    return curve


@given(UNIT)
def test_a_bin_holds_exactly_the_scores_up_to_its_upper_edge(score: float) -> None:
    j, edges = bin_of(score), upper_edges()
    assert score <= edges[j]
    assert j == 0 or score > edges[j - 1]


def test_edge_scores() -> None:
    assert [bin_of(0.0), bin_of(1.0), bin_of(-1e-17), bin_of(1.5)] == [0, BINS - 1, 0, BINS - 1]
    assert [bin_of(float(edge)) for edge in upper_edges()] == list(range(BINS))
    with pytest.raises(ValueError, match="score must be"):
        bin_of(float("nan"))


@pytest.mark.parametrize(("harm", "weight"), [(-0.1, 1.0), (1.1, 1.0), (float("nan"), 1.0), (0.5, -1.0), (0.5, 1e999)])
def test_impossible_tokens_are_refused(harm: float, weight: float) -> None:
    curve = Curve.empty()
    with pytest.raises(ValueError, match="must be"):
        curve.add(0.5, harm, weight)
    assert not curve.rows().any()


@given(TOKENS, TOKENS)
def test_sums_of_clients_equal_the_sums_of_all_tokens(
    a: list[tuple[float, float, float]], b: list[tuple[float, float, float]]
) -> None:
    np.testing.assert_allclose((curve_of(a) + curve_of(b)).rows(), curve_of(a + b).rows(), rtol=1e-12)
    silent = curve_of(a) + Curve.empty()
    assert np.array_equal(silent.rows(), curve_of(a).rows())


def test_a_copy_and_a_decayed_curve_leave_the_original_alone() -> None:
    curve = curve_of([(0.3, 0.5, 2.0)])
    before = curve.rows()
    curve.copy().add(0.3, 1.0)
    half = curve.decayed(0.5)
    half.see(0.9)
    assert np.array_equal(curve.rows(), before)
    assert (half.total_weight, curve.total_weight, curve.total_seen) == (1.0, 2.0, 1.0)


@given(TOKENS, st.floats(0.0, 1.0))
def test_bytes_round_trip_to_float32_and_stay_valid(tokens: list[tuple[float, float, float]], factor: float) -> None:
    curve = curve_of(tokens).decayed(factor)
    data = curve.to_bytes()
    back = Curve.from_bytes(data)
    np.testing.assert_allclose(back.rows(), curve.rows(), rtol=1e-6, atol=1e-37)
    assert back.to_bytes() == data
    used = int(curve.rows().astype(np.float32).any(axis=1).sum())
    assert len(data) == 8 + 16 * used


@given(st.binary(max_size=200))
def test_any_bytes_are_a_valid_curve_or_a_protocol_error(data: bytes) -> None:
    try:
        curve = Curve.from_bytes(data)
    except ProtocolError:
        return
    assert curve.flaw() is None
    assert (curve.square <= curve.harm).all()
    assert (curve.harm <= curve.weight).all()


@pytest.mark.parametrize(
    "row",
    [
        (1.0, float("nan"), 0.0, 0.0),
        (float("inf"), 1.0, 0.0, 0.0),
        (-1.0, 1.0, 0.5, 0.2),
        (1.0, 1.0, -0.5, 0.2),
        (1.0, 1.0, 1.1, 0.2),
        (1.0, 1.0, 0.5, 0.6),
        (1e38, 1.0, 0.5, 0.2),
    ],
)
def test_impossible_sums_are_refused(row: tuple[float, float, float, float]) -> None:
    with pytest.raises(ProtocolError, match="curve"):
        Curve.from_bytes(b"\x01" + bytes(7) + struct.pack("<4f", *row))


@pytest.mark.parametrize("data", [b"", bytes(7), bytes(9), b"\x03" + bytes(7 + 16)])
def test_a_wrong_length_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        Curve.from_bytes(data)


def min_max_isotonic(harm: NDArray[np.float64], weight: NDArray[np.float64]) -> list[float]:
    """The min-max formula of isotonic regression: an oracle that shares nothing with pooling."""
    n = len(harm)
    return [
        max(min(harm[a : b + 1].sum() / weight[a : b + 1].sum() for b in range(j, n)) for a in range(j + 1))
        for j in range(n)
    ]


@given(TOKENS)
def test_isotonic_equals_the_min_max_formula_on_observed_bins(tokens: list[tuple[float, float, float]]) -> None:
    curve = curve_of([(s, h, w) for s, h, w in tokens if w > 1e-3])
    used = np.flatnonzero(curve.weight)
    assume(used.size > 0)
    expected = min_max_isotonic(curve.harm[used], curve.weight[used])
    np.testing.assert_allclose(isotonic(curve)[used], expected, atol=1e-9)


@given(TOKENS)
def test_isotonic_is_monotone_in_range_and_never_optimistic_in_empty_bins(
    tokens: list[tuple[float, float, float]],
) -> None:
    curve = curve_of(tokens)
    m = isotonic(curve)
    assert m.shape == (BINS,)
    assert (np.diff(m) >= 0.0).all()
    assert m.min() >= 0.0
    assert m.max() <= 1.0
    for j in np.flatnonzero(curve.weight == 0.0):
        right = np.flatnonzero(curve.weight[j:])
        assert m[j] == (m[j + right[0]] if right.size else 1.0)


def test_nothing_observed_means_harm_everywhere() -> None:
    assert (isotonic(Curve.empty()) == 1.0).all()
    assert (shrunk(Curve.empty(), Curve.empty(), 5.0) == 1.0).all()
    assert affine(Curve.empty()) == (0.0, 1.0)
    assert correlation(Curve.empty()) == 0.0


@given(TOKENS, TOKENS, st.floats(0.0, 50.0))
def test_shrinkage_is_monotone_and_its_ends_are_own_and_cluster(
    own: list[tuple[float, float, float]], cluster: list[tuple[float, float, float]], kappa: float
) -> None:
    k, c = curve_of(own), curve_of(cluster)
    m = shrunk(k, c, kappa)
    assert (np.diff(m) >= 0.0).all()
    assert np.array_equal(shrunk(k, c, 0.0), isotonic(k))
    np.testing.assert_allclose(shrunk(k, c, 1e9), isotonic(c), atol=1e-4)
    np.testing.assert_allclose(shrunk(Curve.empty(), c, kappa + 1.0), isotonic(c), atol=1e-12)


def test_shrinkage_by_hand() -> None:
    own, cluster = curve_of([(1.0, 0.0, 3.0)]), curve_of([(1.0, 0.8, 10.0)])
    m = shrunk(own, cluster, 1.0)
    # 63 bins of pseudo-weight 1 at 0.8, then one of weight 4 at 0.2: all are pooled into one block.
    assert m[0] == m[-1] == pytest.approx((63 * 0.8 + 4 * 0.2) / 67)


@given(
    st.floats(-1.0, 1.0), st.floats(0.0, 1.0), st.lists(st.integers(0, BINS - 1), min_size=2, max_size=20, unique=True)
)
def test_affine_recovers_a_line_and_its_correlation_is_perfect(slope: float, at_half: float, bins: list[int]) -> None:
    assume(abs(slope) > 0.01)
    line = at_half + slope * (midpoints() - 0.5)
    assume(bool(((line[bins] >= 0.0) & (line[bins] <= 1.0)).all()))
    curve = Curve.empty()
    for j in bins:
        curve.add(float(midpoints()[j]), float(line[j]), 1.0 + j)
    a, b = affine(curve)
    assert a == pytest.approx(slope, abs=1e-9)
    assert b == pytest.approx(at_half - slope / 2, abs=1e-9)
    if np.ptp(bins) > 3:
        assert correlation(curve) == pytest.approx(np.sign(slope), abs=1e-4)


def test_correlation_equals_numpy_on_binned_scores() -> None:
    rng = np.random.default_rng(3)
    score = rng.random(400)
    harm = (rng.random(400) < score).astype(float)
    curve = Curve.empty()
    for s, h in zip(score.tolist(), harm.tolist(), strict=True):
        curve.add(s, h)
    binned = [float(midpoints()[bin_of(s)]) for s in score.tolist()]
    assert correlation(curve) == pytest.approx(np.corrcoef(binned, harm)[0, 1], abs=1e-10)


def test_a_single_bin_has_no_slope() -> None:
    curve = curve_of([(0.5, 0.25, 1.0), (0.5, 0.75, 1.0)])
    assert affine(curve) == (0.0, 0.5)
    assert correlation(curve) == 0.0


def test_isotonic_brute_force_on_three_bins() -> None:
    """No monotone triple on a grid fits better than the isotonic fit."""
    curve = curve_of([(0.1, 0.9, 1.0), (0.5, 0.2, 2.0), (0.9, 0.6, 1.0)])
    used = np.flatnonzero(curve.weight)
    ratio, weight = curve.harm[used] / curve.weight[used], curve.weight[used]
    grid = itertools.combinations_with_replacement(np.linspace(0.0, 1.0, 61), 3)
    best = min(float(weight @ (np.array(m) - ratio) ** 2) for m in grid)
    assert float(weight @ (isotonic(curve)[used] - ratio) ** 2) <= best + 1e-12
