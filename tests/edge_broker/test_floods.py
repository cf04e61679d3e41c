"""An agent or a cluster that sends without end is refused at once, and costs the others neither place nor answer."""

import asyncio
import time

import msgspec

from cloud_verifier import service as cloud_service
from edge_broker.admission import TOO_FAST
from edge_broker.relay import BUSY, PENDING_OF_ONE, Relay
from fedhlm.bus.interface import BusStatistics, Delivery, Inbox
from fedhlm.bus.rates import BURST_S, REFUSALS_S
from fedhlm.protocol import topics
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    Escalation,
    EscalationBatch,
    RoutedEscalation,
    UncertainTokens,
    Verdict,
    VerdictBatch,
)
from fedhlm.settings import Cloud, Edge
from fedhlm_lab.sim.virtual import run_virtual
from tests.edge_broker.test_service import Scene, block, doubts
from tests.edge_broker.world import Hand, World

RATE = 10


def escalation(agent: Hand, number: int) -> Escalation:
    return msgspec.structs.replace(block(agent, [7], 5, hints=None), session=number)


def bare(number: int) -> Escalation:
    """A block outside any world."""
    return Escalation(
        version=SCHEMA_VERSION,
        sender="a",
        sequence=1,
        sent_ms=0,
        session=number,
        epoch=0,
        base=5,
        ids=b"ab",
        patience_ms=1,
    )


def test_blocks_beyond_an_agents_rate_are_refused_at_once_and_others_are_relayed() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        edge = scene.edge.service
        edge.rates.allowance.units.per_s = RATE
        other = await Hand(scene.world, "b").start(topics.VERDICT.name(cluster="c1", agent="b"))
        flood = 10 * RATE
        for number in range(flood):
            await scene.agent.party.send(
                topics.ESCALATE, escalation(scene.agent, number), cluster="c1", agent="a", expiry_s=None
            )
        await other.send(topics.ESCALATE, escalation(other, 1), cluster="c1", agent="b")
        relayed = [item.agent for batch in scene.cloud.of(EscalationBatch) for item in batch.items]
        refused = scene.agent.of(Verdict)
        assert relayed.count("b") == 1, "another agent's block is relayed"
        assert other.of(Verdict) == []
        assert relayed.count("a") == int(RATE * BURST_S)
        assert {(v.status, v.reason) for v in refused} == {("refused", TOO_FAST)}
        assert len(refused) == flood - relayed.count("a")
        assert scene.world.counters["limited_messages"] == len(refused)
        await asyncio.sleep(BURST_S)
        await scene.agent.send(topics.ESCALATE, escalation(scene.agent, flood), cluster="c1", agent="a")
        assert scene.cloud.of(EscalationBatch)[-1].items[-1].agent == "a", "it has its rate again"

    run_virtual(scenario())


def test_an_agent_is_told_of_some_refusals_a_second_only() -> None:
    """Who sends 12,000 blocks a second is not sent 12,000 answers."""

    async def scenario() -> None:
        scene = await Scene().start()
        scene.edge.service.rates.allowance.units.per_s = 1
        for number in range(2_000):
            await scene.agent.party.send(
                topics.ESCALATE, escalation(scene.agent, number), cluster="c1", agent="a", expiry_s=None
            )
            await asyncio.sleep(1e-4)
        await asyncio.sleep(0.1)
        assert len(scene.agent.of(Verdict)) <= REFUSALS_S * (BURST_S + 1.0)
        assert scene.world.counters["limited_messages"] > 1_900

    run_virtual(scenario())


def test_large_messages_count_by_their_bytes() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        scene.edge.service.rates.allowance.bytes.per_s = 1_000
        heavy = msgspec.structs.replace(escalation(scene.agent, 1), laws=bytes(3_900))
        await scene.agent.send(topics.ESCALATE, heavy, cluster="c1", agent="a")
        await scene.agent.send(topics.ESCALATE, heavy, cluster="c1", agent="a")
        assert [v.status for v in scene.agent.of(Verdict)] == ["refused"]

    run_virtual(scenario())


def test_doubts_beyond_the_rate_are_dropped_and_counted() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        scene.edge.service.rates.allowance.units.per_s = RATE
        for number in range(100):
            message: UncertainTokens = doubts(scene.agent, (number, 7))
            await scene.agent.party.send(topics.PEER, message, cluster="c1", agent="a", expiry_s=None)
        await asyncio.sleep(0.1)
        held = scene.edge.service.memory._doubts["a", 1]
        assert len(held) == int(RATE * BURST_S)
        assert scene.world.counters["limited_messages"] == 100 - len(held)

    run_virtual(scenario())


def test_a_cluster_beyond_its_rate_is_refused_at_once_and_others_are_served() -> None:
    async def scenario() -> None:
        world = World()
        cloud = await world.cloud().start()
        cloud.service._allowance.units.per_s = RATE
        hands = {
            name: await Hand(world, f"edge-{name}").start(topics.CLOUD_VERDICT.name(cluster=name)) for name in "ab"
        }
        for name, batches in (("a", 20), ("b", 1)):
            for _ in range(batches):
                items = tuple(RoutedEscalation("x", escalation(hands[name], number)) for number in range(8))
                message = EscalationBatch(**hands[name].party.stamp(), items=items)
                await hands[name].party.send(topics.CLOUD_VERIFY, message, cluster=name, expiry_s=None)
        await asyncio.sleep(1.0)
        told = {
            name: [i.verdict for batch in hand.of(VerdictBatch) for i in batch.items] for name, hand in hands.items()
        }
        too_fast = [v for v in told["a"] if v.reason == cloud_service.TOO_FAST]
        assert len(too_fast) == 8 * 20 - 8 * int(RATE * BURST_S / 8)
        assert world.counters["limited_messages"] == 15
        assert not any(v.reason == cloud_service.TOO_FAST for v in told["b"])
        assert told["b"]

    run_virtual(scenario())


