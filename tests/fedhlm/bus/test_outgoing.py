"""What a broken link leaves: order, QoS 0, and messages that the broker ends connections for."""

import random

from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.fair import AHEAD
from fedhlm.bus.outgoing import SUSPECT_BREAKS, Outbox, Outgoing


def item(name: str, size: int = 1, qos: int = 1) -> Outgoing:
    return Outgoing(name, bytes(size), qos, retain=False)


def begin_all(outbox: Outbox, places: int = 64) -> list[int]:
    """What the bus does: a suspect goes alone."""
    begun: list[int] = []
    while (following := outbox.next) is not None and len(begun) < places:
        if following.suspect and begun:
            break
        begun.append(outbox.begin()[0])
        if following.suspect:
            break
    return begun


def test_what_was_under_way_goes_back_in_front_in_order() -> None:
    outbox = Outbox(10)
    for name in "abcd":
        assert outbox.put(item(name, qos=0 if name == "b" else 1)) is None
    for _ in range(3):
        outbox.begin()
    given_up, refused = outbox.broken(by_broker=False)
    assert ([i.topic for i in given_up], refused) == (["b"], None)
    assert [outbox.begin()[1].topic for _ in range(3)] == ["a", "c", "d"]


def test_a_full_queue_takes_nothing() -> None:
    outbox = Outbox(1)
    assert outbox.put(item("a")) is None
    assert outbox.put(second := item("b")) is second
    assert (len(outbox), outbox.clear(), len(outbox)) == (1, 1, 0)


@given(poison=st.integers(0, 30), count=st.integers(1, 31), places=st.sampled_from([1, 4, 64]))
def test_of_many_messages_only_the_one_that_breaks_links_is_given_up(poison: int, count: int, places: int) -> None:
    outbox = Outbox(100)
    for n in range(count):
        outbox.put(item(str(n), size=100 if n == poison else 1))
    sent: set[str] = set()
    breaks = 0
    while len(outbox):
        begun = begin_all(outbox, places)
        topics = [i.topic for i in outbox._under_way.values()]
        if str(poison) in topics:
            breaks += 1
            given_up, refused = outbox.broken(by_broker=True)
            assert [i.topic for i in given_up] == ([] if refused is None else [str(poison)])
            continue
        for number in begun:
            sent.add(outbox._under_way[number].topic)
            outbox.done(number)
    assert sent == {str(n) for n in range(count) if n != poison}
    assert breaks <= SUSPECT_BREAKS + 1


def test_a_broker_that_says_too_large_means_the_largest() -> None:
    outbox = Outbox(10)
    for name, size in (("small", 10), ("large", 99), ("next", 20)):
        outbox.put(item(name, size))
    begin_all(outbox)
    given_up, refused = outbox.broken(by_broker=True, too_large=True)
    assert refused is not None
    assert [i.topic for i in given_up] == [refused.topic] == ["large"]


def test_a_link_that_breaks_by_itself_makes_nobody_a_suspect() -> None:
    outbox = Outbox(10)
    outbox.put(item("a"))
    for _ in range(9):
        begin_all(outbox)
        assert outbox.broken(by_broker=False) == ([], None)
    assert outbox.next is not None
    assert not outbox.next.suspect


def order(outbox: Outbox) -> list[str]:
    """The topics of all waiting messages as they are sent."""
    return [outbox.begin()[1].topic for _ in range(outbox.waiting)]


def test_many_messages_on_one_topic_do_not_hold_up_the_others() -> None:
    outbox = Outbox(2_000)
    for _ in range(1_000):
        outbox.put(item("flood"))
    outbox.put(item("honest"))
    assert "honest" in order(outbox)[:100]


def test_no_topic_waits_for_ever_behind_ever_new_ones() -> None:
    outbox = Outbox(2_000)
    for _ in range(2 * AHEAD):
        outbox.put(item("busy"))
    sent = 0
    for number in range(1_000):
        outbox.put(item(f"new{number}"))
        sent += outbox.begin()[1].topic == "busy"
    assert sent > AHEAD + 10, "it has its part beyond what keeps its place"


def test_few_messages_keep_their_places_whatever_their_topics() -> None:
    outbox, sent = Outbox(100), [f"{number % 3}" for number in range(AHEAD)]
    for name in sent:
        outbox.put(item(name))
    assert order(outbox) == sent


def test_messages_of_one_topic_stay_in_order_and_each_topic_has_its_part() -> None:
    outbox, rng = Outbox(10_000), random.Random(1)
    for number in range(3_000):
        outbox.put(Outgoing(rng.choice("abb"), str(number).encode(), 1, retain=False))
    sent = [outbox.begin()[1] for _ in range(outbox.waiting)]
    for name in "ab":
        mine = [int(i.payload) for i in sent if i.topic == name]
        assert mine == sorted(mine)
    heads = [i.topic for i in sent[: 3 * AHEAD]]
    assert abs(heads.count("a") - heads.count("b")) <= AHEAD


def test_a_full_queue_drops_the_newest_of_the_topic_that_takes_most() -> None:
    outbox = Outbox(4)
    for number in range(4):
        outbox.put(Outgoing("flood", bytes([number]), 1, retain=False))
    assert outbox.put(flood := item("flood")) is flood
    dropped = outbox.put(item("honest"))
    assert dropped is not None
    assert (dropped.topic, dropped.payload) == ("flood", b"\3")
    assert outbox.waiting == 4
    assert [outbox.begin()[1].payload for _ in range(4)] == [b"\0", b"\1", b"\2", b"\0"]


def test_a_topic_takes_no_places_from_one_with_as_few() -> None:
    outbox = Outbox(4)
    for name in "abab":
        outbox.put(item(name))
    assert outbox.put(another := item("a")) is another
    third = outbox.put(item("c"))
    assert third is not None
    assert third.topic in "ab"
