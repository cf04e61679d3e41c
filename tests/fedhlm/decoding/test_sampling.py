"""Noise is portable and Gumbel, and the same whoever draws it; laws are those of temperature and top-p."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.decoding.sampling import (
    DOUBT_STREAM,
    gumbel,
    inverse_cdf,
    law,
    perturbed_argmax,
    portable_ln,
    probability,
    scores,
    uniform,
    uniforms,
)
from fedhlm.protocol.messages import Sampling

SEEDS = st.integers(0, 2**63 - 1)
POSITIONS = st.integers(0, 131_072)


def logits(seed: int, size: int = 7) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=size) * 1.5


def test_noise_is_the_same_on_every_platform() -> None:
    """A fixed digest: a change of it changes every seeded text in the field."""
    digest = hashlib.sha256(gumbel(2**62 + 3, 77, 5_000).tobytes()).hexdigest()
    assert digest[:16] == "c15fd2aa4fb3b391"


def test_draws_of_every_stream_are_the_same_on_every_platform() -> None:
    drawn = np.array([[uniform(seed, 5, stream) for stream in range(5)] for seed in (0, 1, 2**62 + 3)])
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "510045dc18bc6dab"


@given(seed=SEEDS, position=POSITIONS, stream=st.integers(0, DOUBT_STREAM), count=st.integers(1, 40))
def test_numbers_are_those_of_a_fresh_generator(seed: int, position: int, stream: int, count: int) -> None:
    raw = np.random.Philox(key=[seed, 0], counter=[0, position, stream, 0]).random_raw(count)
    assert np.array_equal(uniforms(seed, position, stream, count), ((raw >> np.uint64(12)) + 0.5) * 2.0**-52)


def test_threads_do_not_disturb_one_another() -> None:
    def draw(seed: int) -> list[float]:
        return [uniform(seed, position, 1) for position in range(500)]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(8)))
    assert together == [draw(seed) for seed in range(8)]


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_portable_ln_is_within_two_ulp(x: float) -> None:
    ours = float(portable_ln(np.array([x]))[0])
    assert abs(ours - math.log(x)) <= 2 * max(math.ulp(math.log(x)), 1e-16)


def test_gumbel_noise_has_its_mean_and_variance() -> None:
    sample = gumbel(1, 2, 200_000)
    assert abs(sample.mean() - 0.5772) < 0.02
    assert abs(sample.var() - math.pi**2 / 6) < 0.03


@given(
    seed=SEEDS, position=POSITIONS, size=st.integers(1, 300), spread=st.sampled_from([0.0, 1e-12, 1.0, 10.0, 1e6, 1e12])
)
def test_lazy_noise_finds_the_same_winner(seed: int, position: int, size: int, spread: float) -> None:
    z = logits(size, size) * spread
    assert perturbed_argmax(z, seed, position) == int(np.argmax(z + gumbel(seed, position, size)))


@given(seed=SEEDS, size=st.integers(2, 60), ulps=st.integers(-3, 3))
def test_near_ties_are_decided_by_the_portable_noise(seed: int, size: int, ulps: int) -> None:
    """Every token's score is within some units in the last place of every other's: only exact noise tells them apart."""
    z = -gumbel(seed, 3, size)
    z[seed % size] += ulps * np.spacing(abs(z[seed % size]))
    assert perturbed_argmax(z, seed, 3) == int(np.argmax(z + gumbel(seed, 3, size)))


@given(size=st.integers(1, 60), temperature=st.sampled_from([0.0, 0.3, 1.0]), top_p=st.floats(0.1, 1.0))
def test_one_probability_is_the_laws(size: int, temperature: float, top_p: float) -> None:
    z = logits(size, size)
    whole = law(z, Sampling(seed=0, temperature=temperature, top_p=top_p))
    ours = [probability(scores(z, Sampling(0, temperature, top_p)), token) for token in range(size)]
    assert ours == pytest.approx(whole.tolist(), rel=1e-5)


@given(st.floats(0.05, 1.0), st.integers(0, 50))
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, seed: int) -> None:
    z = logits(seed, 20)
    kept = np.isfinite(scores(z, Sampling(0, 1.0, top_p)))
    full = law(z, Sampling(seed=0, temperature=1.0))
    assert full[kept].sum() >= top_p - 1e-9
    assert full[kept].min() >= full[~kept].max() if (~kept).any() else True
    assert full[kept].sum() - full[kept].min() < top_p


def test_law_sums_to_one_and_survives_huge_logits() -> None:
    z = np.array([1e4, -1e4, 0.0], np.float32)
    assert law(z, Sampling(seed=0, temperature=0.1)).sum() == pytest.approx(1.0)


@given(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_inverse_cdf_never_returns_an_impossible_token(u: float) -> None:
    q = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    assert inverse_cdf(q, u) in (1, 3)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-200, 1e-7])
@pytest.mark.parametrize("top_p", [1.0, 0.5, 5e-324])
def test_the_coldest_temperatures_are_greedy(temperature: float, top_p: float) -> None:
    """Divided by one of them, logits would become infinite and their differences undefined."""
    z = logits(3)
    log_law = scores(z, Sampling(0, temperature, top_p))
    assert np.array_equal(log_law, scores(z, Sampling(0, 0.0)))
    assert perturbed_argmax(log_law, 1, 1) == int(np.argmax(z))


@given(
    seed=st.integers(0, 50),
    size=st.integers(1, 30),
    levels=st.integers(1, 30),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    top_k=st.one_of(st.none(), st.integers(1, 40)),
    min_p=st.one_of(st.none(), st.floats(0.001, 1.0)),
    top_p=st.floats(0.05, 1.0),
)
def test_filters_apply_in_order_each_to_what_the_others_left(
    seed: int, size: int, levels: int, temperature: float, top_k: int | None, min_p: float | None, top_p: float
) -> None:
    """Written out token by token, with Python's own sort; rounded logits make equal ones."""
    z = np.round(logits(seed, size) * levels) / levels
    p = law(z, Sampling(0, temperature))
    left = sorted(range(size), key=lambda token: (-z[token], token))
    if min_p:
        left = [token for token in left if z[token] / temperature >= z.max() / temperature + math.log(min_p)]
    left = left[: top_k or size]
    total, mass, kept = p[left].sum(), 0.0, []
    for token in left:
        kept.append(token)
        mass += p[token] / total
        if top_p < 1.0 and mass >= top_p - 1e-12:
            break
    found = np.flatnonzero(np.isfinite(scores(z, Sampling(0, temperature, top_p, "gumbel", top_k, min_p))))
    near_the_edge = top_p < 1.0 and abs(mass - top_p) < 1e-9  # rounding may take one token more or less there
    assert set(found) == set(kept) or near_the_edge


@given(seed=SEEDS, top_k=st.integers(1, 8), min_p=st.floats(0.01, 1.0), top_p=st.floats(0.05, 1.0))
def test_every_draw_lies_inside_the_filters(seed: int, top_k: int, min_p: float, top_p: float) -> None:
    z = logits(seed % 97, 40)
    log_law = scores(z, Sampling(seed, 1.0, top_p, "gumbel", top_k, min_p))
    token = perturbed_argmax(log_law, seed, 5)
    p = law(z, Sampling(seed, 1.0))
    assert (p > p[token]).sum() < top_k
    assert p[token] >= min_p * p.max() * (1.0 - 1e-12)
