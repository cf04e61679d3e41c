"""What an agent writes down reads back the same, and nothing else is taken for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import journal
from edge_agent.events import (
    Answered,
    Cancelled,
    Committed,
    Drafted,
    Event,
    Grown,
    Judged,
    LinkDown,
    LinkUp,
    Refused,
    Tick,
    Unprimed,
    Working,
)
from fedhlm.decoding.tree import Branch
from fedhlm.errors import ProtocolError
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Generation

count = st.integers(0, 2**31)
share = st.floats(0.0, 1.0)
drafted = st.builds(Drafted, count, count, count, share, share, st.binary(max_size=9), st.binary(max_size=9))
events: st.SearchStrategy[Event] = st.one_of(
    drafted,
    st.builds(
        Grown,
        count,
        count,
        st.lists(drafted, max_size=3),
        st.lists(st.builds(Branch, count, count), max_size=3).map(tuple),
    ),
    st.builds(
        Answered,
        count,
        count,
        count,
        st.lists(count, max_size=4),
        st.lists(share, max_size=4),
        st.sampled_from(["cloud", "peer", "neighbour"]),
        st.lists(st.booleans(), max_size=4),
    ),
    st.builds(Unprimed, count),
    st.builds(Working, count, count),
    st.builds(Refused, st.text(max_size=20)),
    st.just(LinkUp()),
    st.just(LinkDown()),
    st.sampled_from(["stop", "cancelled"]).map(Cancelled),  # type: ignore[arg-type]
    st.just(Tick()),
)


@given(events)
def test_events_read_back_the_same(event: Event) -> None:
    assert journal.unpack_event(type(event).__name__, journal.pack(event)) == event


@given(st.builds(Judged, count, count, count, share, st.booleans(), st.just("local"), st.none() | share))
def test_decisions_read_back_the_same(judged: Judged) -> None:
    assert journal.unpack(journal.pack(judged), Judged) == judged
    tokens = [Committed(judged.token, "peer", drafted=True)]
    assert journal.unpack(journal.pack(tokens), list[Committed]) == tokens


def test_a_beginning_gives_its_job_back() -> None:
    config = Generation(tau=0.125, peers="neighbour")
    began = journal.Began(
        session=5,
        protocol="5",
        link_up=False,
        config=config,
        sampling=Sampling(3),
        max_tokens=7,
        context_max=99,
        eos_ids=frozenset({0, 2}),
        prompt=[1, 2],
    )
    again = journal.unpack(journal.pack(began), journal.Began)
    assert again == began
    assert again.job == (config, Sampling(3), 7, 99, frozenset({0, 2}))


@given(st.sampled_from(["Drafted", "Grown", "Answered", "Tick", "Nonsense", ""]), st.binary(max_size=64))
def test_hostile_notes_are_refused(name: str, data: bytes) -> None:
    try:
        event = journal.unpack_event(name, data)
    except ProtocolError:
        return
    assert type(event).__name__ == name


@given(st.sampled_from([journal.AgentStart, journal.Began, journal.Planned, journal.Ended]), st.binary(max_size=64))
def test_hostile_facts_are_refused(kind: type, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        journal.unpack(data, kind)


def test_hostile_nesting_is_refused() -> None:
    with pytest.raises(ProtocolError):
        journal.unpack(b"\x91" * 100_000, journal.AgentStart)
