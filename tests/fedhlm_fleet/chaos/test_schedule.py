"""The schedule is a function of its seed, and each deck holds every fault."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm_fleet.chaos.schedule import HOLD_S, LINKED, ON_LINKS, ROLES, TOGETHER, Fault, schedule

PARTS = {"broker": ["broker"], "edge": ["edge-1", "edge-2"], "cloud": ["cloud"], "agent": ["a", "b", "c"]}
DECK = len(ROLES) + len(ON_LINKS) * len(LINKED) + len(TOGETHER) + len(ROLES) + 2 + 2 + 1
SHORT_DECK = len(ROLES) + len(ON_LINKS)


def first(count: int, seed: int, *, short: bool = False) -> list[Fault]:
    return list(islice(schedule(seed, PARTS, short=short), count))


@given(seed=st.integers(0, 2**63 - 1), short=st.booleans())
def test_one_seed_is_one_schedule(seed: int, short: bool) -> None:
    assert first(40, seed, short=short) == first(40, seed, short=short)


def test_another_seed_is_another_schedule() -> None:
    assert len({tuple(first(8, seed)) for seed in range(20)}) == 20


@given(seed=st.integers(0, 10_000))
def test_every_part_is_killed_once_before_anything_else(seed: int) -> None:
    faults = first(len(ROLES), seed)
    assert {f.roles for f in faults} == {(role,) for role in ROLES}
    assert {f.kind for f in faults} == {"kill"}


@pytest.mark.parametrize(("short", "size"), [(False, DECK), (True, SHORT_DECK)])
@given(seed=st.integers(0, 10_000), deck=st.integers(0, 2))
def test_each_deck_holds_every_kind(short: bool, size: int, seed: int, deck: int) -> None:
    faults = first(size * 3, seed, short=short)[size * deck : size * (deck + 1)]
    assert {f.kind for f in faults} == (set(HOLD_S) if not short else {"kill", *ON_LINKS})
    kills = {f.roles for f in faults if f.kind == "kill"}
    assert kills >= {(role,) for role in ROLES}
    if not short:
        assert kills >= set(TOGETHER)
        assert {(f.kind, f.roles) for f in faults} >= {(kind, (role,)) for kind in ON_LINKS for role in LINKED}


@given(seed=st.integers(0, 10_000), persistence=st.sampled_from(["on", "off", "both"]), short=st.booleans())
def test_faults_are_of_those_who_are_there_and_within_their_limits(seed: int, persistence: str, short: bool) -> None:
    given = {"on": {True}, "off": {False}, "both": {True, False}}[persistence]
    for number, f in enumerate(islice(schedule(seed, PARTS, persistence=persistence, short=short), 40)):  # type: ignore[arg-type]
        assert f.number == number
        assert all(target in PARTS[role] for target, role in zip(f.targets, f.roles, strict=True))
        assert HOLD_S[f.kind][0] <= f.hold_s <= HOLD_S[f.kind][1]
        assert (f.amount > 0.0) == (f.kind in ("throttle", "delay", "lie"))
        assert f.keep in given
        assert "broker" not in f.roles or f.kind in ("kill", "freeze"), "the broker has no link of its own"


def test_both_kinds_of_broker_restart_occur() -> None:
    kept = {f.keep for f in first(2 * DECK, 0) if f.kind == "kill" and "broker" in f.roles}
    assert kept == {True, False}


def test_only_some_kinds_on_demand() -> None:
    lies = list(islice(schedule(1, PARTS, only=("lie",)), 20))
    assert {(fault.kind, fault.roles) for fault in lies} == {("lie", ("agent",))}
    assert len({fault.amount for fault in lies}) > 3
    assert [fault.number for fault in lies] == list(range(20))
