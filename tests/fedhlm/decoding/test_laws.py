"""Every form in which a draft law travels comes back as a law, keeps its bound, and refuses what is none."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.decoding.laws import (
    coded_bytes,
    decode_full,
    decode_lattice,
    decode_top_k,
    encode_full,
    encode_lattice,
    encode_top_k,
    online_k,
    quantise,
    top_k_size,
)
from fedhlm.errors import ProtocolError


def coded_bits(vocab_size: int, k: int, resolution: int) -> float:
    """log2 C(V, k) + log2 C(resolution + k - 1, k - 1): the information in a lattice law."""
    k = min(k, vocab_size)
    return math.log2(math.comb(vocab_size, k)) + math.log2(math.comb(resolution + k - 1, k - 1))


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
    data = encode_lattice(law, size)
    assert 8 * len(data) - coded_bits(size, k, resolution) < 8 + 1e-6
    back = decode_lattice(data, size, k, resolution)
    assert np.array_equal(back.support, law.support)
    assert np.array_equal(back.counts, law.counts)


def test_the_published_size() -> None:
    """442 bits for V = 32000, k = 30, resolution 100, less the log2 k of the draft's rank, which is its id here."""
    assert coded_bits(32_000, 30, 100) + math.log2(30) == pytest.approx(442, abs=1)


def test_every_law_of_a_small_lattice_has_its_own_number() -> None:
    size, k, resolution = 5, 3, 4
    laws = {decode_lattice(n.to_bytes(1, "little"), size, k, resolution)[1].tobytes() + bytes([n]) for n in range(150)}
    assert len(laws) == math.comb(5, 3) * math.comb(6, 2)
    for n in range(150):
        assert encode_lattice(decode_lattice(n.to_bytes(1, "little"), size, k, resolution), size) == n.to_bytes(
            1, "little"
        )


@pytest.mark.parametrize("data", [b"", b"\xff", b"\0\0"])
def test_what_is_no_law_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="draft law"):
        decode_lattice(data, 5, 3, 4)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_edges_one_token_and_the_whole_vocabulary(k: int) -> None:
    q = random_law(1, 7)
    law = quantise(q, k, 1_000)
    assert decode_lattice(encode_lattice(law, 7), 7, k, 1_000).dense(7) == pytest.approx(law.dense(7))
    assert coded_bytes(7, k, 1_000) == len(encode_lattice(law, 7))


@given(seed=st.integers(0, 10_000), size=st.integers(1, 300))
def test_a_full_law_round_trips_within_float16(seed: int, size: int) -> None:
    q = random_law(seed, size)
    assert decode_full(encode_full(q), size) == pytest.approx(q, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 14, b"\xff" * 14, b"\x01\x7c" * 7, np.full(7, -1, "<f2").tobytes(), np.full(8, 0.1, "<f2").tobytes()],
)
def test_bad_full_laws_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="draft law"):
        decode_full(data, 7)


def likeliest(q: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    return np.argsort(-q, kind="stable")[:k]


@given(seed=st.integers(0, 10_000), size=st.integers(1, 400), share=st.floats(0.0, 1.0))
def test_top_k_is_rebuilt_with_an_even_tail(seed: int, size: int, share: float) -> None:
    q = random_law(seed, size)
    k = max(1, round(share * size))
    support = likeliest(q, k)
    data = encode_top_k(q, support)
    assert len(data) == 2 + 3 * k == top_k_size(data + b"more", size)
    x = decode_top_k(data, size)
    assert x.sum() == pytest.approx(1.0)
    assert x.min() >= 0.0
    outside = np.setdiff1d(np.arange(size), support)
    assert np.ptp(x[outside]) == 0.0 if outside.size else True
    # Each of the k is off by half a level, and scaling the top to 1 takes off no more than rounding put on.
    assert np.abs(x[support] - q[support]).sum() <= k / 255 + 1e-12


@pytest.mark.parametrize(("size", "k"), [(4_096, 30), (4_096, 4_096 - 1), (12, 12), (12, 11), (2, 1), (1, 1)])
def test_an_even_law_survives_every_k(size: int, k: int) -> None:
    even = np.full(size, 1.0 / size)
    x = decode_top_k(encode_top_k(even, likeliest(even, k)), size)
    assert x.sum() == pytest.approx(1.0)
    assert 0.5 * np.abs(x - even).sum() <= k / 510 + 1e-12


def test_ids_are_three_bytes_wide_beyond_two() -> None:
    q = np.zeros(70_000)
    q[69_999] = 1.0
    data = encode_top_k(q, likeliest(q, 1))
    assert data == b"\1\0" + (69_999).to_bytes(3, "little") + b"\xff"
    assert int(decode_top_k(data, 70_000).argmax()) == 69_999


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "at least 2"),
        (b"\1", "at least 2"),
        (b"\0\0", r"tokens \(got 0\)"),
        (b"\1\0\0\0", "must be 5 bytes"),
        (b"\1\0\0\0\xff\xff", "must be 5 bytes"),
        (b"\1\0\5\0\xff", r"token id must be below .*got 5"),
        (b"\2\0\3\0\3\0\x40\x40", "twice"),
        (b"\6\0" + bytes(range(6)) * 3, r"tokens \(got 6\)"),
        (b"\5\0\0\0\1\0\2\0\3\0\4\0" + bytes(5), "no mass"),
    ],
)
def test_bad_top_k_laws_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        decode_top_k(data, 5)


