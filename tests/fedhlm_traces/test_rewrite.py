"""Renaming and re-stamping: pure, reversible, complete where they apply and without effect elsewhere."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fedhlm.bus.party import Stamp
from fedhlm.errors import TraceError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.fields import NAME_PATTERN
from fedhlm.protocol.messages import (
    Assignment,
    Contribution,
    Escalation,
    EscalationBatch,
    Forget,
    MemberSums,
    Output,
    Presence,
    Profile,
    Roster,
    RoutedEscalation,
    RoutedVerdict,
    Verdict,
    VerdictBatch,
)
from fedhlm.protocol.topics import TABLE, Topic
from fedhlm_traces.file import Record
from fedhlm_traces.rewrite import Renames, parse_renames, rebased, renamed
from tests.fedhlm.protocol.test_messages import instances

names = st.from_regex(rf"\A{NAME_PATTERN}\Z").map(lambda name: name[:40])
ROOT = "lab/7"
LEVELS = {"cluster": "home", "agent": "porch", "client": "desk", "member": "porch"}


def stamp(sender: str, sent_ms: int = 1_000) -> dict[str, Any]:
    return Stamp(sender, lambda: sent_ms / 1000.0)()


@st.composite
def our_records(draw: st.DrawFn) -> Record:
    row: Topic = draw(st.sampled_from(TABLE))
    message = draw(instances(row.payload))
    levels = {"cluster": draw(names), "agent": draw(names), "client": "desk", "member": draw(names)}
    # Half of the senders are those that the topic implies.
    sender = draw(st.sampled_from([message.sender, levels["agent"], f"edge-{levels['cluster']}"]))
    return Record(0.0, 0, row.name(ROOT, **levels), encode(replace(message, sender=sender)))


def mapping(record: Record) -> Renames:
    """Every name of the record gets a new one that occurs nowhere in it."""
    found = topics.lookup(record.topic, ROOT)
    assert found is not None
    message: Any = decode(record.payload)
    items = getattr(message, "items", ())
    agents = {getattr(item, "agent", None) for item in items} | {getattr(message, "agent", None)}
    agents |= {found[1].get("agent"), found[1].get("member")}
    clusters = {found[1].get("cluster"), getattr(message, "cluster", None)}
    if isinstance(message, Roster):
        (clusters if found[0] is topics.CLOUD_ROSTER else agents).update(row.name for row in message.members)
    return Renames(
        {old: f"zzcluster{i}" for i, old in enumerate(sorted(filter(None, clusters)))},
        {old: f"zzagent{i}" for i, old in enumerate(sorted(filter(None, agents)))},
    )


@given(our_records())
def test_renaming_back_gives_the_record_again(record: Record) -> None:
    renames = mapping(record)
    back = Renames(*({new: old for old, new in table.items()} for table in renames))
    there = renamed(record, renames, root=ROOT)
    assert (there.topic == record.topic) == ("zz" not in there.topic)
    again = renamed(there, back, root=ROOT)
    assert again.topic == record.topic
    assert decode(again.payload) == decode(record.payload)


@given(our_records())
def test_names_that_do_not_occur_change_nothing(record: Record) -> None:
    assert renamed(record, Renames({"zznobody": "a"}, {"zznobody": "b"}), root=ROOT) == record
    assert renamed(record, mapping(record), root="another/root") == record


def verdict(sender: str) -> Verdict:
    return Verdict(**stamp(sender), session=1, epoch=0, base=3, status="settled")


def escalation(sender: str) -> Escalation:
    return Escalation(**stamp(sender), session=1, epoch=0, base=3, ids=b"ab", patience_ms=500)


def sums(name: str) -> MemberSums:
    return MemberSums(name, 1, 1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (topics.AGENT_STATUS, Presence(**stamp("porch"), role="agent", online=True, software="x")),
        (topics.EDGE_STATUS, Presence(**stamp("edge-home"), role="edge", online=True, software="x")),
        (
            topics.OUTPUT,
            Output(**stamp("porch"), request="r", position=0, ids=(), sources=(), text="", client="desk"),
        ),
        (topics.ESCALATE, escalation("porch")),
        (topics.VERDICT, verdict("edge-home")),
        (
            topics.CLOUD_VERIFY,
            EscalationBatch(**stamp("edge-home"), items=(RoutedEscalation("porch", escalation("porch")),)),
        ),
        (topics.CLOUD_VERDICT, VerdictBatch(**stamp("cloud"), items=(RoutedVerdict("porch", verdict("cloud")),))),
        (topics.PROFILE, Profile(**stamp("porch"), agent="porch", dims=1, keys=b"", uncertainties=b"")),
        (topics.CLOUD_PROFILE, Profile(**stamp("edge-home"), agent="porch", dims=1, keys=b"", uncertainties=b"")),
        (topics.CLOUD_PROFILE, Profile(**stamp("porch"), agent="porch", dims=1, keys=b"", uncertainties=b"")),
        (topics.ASSIGN, Assignment(**stamp("cloud"), cluster="home")),
        (topics.FL_UPDATE, Contribution(**stamp("porch"), round=1, members=1)),
        (topics.CLOUD_FL_UPDATE, Contribution(**stamp("edge-home"), round=1, members=1)),
        (topics.FORGET, Forget(**stamp("chief"), order=1)),
        (topics.ROSTER, Roster(**stamp("edge-home"), members=(sums("porch"),))),
        (topics.CLOUD_ROSTER, Roster(**stamp("cloud"), members=(sums("home"),))),
    ],
)
def test_no_trace_of_the_old_names_remains(row: Topic, message: Any) -> None:
    record = Record(0.0, 0, row.name(**LEVELS), encode(message), 1, True)
    new = renamed(record, Renames({"home": "barn"}, {"porch": "attic"}))
    assert new.topic == row.name(cluster="barn", agent="attic", client="desk", member="attic")
    for old in (b"home", b"porch"):
        assert old not in new.payload
    expected = encode(message).replace(b"home", b"barn").replace(b"porch", b"attic")
    assert new.payload == expected
    assert (new.qos, new.retain) == (1, True)


def test_an_edge_that_is_forgotten_is_renamed_with_its_cluster() -> None:
    record = Record(0.0, 0, topics.FORGET.name(member="edge-home"), encode(Forget(**stamp("chief"), order=1)))
    assert renamed(record, Renames({"home": "barn"}, {})).topic == topics.FORGET.name(member="edge-barn")


def test_a_stranger_s_sender_stays() -> None:
    """A client called like the agent's cluster asks for a prompt: the topic does not say that it is the edge."""
    record = Record(0.0, 0, topics.VERDICT.name(cluster="home", agent="porch"), encode(verdict("somebody")))
    new = renamed(record, Renames({"home": "barn"}, {"somebody": "attic"}))
    assert decode(new.payload).sender == "somebody"


