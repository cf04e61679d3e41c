"""Draws over large vocabularies take short ways: each is, bit for bit, the plain sum or sort that it stands for."""

import math
from typing import Final

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.decoding.couplings import COUPLINGS, LATTICE_K, LATTICE_RESOLUTION
from fedhlm.decoding.laws import decode_full, encode_full, encode_lattice, quantise
from fedhlm.decoding.sampling import (
    DRAFT_STREAM,
    gumbel,
    inverse_cdf,
    largest,
    law,
    perturbed_argmax,
    probability,
    scores,
    uniform,
)
from fedhlm.decoding.uncertainty import SAMPLE_TEMPERATURES, agreement
from fedhlm.errors import ProtocolError
from fedhlm.protocol.messages import Sampling

SIZES: Final = (1, 2, 7, 60, 1_023, 1_025, 5_000, 16_383, 16_384, 16_385, 20_001, 40_000)
SEEDS = st.integers(0, 2**32 - 1)


def logits_of(seed: int, size: int, spread: float, steps: int) -> NDArray[np.float32]:
    """Random logits. With `steps` they are rounded, so that many are equal."""
    drawn = np.random.default_rng(seed).normal(size=size) * spread
    return (np.round(drawn * steps) / steps if steps else drawn).astype(np.float32)


LOGITS = st.builds(
    logits_of, SEEDS, st.sampled_from(SIZES), st.sampled_from([0.0, 0.3, 2.0, 12.0]), st.sampled_from([0, 1, 8])
)
SAMPLINGS = st.builds(
    Sampling,
    SEEDS,
    st.sampled_from([0.0, 0.05, 0.8, 1.0, 3.0]),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0]),
    st.just("gumbel"),
    st.sampled_from([None, 1, 2, 40, 1_000, 30_000]),
    st.sampled_from([None, 0.01, 0.3]),
)


def plain_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum())


def plain_only(x: NDArray[np.float64], ids: NDArray[np.intp]) -> NDArray[np.float64]:
    kept = np.full(x.shape, -np.inf)
    kept[ids] = x[ids]
    return kept


