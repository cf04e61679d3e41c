"""The closed form is the mean of the published sampling form; every form is a share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.decoding.uncertainty import (
    K_SAMPLES,
    SAMPLE_TEMPERATURES,
    TEMPERATURE_MAX,
    UNCERTAINTIES,
    agreement,
    closed_form,
    entropy,
    k_sample,
)
from fedhlm.protocol.messages import Sampling

LOGITS = st.lists(st.floats(-50, 50), min_size=1, max_size=40)
SAMPLING = Sampling(seed=0)


def softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(z - z.max())
    return np.asarray(weights / weights.sum())


def test_closed_form_is_the_mean_of_k_sample_disagreement() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=12) * 2.0
    token = int(np.argmax(logits))
    temperatures = TEMPERATURE_MAX * (1.0 - rng.random(60_000))
    scaled = logits[None, :] / temperatures[:, None] + rng.gumbel(size=(60_000, 12))
    disagreement = float((scaled.argmax(axis=1) != token).mean())
    assert closed_form(logits, token) == pytest.approx(disagreement, abs=0.01)


@given(LOGITS, st.data())
def test_it_is_a_share_and_falls_with_the_logit(values: list[float], data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(values) - 1))
    logits = np.array(values)
    u = closed_form(logits, token)
    raised = logits.copy()
    raised[token] += 1.0
    assert 0.0 <= closed_form(raised, token) <= u + 1e-6 <= 1.0 + 1e-6


def test_certain_and_hopeless_tokens() -> None:
    logits = np.array([200.0, 0.0, 0.0])
    assert closed_form(logits, 0) == pytest.approx(0.0, abs=1e-9)
    assert closed_form(logits, 1) == pytest.approx(1.0, abs=1e-9)


@given(LOGITS, st.data(), st.integers(1, 5))
def test_agreement_is_the_softmax_at_each_temperature(values: list[float], data: st.DataObject, repeats: int) -> None:
    logits = np.array(values * repeats)
    token = data.draw(st.integers(0, len(logits) - 1))
    temperatures = data.draw(st.lists(st.floats(0.05, 2.0), min_size=1, max_size=30).map(np.array))
    expected = [softmax(logits.astype(np.float32).astype(np.float64) / t)[token] for t in temperatures]
    # float32 inside: an exponent of 100 / 0.05 is off by 1e-4 of itself, where the share is next to nothing.
    assert agreement(logits, token, temperatures) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_agreement_is_the_same_in_one_tile_and_in_many() -> None:
    logits = np.random.default_rng(1).normal(size=9_000) * 3.0
    together = agreement(logits, 5, SAMPLE_TEMPERATURES)
    alone = [float(agreement(logits, 5, SAMPLE_TEMPERATURES[i : i + 1])[0]) for i in range(K_SAMPLES)]
    assert together == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("size", [20_000, 49_152, 262_144])
@pytest.mark.parametrize("seed", range(4))
def test_a_large_vocabulary_has_the_agreement_of_the_plain_formula(size: int, seed: int) -> None:
    """Most tokens are counted in steps; no temperature's share is off by more than float32 rounds, -inf included."""
    rng = np.random.default_rng((size, seed))
    logits = (rng.normal(size=size) * rng.uniform(0.2, 4.0)).astype(np.float32)
    logits[:20] += np.float32(rng.uniform(0.0, 14.0))
    logits[20:25] = -np.inf
    for token in (int(np.argmax(logits)), 3, size // 2, int(np.argsort(logits)[-5])):
        expected = [softmax(logits.astype(np.float64) / t)[token] for t in SAMPLE_TEMPERATURES]
        assert agreement(logits, token, SAMPLE_TEMPERATURES) == pytest.approx(expected, rel=1e-3, abs=3e-6)


def test_a_certain_token_of_a_large_vocabulary_has_no_doubt() -> None:
    logits = np.full(100_000, -200.0)
    logits[7] = 0.0
    assert closed_form(logits, 7) == 0.0
    assert closed_form(logits, 8) == pytest.approx(1.0, abs=1e-9)
    assert closed_form(np.zeros(100_000), 8) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [5, 7])
def test_odd_logits_have_the_doubt_that_they_have_in_a_small_vocabulary(odd: float, token: int) -> None:
    """A model that is broken, or a draft that a mask excludes, must not fail for the size of its vocabulary."""
    doubts = []
    for size in (16_000, 20_000):
        logits = np.zeros(size, np.float32)
        logits[5] = odd
        doubts.append(closed_form(logits, token))
    assert doubts == pytest.approx(doubts[::-1], abs=1e-3)


