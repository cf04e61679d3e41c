"""What an agent has learnt survives its restart, and a garbled file costs no more than that knowledge."""

import asyncio
from typing import Any

import numpy as np

from edge_agent.core import LEARNER_FILE
from edge_agent.events import Observation
from edge_agent.learner import Learner
from edge_agent.measures import measures_of
from edge_agent.service import AgentService
from fedhlm.config import load
from fedhlm.process.runtime import Runtime
from fedhlm.process.state import Store
from fedhlm.protocol.fingerprint import pair_of
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Federation
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.parts import Part
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from tests.edge_agent.devices import tau_of

LOADED = load(preset="budget", environ={})
MEASURES = measures_of(LOADED.config.generation, Sampling(1), pair_of(toy.FINGERPRINT, None))


class Disk:
    """Files in memory, in place of a folder."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.rejected: list[str] = []
        self.store = Store(self.files.get, self.files.__setitem__, lambda name, _why: self.rejected.append(name))


class Keeping(Fleet):
    """A fleet whose parts have this disk."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(toy.pair(0.8), seed=1, clusters=1, delay_s=0.0, sessions_max=3)
        self.disk = disk

    def runtime(self, part: Part | None = None) -> Runtime:
        return super().runtime(part)._replace(store=self.disk.store)


def service(disk: Disk) -> AgentService:
    facts: Any = None  # no prompt is served here
    drafter = toy.ToyDrafter(agreement=0.8)
    _, made = Keeping(disk).agent_service(Part("a"), LOADED, "c0", drafter, facts, lambda: 1)
    return made


def teach(learner: Learner) -> None:
    seen = Observation(0.2, 0.0, 0.0, None, 0.0, "local", False, False)
    learner.observe(MEASURES, LOADED.config.generation, [seen] * 400)


def test_what_was_learnt_survives_a_restart() -> None:
    async def scenario() -> None:
        disk = Disk()
        first = service(disk)
        teach(first.agent.learner)
        await first.agent.save()
        assert disk.files == {}, "nothing before a round is over"
        first.agent.learner.contribution(LOADED.config.generation, 1.0)
        await first.agent.save()
        again = service(disk).agent.learner
        assert again.snapshot() == first.agent.learner.snapshot()
        assert tau_of(again, MEASURES, LOADED.config.generation) > 0.0
        assert disk.rejected == []

    asyncio.run(scenario())


def test_a_garbled_file_is_put_aside() -> None:
    async def scenario() -> None:
        disk = Disk()
        disk.files[LEARNER_FILE] = b"garbled"
        fresh = Learner(Federation(), np.random.default_rng(1))
        fresh.meet(toy.FINGERPRINT, None)
        made = service(disk).agent.learner
        fresh.began_ms = made.began_ms  # its evidence begins now
        assert made.snapshot() == fresh.snapshot()
        assert disk.rejected == [LEARNER_FILE]

    run_virtual(scenario())
