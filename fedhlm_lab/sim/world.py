"""A fleet in virtual time: real agents, edges and a cloud on any pair of models, joined by a loopback broker."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from cloud_verifier.coordinator import Coordinator
from cloud_verifier.engine import Engine
from cloud_verifier.service import CloudService
from cloud_verifier.sessions import Sessions
from edge_agent.driver import Agent
from edge_agent.learner import Learner
from edge_agent.model import Drafter
from edge_agent.peers import Peers
from edge_agent.profile import Sampler
from edge_broker.service import EdgeService
from fedhlm.bus.interface import LinkHook, Retained
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Fingerprint, encode
from fedhlm.settings import Consensus, Federation
from fedhlm.telemetry import Counters
from fedhlm_lab.sim.link import LinkModel
from fedhlm_lab.sim.loopback import LoopbackBroker, LoopbackBus
from fedhlm_lab.sim.parts import Part, PartBus, inline

WALL_S: Final = 1.0e9  # Unix time at the beginning of virtual time


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


class Fleet:
    """The parts on one broker. `sessions_max` bounds the cloud's sessions, `delay_s` is every link's one-way delay.

    With `keeps` the edges and the cloud have disks.
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
        self.nodes: dict[str, Part] = {"cloud": Part("cloud", self._cloud)}
        for c in range(clusters):
            self.nodes[f"edge-{c}"] = Part(f"edge-{c}", partial(self._edge, f"c{c}"))

    def wall_s(self, part: Part | None = None) -> float:
        """The fleet's common wall clock, or a part's own."""
        return WALL_S + asyncio.get_running_loop().time() + (0.0 if part is None else part.skew_s)

    def link(self, name: str) -> LinkModel:
        """A client's link, the same one after a restart of the client."""
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
        """A new connection over that link; the client's id is the link's name by default."""
        return PartBus(
            part or Part(name),
            self.broker,
            client_id=client_id or name,
            link=self.link(name),
            will=will,
            birth=birth,
            on_link=on_link,
        )

    def party(self, bus: LoopbackBus, sender: str, part: Part | None = None) -> Party:
        """A party on that bus."""
        return Party(bus=bus, stamp=Stamp(sender, partial(self.wall_s, part)), counters=self.counters)

    def _cloud(self, part: Part) -> tuple[list[PartBus], CloudService]:
        stamp = Stamp("cloud", partial(self.wall_s, part))
        name = topics.CLOUD_STATUS.name()
        birth = Retained(name, encode(presence(stamp, "cloud", online=True, fingerprint=self.pair.fingerprint)))
        will = Retained(name, encode(presence(stamp, "cloud", online=False)))
        to_announce = asyncio.Event()
        bus = self.bus("cloud", will, birth, on_link=lambda _up: to_announce.set(), part=part)
        service = CloudService(
            party=self.party(bus, "cloud", part),
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
            store=part.disk.store() if self._keeps else None,
            in_thread=inline,
            to_announce=to_announce,
        )
        return [bus], service

    def _edge(self, cluster: str, part: Part) -> tuple[list[PartBus], EdgeService]:
        stamp = Stamp(f"edge-{cluster}", partial(self.wall_s, part))
        name = topics.EDGE_STATUS.name(cluster=cluster)
        will = Retained(name, encode(presence(stamp, "edge", online=False)))
        to_announce = asyncio.Event()
        down = self.bus(f"edge-{cluster}-down", will, on_link=lambda _up: to_announce.set(), part=part)
        up = self.bus(f"edge-{cluster}-up", part=part)
        service = EdgeService(
            cluster=cluster,
            down=self.party(down, f"edge-{cluster}", part),
            up=self.party(up, f"edge-{cluster}", part),
            counters=self.counters,
            batch_max=16,
            batch_wait_s=0.002,
            to_announce=to_announce,
            federation=self.federation,
            store=part.disk.store() if self._keeps else None,
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
        part: Part | None = None,
        kind: Callable[..., Agent] = Agent,
    ) -> Agent:
        """A device on that bus."""
        rng = np.random.default_rng(self.seed)
        return kind(
            party=self.party(bus, name, part),
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
