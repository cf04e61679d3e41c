"""A Dirichlet split loses nothing, repeats itself, and is as uneven as alpha says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm_zoo.partition import dirichlet_partition, skew

TOPICS = ["World", "Sports", "Business", "Technology"]
BALANCED = [TOPICS[i % 4] for i in range(4000)]

label_lists = st.lists(st.sampled_from(TOPICS), max_size=60)
party_counts = st.integers(1, 12)
alphas = st.floats(1e-3, 1e6)
seeds = st.integers(0, 2**32)


@given(label_lists, party_counts, alphas, seeds)
def test_every_index_belongs_to_exactly_one_party(labels: list[str], parties: int, alpha: float, seed: int) -> None:
    parts = dirichlet_partition(labels, parties, alpha, seed)
    assert len(parts) == parties
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    assert all(part == sorted(part) for part in parts)


@given(label_lists, party_counts, alphas, seeds)
def test_no_party_is_empty_while_another_holds_two(labels: list[str], parties: int, alpha: float, seed: int) -> None:
    sizes = [len(part) for part in dirichlet_partition(labels, parties, alpha, seed)]
    assert min(sizes) > 0 or max(sizes) <= 1
    assert (min(sizes) > 0) == (len(labels) >= parties)


@given(label_lists, party_counts, alphas, seeds)
def test_skew_is_a_total_variation(labels: list[str], parties: int, alpha: float, seed: int) -> None:
    value = skew(labels, dirichlet_partition(labels, parties, alpha, seed))
    assert 0.0 <= value <= 1.0
    if parties == 1:
        assert value == 0.0


def test_same_seed_same_split_and_another_seed_another() -> None:
    split = dirichlet_partition(BALANCED, 10, 0.5, 7)
    assert split == dirichlet_partition(BALANCED, 10, 0.5, 7)
    assert split != dirichlet_partition(BALANCED, 10, 0.5, 8)


@pytest.mark.parametrize("seed", range(5))
def test_large_alpha_mirrors_the_whole_and_small_alpha_does_not(seed: int) -> None:
    figures = [skew(BALANCED, dirichlet_partition(BALANCED, 20, alpha, seed)) for alpha in (1e4, 10.0, 1.0, 0.1)]
    assert figures == sorted(figures)
    assert figures[0] < 0.02
    assert figures[-1] > 0.4


def test_shares_have_the_moments_of_the_dirichlet_law() -> None:
    """One label, many seeds: a party's share has mean 1/k and variance (1/k)(1 - 1/k) / (k alpha + 1)."""
    parties, alpha, items = 4, 0.5, 400
    shares = np.array(
        [[len(part) / items for part in dirichlet_partition(["a"] * items, parties, alpha, s)] for s in range(600)]
    )  # (600, 4) float64
    variance = (1 / parties) * (1 - 1 / parties) / (parties * alpha + 1)
    assert np.allclose(shares.mean(axis=0), 1 / parties, atol=5 * np.sqrt(variance / 600))
    assert np.allclose(shares.var(axis=0), variance, rtol=0.25)


def test_skew_of_one_label_per_party_is_one_minus_its_share() -> None:
    parts = [[i for i, label in enumerate(BALANCED) if label == topic] for topic in TOPICS]
    assert skew(BALANCED, parts) == pytest.approx(0.75)
    assert skew(BALANCED, [*parts, []]) == pytest.approx(0.75)


def test_one_party_gets_everything() -> None:
    assert dirichlet_partition(BALANCED, 1, 0.1, 0) == [list(range(len(BALANCED)))]


@pytest.mark.parametrize("alpha", [5e-324, 1e-200, 1e308])
def test_alphas_at_the_ends_of_the_float_range_still_split(alpha: float) -> None:
    parts = dirichlet_partition(BALANCED, 8, alpha, 0)
    assert sorted(index for part in parts for index in part) == list(range(len(BALANCED)))
    assert all(parts)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_alpha_is_named(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha must be .*got {alpha!r}"):
        dirichlet_partition(BALANCED, 4, alpha, 0)


@pytest.mark.parametrize("parties", [0, -3])
def test_an_impossible_number_of_parties_is_named(parties: int) -> None:
    with pytest.raises(ValueError, match=f"parties must be at least 1 \\(got {parties}"):
        dirichlet_partition(BALANCED, parties, 1.0, 0)
