"""Noise is portable and Gumbel; every coupling keeps its promise about the target law."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.errors import ProtocolError
from fedhlm.messages import Sampling
from fedhlm.sampling import (
    COUPLINGS,
    decode_full_law,
    encode_full_law,
    gumbel,
    inverse_cdf,
    law,
    perturbed_argmax,
    portable_ln,
    rejection_probability,
    scores,
)

V = 7
DRAWS = 5_000
CHI2_DF6_1E5 = 33.1  # a chi-square with 6 degrees of freedom exceeds this once in 100,000 runs


def logits(seed: int, size: int = V) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=size) * 1.5


def test_noise_is_the_same_on_every_platform() -> None:
    """A fixed digest: a change of it changes every seeded text in the field."""
    digest = hashlib.sha256(gumbel(2**62 + 3, 77, 5_000).tobytes()).hexdigest()
    assert digest[:16] == "c15fd2aa4fb3b391"


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_portable_ln_is_within_two_ulp(x: float) -> None:
    ours = float(portable_ln(np.array([x]))[0])
    assert abs(ours - math.log(x)) <= 2 * max(math.ulp(math.log(x)), 1e-16)


def test_gumbel_noise_has_its_mean_and_variance() -> None:
    sample = gumbel(1, 2, 200_000)
    assert abs(sample.mean() - 0.5772) < 0.02
    assert abs(sample.var() - math.pi**2 / 6) < 0.03


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 131_072), size=st.integers(1, 300))
def test_lazy_noise_finds_the_same_winner(seed: int, position: int, size: int) -> None:
    z = logits(size, size)
    assert perturbed_argmax(z, seed, position) == int(np.argmax(z + gumbel(seed, position, size)))


@pytest.mark.parametrize("name", ["gumbel", "full", "lattice"])
@pytest.mark.parametrize("draft_there", [True, False])
def test_output_follows_the_target_law(name: str, draft_there: bool) -> None:
    q, p = logits(1), logits(2)
    coupling = COUPLINGS[name]
    counts = np.zeros(V)
    for position in range(DRAWS):
        sampling = Sampling(seed=11, temperature=0.9, coupling=name)
        draft = coupling.draft(q, sampling, position)
        given = (draft.token, draft.law) if draft_there else (None, b"")
        counts[coupling.settle(p, sampling, position, *given)] += 1
    expected = law(p, Sampling(seed=0, temperature=0.9)) * DRAWS
    assert ((counts - expected) ** 2 / expected).sum() < CHI2_DF6_1E5


def test_gumbel_drafts_agree_at_least_as_often_as_the_bound() -> None:
    q, p = logits(1), logits(2)
    sampling = [Sampling(seed=s) for s in range(4_000)]
    coupling = COUPLINGS["gumbel"]
    hits = sum(coupling.draft(q, s, 0).token == coupling.settle(p, s, 0, None, b"") for s in sampling)
    tv = 0.5 * np.abs(law(q, sampling[0]) - law(p, sampling[0])).sum()
    assert hits / len(sampling) >= (1 - tv) / (1 + tv) - 0.03


@pytest.mark.parametrize("name", sorted(COUPLINGS))
def test_temperature_zero_emits_the_likeliest_token(name: str) -> None:
    q, p = logits(3), logits(4)
    sampling = Sampling(seed=5, temperature=0.0, coupling=name)
    draft = COUPLINGS[name].draft(q, sampling, 9)
    assert draft.token == int(np.argmax(q))
    assert COUPLINGS[name].settle(p, sampling, 9, draft.token, draft.law) == int(np.argmax(p))


@given(st.floats(0.05, 1.0), st.integers(0, 50))
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, seed: int) -> None:
    z = logits(seed, 20)
    kept = np.isfinite(scores(z, 1.0, top_p))
    full = law(z, Sampling(seed=0, temperature=1.0))
    assert full[kept].sum() >= top_p - 1e-9
    assert full[kept].min() >= full[~kept].max() if (~kept).any() else True
    assert full[kept].sum() - full[kept].min() < top_p


def test_law_sums_to_one_and_survives_huge_logits() -> None:
    z = np.array([1e4, -1e4, 0.0], np.float32)
    assert law(z, Sampling(seed=0, temperature=0.1)).sum() == pytest.approx(1.0)


def test_full_law_round_trips_within_float16() -> None:
    q = law(logits(6), Sampling(seed=0))
    assert np.allclose(decode_full_law(encode_full_law(q), V), q, atol=1e-3)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * (2 * V), b"\xff" * (2 * V), np.full(V, -1, "<f2").tobytes(), np.full(V + 1, 0.1, "<f2").tobytes()],
)
def test_bad_draft_laws_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="draft law"):
        decode_full_law(data, V)


@given(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_inverse_cdf_never_returns_an_impossible_token(u: float) -> None:
    q = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    assert inverse_cdf(q, u) in (1, 3)


def test_rejection_probability_is_equation_three() -> None:
    assert rejection_probability(0.5, 0.25) == 0.5
    assert rejection_probability(0.25, 0.5) == 0.0
    assert rejection_probability(0.0, 0.5) == 0.0
