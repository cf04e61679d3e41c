"""A fleet in virtual time: real agents, edges and a cloud on any pair of models, joined by a loopback broker."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from msgspec.structs import replace

from cloud_verifier.engine import DraftModel, Engine
from cloud_verifier.service import CloudService
from cloud_verifier.wiring import LargeModel, cloud_of
from edge_agent.core import AgentCore
from edge_agent.model import Drafter
from edge_agent.service import AgentService, ModelFacts
from edge_agent.wiring import SmallModel, agent_of, service_of
from edge_broker.service import EdgeService
from edge_broker.wiring import edge_of
from fedhlm import settings
from fedhlm.bus.interface import LinkHook, Retained
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.config import Loaded
from fedhlm.process.runtime import OpenBus, Runtime
from fedhlm.process.saver import inline
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Fingerprint
from fedhlm.settings import Config, Federation
from fedhlm.telemetry import Counters
from fedhlm_lab.sim.link import LinkModel
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import LoopbackBroker
from fedhlm_lab.sim.parts import Part, PartBus

# Small enough that contexts are fed in pieces and caches are dropped.
CLOUD: Final = settings.Cloud(batch_max=8, batch_wait_ms=0.0, batch_tokens=24, cache_bytes=24 * 2**20)
EDGE: Final = settings.Edge(batch_max=16, batch_wait_ms=2.0)
WALL_S: Final = 1.0e9  # Unix time at the beginning of virtual time


class Pair(NamedTuple):
    """Two models with one tokenizer; `context` is in tokens.

    `drafter` makes an agent's own view of the SLM, and `beside` the cloud's. `space` identifies how the SLM's keys are
    made; keys of different spaces are not compared.
    """

    fingerprint: Fingerprint
    eos_ids: frozenset[int]
    context: int
    engine: Callable[[], Engine]
    drafter: Callable[[], Drafter]
    space: str
    beside: Callable[[], DraftModel | None] = lambda: None


class Fleet:
    """The parts on one broker.

    `sessions_max` bounds the cloud's sessions, and `delay_s` is every link's one-way delay. With `keeps` the edges
    and the cloud have disks. `services` are the settings of the edges and the cloud.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        seed: int,
        clusters: int,
        delay_s: float,
        sessions_max: int,
        federation: Federation = Federation(),  # noqa: B008 - frozen
        keeps: bool = False,
        services: Config = Config(cloud=CLOUD, edge=EDGE),  # noqa: B008 - frozen
    ) -> None:
        self.pair = pair
        self.seed = seed
        self.rng = random.Random(seed)
        self.broker = LoopbackBroker(self.rng, keepalive_s=3.0, reconnect_s=0.5)
        self.counters = Counters()
        self.links: dict[str, LinkModel] = {}
        self.federation = federation
        self._delay_s = delay_s
        self._sessions_max = sessions_max
        self._keeps = keeps
        self._settings = services
        self.nodes: dict[str, Part] = {"cloud": Part("cloud", self._cloud)}
        for c in range(clusters):
            self.nodes[f"edge-{c}"] = Part(f"edge-{c}", partial(self._edge, f"c{c}"))

    def wall_s(self, part: Part | None = None) -> float:
        """The fleet's wall clock, or a part's own."""
        return WALL_S + asyncio.get_running_loop().time() + (0.0 if part is None else part.skew_s)

    def link(self, name: str) -> LinkModel:
        """A client's link; it stays the same when the client restarts."""
        return self.links.setdefault(name, LinkModel(delay_s=self._delay_s))

    def bus(
        self,
        name: str,
        will: Retained | None = None,
        birth: Retained | None = None,
        on_link: LinkHook | None = None,
        part: Part | None = None,
        client_id: str = "",
    ) -> PartBus:
        """A new connection over that link; its client id is by default the link's name."""
        return PartBus(
            part or Part(name),
            self.broker,
            client_id=client_id or name,
            link=self.link(name),
            will=will,
            birth=birth,
            on_link=on_link,
        )

    def runtime(self, part: Part | None = None) -> Runtime:
        """What the simulated machine gives to a part."""
        store = part.disk.store() if part is not None and self._keeps else None
        return Runtime(self.counters, wall_s=partial(self.wall_s, part), in_thread=inline, store=store)

    def opener(self, name: str, part: Part, buses: list[PartBus]) -> OpenBus:
        """Opens the part's connections over the link of that name, and adds them to `buses`."""

        def open_bus(
            *,
            client_id: str,
            birth: Retained | None = None,
            will: Retained | None = None,
            on_link: LinkHook | None = None,
        ) -> PartBus:
            # The first connection uses the link's name. All parts share one broker here, which knows clients by id.
            given = client_id if any(bus.client_id == name for bus in buses) else name
            bus = self.bus(name, will, birth, on_link=on_link, part=part, client_id=given)
            bus.fit(part.room)
            buses.append(bus)
            return bus

        return open_bus

    def party(self, bus: LoopbackBus, sender: str, part: Part | None = None) -> Party:
        """An endpoint on that bus."""
        return Party(bus=bus, stamp=Stamp(sender, partial(self.wall_s, part)), counters=self.counters)

    def _cloud(self, part: Part) -> tuple[list[PartBus], CloudService]:
        buses: list[PartBus] = []
        pair, cloud = self.pair, replace(self._settings.cloud, sessions_max=self._sessions_max)
        service = cloud_of(
            Config(cloud=cloud, federation=self.federation),
            self.runtime(part),
            LargeModel(pair.engine(), pair.fingerprint, pair.eos_ids, pair.context, pair.beside()),
            open_bus=self.opener("cloud", part, buses),
        )
        return buses, service

    def _edge(self, cluster: str, part: Part) -> tuple[list[PartBus], EdgeService]:
        buses: list[PartBus] = []
        service = edge_of(
            Config(cluster=settings.Cluster(name=cluster), edge=self._settings.edge, federation=self.federation),
            self.runtime(part),
            open_down=self.opener(f"edge-{cluster}-down", part, buses),
            open_up=self.opener(f"edge-{cluster}-up", part, buses),
        )
        return buses, service

    def agent(
        self,
        bus: LoopbackBus,
        cluster: str,
        name: str,
        drafter: Drafter,
        new_session: Callable[[], int],
        fingerprint: Fingerprint | None = None,
        counters: Counters | None = None,
    ) -> AgentCore:
        """An agent on that bus, without a disk."""
        config = Config(
            agent=settings.Agent(id=name), cluster=settings.Cluster(name=cluster), federation=self.federation
        )
        model = SmallModel(drafter, fingerprint or self.pair.fingerprint, self.pair.space)
        rng = np.random.default_rng(self.seed)
        runtime = self.runtime()
        runtime = runtime if counters is None else runtime._replace(counters=counters)
        return agent_of(config, runtime, bus, model, new_session=new_session, rng=rng)

    def agent_service(
        self,
        part: Part,
        loaded: Loaded,
        cluster: str,
        drafter: Drafter,
        facts: ModelFacts,
        new_session: Callable[[], int],
        kind: Callable[..., AgentCore] = AgentCore,
    ) -> tuple[list[PartBus], AgentService]:
        """One life of an agent under the part's name, with its state on the part's disk."""
        config = replace(
            loaded.config,
            agent=replace(loaded.config.agent, id=part.name),
            cluster=settings.Cluster(name=cluster),
            federation=self.federation,
        )
        buses: list[PartBus] = []
        service = service_of(
            dataclasses.replace(loaded, config=config),
            self.runtime(part),
            SmallModel(drafter, self.pair.fingerprint, self.pair.space),
            facts,
            open_bus=self.opener(part.name, part, buses),
            new_session=new_session,
            rng=np.random.default_rng(self.seed),
            kind=kind,
        )
        return buses, service

    @asynccontextmanager
    async def online(
        self, cluster: str, name: str, drafter: Drafter, counters: Counters | None = None, pace_s: float = 0.0
    ) -> AsyncIterator[AgentCore]:
        """An agent that reads its bus inside the block, and moves when it is assigned to another cluster.

        Its session numbers follow from the seed and its name. It counts with all other parts, or in `counters`,
        and takes `pace_s` seconds over each message.
        """
        rng = random.Random(f"{self.seed}/{name}/sessions")
        async with self.bus(name, part=Part(name, pace_s=pace_s)) as bus:
            agent = self.agent(bus, cluster, name, drafter, lambda: rng.getrandbits(63), counters=counters)
            async with reading(agent):
                yield agent


@asynccontextmanager
async def reading(agent: AgentCore) -> AsyncIterator[None]:
    """Have an agent, whose bus is open, present itself and read the bus inside the block."""
    await agent.subscribe()
    state = presence(agent.party.stamp, "agent", online=True, fingerprint=agent.fingerprint)
    await agent.party.send(topics.AGENT_STATUS, state, cluster=agent.cluster, agent=agent.party.stamp.sender)
    tasks = [
        asyncio.create_task(listen(agent), name=f"{agent.party.stamp.sender}-listen"),
        asyncio.create_task(agent.auditor.keep(), name=f"{agent.party.stamp.sender}-audits"),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def listen(agent: AgentCore) -> None:
    """Pass the bus's deliveries to an agent."""
    async for received in agent.party.received():
        await agent.handle(received)
