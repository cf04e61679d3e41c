"""The queue between a transport and a service is bounded in messages and in bytes."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.fair import AHEAD
from fedhlm.bus.interface import BusStatistics, Delivery, Inbox
from fedhlm_lab.sim.virtual import run_virtual

LIMIT, LIMIT_BYTES = 5, 100


@given(st.lists(st.one_of(st.integers(0, 150), st.just(-1)), max_size=40))
def test_a_full_inbox_drops_the_newest_and_makes_room_as_it_is_read(steps: list[int]) -> None:
    """A number is a payload that comes in, -1 is a read; a plain list says what must be there."""

    async def main() -> None:
        statistics = BusStatistics()
        inbox = Inbox(LIMIT, statistics, limit_bytes=LIMIT_BYTES)
        model: list[int] = []
        dropped = 0
        for size in steps:
            if size < 0:
                if model:
                    assert len((await anext(inbox)).payload) == model.pop(0)
                continue
            room = len(model) < LIMIT and (not model or sum(model) + size + len(model) + 1 <= LIMIT_BYTES)
            assert inbox.put(Delivery("t", bytes(size), False), size) == room
            model += [size] if room else []
            dropped += not room
        assert (len(inbox), statistics.dropped_in) == (len(model), dropped)

    run_virtual(main())


def test_one_message_always_has_room() -> None:
    async def main() -> int:
        inbox = Inbox(LIMIT, BusStatistics(), limit_bytes=10)
        assert inbox.put(Delivery("t", bytes(1_000), False), 1_000)
        assert not inbox.put(Delivery("t", b"", False), 0)
        async with asyncio.timeout(1.0):
            return len((await anext(inbox)).payload)

    assert run_virtual(main()) == 1_000


def test_a_flood_on_one_topic_does_not_hold_up_the_others() -> None:
    async def main() -> None:
        inbox = Inbox(4_096, BusStatistics())
        for number in range(3_000):
            assert inbox.put(Delivery("flood", b"%d" % number, False), 1)
        for number in range(3):
            assert inbox.put(Delivery("honest", b"%d" % number, False), 1)
        read = [await anext(inbox) for _ in range(3_003)]
        assert [d.payload for d in read[:100] if d.topic == "honest"] == [b"0", b"1", b"2"]
        assert [int(d.payload) for d in read if d.topic == "flood"] == [*range(3_000)]

    run_virtual(main())


@given(st.lists(st.sampled_from("abc"), max_size=AHEAD))
def test_few_messages_are_read_in_the_order_of_their_arrival(names: list[str]) -> None:
    async def main() -> None:
        inbox = Inbox(100, BusStatistics())
        for name in names:
            inbox.put(Delivery(name, b"", False), 1)
        assert [(await anext(inbox)).topic for _ in names] == names

    run_virtual(main())
