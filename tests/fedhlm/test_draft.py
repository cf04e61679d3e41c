"""Lattice laws sum to their resolution, stay within their bound, and pack to the formula's bits and back."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.draft import coded_bits, coded_bytes, decode, encode, quantise
from fedhlm.errors import ProtocolError


def random_law(seed: int, size: int) -> NDArray[np.float64]:
    weights = np.exp(np.random.default_rng(seed).normal(size=size) * 3.0)
    return np.asarray(weights / weights.sum())


@given(seed=st.integers(0, 10_000), size=st.integers(1, 400), k=st.integers(1, 60), resolution=st.integers(1, 300))
def test_quantise_then_code_is_identity_and_within_the_bound(seed: int, size: int, k: int, resolution: int) -> None:
    q = random_law(seed, size)
    law = quantise(q, k, resolution)
    kept = min(k, size)
    assert law.counts.sum() == resolution
    assert law.counts.min() >= 0
    assert len(law.support) == kept
    tv = 0.5 * np.abs(q - law.dense(size)).sum()
    assert tv <= (1 - q[law.support].sum()) + kept / (4 * resolution) + 1e-12
    data = encode(law, size)
    assert 8 * len(data) - coded_bits(size, k, resolution) < 8 + 1e-6
    back = decode(data, size, k, resolution)
    assert np.array_equal(back.support, law.support)
    assert np.array_equal(back.counts, law.counts)


def test_the_published_size() -> None:
    """442 bits for V = 32000, k = 30, resolution 100, less the log2 k of the draft's rank, which is its id here."""
    assert coded_bits(32_000, 30, 100) + math.log2(30) == pytest.approx(442, abs=1)


def test_every_law_of_a_small_lattice_has_its_own_number() -> None:
    size, k, resolution = 5, 3, 4
    laws = {decode(n.to_bytes(1, "little"), size, k, resolution)[1].tobytes() + bytes([n]) for n in range(150)}
    assert len(laws) == math.comb(5, 3) * math.comb(6, 2)
    for n in range(150):
        assert encode(decode(n.to_bytes(1, "little"), size, k, resolution), size) == n.to_bytes(1, "little")


@pytest.mark.parametrize("data", [b"", b"\xff", b"\0\0"])
def test_what_is_no_law_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="draft law"):
        decode(data, 5, 3, 4)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_edges_one_token_and_the_whole_vocabulary(k: int) -> None:
    q = random_law(1, 7)
    law = quantise(q, k, 1_000)
    assert decode(encode(law, 7), 7, k, 1_000).dense(7) == pytest.approx(law.dense(7))
    assert coded_bytes(7, k, 1_000) == len(encode(law, 7))


def test_sampling_before_quantising_is_biased_and_sampling_after_it_is_not() -> None:
    """Oracle 9: with the wrong order the output's law misses p by up to TV(q, q-hat); with the right one by nothing."""
    q, p = random_law(2, 9), random_law(3, 9)
    x = quantise(q, 3, 10).dense(9)

    def output(draft_law: NDArray[np.float64], tested: NDArray[np.float64]) -> NDArray[np.float64]:
        accept = np.minimum(1.0, np.divide(p, tested, out=np.ones(9), where=tested > 0))
        residual = np.maximum(0.0, p - tested)
        kept = draft_law * accept
        return np.asarray(kept + (1.0 - kept.sum()) * residual / residual.sum())

    assert output(x, x) == pytest.approx(p, abs=1e-12)
    bias = 0.5 * np.abs(output(q, x) - p).sum()
    assert 0.0 < bias <= 0.5 * np.abs(q - x).sum() + 1e-12
