"""The stated epsilon is never below what the Gaussian mechanism really costs, and noised sums are still sums."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.learning.curve import BINS, Curve
from fedhlm.learning.privacy import SENSITIVITY, noised, sigma_for

EPSILON = st.floats(0.05, 20.0)
DELTA = st.floats(1e-9, 0.1)
RELEASES = st.integers(1, 1_000)


def epsilon_of(sigma: float, releases: int, delta: float) -> float:
    """epsilon that `releases` releases with noise sigma cost at this delta; 0 < delta < 1.

    One release has rho = SENSITIVITY^2 / (2 sigma^2); rho adds up, whatever earlier releases were (Bun and Steinke,
    propositions 1.6 and 1.7); epsilon = rho + 2 sqrt(rho ln(1/delta)) (proposition 1.3).
    """
    if not sigma > 0.0:
        return math.inf
    rho = releases * SENSITIVITY**2 / (2.0 * sigma**2)
    return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))


@given(EPSILON, DELTA, RELEASES)
def test_sigma_and_epsilon_are_inverses(epsilon: float, delta: float, releases: int) -> None:
    assert epsilon_of(sigma_for(epsilon, delta, releases), releases, delta) == pytest.approx(epsilon, rel=1e-9)


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


@given(EPSILON, DELTA, RELEASES)
def test_the_promise_holds_against_the_exact_delta_of_the_gaussian_mechanism(
    epsilon: float, delta: float, releases: int
) -> None:
    """k releases of a change equal one of sqrt(k) times that change; its exact delta is known (Balle, Wang 2018)."""
    mu = SENSITIVITY * math.sqrt(releases) / sigma_for(epsilon, delta, releases)
    exact = phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)
    assert exact <= delta


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


def test_no_noise_no_privacy_and_bad_settings() -> None:
    assert epsilon_of(0.0, 1, 1e-5) == math.inf
    with pytest.raises(ValueError, match="releases must be"):
        sigma_for(1.0, 1e-5, 0)
    with pytest.raises(ValueError, match="delta must be"):
        sigma_for(1.0, 1.0, 1)
    with pytest.raises(ValueError, match="epsilon must be"):
        sigma_for(0.0, 1e-5, 1)
    with pytest.raises(ValueError, match="sigma must be"):
        noised(Curve.empty(), math.nan, np.random.default_rng(0))
