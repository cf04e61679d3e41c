"""The memory is an LRU that only unanimous neighbours answer from; the centroid rule is eqs. (9)-(10) with its gaps closed."""

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from fedhlm.errors import ProtocolError
from fedhlm.peers.neighbours import Centroid, Match, Memory, Origin

DIMS = 4
CAPACITY = 5

Entry = tuple[tuple[int, ...], int, str]  # key, token, origin

# Few values and few tokens, so that equal keys, ties and agreement are common.
components = st.lists(st.sampled_from((-128, -3, 0, 3, 127)), min_size=DIMS, max_size=DIMS).map(tuple)
tokens = st.integers(0, 2)
origins: st.SearchStrategy[Origin] = st.sampled_from(("peer", "neighbour"))
entries = st.tuples(components, tokens, origins)


def key_of(values: Any) -> NDArray[np.int8]:
    return np.array(values, np.int8)


def cosine(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    x, y = np.array(a, float), np.array(b, float)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


class Model:
    """The memory as a plain list, least recently used first."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, values: tuple[int, ...], token: int, origin: str) -> None:
        if not any(values):
            return
        known = [e for e in self.entries if e[:2] == (values, token)]
        self.entries = [e for e in self.entries if e not in known]
        origin = "peer" if any(e[2] == "peer" for e in known) else origin
        self.entries = [*self.entries, (values, token, origin)][-CAPACITY:]

    def nearest(self, values: tuple[int, ...], votes: int, theta: float) -> Match | None:
        if not any(values) or len(self.entries) < votes:
            return None
        similar = [cosine(values, e[0]) for e in self.entries]
        last = sorted(similar, reverse=True)[votes - 1]
        voters = [e for e, s in zip(self.entries, similar, strict=True) if s >= last - 1e-6]
        if len({e[1] for e in voters}) > 1:
            return None
        if last >= theta:
            self.entries = [e for e in self.entries if e not in voters] + voters
        return Match(voters[0][1], last, "peer" if all(e[2] == "peer" for e in voters) else "neighbour")


def held(memory: Memory) -> list[Entry]:
    _, _, dims, keys, found, peers = msgspec.msgpack.decode(memory.snapshot())
    rows = np.frombuffer(keys, np.int8).reshape(-1, dims).tolist()
    return [(tuple(k), t, "peer" if p else "neighbour") for k, t, p in zip(rows, found, peers, strict=True)]


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(CAPACITY, DIMS)
        self.model = Model()

    @rule(entry=entries)
    def add(self, entry: tuple[tuple[int, ...], int, Origin]) -> None:
        values, token, origin = entry
        self.memory.add(key_of(values), token, origin)
        self.model.add(values, token, origin)

    @rule(values=components, votes=st.integers(1, 3), theta=st.sampled_from((-1.0, 0.45, 0.83)))
    def nearest(self, values: tuple[int, ...], votes: int, theta: float) -> None:
        found = self.memory.nearest(key_of(values), votes, theta=theta)
        expected = self.model.nearest(values, votes, theta)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert (found.token, found.origin) == (expected.token, expected.origin)
            assert found.similarity == pytest.approx(expected.similarity, abs=1e-6)
            assert found.similarity <= 1.0

    @rule()
    def restart(self) -> None:
        self.memory = Memory.restore(self.memory.snapshot(), CAPACITY, DIMS)

    @invariant()
    def same_entries_in_the_same_order(self) -> None:
        assert held(self.memory) == self.model.entries
        assert self.memory.size == len(self.model.entries) <= self.memory.capacity


TestMemoryIsItsModel = MemoryMachine.TestCase


@given(st.lists(entries, max_size=12), components, st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_order_of_arrival_decides_nothing(
    given_entries: list[tuple[tuple[int, ...], int, Origin]], values: tuple[int, ...], votes: int, shuffler: Any
) -> None:
    answers = []
    for _ in range(2):
        memory = Memory(20, DIMS)
        for entry, token, origin in given_entries:
            memory.add(key_of(entry), token, origin)
        answers.append(memory.nearest(key_of(values), votes))
        shuffler.shuffle(given_entries)
    assert answers[0] == answers[1]


@given(st.lists(entries, max_size=12), components, st.integers(1, 4))
def test_a_match_with_more_votes_is_one_with_fewer(
    given_entries: list[tuple[tuple[int, ...], int, Origin]], values: tuple[int, ...], votes: int
) -> None:
    memory = Memory(20, DIMS)
    for entry, token, origin in given_entries:
        memory.add(key_of(entry), token, origin)
    more, fewer = (memory.nearest(key_of(values), n) for n in (votes + 1, votes))
    if more is not None:
        assert fewer is not None
        assert fewer.token == more.token
        assert fewer.similarity >= more.similarity


def test_a_vote_needs_agreement_and_enough_voters() -> None:
    memory = Memory(8, 2)
    query = key_of([100, 0])
    assert memory.nearest(query, 1) is None
    memory.add(key_of([100, 1]), 7, "peer")
    memory.add(key_of([100, 30]), 7, "neighbour")
    memory.add(key_of([0, 100]), 9, "peer")
    nearest = memory.nearest(query, 1)
    assert nearest is not None
    assert (nearest.token, nearest.origin) == (7, "peer")
    both = memory.nearest(query, 2)
    assert both is not None
    assert (both.token, both.origin) == (7, "neighbour")
    assert both.similarity == pytest.approx(100 / np.hypot(100, 30))
    assert memory.nearest(query, 3) is None
    assert memory.nearest(query, 4) is None


def test_a_tie_of_different_tokens_is_no_match() -> None:
    memory = Memory(8, 2)
    memory.add(key_of([100, 10]), 7, "peer")
    memory.add(key_of([100, -10]), 8, "peer")
    assert memory.nearest(key_of([100, 0]), 1) is None


def test_a_token_delivered_twice_votes_once() -> None:
    memory = Memory(8, 2)
    for _ in range(3):
        memory.add(key_of([100, 1]), 7, "peer")
    assert memory.size == 1
    assert memory.nearest(key_of([100, 0]), 2) is None


def test_what_is_used_stays_and_what_is_only_looked_at_goes() -> None:
    for theta, survivor in ((0.9, True), (1.1, False)):
        memory = Memory(2, 2)
        memory.add(key_of([100, 0]), 1, "peer")
        memory.add(key_of([0, 100]), 2, "peer")
        assert memory.nearest(key_of([100, 5]), 1, theta=theta) is not None
        memory.add(key_of([-100, 0]), 3, "peer")
        assert ([100, 0] in [list(e[0]) for e in held(memory)]) is survivor


def test_a_key_of_zeros_is_neither_kept_nor_matched() -> None:
    memory = Memory(2, 2)
    memory.add(key_of([0, 0]), 1, "peer")
    assert memory.size == 0
    memory.add(key_of([1, 0]), 1, "peer")
    assert memory.nearest(key_of([0, 0]), 1) is None


def test_a_memory_without_room_keeps_nothing_and_answers_nothing() -> None:
    whole, none = Memory(2, 2), Memory(0, 2)
    for memory in (whole, none):
        memory.add(key_of([1, 0]), 7, "peer")
        memory.add(key_of([0, 1]), 8, "peer")
    assert none.size == 0
    assert none.nearest(key_of([1, 0]), 1) is None
    assert held(Memory.restore(whole.snapshot(), 0, 2)) == []
    assert held(Memory.restore(none.snapshot(), 2, 2)) == []


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="capacity must be"):
        Memory(-1)
    for dims in (0, 1025):
        with pytest.raises(ValueError, match=f"dims must be .*got {dims}"):
            Memory(1, dims)
    with pytest.raises(ValueError, match="votes must be"):
        Memory(1, 2).nearest(key_of([1, 1]), 0)
    with pytest.raises(ValueError, match=r"must be of shape \(2,\) \(got \(3,\)\)"):
        Memory(1, 2).add(key_of([1, 1, 1]), 0, "peer")


def test_the_widest_keys_of_extreme_values_are_told_apart() -> None:
    memory = Memory(2, 1024)
    extreme = np.full(1024, -128, np.int8)
    almost = extreme.copy()
    almost[:8] = 127
    memory.add(almost, 1, "peer")
    memory.add(extreme, 2, "peer")
    match = memory.nearest(extreme, 1)
    assert match == Match(2, 1.0, "peer")


@given(st.lists(entries, max_size=12), st.integers(1, 6))
def test_a_smaller_memory_restores_the_most_recent(
    given_entries: list[tuple[tuple[int, ...], int, Origin]], capacity: int
) -> None:
    memory = Memory(20, DIMS)
    for entry, token, origin in given_entries:
        memory.add(key_of(entry), token, origin)
    assert held(Memory.restore(memory.snapshot(), capacity, DIMS)) == held(memory)[-capacity:]


def test_a_snapshot_of_another_kind_is_refused() -> None:
    memory = Memory(4, 2, space="a")
    memory.add(key_of([1, 2]), 3, "peer")
    good = memory.snapshot()
    assert held(Memory.restore(good, 4, 2, space="a")) == [((1, 2), 3, "peer")]
    with pytest.raises(ProtocolError, match="space of .* must be 'b' \\(got 'a'"):
        Memory.restore(good, 4, 2, space="b")
    with pytest.raises(ProtocolError, match="dims of .* must be 3 \\(got 2"):
        Memory.restore(good, 4, 3, space="a")
    fields = msgspec.msgpack.decode(good)
    for place, value, message in (
        (0, 2, "version of .* must be 1 \\(got 2"),
        (3, b"\x01", "keys of .* must be 2 \\(got 1"),
        (4, [3, 4], "peers of .* must be 2 \\(got 1"),
        (4, [-1], "outside 0..2147483647"),
        (4, ["x"], "cannot be decoded"),
    ):
        with pytest.raises(ProtocolError, match=message):
            Memory.restore(msgspec.msgpack.encode([*fields[:place], value, *fields[place + 1 :]]), 4, 2, space="a")


@given(st.binary(max_size=60), st.integers(0, 60))
def test_arbitrary_bytes_are_no_snapshot(data: bytes, cut: int) -> None:
    memory = Memory(4, 2)
    memory.add(key_of([1, 2]), 3, "peer")
    for broken in (data, memory.snapshot()[: min(cut, len(memory.snapshot()) - 1)]):
        with pytest.raises(ProtocolError):
            Memory.restore(broken, 4, 2)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


publications = st.lists(st.tuples(st.sampled_from("abcd"), components), max_size=20)


@given(publications, components, st.integers(1, 4))
def test_the_centroid_rule_is_the_published_one(
    published: list[tuple[str, tuple[int, ...]]], values: tuple[int, ...], recent: int
) -> None:
    centroid = Centroid(Clock(), recent=recent)
    for name, entry in published:
        centroid.add(name, key_of(entry))
    others = {n: [e for m, e in published if m == n][-recent:] for n, _ in published if n != "a"}
    found = centroid.similarity("a", key_of(values))
    if not others:
        assert found is None
        return
    mean = np.mean([np.mean(np.array(keys, float), axis=0) for keys in others.values()], axis=0)
    product = np.linalg.norm(mean) * np.linalg.norm(np.array(values, float))
    if product > 1e-6:
        assert found == pytest.approx(mean @ np.array(values) / product)
    elif product == 0.0:
        assert found is None


@given(publications, components, st.randoms(use_true_random=False))
def test_who_speaks_first_does_not_matter_for_the_centroid(
    published: list[tuple[str, tuple[int, ...]]], values: tuple[int, ...], shuffler: Any
) -> None:
    last = list(dict(published).items())
    answers = []
    for _ in range(2):
        centroid = Centroid(Clock(), recent=1)
        for name, entry in last:
            centroid.add(name, key_of(entry))
        answers.append(centroid.similarity("a", key_of(values)))
        shuffler.shuffle(last)
    assert answers[0] == answers[1]


def test_a_singleton_cluster_a_zero_centroid_and_a_zero_key_say_nothing() -> None:
    centroid = Centroid(Clock())
    key = key_of([1, 2])
    assert centroid.similarity("a", key) is None
    centroid.add("a", key)
    assert centroid.similarity("a", key) is None
    centroid.add("b", key)
    assert centroid.similarity("a", key) == pytest.approx(1.0)
    assert centroid.similarity("a", key_of([0, 0])) is None
    centroid.add("c", key_of([-1, -2]))
    assert centroid.similarity("a", key) is None


def test_silent_agents_are_forgotten() -> None:
    clock = Clock()
    centroid = Centroid(clock, max_age_s=10.0)
    centroid.add("b", key_of([1, 0]))
    clock.now_s = 6.0
    centroid.add("c", key_of([0, 1]))
    clock.now_s = 10.0
    assert list(centroid.peers) == ["b", "c"]
    clock.now_s = 10.5
    assert list(centroid.peers) == ["c"]
    assert centroid.similarity("a", key_of([0, 1])) == pytest.approx(1.0)
    clock.now_s = 17.0
    assert centroid.similarity("a", key_of([0, 1])) is None


@given(st.lists(st.sampled_from("abcdefgh"), max_size=30), st.integers(1, 5))
def test_the_longest_silent_agents_make_room(names: list[str], most: int) -> None:
    centroid = Centroid(Clock(), max_peers=most)
    for name in names:
        centroid.add(name, key_of([1, 0]))
    by_last_word = sorted(set(names), key=lambda n: len(names) - 1 - names[::-1].index(n))
    assert centroid.peers == tuple(by_last_word[-most:])


def test_wrong_limits_of_the_centroid_are_named() -> None:
    with pytest.raises(ValueError, match="recent and max_peers must be"):
        Centroid(Clock(), recent=0)
    with pytest.raises(ValueError, match="got 8 and 0"):
        Centroid(Clock(), max_peers=0)


def test_a_centroid_of_many_keys_moves_with_the_latest() -> None:
    centroid = Centroid(Clock(), recent=2)
    found = []
    for values in ([1, 0], [0, 1], [0, 1]):
        centroid.add("b", key_of(values))
        found.append(centroid.similarity("a", key_of([0, 1])))
    assert all(a is not None and b is not None and a < b for a, b in pairwise(found))


@given(st.lists(components, min_size=1, max_size=12))
def test_keys_published_together_count_as_if_one_by_one(published: list[tuple[int, ...]]) -> None:
    together, apart = Centroid(lambda: 0.0), Centroid(lambda: 0.0)
    together.add("a", *(key_of(values) for values in published))
    for values in published:
        apart.add("a", key_of(values))
    probe = key_of((1, 2, 3, 4))
    assert together.similarity("b", probe) == apart.similarity("b", probe)