def test_a_flood_is_dropped_before_it_is_read() -> None:
    """Every kind of message that an agent sends counts. Of the cloud's messages none is dropped."""

    async def scenario() -> None:
        scene = await Scene().start()
        down = scene.edge.service.down.bus
        before, now_s = down.statistics.messages_in, asyncio.get_running_loop().time()
        for number in range(3_000):
            await scene.agent.party.send(topics.PEER, doubts(scene.agent, (number, 7)), cluster="c1", agent="a")
            await scene.agent.party.send(topics.ESCALATE, escalation(scene.agent, number), cluster="c1", agent="a")
            await asyncio.sleep(1e-4)
        took_s = asyncio.get_running_loop().time() - now_s
        most = (Edge().agent_messages_s + REFUSALS_S) * (BURST_S + took_s)
        assert 0.99 * most < down.statistics.messages_in - before <= most
        assert scene.world.counters["limited_messages"] >= 6_000 - Edge().agent_messages_s * (BURST_S + took_s)
        assert down.sheds is not None
        answers = topics.CLOUD_VERDICT.name(cluster="c1").encode()
        assert not any(down.sheds(answers, 1_000) for _ in range(10_000)), "on a broker of both sides"

    run_virtual(scenario())


def test_a_clusters_flood_is_dropped_before_it_is_read() -> None:
    async def scenario() -> None:
        world = World()
        cloud = await world.cloud().start()
        sheds = cloud.service.bus.sheds
        assert sheds is not None
        flood = [topic.name(cluster="a").encode() for topic in (topics.CLOUD_VERIFY, topics.CLOUD_PROFILE)]
        read = sum(not sheds(flood[number % 2], 100) for number in range(20_000))
        assert read == (Cloud().cluster_blocks_s + REFUSALS_S) * BURST_S
        assert world.counters["limited_messages"] == 20_000 - read
        assert not sheds(topics.CLOUD_VERIFY.name(cluster="b").encode(), 100)
        assert not sheds(topics.FORGET.name(member="a").encode(), 100)

    run_virtual(scenario())


def test_the_settings_set_the_rates() -> None:
    async def scenario() -> None:
        world = World()
        edge = world.edge().service
        assert (edge.rates.allowance.units.per_s, edge.rates.allowance.bytes.per_s) == (
            Edge().agent_messages_s,
            Edge().agent_bytes_s,
        )
        cloud = world.cloud().service
        assert (cloud._allowance.units.per_s, cloud._allowance.bytes.per_s) == (
            Cloud().cluster_blocks_s,
            Cloud().cluster_bytes_s,
        )

    run_virtual(scenario())


# Queues


def test_a_batch_has_a_block_of_each_agent_before_the_second_of_one() -> None:
    relay = Relay(batch_max=4)
    for number in range(100):
        relay.escalate("flood", bare(number))
    for agent in ("b", "c"):
        relay.escalate(agent, bare(1))
    assert [routed.agent for routed in relay.take_batch()] == ["flood", "flood", "b", "c"]
    assert [routed.agent for routed in relay.take_batch()] == ["flood"] * 4


def test_an_escalation_costs_the_same_however_many_blocks_wait() -> None:
    blocks = [bare(number) for number in range(4_000)]

    def seconds(relay: Relay, agent: str) -> float:
        began = time.process_time()
        for waiting in blocks:
            relay.escalate(agent, waiting)
            relay.escalate(agent, waiting)
        return time.process_time() - began

    alone = min(seconds(Relay(), "a") for _ in range(3))
    crowded = Relay()
    for agent in range(5):
        seconds(crowded, f"other{agent}")
    assert min(seconds(crowded, "a") for _ in range(3)) < 10.0 * alone
    assert len(crowded) == 6 * 4_000


def test_an_agent_whose_queue_is_full_is_told_at_once() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        for number in range(PENDING_OF_ONE):
            scene.edge.service.relay.escalate("a", escalation(scene.agent, number))
        await scene.edge.service._escalate("a", escalation(scene.agent, PENDING_OF_ONE), "")
        await asyncio.sleep(0.01)
        assert [(v.session, v.reason) for v in scene.agent.of(Verdict)] == [(PENDING_OF_ONE, BUSY)]
        assert len(scene.edge.service.relay) == PENDING_OF_ONE

    run_virtual(scenario())


def test_a_flood_on_one_topic_takes_no_place_from_another() -> None:
    async def scenario() -> None:
        statistics = BusStatistics()
        inbox = Inbox(100, statistics)
        for number in range(500):
            inbox.put(Delivery("flood", bytes([number % 256]), False), 1)
        for number in range(30):
            inbox.put(Delivery("honest", bytes([number]), False), 1)
            inbox.put(Delivery("flood", b"", False), 1)
        assert len(inbox) == 100
        assert statistics.dropped_in == 400 + 30 + 30
        found = [await anext(inbox) for _ in range(100)]
        assert [d.payload[0] for d in found if d.topic == "honest"] == list(range(30))
        assert [d.payload[0] for d in found if d.topic == "flood"] == list(range(70)), "in order of arrival"
        assert len(inbox) == 0

    run_virtual(scenario())
