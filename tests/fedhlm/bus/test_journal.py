"""A journal: notes in order, numbered without gaps where nothing was lost, and with one where something was."""

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus import journal
from fedhlm.bus.journal import JournalWriter
from fedhlm.bus.party import Party, Stamp
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.fields import MAX_NOTES
from fedhlm.protocol.messages import Journal, Note, Prompt
from fedhlm.telemetry import Counters
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import LoopbackBroker
from fedhlm_lab.sim.virtual import run_virtual

LEVELS = {"cluster": "c0", "agent": "a"}
sizes = st.lists(st.integers(0, 40_000), max_size=30)


def loop_s() -> float:
    return asyncio.get_running_loop().time()


class World:
    """A part with a journal, and someone who reads its journal."""

    def __init__(self, *, max_outgoing: int = 1_024) -> None:
        broker = LoopbackBroker(random.Random(1))
        self.reader = LoopbackBus(broker, client_id="reader")
        self.bus = LoopbackBus(broker, client_id="a", max_outgoing=max_outgoing)
        self.journal = JournalWriter(7, loop_s)
        self.party = Party(bus=self.bus, stamp=Stamp("a", lambda: 0.0), counters=Counters(), journal=self.journal)

    async def heard(self, settle_s: float = 5.0) -> list[Journal]:
        """All journals that come within so many seconds."""
        found: list[Journal] = []

        async def listen() -> None:
            async for delivery in self.reader.deliveries():
                message = decode(delivery.payload)
                assert isinstance(message, Journal)
                found.append(message)

        task = asyncio.create_task(listen())
        await asyncio.sleep(settle_s)
        task.cancel()
        await asyncio.wait([task])
        return found


def notes_of(journals: list[Journal]) -> list[Note]:
    """Their notes, checked to be numbered without a gap."""
    notes: list[Note] = []
    for message in journals:
        assert message.life == 7
        assert message.number == len(notes)
        assert len(message.notes) <= MAX_NOTES
        notes += message.notes
    return notes


@given(sizes)
def test_all_notes_arrive_once_and_in_order(lengths: list[int]) -> None:
    async def scenario() -> list[Note]:
        world = World()
        async with world.reader, world.bus:
            await world.reader.subscribe(topics.AGENT_JOURNAL.name(**LEVELS))
            keeper = asyncio.create_task(world.party.keep_journal(topics.AGENT_JOURNAL, lambda: LEVELS))
            for i, length in enumerate(lengths):
                world.journal.note("fed", str(i), bytes(length))
                await asyncio.sleep(0.01)
            heard = await world.heard()
            keeper.cancel()
            await asyncio.wait([keeper])
            return notes_of(heard)

    notes = run_virtual(scenario())
    assert [(n.subject, len(n.data)) for n in notes] == [(str(i), length) for i, length in enumerate(lengths)]
    assert [n.at_s for n in notes] == sorted(n.at_s for n in notes)


def test_the_last_words_of_a_stopped_part_are_published() -> None:
    async def scenario() -> list[Note]:
        world = World()
        async with world.reader, world.bus:
            await world.reader.subscribe(topics.AGENT_JOURNAL.name(**LEVELS))
            keeper = asyncio.create_task(world.party.keep_journal(topics.AGENT_JOURNAL, lambda: LEVELS))
            await asyncio.sleep(0.1)
            world.journal.note("ended", "last")
            keeper.cancel()
            await asyncio.wait([keeper])
            return notes_of(await world.heard())

    assert [n.subject for n in run_virtual(scenario())] == ["last"]


def test_what_finds_no_room_leaves_a_gap_in_the_numbers() -> None:
    async def scenario() -> list[Journal]:
        world = World(max_outgoing=2)
        for i in range(5):  # not connected yet: the bus takes two messages and refuses the others
            world.journal.note("fed", str(i), bytes(journal.FLUSH_BYTES))
        async with world.reader:
            await world.reader.subscribe(topics.AGENT_JOURNAL.name(**LEVELS))
            async with world.bus:
                world.bus.link.partitioned = True
                await world.party.publish_journal(topics.AGENT_JOURNAL, LEVELS)
                world.bus.link.partitioned = False
                await asyncio.sleep(120.0)
                world.journal.note("fed", "later")
                await world.party.publish_journal(topics.AGENT_JOURNAL, LEVELS)
                return await world.heard()

    heard = run_virtual(scenario())
    numbers = [n for m in heard for n in range(m.number, m.number + len(m.notes))]
    assert heard[-1].notes[-1].subject == "later"
    assert numbers[-1] == 5
    assert len(numbers) < 6


def test_too_much_waiting_drops_the_oldest_and_says_so() -> None:
    async def scenario() -> list[Journal]:
        world = World()
        count = journal.WAITING_BYTES // journal.FLUSH_BYTES + 3
        for i in range(count):
            world.journal.note("fed", str(i), bytes(journal.FLUSH_BYTES))
        async with world.reader, world.bus:
            await world.reader.subscribe(topics.AGENT_JOURNAL.name(**LEVELS))
            await world.party.publish_journal(topics.AGENT_JOURNAL, LEVELS)
            return await world.heard()

    heard = run_virtual(scenario())
    assert heard[0].number == 3
    assert heard[0].notes[0].subject == "3"


def test_a_party_notes_what_it_sends_and_hears_and_not_its_journal() -> None:
    async def scenario() -> list[Note]:
        world = World()
        async with world.reader, world.bus:
            await world.bus.subscribe(topics.PROMPT.name(**LEVELS))
            await world.reader.subscribe(topics.AGENT_JOURNAL.name(**LEVELS))
            prompt = Prompt(**Stamp("client", lambda: 0.0)(), request="r", text="hello")
            await world.reader.publish(topics.PROMPT.name(**LEVELS), b"no message of ours")
            await world.reader.publish(topics.PROMPT.name(**LEVELS), encode(prompt))
            async for received in world.party.received():
                await world.party.send(topics.PROMPT, received.message, cluster="c1", agent="b")
                break
            await world.party.publish_journal(topics.AGENT_JOURNAL, LEVELS)
            return notes_of(await world.heard())

    notes = run_virtual(scenario())
    assert [(n.kind, n.subject) for n in notes] == [
        ("heard", topics.PROMPT.name(**LEVELS)),
        ("sent", topics.PROMPT.name(cluster="c1", agent="b")),
    ]
    assert notes[0].data == notes[1].data
