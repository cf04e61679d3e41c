"""Rounds: the pool is a function of everyone's latest sums, whatever the network did to the messages."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fedhlm.errors import ProtocolError
from fedhlm.learning import federation, learnt_state
from fedhlm.learning.curve import Curve
from fedhlm.learning.federation import LEAP, OVERTAKEN_S, Members, highest_of, mean_of_agents, mean_of_clusters
from fedhlm.learning.learnt_state import State
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.fields import MAX_CURVES
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import SCHEMA_VERSION, Contribution, Learned, PaperThreshold
from fedhlm.settings import Federation

PRIOR_TOKENS = 256.0
PAIR = "3fa4b1.09c2de"
RULES = Federation(round_updates=3, round_s=2.0)


def header(sequence: int = 1, sent_ms: int = 1) -> dict[str, Any]:
    return {"version": SCHEMA_VERSION, "sender": "a", "sequence": sequence, "sent_ms": sent_ms}


def curve(tokens: float, harm: float = 0.5, score: float = 0.3) -> Curve:
    made = Curve.empty()
    made.see(score, tokens)
    made.add(score, harm, tokens)
    return made


def contribution(
    number: int,
    tokens: float = 10.0,
    *,
    sent_ms: int | None = None,
    sequence: int | None = None,
    members: int = 1,
    threshold: PaperThreshold | None = None,
    measure: str = "u",
    harm: float = 0.5,
) -> Contribution:
    return Contribution(
        **header(number if sequence is None else sequence, number if sent_ms is None else sent_ms),
        round=number,
        members=members,
        thresholds={} if threshold is None else {PAIR: threshold},
        curves={measure: curve(tokens, harm).to_bytes()},
    )


def agents(rules: Federation = RULES) -> Members:
    return Members(rules, mean_of_agents)


def same(a: State, b: State) -> bool:
    return (
        a._replace(curves={}) == b._replace(curves={})
        and a.curves.keys() == b.curves.keys()
        and all(np.array_equal(a.curves[m].rows(), b.curves[m].rows()) for m in a.curves)
    )


def weight(state: State, measure: str = "u") -> float:
    return state.curves[measure].total_weight if measure in state.curves else 0.0


@given(
    names=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=12),
    rng=st.randoms(use_true_random=False),
    trim=st.sampled_from((0.0, 0.2)),
)
def test_order_repetition_and_loss_never_change_the_final_pool(names: list[str], rng: Any, trim: float) -> None:
    rules = Federation(trim=trim)
    sent: list[tuple[str, Contribution]] = []
    for number, name in enumerate(names, start=1):  # later messages hold more tokens
        sent.append((name, contribution(number, 3.0 * number, harm=rng.random())))
    plain, faulty = agents(rules), agents(rules)
    for name, message in sent:
        plain.take(name, message, 0.0)
    last = dict(sent)
    lossy = [item for item in sent if item[1] is last[item[0]] or rng.random() < 0.5] * 2
    rng.shuffle(lossy)
    for name, message in lossy:
        faulty.take(name, message, 0.0)
    assert same(plain.state(), faulty.state())
    assert weight(plain.state()) == pytest.approx(sum(3.0 * m.round for m in last.values()))


def test_a_duplicate_is_told_from_news() -> None:
    members = agents()
    assert members.take("a", contribution(2), 0.0) == "taken"
    assert members.take("a", contribution(2), 0.0) == "duplicate"
    assert members.take("a", contribution(1), 0.0) == "duplicate"
    assert members.take("a", contribution(3), 0.0) == "taken"
    assert (len(members), members.fresh) == (1, 1)


def test_a_member_that_lost_its_count_is_heard_again() -> None:
    members = agents()
    members.take("a", contribution(900, 50.0, sent_ms=1000), 0.0)
    assert members.take("a", contribution(1, 2.0, sent_ms=2000), 0.0) == "taken"
    assert members.take("a", contribution(2, 4.0, sent_ms=3000), 0.0) == "taken"
    assert weight(members.state()) == pytest.approx(4.0)


def test_a_member_whose_clock_went_back_is_heard_again() -> None:
    members = agents()
    members.take("a", contribution(1, 5.0, sent_ms=10**12, sequence=7), 0.0)
    assert members.take("a", contribution(2, 6.0, sent_ms=3, sequence=8), 0.0) == "taken"
    assert weight(members.state()) == pytest.approx(6.0)


def test_a_liars_number_and_clock_do_not_shut_its_successor_out() -> None:
    """A high round and a clock ahead of all others, then an honest agent of the same name that begins at 0."""
    members, day_ms = agents(), 86_400_000
    assert members.take("a", contribution(3, sent_ms=2**53 - 1), 0.0, wall_ms=day_ms) == "refused"
    assert members.take("a", contribution(3, sent_ms=2 * day_ms), 0.0, wall_ms=day_ms) == "taken"
    assert members.take("a", contribution(4 + LEAP, sent_ms=2 * day_ms), 1.0, wall_ms=day_ms) == "refused"
    assert members.refused == {"time": 1, "round": 1}
    honest = contribution(0, 7.0, sent_ms=day_ms, sequence=1)
    assert members.take("a", honest, 2.0, wall_ms=day_ms) == "duplicate"
    members.born("a")
    assert members.take("a", honest, 3.0, wall_ms=day_ms) == "taken"
    assert members.take("a", honest, 4.0, wall_ms=day_ms) == "duplicate"
    assert members.take("a", contribution(1, sent_ms=day_ms, sequence=2), 5.0, wall_ms=day_ms) == "taken"


def test_without_a_birth_it_takes_a_few_minutes() -> None:
    members = agents()
    members.take("a", contribution(2**31 - 1, sent_ms=50), 0.0)
    late = contribution(0, 7.0, sent_ms=10, sequence=3)
    assert members.take("a", late, OVERTAKEN_S, wall_ms=10) == "duplicate"
    assert members.take("a", late, OVERTAKEN_S + 1.0, wall_ms=10) == "taken"
    assert weight(members.state()) == pytest.approx(7.0)


def test_members_age_out_also_over_restarts() -> None:
    rules = Federation(silence_s=100.0)
    members = agents(rules)
    members.take("a", contribution(1, 5.0), 0.0)
    members.take("b", contribution(1, 7.0), 60.0)
    assert members.age(100.0) == []
    for _ in range(3):  # clocks of processes begin anywhere
        again = agents(rules)
        again.restore(members.snapshot())
        members = again
    assert members.age(5_000.0) == []
    assert members.age(5_001.0) == ["a"]
    assert members.grown
    assert weight(members.state()) == pytest.approx(7.0)
    assert members.age(5_061.0) == ["b"]


def test_a_silent_member_stays_with_its_last_sums_and_a_moved_one_goes() -> None:
    members = agents()
    members.take("a", contribution(1, 5.0), 0.0)
    members.take("b", contribution(1, 7.0), 0.0)
    members.close()
    members.take("b", contribution(2, 9.0), 1.0)
    assert weight(members.close()) == pytest.approx(14.0)
    grown = [members.grown]
    assert [members.forget("a"), members.forget("a")] == [True, False]
    assert [*grown, members.grown] == [False, True]
    assert weight(members.state()) == pytest.approx(9.0)


def test_a_cluster_of_one_and_of_none() -> None:
    members = agents()
    assert members.close().curves == {}
    members.take("a", contribution(1, 5.0), 0.0)
    assert np.allclose(members.close().curves["u"].rows(), curve(5.0).rows())


def test_a_round_is_due_by_count_or_by_time() -> None:
    members = agents()
    assert members.due_s() is None
    assert not members.due(1e9)
    members.take("a", contribution(1), 10.0)
    members.take("a", contribution(2), 11.0)
    assert members.due_s() == 12.0
    assert not members.due(11.99)
    assert members.due(12.0)
    members.take("b", contribution(1), 11.0)
    members.take("c", contribution(1), 11.0)
    assert members.due(11.0)
    assert members.close().round == 1
    assert members.due_s() is None
    members.touch(20.0)
    assert members.due_s() == 22.0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"curves": {"u": b"garbage"}}, "curve"),
        ({"curves": {"u": Curve(*(np.full(64, v) for v in (1.0, 1.0, 2.0, 1.0))).to_bytes()}}, "curve"),
        ({"thresholds": {PAIR: PaperThreshold(0.5, 1, float("nan"))}}, "threshold"),
        ({"thresholds": {PAIR: PaperThreshold(0.5, 1, float("inf"))}}, "threshold"),
    ],
)
def test_impossible_contributions_are_counted_and_never_kept(bad: dict[str, Any], reason: str) -> None:
    members = agents()
    members.take("a", contribution(1, 5.0), 0.0)
    before = members.state()
    message = Contribution(**header(9, 9), round=9, members=1, **bad)
    assert members.take("a", message, 0.0) == "refused"
    assert members.take("b", message, 0.0) == "refused"
    assert members.refused == {reason: 2}
    after = members.state()
    assert after.refused == 2
    assert same(after._replace(refused=0), before)


def test_the_number_of_members_is_bounded_and_the_longest_silent_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "MEMBERS_MAX", 3)
    members = agents()
    for name in "abc":
        members.take(name, contribution(1), 0.0)
    members.take("a", contribution(2), 0.0)
    members.take("d", contribution(1), 0.0)
    assert len(members) == 3
    assert members.forget("a")
    assert not members.forget("b")


def test_liars_cannot_make_a_state_that_does_not_fit_a_message() -> None:
    members = agents()
    for i in range(MAX_CURVES + 4):
        members.take(f"liar{i}", contribution(1, measure=f"m{i}", members=2**31 - 1), 0.0)
    members.take("a", contribution(1, measure="u"), 0.0)
    members.take("b", contribution(1, measure="u"), 0.0)
    state = members.close()
    assert "u" in state.curves
    assert len(state.curves) == MAX_CURVES
    for message in (state.learned(header()), state.contribution(header())):
        assert decode(encode(message)) == message


# Thresholds


def test_the_cluster_threshold_weighs_this_rounds_tokens_and_is_kept_without_any() -> None:
    members = agents()
    # All that is above the median of the lowest majority, a, b and d, counts as that.
    members.take("a", contribution(1, threshold=PaperThreshold(0.2, 30, control=-2.0)), 0.0)
    members.take("b", contribution(1, threshold=PaperThreshold(0.6, 10, control=-4.0)), 0.0)
    members.take("c", contribution(1, threshold=PaperThreshold(0.9, 10, control=-3.0)), 0.0)
    members.take("d", contribution(1, threshold=PaperThreshold(0.8, 0, control=-3.0)), 0.0)
    first = members.close().thresholds.get(PAIR)
    assert first is not None
    assert [first.threshold, first.count, first.control] == pytest.approx([0.36, 50, -3.0])
    members.take("b", contribution(2, threshold=PaperThreshold(0.8, 5, control=-4.0)), 0.0)
    second = members.close().thresholds.get(PAIR)
    assert second is not None
    assert [second.threshold, second.count] == pytest.approx([0.8, 5])
    members.take("a", contribution(2, threshold=PaperThreshold(0.1, 0, control=-2.0)), 0.0)
    third = members.close().thresholds.get(PAIR)
    assert third is not None
    assert [third.threshold, third.count] == pytest.approx([0.8, 0])


@pytest.mark.parametrize(("members", "liars"), [(2, 1), (3, 1), (4, 1), (8, 1), (8, 3), (16, 1), (16, 7), (32, 1)])
def test_counts_and_thresholds_do_not_carry_the_published_threshold_away(members: int, liars: int) -> None:
    """Unguarded it ends at 0.999998 in each of these."""
    clean, dirty = agents(), agents()
    for i in range(members):
        honest = contribution(1, threshold=PaperThreshold(0.42 + 0.02 * i / members, 30 + i % 3))
        clean.take(f"a{i:02}", honest, 0.0)
        shout = contribution(1, threshold=PaperThreshold(1.0, 2**31 - 1, 1e11))
        dirty.take(f"a{i:02}", shout if i < liars else honest, 0.0)
    before, after = clean.close().thresholds.get(PAIR), dirty.close().thresholds.get(PAIR)
    assert before is not None
    assert after is not None
    assert before.threshold == pytest.approx(0.43, abs=0.02)
    assert 0.42 <= after.threshold <= 0.44
    assert members < 10 or liars > 1 or abs(after.control) < 1.0


def test_a_count_that_nobody_has_does_not_pull_the_published_threshold_down() -> None:
    """Unguarded it ends at 0.0000001."""
    members = agents()
    members.take("liar", contribution(1, threshold=PaperThreshold(0.0, 2**31 - 1)), 0.0)
    for name in "abc":
        members.take(name, contribution(1, threshold=PaperThreshold(0.42, 30)), 0.0)
    assert members.close().thresholds[PAIR].threshold == pytest.approx(0.42 * 90 / (90 + 4 * 30))


def test_a_liar_that_is_alone_in_a_round_is_held_to_the_median_of_all() -> None:
    members = agents()
    members.take("a", contribution(1, threshold=PaperThreshold(0.3, 30)), 0.0)
    members.take("liar", contribution(1, threshold=PaperThreshold(0.3, 30)), 0.0)
    members.close()
    for number in range(2, 20):
        members.take("liar", contribution(number, threshold=PaperThreshold(1.0, 100)), 0.0)
        found = members.close().thresholds[PAIR]
        assert found.threshold == pytest.approx(0.3)


def test_liars_that_contribute_first_and_most_often_are_held_to_the_honest() -> None:
    """The published threshold never falls, so what it takes from the first ones would stay for ever."""
    liars, honest = [f"liar{i}" for i in range(3)], [f"a{i}" for i in range(5)]
    members = agents()
    for number, name in enumerate([*honest, *honest], 1):
        for liar in liars:
            members.take(liar, contribution(number, threshold=PaperThreshold(1.0, 30)), 0.0)
        early = members.close([*liars, *honest]).thresholds.get(PAIR)
        threshold = PaperThreshold(0.3 + number / 100, 30)
        members.take(name, contribution(1 + number // 6, threshold=threshold), 0.0)
        for liar in liars:
            members.take(liar, contribution(100 + number, threshold=PaperThreshold(1.0, 30)), 0.0)
        found = members.close([*liars, *honest]).thresholds.get(PAIR)
        assert (early is None) == (number <= 2), "more than half must have contributed"
        assert (found is None) == (number < 2)
        assert found is None or found.threshold <= 0.3 + number / 100


@given(st.lists(st.floats(0.0, 0.9), min_size=1, max_size=9), st.integers(0, 9), st.floats(0.0, 0.9), st.data())
def test_high_thresholds_of_a_minority_do_not_take_the_limit_past_the_honest_median(
    honest: list[float], silent: int, old: float, data: st.DataObject
) -> None:
    truthful = sorted([*honest, *[old] * silent])
    lies = data.draw(st.lists(st.floats(0.9, 1.0), max_size=len(truthful) - 1))
    limit = highest_of([*lies, *honest], silent, PaperThreshold(old, 1))
    assert limit is not None
    assert limit <= truthful[(len(truthful) - 1) // 2]


def test_three_liars_of_eight_do_not_raise_the_published_threshold_above_that_of_the_honest() -> None:
    honest = [0.50, 0.52, 0.54, 0.56, 0.58]
    members = agents()
    for number, threshold in enumerate([*honest, 1.0, 1.0, 1.0]):
        members.take(f"a{number}", contribution(1, threshold=PaperThreshold(threshold, 30)), 0.0)
    assert members.close().thresholds[PAIR].threshold <= sum(honest) / len(honest)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9), st.integers(0, 9), st.floats(0.0, 1.0), st.data())
def test_the_limit_of_a_published_threshold_is_an_honest_one_or_the_old_one(
    honest: list[float], silent: int, old: float, data: st.DataObject
) -> None:
    most = (len(honest) + silent - 1) // 2
    lies = data.draw(st.lists(st.floats(0.0, 1.0), max_size=min(most, len(honest) + silent - 1)))
    quiet = max(0, silent - len(lies))
    first = highest_of([*lies, *honest], quiet, None)
    assert (first is None) == (len(lies) + len(honest) <= quiet)
    if 2 * len(lies) < len(lies) + len(honest) + quiet:
        assert first is None or first <= max(honest)
        later = highest_of([*lies, *honest], quiet, PaperThreshold(old, 1))
        assert later is not None
        assert later <= max(old, *honest)


def test_the_global_threshold_is_the_plain_mean_of_all_clusters() -> None:
    members = Members(RULES, mean_of_clusters, of_clusters=True)
    members.take("c1", contribution(1, threshold=PaperThreshold(0.2, 1000)), 0.0)
    members.close()
    members.take("c2", contribution(1, threshold=PaperThreshold(0.6, 1)), 0.0)
    state = members.close()
    assert state.thresholds[PAIR].threshold == pytest.approx(0.4)


def test_pairs_of_models_in_one_cluster_have_thresholds_and_curves_of_their_own() -> None:
    members = agents()
    other = "aaaaaa.09c2de"
    members.take("a", contribution(1, 10.0, threshold=PaperThreshold(0.2, 30), measure=f"u/{PAIR}"), 0.0)
    mixed = contribution(1, 20.0, measure=f"u/{other}", harm=0.1)
    members.take("b", replace(mixed, thresholds={other: PaperThreshold(0.8, 10)}), 0.0)
    state = members.close()
    assert {pair: told.threshold for pair, told in state.thresholds.items()} == pytest.approx({PAIR: 0.2, other: 0.8})
    assert state.curves[f"u/{PAIR}"].total_weight == pytest.approx(10.0)
    assert state.curves[f"u/{other}"].harm.sum() == pytest.approx(2.0)
    again = agents()
    again.restore(members.snapshot())
    assert same(again.state(), state)


def test_the_log_names_pairs_whose_model_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """A cloud, or an edge, that finds sums about another LLM in its state folder."""
    before = agents()
    before.take("a", contribution(1, threshold=PaperThreshold(0.2, 30), measure=f"u/{PAIR}"), 0.0)
    after = agents()
    after.restore(before.snapshot())
    after.note_large(fingerprint_of("t", 64, noise="n", model="newest"))
    assert f"the large model is now newest: what was learnt about pair {PAIR}" in caplog.text
    assert weight(after.state(), f"u/{PAIR}") == pytest.approx(10.0), "kept for the day it comes back"


def test_a_snapshot_of_an_earlier_version_is_refused() -> None:
    kept = msgspec.msgpack.decode(agents().snapshot())
    kept[0] = 1
    with pytest.raises(ProtocolError, match="version of the federation snapshot must be 2 .got 1."):
        agents().restore(msgspec.msgpack.encode(kept))


# What is above


def test_a_new_cluster_starts_from_what_others_know_but_soon_speaks_for_itself() -> None:
    others = State(4, 9, 0, {PAIR: PaperThreshold(0.7, 3)}, {"u": curve(1e5, 0.1)})
    empty = agents().state().below(others, tokens=PRIOR_TOKENS)
    assert weight(empty) == pytest.approx(PRIOR_TOKENS)
    assert empty.curves["u"].harm.sum() / weight(empty) == pytest.approx(0.1)
    assert empty.thresholds == others.thresholds
    members = agents()
    members.take("a", contribution(1, 1e5, harm=0.9), 0.0)
    own = members.state().below(others, tokens=PRIOR_TOKENS)
    assert own.curves["u"].harm.sum() / weight(own) > 0.89
    assert members.state().below(None, tokens=PRIOR_TOKENS).curves["u"].total_weight == pytest.approx(1e5)


def test_little_knowledge_above_is_not_blown_up() -> None:
    assert weight(agents().state().below(State(1, 1, 0, {}, {"u": curve(3.0)}), tokens=PRIOR_TOKENS)) == pytest.approx(
        3.0
    )


# Restarts


def test_an_inherited_state_fades_as_its_members_return() -> None:
    before = agents()
    for name, tokens in (("a", 10.0), ("b", 20.0), ("c", 30.0)):
        before.take(name, contribution(5, tokens, threshold=PaperThreshold(0.5, 4)), 0.0)
    retained = before.close().learned(header())
    after = agents()
    assert after.inherit(retained)
    assert not after.inherit(retained), "an echo"
    assert weight(after.state()) == pytest.approx(60.0)
    assert after.state().thresholds == retained.thresholds
    weights = []
    for name, tokens in (("a", 10.0), ("b", 20.0), ("c", 30.0)):
        after.take(name, contribution(6, tokens), 0.0)
        state = after.close()
        assert state.round > retained.round
        assert state.members == 3
        weights.append(weight(state))
    assert weights[:2] == [pytest.approx(10.0 + 40.0), pytest.approx(30.0 + 20.0)]
    assert weights[2] == pytest.approx(60.0)
    assert after.inherited_share == 0.0
    assert not after.inherit(retained), "own rounds are made already"


def test_an_empty_or_impossible_state_is_not_inherited() -> None:
    members = agents()
    assert not members.inherit(Learned(**header(), round=7, members=0, curves={"u": curve(9.0).to_bytes()}))
    with pytest.raises(ProtocolError):
        members.inherit(Learned(**header(), round=7, members=2, curves={"u": b"?"}))
    assert members.state().curves == {}


@given(sizes=st.lists(st.floats(0.5, 1e4, width=32), max_size=6), inherits=st.booleans())
def test_a_snapshot_restores_the_same_pool(sizes: list[float], inherits: bool) -> None:
    members = agents()
    if inherits:
        members.inherit(Learned(**header(), round=7, members=9, curves={"u": curve(90.0).to_bytes()}))
    for i, tokens in enumerate(sizes):
        members.take(f"m{i}", contribution(3, tokens, threshold=PaperThreshold(0.25, 2)), 0.0)
    state = members.close()
    again = agents()
    again.restore(members.snapshot())
    assert same(again.state(), state)
    assert again.told
    assert again.take("m0", contribution(3), 0.0) == ("duplicate" if sizes else "taken")


@given(st.binary(max_size=64), st.integers(0, 400))
def test_a_bad_snapshot_is_refused_and_changes_nothing(noise: bytes, cut: int) -> None:
    good = agents()
    good.take("a", contribution(3, 5.0), 0.0)
    whole = good.snapshot()
    members = agents()
    members.take("b", contribution(1, 2.0), 0.0)
    for data in (noise, whole[: min(cut, len(whole) - 1)], whole.replace(curve(5.0).to_bytes(), b"x" * 24)):
        with pytest.raises(ProtocolError):
            members.restore(data)
    assert weight(members.state()) == pytest.approx(2.0)


@pytest.mark.parametrize("control", [1e308, -1e13, float("inf"), float("nan")])
def test_controls_whose_sum_might_overflow_are_refused(control: float) -> None:
    pool = agents()
    assert pool.take("a", contribution(1, threshold=PaperThreshold(0.5, 1, control)), 0.0) == "refused"
    assert pool.take("b", contribution(1, threshold=PaperThreshold(0.5, 1, learnt_state.CONTROL_MAX)), 0.0) == "taken"
    assert len(pool) == 1