def test_k_sample_has_the_mean_and_the_spread_of_its_twenty_draws() -> None:
    logits = np.random.default_rng(2).normal(size=30) * 2.0
    token = int(np.argmax(logits))
    right = np.array([softmax(logits / t)[token] for t in SAMPLE_TEMPERATURES])  # (20,)
    seeds = 4_000
    values = [k_sample(logits, token, Sampling(seed=s), s % 7) for s in range(seeds)]
    variance = float((right * (1.0 - right)).sum()) / K_SAMPLES**2
    assert float(np.mean(values)) == pytest.approx(1.0 - right.mean(), abs=5.0 * (variance / seeds) ** 0.5)
    assert float(np.var(values)) == pytest.approx(variance, rel=0.15)


@given(values=LOGITS)
def test_the_grid_of_k_sample_lies_within_a_step_of_the_quadrature(values: list[float]) -> None:
    """The likeliest token's doubt rises with T, and T_k ends the k-th of 20 steps of equal width."""
    logits = np.array(values)
    token = int(np.argmax(logits))
    grid = 1.0 - float(agreement(logits, token, SAMPLE_TEMPERATURES).mean())
    u = closed_form(logits, token)
    assert u - 0.01 <= grid <= u + 1.0 / K_SAMPLES + 0.01


@given(seed=st.integers(0, 2**62), spread=st.floats(0.1, 8.0))
def test_k_sample_averages_to_the_closed_form(seed: int, spread: float) -> None:
    logits = np.random.default_rng(3).normal(size=50) * spread
    token = int(np.argmax(logits))
    mean = float(np.mean([k_sample(logits, token, Sampling(seed=seed), position) for position in range(300)]))
    # The grid's step, and six standard errors of 300 x 20 coins.
    assert abs(mean - closed_form(logits, token)) < 1.0 / K_SAMPLES + 6.0 * 0.5 / (300 * K_SAMPLES) ** 0.5


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 1_000))
def test_k_sample_is_a_number_of_twentieths_and_repeats(seed: int, position: int) -> None:
    logits = np.random.default_rng(5).normal(size=50)
    u = k_sample(logits, 3, Sampling(seed=seed), position)
    assert u * K_SAMPLES == pytest.approx(round(u * K_SAMPLES))
    assert u == k_sample(logits, 3, Sampling(seed=seed), position)


def test_k_sample_differs_between_positions() -> None:
    logits = np.zeros(2)
    assert len({k_sample(logits, 0, SAMPLING, position) for position in range(50)}) > 3


@given(LOGITS)
def test_entropy_is_the_laws_over_that_of_the_uniform_law(values: list[float]) -> None:
    q = softmax(np.array(values))
    nats = -sum(float(x) * float(np.log(x)) for x in q if x > 0.0)
    most = float(np.log(len(values))) or 1.0
    assert entropy(np.array(values)) == pytest.approx(nats / most, abs=1e-9)


def test_entropy_of_even_and_of_certain_laws() -> None:
    assert entropy(np.full(100, 3.0)) == pytest.approx(1.0)
    assert entropy(np.array([500.0, 0.0])) == pytest.approx(0.0)
    assert entropy(np.array([1.0])) == 0.0


@pytest.mark.parametrize("name", sorted(UNCERTAINTIES))
@given(values=LOGITS, seed=st.integers(0, 2**63 - 1))
def test_every_form_is_a_share(name: str, values: list[float], seed: int) -> None:
    logits = np.array(values, np.float32)
    u = UNCERTAINTIES[name](logits, len(values) // 2, Sampling(seed=seed), 3)
    assert type(u) is float
    assert 0.0 <= u <= 1.0


@pytest.mark.parametrize("name", sorted(UNCERTAINTIES))
def test_every_form_knows_a_certain_from_an_open_law(name: str) -> None:
    doubt = UNCERTAINTIES[name]
    assert doubt(np.array([300.0, *[0.0] * 99]), 0, SAMPLING, 1) < 0.01
    assert doubt(np.zeros(100), 0, SAMPLING, 1) > 0.8


def test_the_softening_temperatures_reach_up_to_two() -> None:
    """The published form draws T from (0, 2]; the expectation here is a Riemann sum written without the module's constants."""
    logits = np.array([1.0, 0.5, -0.5, -2.0])
    grid = (np.arange(20_000) + 0.5) / 20_000 * 2.0
    mean = float(np.mean([softmax(logits / t)[0] for t in grid]))
    assert closed_form(logits, 0) == pytest.approx(1.0 - mean, abs=1e-3)


def test_k_sample_draws_twenty_times() -> None:
    """Twenty draws of an even coin: the share has a variance of 1/80 and takes odd twentieths as often as even ones."""
    even = np.zeros(2)
    shares = np.array([k_sample(even, 0, Sampling(seed=seed), 0) for seed in range(2_000)])
    assert float(shares.var()) == pytest.approx(1.0 / 80.0, rel=0.15)
    odd = np.rint(shares * 20.0).astype(int) % 2
    assert 0.4 < float(odd.mean()) < 0.6
