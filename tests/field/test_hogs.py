"""Hogs on real brokers: what is beyond an agent's rate is refused at once, and a quiet agent beside it is served."""

import asyncio
from collections import Counter

from edge_broker.admission import TOO_FAST
from fedhlm.bus.party import Party, Stamp
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Escalation, Sampling, Verdict
from fedhlm.telemetry import Counters
from fedhlm_lab.sim import toy
from tests.brokers import until
from tests.field.fleet import both_brokers, fleets

RATE = 20
FLOOD = 40 * RATE
LENGTH = 16
TEXT = toy.ToyTokenizer().decode([5, 6])
SEED = next(s for s in range(1_000) if len(toy.large_alone([5, 6], Sampling(s, 0.8), LENGTH)) == LENGTH)


@both_brokers
async def test_a_hog_is_refused_and_a_quiet_agent_beside_it_writes_the_same_text(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        await fleet.edge(**{"edge.agent_messages_s": str(RATE)})
        await fleet.cloud()
        await fleet.agent("porch")
        client = await fleet.client()
        options = {"max_tokens": LENGTH, "seed": SEED, "temperature": 0.8}
        assert (await client.write("porch", TEXT, **options)).finish == "length"
        said: Counter[str] = Counter()
        async with fleet.bus("agent home hog", client_id="hog") as bus:
            hog = Party(bus=bus, stamp=Stamp("hog"), counters=Counters())
            await bus.subscribe(topics.VERDICT.name(cluster="home", agent="hog"))

            async def hear() -> None:
                async for received in hog.received():
                    if isinstance(received.message, Verdict):
                        said[received.message.reason] += 1

            hearing = asyncio.create_task(hear())
            for n in range(FLOOD):
                block = Escalation(**hog.stamp(), session=n, epoch=0, base=2, ids=bytes(4), patience_ms=1_000, before=1)
                await hog.send(topics.ESCALATE, block, cluster="home", agent="hog")
            answer = await client.write("porch", TEXT, **options)
            await until(lambda: said[TOO_FAST] > 0)
            hearing.cancel()
            await asyncio.wait([hearing])
        assert list(answer.ids) == toy.large_alone([5, 6], Sampling(SEED, 0.8), LENGTH)
        assert fleet.counters["edge home"]["limited_messages"] > FLOOD / 2
        assert {name: lost for name, lost in fleet.reconnects.items() if "hog" not in name} == {}