def test_two_parties_can_change_places() -> None:
    swap = parse_renames(("agent=porch:attic", "agent=attic:porch"))
    record = Record(0.0, 0, topics.ESCALATE.name(cluster="home", agent="porch"), encode(escalation("porch")))
    there = renamed(record, swap)
    assert there.topic.endswith("/attic")
    assert renamed(there, swap) == record


@given(our_records(), st.integers(0, 2**52))
def test_rebasing_changes_times_of_sending_and_nothing_else(record: Record, now_ms: int) -> None:
    before: Any = decode(record.payload)
    after: Any = decode(rebased(record, now_ms, root=ROOT).payload)
    assert after.sent_ms == now_ms
    shift_ms = now_ms - before.sent_ms
    plain = replace(after, sent_ms=before.sent_ms)
    for field in ("escalation", "verdict"):
        if items := [item for item in getattr(after, "items", ()) if hasattr(item, field)]:
            for old, new in zip(before.items, items, strict=True):
                was_ms, is_ms = getattr(old, field).sent_ms, getattr(new, field).sent_ms
                assert is_ms == min(max(0, was_ms + shift_ms), 2**53 - 1)
            restored = tuple(
                replace(new, **{field: replace(getattr(new, field), sent_ms=getattr(old, field).sent_ms)})
                for old, new in zip(before.items, items, strict=True)
            )
            plain = replace(plain, items=restored)
    assert plain == before


@given(payload=st.binary(max_size=50), topic=st.sampled_from(["x", ROOT, f"{ROOT}/cloud/fl", f"{ROOT}/c/a/a/b/c/d"]))
def test_what_is_not_ours_stays(payload: bytes, topic: str) -> None:
    record = Record(1.0, 2, topic, payload)
    assert rebased(record, 5, root=ROOT) == record
    assert renamed(record, Renames({"a": "b"}, {"a": "b"}), root=ROOT) == record


def test_a_topic_of_ours_is_renamed_even_around_a_strange_payload() -> None:
    record = Record(0.0, 0, topics.ESCALATE.name(cluster="home", agent="porch"), b"junk")
    new = renamed(record, Renames({"home": "barn"}))
    assert new == replace(record, topic=topics.ESCALATE.name(cluster="barn", agent="porch"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("cluster",), "must be .*got ''"),
        (("edge=a:b",), "rename must be cluster=OLD:NEW or agent=OLD:NEW .got 'edge=a:b'"),
        (("cluster=a",), "must be .*got ''"),
        (("cluster=:b",), "must be .*got ''"),
        (("agent=a:b:c",), "must be .*got 'b:c'"),
        (("agent=a:b/c",), "must be .*got 'b/c'"),
        (("agent=a:+",), "must be .*got '\\+'"),
        (("agent=a:b", "agent=a:c"), "'a' has a new name already, 'b'"),
        (("agent=a:c", "agent=b:c"), "'c' is another agent's new name"),
        (("cluster=a:" + "b" * 60,), "too long"),
    ],
)
def test_wrong_renames_are_refused(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(TraceError, match=complaint):
        parse_renames(words)


def test_good_renames() -> None:
    assert parse_renames(()) == Renames({}, {})
    assert not parse_renames(())
    both = parse_renames(("cluster=a:b", "agent=a:c", "cluster=b:a"))
    assert both == Renames({"a": "b", "b": "a"}, {"a": "c"})
    assert both
