"""The fleet's certificate over real parts: from agents' texts by edge and cloud back to the agents, and what survives."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cloud_verifier.service import CloudService
from edge_agent.core import AgentCore
from edge_agent.result import GenerationResult, Job
from edge_broker.service import EdgeService
from fedhlm.config import load
from fedhlm.learning.certificate import Certificate
from fedhlm.learning.evidence import certificates_of
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import Learned, Sampling
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from fedhlm_lab.studies.compare import nobody
from fedhlm_lab.studies.coverage import errors_of

FLAGS = {
    "federation.round_s": "1.0",
    "generation.learning.round_tokens": "48",
    "generation.learning.growth": "0.01",
    "generation.peers": "none",
}
CONFIG = load(preset="budget", environ={}, flags=FLAGS).config


class World(Fleet):
    """Two clusters; edges and cloud keep their state, agents do not."""

    def __init__(self) -> None:
        super().__init__(
            toy.pair(0.85), seed=3, clusters=2, delay_s=0.01, sessions_max=64, federation=CONFIG.federation, keeps=True
        )
        self.prompts = random.Random(5)
        self.tokens = self.wrong = 0

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["World"]:
        for node in self.nodes.values():
            node.start()
        await asyncio.sleep(1.0)
        yield self
        for node in self.nodes.values():
            await node.crash()

    async def write(self, agent: AgentCore, texts: int) -> GenerationResult:
        for _ in range(texts):
            prompt = [self.prompts.randrange(1, toy.VOCAB_SIZE) for _ in range(3)]
            sampling = Sampling(self.prompts.getrandbits(40), 0.8)
            job = Job(CONFIG.generation, sampling, 24, self.pair.context, self.pair.eos_ids)
            result = await agent.generate(job, prompt, nobody)
            self.tokens += len(result.ids)
            self.wrong += errors_of(prompt, sampling, result)
        await asyncio.sleep(5.0)
        return result

    def told(self, cluster: str | None = None) -> Certificate:
        """What the cloud, or an edge, tells those below it."""
        name = topics.CLOUD_FL_STATE.name() if cluster is None else topics.FL_STATE.name(cluster=cluster)
        if name not in self.broker.retained:
            return Certificate()
        message = decode(self.broker.retained[name].payload)
        assert isinstance(message, Learned)
        return sum(certificates_of(message.evidence).values(), Certificate())


def test_what_the_devices_of_two_clusters_know_adds_up_at_the_cloud_and_comes_back() -> None:
    async def scenario() -> None:
        async with (
            World().opened() as fleet,
            fleet.online("c0", "porch", fleet.pair.drafter()) as porch,
            fleet.online("c1", "attic", fleet.pair.drafter()) as attic,
        ):
            await fleet.write(porch, 30)
            await fleet.write(attic, 30)
            last = await fleet.write(porch, 10)
            whole = sum(
                (Certificate.from_bytes(next(iter(said.sums.values())))
                 for said in (porch.learner.evidence(), attic.learner.evidence()) if said is not None),
                Certificate(),
            )  # fmt: skip
            told = fleet.told()
            assert 0.8 * whole.tokens < told.tokens <= whole.tokens
            assert told.limit(0.95) >= whole.limit(0.95) - 1e-9
            assert told.limit(0.95) > fleet.wrong / fleet.tokens
            assert fleet.told("c0").tokens == fleet.told("c1").tokens == told.tokens, "the whole fleet's"
            assert last.fleet is not None
            figures = last.statistics()
            assert figures["fleet_risk_limit"] == last.fleet.limit(0.95) < figures["risk_limit"]
            assert figures["fleet_risk_tokens"] > figures["risk_tokens"]
            exported = fleet.counters.snapshot()
            assert exported["fleet_risk_limit"] == pytest.approx(told.limit(0.95), rel=0.2)

    run_virtual(scenario())


def test_a_device_that_loses_its_disk_begins_anew_and_the_fleet_does_not() -> None:
    async def scenario() -> None:
        async with World().opened() as fleet:
            async with fleet.online("c0", "porch", fleet.pair.drafter()) as porch:
                await fleet.write(porch, 40)
                before = fleet.told()
                assert before.tokens > 700
            fleet.seed += 1  # session numbers do not repeat
            async with fleet.online("c0", "porch", fleet.pair.drafter()) as porch:
                await asyncio.sleep(1.0)
                fresh = await fleet.write(porch, 10)
                assert fresh.certificate is not None
                assert fresh.certificate.tokens <= 240
                after = fleet.told()
                assert after.tokens > before.tokens + 100
                assert after.figures()["harm"] >= before.figures()["harm"]
                assert after.limit(0.95) > fleet.wrong / fleet.tokens

    run_virtual(scenario())


@pytest.mark.parametrize("part", ["edge-0", "cloud"])
@pytest.mark.parametrize("disk", [True, False])
def test_an_edge_or_a_cloud_that_starts_again_loses_and_doubles_nothing(part: str, disk: bool) -> None:
    async def scenario() -> None:
        async with World().opened() as fleet, fleet.online("c0", "porch", fleet.pair.drafter()) as porch:
            await fleet.write(porch, 40)
            before = fleet.told()
            service = fleet.nodes[part].service
            assert isinstance(service, EdgeService | CloudService)
            await asyncio.sleep(60.0)  # saved
            await fleet.nodes[part].crash()
            if not disk:
                fleet.nodes[part].disk.files.clear()
            fleet.nodes[part].start()
            await asyncio.sleep(5.0)
            assert fleet.told().tokens >= before.tokens
            await fleet.write(porch, 40)
            after = fleet.told()
            known = porch.learner.evidence()
            assert known is not None
            whole = Certificate.from_bytes(next(iter(known.sums.values())))
            assert before.tokens + 100 < after.tokens <= whole.tokens + 1e-6
            assert after.limit(0.95) > fleet.wrong / fleet.tokens

    run_virtual(scenario())


def test_with_privacy_no_evidence_travels() -> None:
    async def scenario() -> None:
        fleet = World()
        private = load(preset="budget", environ={}, flags={**FLAGS, "federation.epsilon": "5.0"}).config.federation
        fleet.federation = private
        async with fleet.opened(), fleet.online("c0", "porch", fleet.pair.drafter()) as porch:
            await fleet.write(porch, 20)
            assert porch.learner.evidence() is None
            assert fleet.told().tokens == 0.0

    run_virtual(scenario())
