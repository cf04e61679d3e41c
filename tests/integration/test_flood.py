"""A real broker and a real edge: one agent sends blocks as fast as the broker reads, and another one asks beside it."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from edge_broker.service import EdgeService
from edge_broker.wiring import edge_of
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.bus.rates import BURST_S, REFUSALS_S
from fedhlm.process.runtime import Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    Escalation,
    EscalationBatch,
    Prime,
    RoutedVerdict,
    Sampling,
    Verdict,
    VerdictBatch,
)
from fedhlm.protocol.packing import pack_ids, pack_probs
from fedhlm.settings import Cluster, Config, Edge
from fedhlm.telemetry import Counters
from fedhlm_fleet.pki.mosquitto import Listener, _limits
from fedhlm_lab.sim import toy
from tests.brokers import MOSQUITTO, Mosquitto, until

BLOCKS = 36_000  # three seconds of 12,000
ANSWERS = 8
OTHERS = 5_000  # messages from the cloud to the edge, on the same connection
ANSWER_S = 10.0  # on a machine that does much else; the issue is with twenty


def block(agent: str, session: int) -> Escalation:
    ids = pack_ids([7, 8, 9, 10], toy.VOCAB_SIZE)
    before = Prime(Sampling(1, 0.0), toy.FINGERPRINT, pack_ids([1, 2, 3, 4, 5], toy.VOCAB_SIZE))
    head: dict[str, Any] = {"version": SCHEMA_VERSION, "sender": agent, "sequence": session, "sent_ms": 0}
    return Escalation(**head, session=session, epoch=0, base=5, ids=ids, patience_ms=30_000, before=before)


def party(url: str, name: str) -> Party:
    return Party(bus=MqttBus(url, client_id=name), stamp=Stamp(name), counters=Counters())


async def cloud(here: Party) -> None:
    """Settle every block at once."""
    await here.send(topics.CLOUD_STATUS, presence(here.stamp, "cloud", online=True, fingerprint=toy.FINGERPRINT))
    async for received in here.received():
        assert isinstance(received.message, EscalationBatch)
        answers = []
        for agent, asked in ((item.agent, item.escalation) for item in received.message.items):
            place: dict[str, Any] = {"session": asked.session, "epoch": 0, "base": asked.base, "accepted": 4}
            verdict = Verdict(**here.stamp(), **place, status="settled", target_probs=pack_probs(np.ones(4)))
            answers.append(RoutedVerdict(agent, verdict))
        await here.send(
            topics.CLOUD_VERDICT, VerdictBatch(**here.stamp(), items=tuple(answers)), cluster=received.levels["cluster"]
        )


async def flood(port: int) -> None:
    """One connection of MQTT 3.1.1 that publishes at QoS 0, so that it need not wait for anything."""
    topic, name = topics.ESCALATE.name(cluster="home", agent="flood").encode(), b"flood"
    packets = []
    for session in range(BLOCKS):
        body = len(topic).to_bytes(2, "big") + topic + encode(block("flood", session))
        packets.append(bytes([0x30, len(body) % 128 | 128, len(body) // 128]) + body)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\x10" + bytes([12 + len(name)]) + b"\0\4MQTT\4\2\0\0\0" + bytes([len(name)]) + name)
    for start in range(0, BLOCKS, 100):
        writer.write(b"".join(packets[start : start + 100]))
        await writer.drain()
    writer.close()


async def ask(honest: Party, session: int, heard: dict[int, Verdict]) -> float:
    """Send one block, once, and return the seconds until its verdict."""
    began_s = asyncio.get_running_loop().time()
    await honest.send(topics.ESCALATE, block("honest", session), cluster="home", agent="honest")
    async with asyncio.timeout(ANSWER_S):
        await until(lambda: session in heard)
    return asyncio.get_running_loop().time() - began_s


async def listen(honest: Party, heard: dict[int, Verdict]) -> None:
    async for received in honest.received():
        assert isinstance(received.message, Verdict)
        heard[received.message.session] = received.message


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
async def test_a_flood_of_blocks_is_dropped_unread_and_another_agent_is_answered_beside_it() -> None:
    lines = _limits(Listener(1883, data="/tmp"), "shared")  # noqa: S108 - not used: nothing persists here
    extra = "\n".join(line for line in lines if not line.startswith(("#", "log_", "persistence", "autosave")))
    config, counters = Config(cluster=Cluster(name="home"), edge=Edge()), Counters()
    async with Mosquitto(extra=extra) as broker, AsyncExitStack() as stack:
        far, honest = party(broker.url, "cloud"), party(broker.url, "honest")
        service: EdgeService = edge_of(
            config,
            Runtime.of_process(counters, store=None, journal=False),
            open_down=lambda **named: MqttBus(broker.url, **named),
        )
        heard: dict[int, Verdict] = {}
        await service.subscribe()
        await far.bus.subscribe(topics.CLOUD_VERIFY.name(cluster="+"))
        await honest.bus.subscribe(topics.VERDICT.name(cluster="home", agent="honest"))
        for bus in (*service.buses, far.bus, honest.bus):
            await stack.enter_async_context(bus)
        tasks = [asyncio.ensure_future(work) for work in (service.run(), cloud(far), listen(honest, heard))]
        try:
            await ask(honest, 1, heard)
            began_s = asyncio.get_running_loop().time()
            flooding = asyncio.ensure_future(flood(broker.port))
            await until(lambda: counters["limited_messages"] > 0)
            for session in range(2, 2 + ANSWERS):
                await ask(honest, session, heard)
            await flooding
            await ask(honest, 2 + ANSWERS, heard)
            await asyncio.sleep(0.5)
            took_s = asyncio.get_running_loop().time() - began_s
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert {verdict.status for verdict in heard.values()} == {"settled"}
        read = service.down.bus.statistics.messages_in
        assert read <= (config.edge.agent_messages_s + REFUSALS_S) * (took_s + BURST_S) + OTHERS
        assert counters["limited_messages"] > 0
