"""A fleet in virtual time: real agents, edges and a cloud on any pair of models, joined by a loopback broker."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np

from cloud_verifier.coordinator import Coordinator
from cloud_verifier.service import CloudService, Engine
from cloud_verifier.sessions import Sessions
from edge_agent.agent import Agent
from edge_agent.learner import Learner
from edge_agent.model import Drafter
from edge_agent.peers import Peers
from edge_agent.profile import Sampler
from edge_broker.service import EdgeService
from fedhlm import topics
from fedhlm.bus import LinkHook, Retained
from fedhlm.link import LinkModel
from fedhlm.loopback import LoopbackBroker, LoopbackBus
from fedhlm.messages import Fingerprint, encode
from fedhlm.party import Party, Stamp, presence
from fedhlm.settings import Consensus, Federation
from fedhlm.telemetry import Counters


class Pair(NamedTuple):
    """Two models that share a tokenizer; `context` in tokens. `drafter` makes an agent's own view of the small one.

    `space` names what the small one's keys are made with; keys of different spaces are not compared.
    """

    fingerprint: Fingerprint
    eos_ids: frozenset[int]
    context: int
    engine: Callable[[], Engine]
    drafter: Callable[[], Drafter]
    space: str


Service = CloudService | EdgeService


class Node:
    """A part that can crash and start again: `launch` makes its buses and its service anew."""

    def __init__(self, launch: Callable[[], tuple[list[LoopbackBus], Service]]) -> None:
        self._launch = launch
        self._task: asyncio.Task[None] | None = None
        self._buses: list[LoopbackBus] = []

    def start(self) -> None:
        """Bring the part up."""
        self._buses, service = self._launch()
        self._task = asyncio.create_task(self._live(service), name="node")

    async def _live(self, service: Service) -> None:
        await service.subscribe()
        for bus in self._buses:
            await bus.__aenter__()
        await service.run()

    async def crash(self) -> None:
        """Kill it as a power cut would: nothing is said, nothing is saved."""
        for bus in self._buses:
            bus.crash()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None


class Fleet:
    """The parts on one broker. `sessions_max` bounds the cloud's sessions, `delay_s` is every link's one-way delay."""

    def __init__(
        self,
        pair: Pair,
        *,
        seed: int,
        clusters: int,
        delay_s: float,
        sessions_max: int,
        federation: Federation = Federation(),  # noqa: B008 - frozen
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
        self.nodes: dict[str, Node] = {"cloud": Node(self._cloud)}
        for c in range(clusters):
            self.nodes[f"edge-{c}"] = Node(lambda c=c: self._edge(f"c{c}"))  # type: ignore[misc]

    def wall_s(self) -> float:
        """The fleet's common wall clock."""
        return 1.0e9 + asyncio.get_running_loop().time()

    def link(self, name: str) -> LinkModel:
        """A client's link, the same one after a restart of the client."""
        return self.links.setdefault(name, LinkModel(delay_s=self._delay_s))

    def bus(
        self,
        name: str,
        will: Retained | None = None,
        birth: Retained | None = None,
        on_link: LinkHook | None = None,
    ) -> LoopbackBus:
        """A new connection over that link."""
        return LoopbackBus(self.broker, client_id=name, link=self.link(name), will=will, birth=birth, on_link=on_link)

    def party(self, bus: LoopbackBus, sender: str) -> Party:
        """A party on that bus."""
        return Party(bus=bus, stamp=Stamp(sender, self.wall_s), counters=self.counters)

    def _cloud(self) -> "tuple[list[LoopbackBus], Service]":
        stamp = Stamp("cloud", self.wall_s)
        name = topics.CLOUD_STATUS.name()
        birth = Retained(name, encode(presence(stamp, "cloud", online=True, fingerprint=self.pair.fingerprint)))
        will = Retained(name, encode(presence(stamp, "cloud", online=False)))
        bus = self.bus("cloud", will, birth)
        service = CloudService(
            party=self.party(bus, "cloud"),
            engine=self.pair.engine(),
            sessions=Sessions(
                fingerprint=self.pair.fingerprint,
                eos_ids=self.pair.eos_ids,
                context_max=self.pair.context,
                sessions_max=self._sessions_max,
            ),
            counters=self.counters,
            batch_max=8,
            coordinator=Coordinator.of(self.federation),
            assign_s=self.federation.assign_s,
            in_thread=inline,
        )
        return [bus], service

    def _edge(self, cluster: str) -> "tuple[list[LoopbackBus], Service]":
        stamp = Stamp(f"edge-{cluster}", self.wall_s)
        name = topics.EDGE_STATUS.name(cluster=cluster)
        will = Retained(name, encode(presence(stamp, "edge", online=False)))
        to_announce = asyncio.Event()
        down = self.bus(f"edge-{cluster}-down", will, on_link=lambda _up: to_announce.set())
        up = self.bus(f"edge-{cluster}-up")
        service = EdgeService(
            cluster=cluster,
            down=self.party(down, f"edge-{cluster}"),
            up=self.party(up, f"edge-{cluster}"),
            counters=self.counters,
            batch_max=16,
            batch_wait_s=0.002,
            to_announce=to_announce,
            federation=self.federation,
            in_thread=inline,
        )
        return [down, up], service

    def agent(
        self,
        bus: LoopbackBus,
        cluster: str,
        name: str,
        drafter: Drafter,
        new_session: Callable[[], int],
        fingerprint: Fingerprint | None = None,
    ) -> Agent:
        """A device on that bus."""
        rng = np.random.default_rng(self.seed)
        return Agent(
            party=self.party(bus, name),
            cluster=cluster,
            drafter=drafter,
            fingerprint=fingerprint or self.pair.fingerprint,
            counters=self.counters,
            new_session=new_session,
            learner=Learner(self.federation, rng),
            make_peers=lambda: Peers(
                name,
                asyncio.get_running_loop().time,
                size=Consensus().size,
                max_age_s=Consensus().max_age_s,
                space=self.pair.space,
            ),
            sampler=Sampler(rng) if self.federation.assign_s else None,
        )

    @asynccontextmanager
    async def online(self, cluster: str, name: str, drafter: Drafter) -> AsyncIterator[Agent]:
        """An agent that hears its bus while the block runs, and moves when it is assigned to another cluster.

        Its session numbers follow from the seed and its name.
        """
        rng = random.Random(f"{self.seed}/{name}/sessions")
        async with self.bus(name) as bus:
            agent = self.agent(bus, cluster, name, drafter, lambda: rng.getrandbits(63))
            await agent.subscribe()
            listener = asyncio.create_task(listen(agent), name=f"{name}-listen")
            try:
                yield agent
            finally:
                listener.cancel()
                await asyncio.wait([listener])


async def listen(agent: Agent) -> None:
    """Hand what the bus brings to an agent."""
    async for received in agent.party.received():
        await agent.handle(received)


async def inline(work: Callable[..., Any], *given: object) -> Any:
    """What `asyncio.to_thread` is to real time: the work takes no virtual time."""
    return work(*given)
