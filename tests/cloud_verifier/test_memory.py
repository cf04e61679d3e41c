"""The cloud gives memory back to the system, whether it is idle or busy."""

import asyncio

from msgspec.structs import replace

from cloud_verifier.service import BUSY_S, CACHES_S, IDLE_S
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Escalation, EscalationBatch, Prime, RoutedEscalation, Sampling, VerdictBatch
from fedhlm.protocol.packing import pack_ids
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from tests.edge_broker.world import Hand, World


def test_memory_is_given_back_while_there_is_work_and_when_there_is_none() -> None:
    async def scenario() -> None:
        world = World()
        cloud = await world.cloud().start()
        edge = await Hand(world, "edge-c1").start(topics.CLOUD_VERDICT.name(cluster="c1"))
        released: list[float] = []
        now_s = asyncio.get_running_loop().time
        cloud.service._engine = cloud.service._engine._replace(release=lambda: released.append(now_s()))
        context = pack_ids([1, 2, 3], toy.VOCAB_SIZE)
        block = Escalation(
            **edge.party.stamp(),
            session=1,
            epoch=0,
            base=3,
            ids=pack_ids([4], toy.VOCAB_SIZE),
            patience_ms=1_000,
            before=Prime(Sampling(1, 0.0), toy.FINGERPRINT, context),
        )
        began_s, rounds = now_s(), 100
        for number in range(rounds):
            items = (RoutedEscalation("a", replace(block, session=number)),)
            await edge.send(topics.CLOUD_VERIFY, EscalationBatch(**edge.party.stamp(), items=items), cluster="c1")
            await asyncio.sleep(IDLE_S / 2.0)
        busy_s = now_s() - began_s
        assert len(edge.of(VerdictBatch)) == rounds
        assert busy_s / BUSY_S - 2.0 <= len(released) <= busy_s / BUSY_S
        assert cloud.service.batcher.cached_bytes > 0
        released.clear()
        await asyncio.sleep(IDLE_S + CACHES_S + 1.0)
        assert len(released) == 2
        assert cloud.service.batcher.cached_bytes == 0

    run_virtual(scenario())