@given(st.binary(max_size=60), st.integers(1, 9))
def test_any_bytes_are_a_law_or_refused(data: bytes, size: int) -> None:
    try:
        x = decode_top_k(data, size)
    except ProtocolError:
        return
    assert x.shape == (size,)
    assert x.sum() == pytest.approx(1.0)
    assert x.min() >= 0.0


def u_tv(ordered: NDArray[np.float64], k: int, draft_prob: float, uncertainty: float) -> float:
    """CU-HLM eqs. 23-26, written out."""
    tail = ordered[k:]
    distance = sum(abs(float(x) - float(tail.sum()) / len(tail)) for x in tail)
    beta = min(1.0, max(0.0, 0.82 * uncertainty - 0.06))
    return distance / (
        (1.0 - draft_prob) * math.log(1.0 + math.exp(-1.0)) + draft_prob * math.log(1.0 + math.exp(-beta))
    )


@given(seed=st.integers(0, 10_000), size=st.integers(1, 120), spread=st.floats(0.0, 4.0), u=st.floats(0.0, 1.0))
def test_online_k_is_the_smallest_within_the_limit(seed: int, size: int, spread: float, u: float) -> None:
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(size=size) * spread)
    ordered = np.sort(weights / weights.sum())[::-1]
    draft_prob = float(ordered[rng.integers(size)])
    k = online_k(ordered, draft_prob=draft_prob, uncertainty=u)
    assert 1 <= k <= size
    assert u_tv(ordered, k, draft_prob, u) <= 0.1 + 1e-9
    assert all(u_tv(ordered, smaller, draft_prob, u) > 0.1 - 1e-9 for smaller in range(1, k))


def test_online_k_of_even_certain_and_heavy_tailed_laws() -> None:
    assert online_k(np.full(500, 1 / 500), draft_prob=1 / 500, uncertainty=0.9) == 1
    assert online_k(np.array([1.0, 0.0, 0.0]), draft_prob=1.0, uncertainty=0.0) == 1
    heavy = 1.0 / np.arange(1, 5_001)
    heavy /= heavy.sum()
    unsure, sure = (online_k(heavy, draft_prob=float(heavy[0]), uncertainty=u) for u in (1.0, 0.0))
    assert 30 < sure <= unsure < 5_000


def test_tokens_that_are_rounded_alike_give_way_from_the_first() -> None:
    """Halves are rounded up and the sum is repaired from the lowest id on, so every device has the same lattice law."""
    assert quantise(np.array([0.5, 0.5]), 2, 5).counts.tolist() == [2, 3]
    assert quantise(np.full(4, 0.25), 4, 6).counts.tolist() == [1, 1, 2, 2]


@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(2, 9))
def test_no_lattice_law_is_nearer(seed: int, size: int, resolution: int) -> None:
    q = random_law(seed, size)
    found = quantise(q, size, resolution).counts / resolution
    bars = itertools.combinations(range(resolution + size - 1), size - 1)
    points = (np.diff([-1, *bar, resolution + size - 1]) - 1 for bar in bars)
    best = min(float(np.abs(point / resolution - q).sum()) for point in points)
    assert float(np.abs(found - q).sum()) == pytest.approx(best, abs=1e-12)
