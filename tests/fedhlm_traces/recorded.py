"""Fleets of toy models in virtual time whose parts keep journals, and the recording that a listener makes of them."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cloud_verifier.engine import Engine
from edge_agent.result import Job
from fedhlm.bus.journal import JournalWriter
from fedhlm.config import load
from fedhlm.learning import federation, robust
from fedhlm.learning.robust import Pooled
from fedhlm.process.runtime import Runtime
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Config
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.parts import Part
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from fedhlm_traces.check.journals import PartJournal, lives
from fedhlm_traces.file import Record


def engine() -> Engine:
    """The toy LLM, which takes no time."""
    return toy.engine(step_s=0.0)


class Recorded(Fleet):
    """A fleet whose edges and cloud keep journals."""

    def __init__(self, config: Config, *, seed: int, clusters: int, keeps: bool, agreement: float) -> None:
        self.journals = 0
        super().__init__(
            toy.pair(agreement),
            seed=seed,
            clusters=clusters,
            delay_s=0.01,
            sessions_max=3,
            federation=config.federation,
            keeps=keeps,
        )

    def runtime(self, part: Part | None = None) -> Runtime:
        runtime = super().runtime(part)
        if part is None or not part.lives:
            return runtime
        self.journals += 1
        return runtime._replace(journal=JournalWriter(self.journals, runtime.clock_s))

    @asynccontextmanager
    async def recording(self, records: list[Record]) -> AsyncIterator[None]:
        """Hear everything while the block runs."""
        async with self.bus("tap") as bus:
            self.link("tap").delay_s = 0.0
            bus.max_incoming = 1_000_000
            await bus.subscribe("#")
            task = asyncio.create_task(self._listen(bus, records), name="tap")
            try:
                yield
            finally:
                task.cancel()
                await asyncio.wait([task])

    async def _listen(self, bus: LoopbackBus, records: list[Record]) -> None:
        async for delivery in bus.deliveries():
            now_s = asyncio.get_running_loop().time()
            records.append(Record(now_s, int(now_s * 1000), delivery.topic, delivery.payload, 1, delivery.retain))

    async def trouble(self, rng: random.Random) -> None:
        """Links that lose, repeat and overtake, and parts that crash, as long as it is not cancelled."""
        while True:
            name = rng.choice(sorted(set(self.links) - {"tap"}))
            link = self.links[name]
            link.loss, link.duplicate, link.reorder = (rng.choice((0.0, 0.2)), *(rng.choice((0.0, 0.5)),) * 2)
            await asyncio.sleep(rng.expovariate(2.0))
            if rng.random() < 0.2:
                part = self.nodes[rng.choice(sorted(self.nodes))]
                await part.crash()
                await asyncio.sleep(rng.choice((0.0, 0.5)))
                part.start()

    def calm(self) -> None:
        """Good links from now on."""
        for link in self.links.values():
            link.loss = link.duplicate = link.reorder = 0.0


async def _agent(fleet: Recorded, config: Config, cluster: str, name: str, agreement: float, prompts: int) -> None:
    pool, rng = random.Random(fleet.seed), random.Random(f"{fleet.seed}/{name}")
    # Few prompts for all, so that what is known of one text helps with another.
    known = [[pool.randrange(1, toy.VOCAB_SIZE) for _ in range(pool.randrange(1, 6))] for _ in range(2)]
    async with fleet.online(cluster, name, toy.ToyDrafter(agreement=agreement)) as agent:
        for _ in range(prompts):
            prompt = rng.choice(known)
            sampling = Sampling(rng.getrandbits(40), 0.8, 1.0, config.generation.coupling)
            job = Job(
                config.generation,
                sampling,
                max_tokens=24,
                context_max=toy.CONTEXT,
                eos_ids=frozenset({toy.EOS_ID}),
            )

            async def hear(_tokens: object) -> None:
                return None

            await agent.generate(job, prompt, hear)


async def _record(
    preset: str, seed: int, *, faults: bool, flags: dict[str, str], keeps: bool, prompts: int
) -> list[Record]:
    agreement = 0.7
    given = {
        "generation.retry_ms": "300",
        "generation.learning.round_tokens": "8",
        "federation.round_updates": "2",
        "federation.round_s": "0.5",
        **flags,
    }
    config = load(preset=preset, environ={}, flags=given).config
    fleet = Recorded(config, seed=seed, clusters=2, keeps=keeps, agreement=agreement)
    records: list[Record] = []
    async with fleet.recording(records):
        await asyncio.sleep(0.1)
        for node in fleet.nodes.values():
            node.start()
        await asyncio.sleep(0.5)
        agents = [(f"c{c}", f"agent-{c}-{a}") for c in range(2) for a in range(2)]
        for _, name in agents:
            fleet.link(name)
        troubles = asyncio.create_task(fleet.trouble(random.Random(seed)), name="trouble") if faults else None
        work = [_agent(fleet, config, cluster, name, agreement, prompts) for cluster, name in agents]
        if troubles is None:
            await asyncio.gather(*work)
        else:
            tasks = asyncio.gather(*work)
            await asyncio.wait([tasks], timeout=15.0)
            troubles.cancel()
            await asyncio.wait([troubles])
            fleet.calm()
            for node in fleet.nodes.values():
                if not node.up:
                    node.start()
            await tasks
        await asyncio.sleep(2.0)
        for node in fleet.nodes.values():
            await node.crash()
        await asyncio.sleep(1.0)
    return records


def record(
    preset: str,
    seed: int,
    *,
    faults: bool = False,
    flags: dict[str, str] | None = None,
    keeps: bool = False,
    prompts: int = 2,
) -> list[Record]:
    """Everything on the bus of one run."""
    return run_virtual(_record(preset, seed, faults=faults, flags=flags or {}, keeps=keeps, prompts=prompts))


def lives_of(records: list[Record], part: str) -> list[PartJournal]:
    """The journals of one kind of part."""
    return [life for life in lives(records) if life.part == part]


def pool_otherwise(patch: pytest.MonkeyPatch) -> None:
    """Change a rule: sums are halved."""
    original = robust.pool

    def pool(*given: object, **named: object) -> Pooled:
        pooled: Pooled = original(*given, **named)  # type: ignore[arg-type]
        return pooled._replace(curve=pooled.curve.scaled(0.5))

    patch.setattr(federation, "pool", pool)
