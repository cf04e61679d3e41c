"""The stated epsilon is what the Gaussian mechanism costs, no more and no less, and noised sums are still sums."""

import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.learning.curve import BINS, Curve
from fedhlm.learning.privacy import SENSITIVITY, gaussian_delta, noised, sigma_for

EPSILON = st.floats(0.05, 20.0)
DELTA = st.floats(1e-9, 0.1)
RELEASES = st.integers(1, 1_000)


@given(EPSILON, DELTA)
def test_the_noise_of_one_release_is_what_dp_accounting_calibrates(epsilon: float, delta: float) -> None:
    expected = SENSITIVITY * dp_accounting.get_sigma_gaussian(epsilon, delta)
    assert sigma_for(epsilon, delta, 1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("epsilon", "delta", "releases"), [(1.0, 1e-6, 30), (4.0, 1e-5, 200)])
def test_the_promise_of_many_releases_is_what_dp_accounting_composes(
    epsilon: float, delta: float, releases: int
) -> None:
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    noise = sigma_for(epsilon, delta, releases) / SENSITIVITY
    accountant.compose(dp_accounting.GaussianDpEvent(noise), releases)
    assert accountant.get_epsilon(delta) == pytest.approx(epsilon, rel=0.02)


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


@given(EPSILON, st.floats(0.01, 20.0))
def test_the_curve_is_that_of_balle_and_wang(epsilon: float, shift: float) -> None:
    exact = phi(shift / 2 - epsilon / shift) - math.exp(epsilon) * phi(-shift / 2 - epsilon / shift)
    assert gaussian_delta(epsilon, shift) == pytest.approx(exact, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("epsilon", [1e-6, 1.0, 1_000.0])
@pytest.mark.parametrize("delta", [1e-300, 1e-12, 0.5, 0.999])
def test_extreme_settings_get_the_smallest_noise_that_keeps_the_promise(epsilon: float, delta: float) -> None:
    sigma = sigma_for(epsilon, delta, 1)
    assert gaussian_delta(epsilon, SENSITIVITY / sigma) <= delta * (1.0 + 1e-9)
    assert gaussian_delta(epsilon, SENSITIVITY / sigma * 1.01) > delta


def test_exact_accounting_needs_a_fifth_less_noise_than_concentrated_privacy() -> None:
    """epsilon = rho + 2 sqrt(rho ln(1/delta)) with rho = releases SENSITIVITY^2 / (2 sigma^2) (Bun and Steinke)."""
    log = math.log(1e6)
    root = math.sqrt(log + 1.0) - math.sqrt(log)
    concentrated = SENSITIVITY * math.sqrt(1_000 / 2.0) / root
    assert sigma_for(1.0, 1e-6, 1_000) == pytest.approx(0.79 * concentrated, rel=0.01)


@given(EPSILON, DELTA, RELEASES)
def test_more_releases_or_a_smaller_delta_need_more_noise(epsilon: float, delta: float, releases: int) -> None:
    sigma = sigma_for(epsilon, delta, releases)
    assert sigma_for(epsilon, delta, 4 * releases) == pytest.approx(2 * sigma)
    assert sigma_for(epsilon, delta / 2, releases) > sigma
    assert sigma_for(2 * epsilon, delta, releases) < sigma


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_one_token_changes_the_sums_by_at_most_the_sensitivity(score: float, harm: float, weight: float) -> None:
    curve = Curve.empty()
    curve.see(score)
    curve.add(score, harm, weight)
    assert float(np.linalg.norm(curve.rows())) <= SENSITIVITY


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 50.0))
def test_noised_sums_are_valid_and_travel(seed: int, sigma: float) -> None:
    rng = np.random.default_rng(seed)
    curve = Curve.empty()
    for u, h in rng.random((30, 2)).tolist():
        curve.see(u)
        curve.add(u, h)
    before = curve.rows()
    result = noised(curve, sigma, rng)
    assert result.flaw() is None
    assert Curve.from_bytes(result.to_bytes()).flaw() is None
    assert np.array_equal(curve.rows(), before)


def test_without_noise_nothing_changes_and_the_same_generator_gives_the_same_noise() -> None:
    curve = Curve.empty()
    curve.see(0.2, 5.0)
    curve.add(0.2, 0.5, 3.0)
    assert np.array_equal(noised(curve, 0.0, np.random.default_rng(1)).rows(), curve.rows())
    first, second = (noised(curve, 2.0, np.random.default_rng(1)).rows() for _ in range(2))
    assert np.array_equal(first, second)


def test_noise_has_the_stated_deviation_in_every_sum() -> None:
    """Sums far from their bounds are not clipped, so the noise shows whole."""
    curve = Curve(*(np.full(BINS, level) for level in (4e3, 3e3, 2e3, 1e3)))
    rng = np.random.default_rng(2)
    noise = np.array([noised(curve, 7.0, rng).rows() - curve.rows() for _ in range(200)])  # (200, BINS, 4) float64
    assert np.abs(noise.std(axis=(0, 1)) - 7.0).max() < 0.25
    assert np.abs(noise.mean(axis=(0, 1))).max() < 0.3


def test_empty_bins_are_hidden_too() -> None:
    result = noised(Curve.empty(), 3.0, np.random.default_rng(3))
    assert (result.seen > 0.0).sum() > BINS / 4
    assert (result.weight > 0.0).sum() > BINS / 4


def test_bad_settings_are_rejected() -> None:
    with pytest.raises(ValueError, match="releases must be"):
        sigma_for(1.0, 1e-5, 0)
    with pytest.raises(ValueError, match="delta must be"):
        sigma_for(1.0, 1.0, 1)
    with pytest.raises(ValueError, match="epsilon must be"):
        sigma_for(0.0, 1e-5, 1)
    with pytest.raises(ValueError, match="sigma must be"):
        noised(Curve.empty(), math.nan, np.random.default_rng(0))