def plain_scores(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    if sampling.temperature == 0.0:
        return plain_only(np.zeros(wide.shape), np.array([int(np.argmax(wide))]))
    scaled = wide / sampling.temperature
    if sampling.min_p:
        scaled = plain_only(scaled, np.flatnonzero(scaled >= scaled.max() + math.log(sampling.min_p)))
    if sampling.top_k:
        scaled = plain_only(scaled, np.argsort(-scaled, kind="stable")[: sampling.top_k])
    if sampling.top_p < 1.0:
        order = np.argsort(-scaled, kind="stable")
        mass = np.cumsum(plain_softmax(scaled)[order])
        scaled = plain_only(scaled, order[: int(np.searchsorted(mass, sampling.top_p)) + 1])
    return scaled


def plain_quantile(q: NDArray[np.float64], u: float) -> int:
    cumulative = np.cumsum(q)
    return int(min(np.searchsorted(cumulative, u * cumulative[-1], side="right"), np.flatnonzero(q)[-1]))


@given(logits=LOGITS, sampling=SAMPLINGS)
def test_scores_laws_and_probabilities_are_the_plain_ones(logits: NDArray[np.float32], sampling: Sampling) -> None:
    before = logits.copy()
    expected = plain_scores(logits, sampling)
    assert np.array_equal(scores(logits, sampling), expected)
    q = plain_softmax(expected)
    assert np.array_equal(law(logits, sampling), q)
    token = int(np.argmax(q))
    assert probability(expected, token) == pytest.approx(q[token], rel=1e-5)
    assert np.array_equal(logits, before)


@given(logits=LOGITS, k=st.sampled_from([1, 2, 30, 1_000, 1_024, 1_025, 50_000]))
def test_the_largest_are_the_first_of_a_stable_sort(logits: NDArray[np.float32], k: int) -> None:
    x = logits.astype(np.float64)
    assert np.array_equal(largest(x, k), np.sort(np.argsort(-x, kind="stable")[:k]))
    some = plain_only(x, np.flatnonzero(x >= np.median(x)))
    assert np.array_equal(largest(some, k), np.sort(np.argsort(-some, kind="stable")[:k]))


@given(logits=LOGITS, u=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True), zeros=st.booleans())
@example(logits=np.zeros(3, np.float32), u=1.0 - 2.0**-53, zeros=True)
def test_the_quantile_is_the_plain_one(logits: NDArray[np.float32], u: float, zeros: bool) -> None:
    q = plain_softmax(logits.astype(np.float64))
    if zeros:
        q[q < q.max() / 2] = 0.0
        q[q.size // 2 + 1 :] = 0.0
        q[0] = q[0] or 1.0
    assert inverse_cdf(q, u) == plain_quantile(q, u)


@given(logits=LOGITS, seed=SEEDS, position=st.integers(0, 100_000))
def test_the_perturbed_winner_is_that_of_all_noise(logits: NDArray[np.float32], seed: int, position: int) -> None:
    x = logits.astype(np.float64)
    assert perturbed_argmax(x, seed, position) == int(np.argmax(x + gumbel(seed, position, x.size)))


@given(logits=LOGITS, sampling=SAMPLINGS, position=st.integers(0, 100_000))
def test_drafts_with_a_law_are_the_plain_ones(logits: NDArray[np.float32], sampling: Sampling, position: int) -> None:
    q = plain_softmax(plain_scores(logits, sampling))
    u = uniform(sampling.seed, position, DRAFT_STREAM)
    encoded = q.astype("<f2").tobytes()
    halves = q.astype("<f2").astype(np.float64)
    rounded = halves / halves.sum()
    token = plain_quantile(rounded, u)
    found = COUPLINGS["full"].draft(logits, sampling, position)
    assert (found.token, found.prob, found.law) == (token, float(rounded[token]), encoded)
    assert np.array_equal(decode_full(encoded, logits.size), rounded)
    point = quantise(q, LATTICE_K, LATTICE_RESOLUTION)
    dense = point.dense(logits.size)
    token = plain_quantile(dense, u)
    found = COUPLINGS["lattice"].draft(logits, sampling, position)
    assert (found.token, found.prob, found.law) == (token, float(dense[token]), encode_lattice(point, logits.size))


@given(logits=LOGITS)
def test_the_doubt_is_the_plain_one(logits: NDArray[np.float32]) -> None:
    token = int(np.argmin(logits))
    lead = logits - logits[token]
    with np.errstate(over="ignore"):
        sums = [np.exp(lead * c).sum() for c in np.asarray(1.0 / SAMPLE_TEMPERATURES, np.float32)]
        expected = 1.0 / np.array(sums)
    assert agreement(logits, token, SAMPLE_TEMPERATURES) == pytest.approx(expected, rel=1e-3, abs=1e-6)


EDGES: Final = [
    step * 2.0**exponent * (1.0 + nudge * 2.0**-40)
    for exponent in range(-27, 0)
    for step in (1.0, 1.5, 1.25, 1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11)
    for nudge in (-1, 0, 1)
]


@given(st.lists(st.floats(0.0, 1.0) | st.sampled_from(EDGES), min_size=1, max_size=50))
@example(EDGES)
@example([1.0, 0.0, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-25, np.nextafter(2.0**-14, 0.0)])
def test_halves_are_rounded_as_numpy_rounds_them(probabilities: list[float]) -> None:
    q = np.array(probabilities)
    assert encode_full(q) == q.astype("<f2").tobytes()


@given(
    st.lists(st.integers(0, 0xFFFF) | st.sampled_from([0, 1, 0x7BFF, 0x7C00, 0x8000, 0x8001]), min_size=1, max_size=9)
)
def test_a_law_of_halves_is_read_or_refused_as_its_numbers_say(bits: list[int]) -> None:
    data = np.array(bits, "<u2").tobytes()
    values = [math.nan if b & 0x7FFF > 0x7C00 else float(np.array(b, "<u2").view("<f2")) for b in bits]
    if all(math.isfinite(v) and v >= 0.0 for v in values) and any(values):
        wide = np.array(values)
        assert np.array_equal(decode_full(data, len(bits)), wide / wide.sum())
    else:
        with pytest.raises(ProtocolError, match="negative or non-finite probability, or no mass"):
            decode_full(data, len(bits))
