"""Journals are put together from their messages, whatever the network did to them."""

from itertools import pairwise

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import SCHEMA_VERSION, Journal, Note
from fedhlm_traces.check.journals import lives
from fedhlm_traces.file import Record

HEADER = {"version": SCHEMA_VERSION, "sent_ms": 0}


def note(number: int) -> Note:
    return Note(float(number), "heard", f"{number}", b"")


def message(sender: str, life: int, numbers: range) -> Record:
    sequence = numbers.start
    journal = Journal(
        **HEADER,
        sender=sender,
        sequence=sequence,
        life=life,
        number=numbers.start,
        notes=tuple(note(n) for n in numbers),
    )
    topic, levels = {
        "a": (topics.AGENT_JOURNAL, {"cluster": "c0", "agent": "a"}),
        "e": (topics.EDGE_JOURNAL, {"cluster": "c0"}),
        "cloud": (topics.CLOUD_JOURNAL, {}),
    }[sender]
    return Record(0.0, 0, topic.name(**levels), encode(journal))


def pieces(cuts: list[int]) -> list[range]:
    edges = [0, *sorted(set(cuts)), 30]
    return [range(a, b) for a, b in pairwise(edges)]


@given(
    cuts=st.lists(st.integers(1, 29), max_size=6),
    data=st.data(),
    senders=st.lists(st.tuples(st.sampled_from(["a", "e", "cloud"]), st.integers(0, 3)), unique=True, min_size=1),
)
def test_order_and_repetition_of_messages_change_nothing(
    cuts: list[int], data: st.DataObject, senders: list[tuple[str, int]]
) -> None:
    records = [message(sender, life, piece) for sender, life in senders for piece in pieces(cuts)]
    repeated = data.draw(st.lists(st.sampled_from(records), max_size=5))
    shuffled = data.draw(st.permutations(records + repeated))
    found = lives(shuffled)
    assert {(life.name, life.life) for life in found} == set(senders)
    for life in found:
        assert life.whole
        assert life.number == 0
        assert life.notes == [note(n) for n in range(30)]
        assert life.part == {"a": "agent", "e": "edge", "cloud": "cloud"}[life.name]


@given(cuts=st.lists(st.integers(1, 29), max_size=6), data=st.data())
def test_a_gap_ends_the_notes_and_is_said(cuts: list[int], data: st.DataObject) -> None:
    whole = pieces(cuts)
    kept = data.draw(st.lists(st.sampled_from(whole), unique=True, min_size=1))
    (life,) = lives([message("e", 7, piece) for piece in kept])
    numbers = sorted(n for piece in kept for n in piece)
    expected = [n for i, n in enumerate(numbers) if n == numbers[0] + i]
    assert life.notes == [note(n) for n in expected]
    assert life.number == numbers[0]
    last = max(numbers)
    assert life.whole == (numbers == list(range(last + 1)))
    if numbers[0]:
        assert f"notes 0 to {numbers[0] - 1} are missing" in life.complaint
    if len(expected) < len(numbers):
        assert f"notes {expected[-1] + 1} to {numbers[len(expected)] - 1} are missing" in life.complaint
        assert f"{len(numbers) - len(expected)} notes" in life.complaint


def test_other_roots_and_other_messages_are_passed_over() -> None:
    good = message("e", 1, range(3))
    foreign = msgspec.structs.replace(good, topic="elsewhere/1/c/c0/journal")
    junk = msgspec.structs.replace(good, payload=b"\xc1")
    assert lives([foreign, junk]) == []
    assert len(lives([foreign], "elsewhere/1")) == 1
