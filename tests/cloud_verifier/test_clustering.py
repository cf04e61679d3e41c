"""Agents whose tokens differ are told apart and sorted once; agents that are alike are left in peace."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cloud_verifier.clustering import (
    AGENTS_MAX,
    CLUSTERS_MAX,
    PROFILES_MAX,
    TOKENS_MAX,
    TOKENS_MIN,
    Clusterer,
    Sample,
    agglomerate,
    assign,
    distance,
    distances,
    worthwhile,
)

COLUMNS = 12
CLUSTERS = ("north", "south", "west")


def tokens(kind: int, seed: int, count: int = 200) -> Sample:
    """Gaussian tokens of population `kind`; two kinds differ by 2.5 standard deviations in each of two columns."""
    rows = np.random.default_rng((kind, seed)).normal(size=(count, COLUMNS))
    rows[:, 2 * kind : 2 * kind + 2] += 2.5
    return Sample(rows.astype(np.float32))


def points(seed: int, count: int) -> tuple[list[str], NDArray[np.float64]]:
    """Names and distances of random points on a line, within [0, 1]."""
    places = np.random.default_rng(seed).random(count)  # (n,) float64
    return [f"a{i}" for i in range(count)], np.abs(places[:, None] - places[None, :])


def partition(groups: dict[str, int]) -> set[frozenset[str]]:
    return {frozenset(n for n in groups if groups[n] == g) for g in groups.values()}


# Distance


@pytest.mark.parametrize("seed", range(4))
def test_alike_is_near_zero_and_unlike_near_one(seed: int) -> None:
    assert distance(tokens(0, seed), tokens(0, seed + 50), seed=seed) < 0.2
    assert distance(tokens(0, seed), tokens(1, seed), seed=seed) > 0.8


def test_a_sample_is_at_no_distance_from_itself() -> None:
    assert distance(tokens(0, 1), tokens(0, 1), seed=0) == 0.0


def test_a_larger_difference_is_a_larger_distance() -> None:
    base = tokens(0, 1).features
    other = tokens(0, 2).features
    far = [distance(Sample(base), Sample(other + np.float32(shift)), seed=0) for shift in (0.0, 0.2, 0.5, 1.0)]
    assert far == sorted(far)
    assert far[0] < 0.2
    assert far[1] > far[0]
    assert far[3] > 0.8


@pytest.mark.parametrize("sizes", [(200, 200), (90, 200), (1000, 300)])
def test_distance_is_symmetric_and_repeatable(sizes: tuple[int, int]) -> None:
    a, b = tokens(0, 1, sizes[0]), Sample(tokens(0, 2, sizes[1]).features + np.float32(0.2))
    there = distance(a, b, seed=3)
    assert there == distance(a, b, seed=3)
    # Reversed labels round differently, which may turn a token on the boundary, and no more.
    assert distance(b, a, seed=3) == pytest.approx(there, abs=2 / min(sizes))
    assert 0.0 <= there <= 1.0


def test_unequal_numbers_of_tokens_are_no_difference() -> None:
    assert distance(tokens(0, 1, TOKENS_MIN), tokens(0, 2, 4000), seed=0) < 0.3


def test_too_few_tokens_are_no_evidence() -> None:
    assert distance(tokens(0, 1, TOKENS_MIN - 1), tokens(1, 2), seed=0) == 0.0
    assert distance(tokens(0, 1), tokens(1, 2, 0), seed=0) == 0.0
    assert distance(tokens(0, 1, TOKENS_MIN), tokens(1, 2), seed=0) > 0.8


def test_prompts_are_not_mistaken_for_agents() -> None:
    """Runs of tokens around a centre of their own, as a prompt gives them: the agents draw centres from one law."""

    def agent(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        centres = np.repeat(rng.normal(size=(8, COLUMNS)) * 3, 25, axis=0)  # (200, f) float64
        return Sample((centres + rng.normal(size=(200, COLUMNS))).astype(np.float32))

    in_order = [distance(agent(2 * i), agent(2 * i + 1), seed=0) for i in range(6)]
    shuffled = [
        distance(*(Sample(np.random.default_rng(0).permutation(agent(2 * i + k).features)) for k in (0, 1)), seed=0)
        for i in range(6)
    ]
    assert np.mean(shuffled) > 0.4
    assert np.mean(in_order) < np.mean(shuffled) - 0.2


def test_constant_columns_and_huge_scales_do_no_harm() -> None:
    a, b = tokens(0, 1).features.copy(), tokens(1, 2).features.copy()
    a[:, 5], b[:, 5] = 7.0, 7.0
    a[:, 6] *= 1e6
    b[:, 6] *= 1e6
    assert distance(Sample(a), Sample(b), seed=0) > 0.8


def test_different_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="got 12 and 11"):
        distance(tokens(0, 1), Sample(tokens(0, 2).features[:, :-1]), seed=0)
    with pytest.raises(ValueError, match=r"got \[11, 12\]"):
        distances({"a": tokens(0, 1), "b": Sample(tokens(0, 2).features[:, :-1])}, seed=0)


def test_the_matrix_is_symmetric_and_knows_no_order() -> None:
    samples = {f"agent{i}": tokens(i % 2, i) for i in range(5)}
    names, matrix = distances(samples, seed=0)
    assert names == tuple(sorted(samples))
    assert (matrix == matrix.T).all()
    assert (np.diag(matrix) == 0).all()
    again_names, again = distances(dict(reversed(samples.items())), seed=0)
    assert again_names == names
    assert (again == matrix).all()


def test_the_number_of_agents_is_capped() -> None:
    with pytest.raises(ValueError, match=rf"\(got {AGENTS_MAX + 1}\)"):
        distances({f"a{i}": tokens(0, i, 1) for i in range(AGENTS_MAX + 1)}, seed=0)


# Groups


def naive_groups(names: list[str], matrix: NDArray[np.float64], limit: int | None, cut: float) -> set[frozenset[str]]:
    """Average linkage by its definition: again and again the two groups with the least mean distance."""
    groups = [[i] for i in range(len(names))]
    while len(groups) > 1:
        height, left, right = min(
            (float(np.mean(matrix[np.ix_(groups[i], groups[j])])), i, j) for i in range(len(groups)) for j in range(i)
        )
        if height > cut and (limit is None or len(groups) <= limit):
            break
        groups[right] += groups.pop(left)
    return {frozenset(names[i] for i in group) for group in groups}


@given(st.integers(0, 10**6), st.integers(1, 9), st.none() | st.integers(1, 5), st.floats(0.0, 1.0))
def test_grouping_is_average_linkage(seed: int, count: int, limit: int | None, cut: float) -> None:
    names, matrix = points(seed, count)
    assert partition(agglomerate(names, matrix, clusters=limit, cut=cut)) == naive_groups(names, matrix, limit, cut)


@given(st.integers(0, 10**6), st.integers(0, 9), st.none() | st.integers(1, 5), st.data())
def test_labels_do_not_depend_on_the_order(seed: int, count: int, limit: int | None, data: st.DataObject) -> None:
    names, matrix = points(seed, count)
    order = data.draw(st.permutations(range(count)))
    groups = agglomerate(names, matrix, clusters=limit, cut=0.2)
    other = matrix[np.ix_(order, order)] if order else matrix
    assert agglomerate([names[i] for i in order], other, clusters=limit, cut=0.2) == groups
    assert list(dict.fromkeys(groups[name] for name in sorted(groups))) == sorted(set(groups.values()))
    if limit is not None:
        assert len(set(groups.values())) <= limit


def test_populations_are_found_without_their_number() -> None:
    names, matrix = distances({f"agent{i}": tokens(i % 3, i) for i in range(6)}, seed=0)
    groups = agglomerate(names, matrix, clusters=None, cut=0.3)
    assert groups == {f"agent{i}": i % 3 for i in range(6)}


def test_a_matrix_that_is_none_is_refused() -> None:
    names, matrix = points(0, 3)
    lopsided = matrix.copy()
    lopsided[0, 1] += 0.5
    for wrong in (matrix[:2], lopsided, np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="must be symmetric and finite"):
            agglomerate(names, wrong, clusters=None, cut=0.3)
    with pytest.raises(ValueError, match="clusters must be at least 1, or None \\(got 0\\)"):
        agglomerate(names, matrix, clusters=0, cut=0.3)


# Names


def moved(before: dict[str, str], after: dict[str, str]) -> int:
    return sum(before[name] != after[name] for name in before)


agents = st.sampled_from([f"a{i}" for i in range(8)])


@given(st.dictionaries(agents, st.sampled_from(CLUSTERS), min_size=8), st.dictionaries(agents, st.integers(0, 2)))
def test_as_few_agents_move_as_any_naming_allows(previous: dict[str, str], groups: dict[str, int]) -> None:
    after = assign(previous, groups, CLUSTERS)
    assert after.keys() == previous.keys()
    assert all(after[name] == previous[name] for name in previous.keys() - groups.keys())
    homes = {(groups[name], after[name]) for name in groups}
    assert len(homes) == len({g for g, _ in homes}) == len({c for _, c in homes})
    fewest = min(
        moved(previous, {**previous, **{name: naming[groups[name]] for name in groups}})
        for naming in permutations(CLUSTERS)
    )
    assert moved(previous, after) == fewest


def test_newcomers_and_agents_of_unknown_clusters_get_a_home() -> None:
    after = assign({"a": "south", "b": "gone"}, {"a": 0, "b": 1, "c": 0, "d": 1}, ("north", "south"))
    assert after == {"a": "south", "b": "north", "c": "south", "d": "north"}


def test_more_groups_than_names_are_refused() -> None:
    with pytest.raises(ValueError, match="the 2 cluster names .got 3"):
        assign({}, {"a": 0, "b": 1, "c": 2}, ("north", "south"))


# Which moves pay


@given(st.integers(0, 10**6), st.integers(1, 8), st.data())
def test_every_move_brings_its_agent_nearer_by_the_margin(seed: int, count: int, data: st.DataObject) -> None:
    names, matrix = points(seed, count)
    homes = st.fixed_dictionaries({name: st.sampled_from(CLUSTERS) for name in names})
    current, proposed = data.draw(homes), data.draw(homes)
    assert worthwhile(names, matrix, current, current, margin=0.0) == {}
    assert worthwhile(names, matrix, current, proposed, margin=1.0) == {}
    moves = worthwhile(names, matrix, current, proposed, margin=0.1)
    assert all(moves[name] == proposed[name] != current[name] for name in moves)
    after = {**current, **moves}
    assert worthwhile(names, matrix, after, proposed, margin=0.1) == {}


def test_agents_follow_when_a_move_of_others_makes_their_place_a_bad_one() -> None:
    """The two alike clusters of kind 0 stay apart until kind 1 is sent into one of them."""
    kinds = {"a": 0, "b": 0, "c": 0, "d": 0, "x": 1, "y": 1}
    names = list(kinds)
    matrix = np.array([[float(kinds[i] != kinds[j]) for j in names] for i in names])  # (6, 6) float64
    current = {"a": "north", "b": "north", "c": "south", "d": "south", "x": "west", "y": "west"}
    gathered = {**current, "a": "south", "b": "south"}
    assert worthwhile(names, matrix, current, gathered, margin=0.1) == {}
    mixed = {**current, "c": "west"}
    proposed = {**gathered, "c": "south", "x": "north", "y": "north"}
    moves = worthwhile(names, matrix, mixed, proposed, margin=0.1)
    assert moves == {"a": "south", "b": "south", "c": "south", "x": "north", "y": "north"}


# The clusterer


def clusterer(**options: float) -> Clusterer:
    return Clusterer(("north", "south"), columns=COLUMNS, interval_s=10.0, **options)  # type: ignore[arg-type]


def test_identical_populations_never_move() -> None:
    state = clusterer()
    for step in range(4):
        for i in range(6):
            state.note_profile(f"agent{i}", "north" if i % 2 else "south", tokens(0, 100 * step + i))
        assert state.compute(10.0 * step) == {}


def test_mixed_populations_are_sorted_in_one_computation_and_then_stay() -> None:
    state = clusterer()
    kinds = {f"agent{i}": i // 3 for i in range(6)}
    homes = {name: "north" if i % 2 else "south" for i, name in enumerate(kinds)}
    for step in range(3):
        for i, (name, kind) in enumerate(kinds.items()):
            state.note_profile(name, homes[name], tokens(kind, 100 * step + i))
        changed = state.compute(10.0 * step)
        if step == 0:
            assert len(changed) == 2
        else:
            assert changed == {}
        homes |= changed
        assert partition({name: int(homes[name] == "north") for name in homes}) == partition(kinds)
        assert state.assignment == homes


def test_everyone_in_one_cluster_is_spread_over_the_others() -> None:
    state = clusterer()
    for i in range(5):
        state.note_profile(f"agent{i}", "north", tokens(i % 2, i))
    assert state.compute(0.0) == {"agent1": "south", "agent3": "south"}


def test_an_agent_whose_tokens_change_is_moved() -> None:
    state = clusterer()
    for i in range(6):
        state.note_profile(f"agent{i}", "north" if i < 3 else "south", tokens(i // 3, i))
    assert state.compute(0.0) == {}
    state.note_profile("agent0", "north", tokens(1, 60))
    assert state.compute(10.0) == {"agent0": "south"}


def test_a_report_from_the_old_cluster_repeats_the_assignment() -> None:
    state = clusterer()
    for i in range(4):
        state.note_profile(f"agent{i}", "north", tokens(i % 2, i))
    first = state.compute(0.0)
    assert first
    assert state.compute(1.0) == {}
    for name in first:
        state.note_profile(name, "north", tokens(int(name[-1]) % 2, 90))
    assert state.compute(2.0) == first


def test_agents_with_few_tokens_stay() -> None:
    state = clusterer()
    for i in range(4):
        state.note_profile(f"agent{i}", "north" if i < 2 else "south", tokens(i // 2, i))
    state.note_profile("stranger", "north", tokens(1, 9, TOKENS_MIN - 1))
    assert state.compute(0.0) == {}
    assert state.assignment["stranger"] == "north"


def test_a_fleet_of_none_or_one_computes_nothing() -> None:
    state = clusterer()
    assert state.compute(0.0) == {}
    state.note_profile("agent0", "north", tokens(0, 0))
    assert state.compute(1.0) == {}


def test_due_after_the_interval_and_only_with_something_new() -> None:
    state = clusterer()
    assert not state.due(0.0)
    state.note_profile("agent0", "north", tokens(0, 0))
    assert state.due(0.0)
    state.compute(0.0)
    assert not state.due(100.0)
    state.note_profile("agent0", "north", tokens(0, 1))
    assert not state.due(9.9)
    assert state.due(10.0)


@pytest.mark.parametrize("shape", [(70, COLUMNS + 1), (70,)])
def test_a_profile_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    state = clusterer()
    with pytest.raises(ValueError, match=r"features of agent0 must be finite numbers of shape \(n, 12\)"):
        state.note_profile("agent0", "north", Sample(np.zeros(shape, np.float32)))
    assert state.assignment == {}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_profile_that_is_not_finite_is_refused(value: float) -> None:
    state = clusterer()
    features = tokens(0, 0).features.copy()
    features[3, 3] = value
    with pytest.raises(ValueError, match="features of agent0"):
        state.note_profile("agent0", "north", Sample(features))
    assert not state.due(100.0)


def test_memory_is_bounded_and_forgets_the_longest_silent() -> None:
    state = clusterer()
    one = tokens(0, 0, 1)
    for i in range(PROFILES_MAX):
        state.note_profile(f"agent{i}", "north", one)
    state.note_profile("agent0", "north", one)
    state.note_profile("newcomer", "north", one)
    assert len(state.assignment) == PROFILES_MAX
    assert "agent0" in state.assignment
    assert "agent1" not in state.assignment


def test_a_profile_keeps_its_latest_tokens() -> None:
    state = clusterer()
    for i in range(4):
        state.note_profile(f"agent{i}", "north" if i < 2 else "south", tokens(i // 2, i))
    turned = np.concatenate([tokens(0, 7, 500).features, tokens(1, 8, TOKENS_MAX).features])
    state.note_profile("agent0", "north", Sample(turned))
    assert state.compute(0.0) == {"agent0": "south"}


def test_a_large_fleet_is_looked_at_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every agent is seen within a few computations, never more than AGENTS_MAX at once."""
    seen: list[set[str]] = []

    def blank(samples: dict[str, Sample], *, seed: int) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        seen.append(set(samples))
        return tuple(sorted(samples)), np.zeros((len(samples), len(samples)))

    monkeypatch.setattr("cloud_verifier.clustering.distances", blank)
    state = clusterer()
    for i in range(2 * AGENTS_MAX):
        state.note_profile(f"agent{i:03}", "north", tokens(0, i, TOKENS_MIN))
    for step in range(12):
        assert state.compute(float(step)) == {}
    assert all(len(names) == AGENTS_MAX for names in seen)
    assert len(set.union(*seen)) == 2 * AGENTS_MAX


def test_names_of_clusters_that_strangers_make_up_are_forgotten() -> None:
    clusterer = Clusterer(CLUSTERS, columns=COLUMNS)
    for number in range(3 * CLUSTERS_MAX):
        clusterer.note_profile("liar", f"made-up-{number}", tokens(0, 1, 2))
        assert len(clusterer._clusters) <= CLUSTERS_MAX
    assert set(CLUSTERS) < set(clusterer._clusters)
