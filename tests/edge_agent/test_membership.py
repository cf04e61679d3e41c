"""Moving between clusters: hear first, speak then, never nowhere; and the connection follows without missing a message."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from edge_agent.connection import Connection
from edge_agent.membership import CLUSTERS_MAX, Membership, birth_and_will
from fedhlm.bus.interface import BusStatistics
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.errors import BusError, ProtocolError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import Presence, Prompt
from fedhlm.protocol.topics import DEFAULT_ROOT
from fedhlm.telemetry import Counters
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import LoopbackBroker
from fedhlm_lab.sim.toy import FINGERPRINT
from fedhlm_lab.sim.virtual import run_virtual


class Notebook:
    """A bus that writes down what is asked of it, and refuses filters of `forbidden` clusters."""

    protocol = "5"
    max_packet_bytes = None
    connected = True
    statistics = BusStatistics()

    def __init__(self, forbidden: str = "forbidden") -> None:
        self.log: list[tuple[str, str]] = []
        self._forbidden = forbidden

    async def publish(self, topic: str, payload: bytes, **_options: object) -> bool:
        state = decode(payload)
        assert isinstance(state, Presence)
        self.log.append(("online" if state.online else "offline", topic))
        return True

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        for pattern in filters:
            if self._forbidden in pattern:
                raise BusError(f"refused {pattern}")
            self.log.append(("hear", pattern))


def membership(bus: Any) -> Membership:
    party = Party(bus=bus, stamp=Stamp("a", lambda: 0.0), counters=Counters())
    return Membership(party=party, cluster="c0", fingerprint=FINGERPRINT)


def edge(*, online: bool = True, cloud: bool = True) -> Presence:
    return presence(Stamp("edge", lambda: 0.0), "edge", online=online, upstream=FINGERPRINT if cloud else None)


def test_the_new_cluster_is_heard_before_the_agent_is_there_and_it_is_never_nowhere() -> None:
    async def scenario() -> None:
        bus = Notebook()
        member = membership(bus)
        await member.assigned("c1")
        assert bus.log == [("hear", topics.EDGE_STATUS.name(cluster="c1"))]
        bus.log.clear()
        assert await member.seen("c1", edge())
        said = [entry for entry in bus.log if entry[0] != "hear"]
        assert bus.log[-2:] == said
        assert said == [
            ("online", topics.AGENT_STATUS.name(cluster="c1", agent="a")),
            ("offline", topics.AGENT_STATUS.name(cluster="c0", agent="a")),
        ]
        heard = {pattern for what, pattern in bus.log if what == "hear"}
        assert {topic.name(cluster="c1", agent="a") for topic in (topics.PROMPT, topics.VERDICT)} <= heard
        left = {topic.name(cluster="c0", agent="a") for topic in (topics.PROMPT, topics.VERDICT)}
        assert heard | left <= set(member.filters())
        assert topics.KNOWN.name(cluster="c0") not in member.filters()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("cluster", "state"),
    [("c1", edge(online=False)), ("c1", edge(cloud=False)), ("c2", edge()), ("c0", edge())],
    ids=["offline", "without a cloud", "not assigned", "its own"],
)
def test_it_stays_until_the_assigned_edge_is_seen_at_work(cluster: str, state: Presence) -> None:
    async def scenario() -> None:
        member = membership(Notebook())
        assert not await member.seen("c1", edge())
        await member.assigned("c1")
        assert not await member.seen(cluster, state)
        assert member.cluster == "c0"
        assert await member.seen("c1", edge())
        assert member.cluster == "c1"

    asyncio.run(scenario())


def test_an_assignment_home_takes_back_one_that_was_not_followed_yet() -> None:
    async def scenario() -> None:
        member = membership(Notebook())
        await member.assigned("c1")
        await member.assigned("c0")
        assert not await member.seen("c1", edge())
        assert (member.cluster, member.moves) == ("c0", 0)

    asyncio.run(scenario())


def test_a_refused_cluster_and_a_flood_of_clusters_leave_it_where_it_is() -> None:
    async def scenario() -> None:
        bus = Notebook()
        member = membership(bus)
        with pytest.raises(ProtocolError, match="assignment.cluster must be .*got 'forbidden'"):
            await member.assigned("forbidden")
        for number in range(CLUSTERS_MAX - 2):  # its own is one, the refused another
            await member.assigned(f"x{number}")
        with pytest.raises(ProtocolError, match=f"at most {CLUSTERS_MAX} clusters"):
            await member.assigned("x")
        assert len(bus.log) == CLUSTERS_MAX - 2
        assert member.cluster == "c0"

    asyncio.run(scenario())


def online(broker: LoopbackBroker, cluster: str) -> bool:
    state = decode(broker.retained[topics.AGENT_STATUS.name(cluster=cluster, agent="a")].payload)
    assert isinstance(state, Presence)
    return state.online


def with_connection(work: Callable[[LoopbackBroker, Connection, Party], Any]) -> None:
    async def scenario() -> None:
        broker = LoopbackBroker(random.Random(1))
        stamp = Stamp("a", lambda: 0.0)

        def open_bus(cluster: str) -> LoopbackBus:
            birth, will = birth_and_will(stamp, FINGERPRINT, cluster, DEFAULT_ROOT)
            return LoopbackBus(broker, client_id=f"{cluster}-a", birth=birth, will=will)

        party = Party(bus=open_bus("c0"), stamp=stamp, counters=Counters())
        connection = Connection(party, open_bus, "c0")
        async with connection:
            await work(broker, connection, party)
        await asyncio.sleep(1.0)

    run_virtual(scenario())


def test_after_a_renewal_a_power_cut_is_told_in_the_new_cluster() -> None:
    async def work(broker: LoopbackBroker, connection: Connection, party: Party) -> None:
        await asyncio.sleep(1.0)
        assert online(broker, "c0")
        await connection.adopt(await connection.successor("c1", {}), "c1")
        await asyncio.sleep(1.0)
        assert online(broker, "c1")
        assert not online(broker, "c0")
        bus = party.bus
        assert isinstance(bus, LoopbackBus)
        bus.crash()
        await asyncio.sleep(1.0)
        assert not online(broker, "c1")

    with_connection(work)


def test_nothing_is_missed_between_two_connections() -> None:
    async def work(broker: LoopbackBroker, connection: Connection, party: Party) -> None:
        name = topics.PROMPT.name(cluster="c0", agent="a")
        await party.bus.subscribe(name)
        heard: list[str] = []

        async def listen() -> None:
            bus = None
            while bus is not party.bus:
                bus = party.bus
                async for received in party.received():
                    assert isinstance(received.message, Prompt)
                    heard.append(received.message.request)

        async with LoopbackBus(broker, client_id="client") as client:
            asker = Party(bus=client, stamp=Stamp("client", lambda: 0.0), counters=Counters())

            async def ask() -> None:
                for number in range(200):
                    prompt = Prompt(**asker.stamp(), request=f"q{number}", text="x")
                    await asker.send(topics.PROMPT, prompt, cluster="c0", agent="a")
                    await asyncio.sleep(0.001)

            listening, asking = asyncio.create_task(listen()), asyncio.create_task(ask())
            for cluster in ("c1", "c0", "c1"):
                await asyncio.sleep(0.04)
                await connection.adopt(await connection.successor(cluster, {name: 1}), cluster)
            await asking
            await asyncio.sleep(1.0)
            listening.cancel()
            await asyncio.wait([listening])
        assert list(dict.fromkeys(heard)) == [f"q{number}" for number in range(200)]

    with_connection(work)
