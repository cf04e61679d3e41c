"""Edges, a cloud and hand-written agents on one loopback broker in virtual time."""

import asyncio
import random
from typing import Any, TypeVar

from msgspec.structs import replace

from cloud_verifier.coordinator import Coordinator
from cloud_verifier.engine import Engine
from cloud_verifier.service import CloudService
from cloud_verifier.wiring import LargeModel, cloud_of
from edge_broker.service import EdgeService
from edge_broker.wiring import edge_of
from fedhlm.bus.party import Party, Stamp
from fedhlm.learning.curve import Curve
from fedhlm.learning.federation import Members, mean_of_clusters
from fedhlm.process.runtime import Runtime
from fedhlm.process.saver import inline
from fedhlm.process.state import Store
from fedhlm.protocol import topics
from fedhlm.protocol.messages import AnyMessage, Contribution, PaperThreshold
from fedhlm.settings import Cloud, Cluster, Config, Edge, Federation
from fedhlm.telemetry import Counters
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import LoopbackBroker

PRIOR_TOKENS = 256.0
RULES = Federation(round_updates=4, round_s=1.0, prior_tokens=PRIOR_TOKENS)
M = TypeVar("M")


def curve(tokens: float, harm: float = 0.5) -> Curve:
    made = Curve.empty()
    made.add(0.3, harm, tokens)
    return made


class Disk:
    """A store in memory that outlives services."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.rejected: list[str] = []

    @property
    def store(self) -> Store:
        return Store(self.files.get, self.files.__setitem__, lambda name, _why: self.rejected.append(name))


class Node:
    """A running service with its buses; `stop` ends it politely, `crash` as a power cut does."""

    def __init__(self, buses: list[LoopbackBus], service: EdgeService | CloudService) -> None:
        self.buses = buses
        self.service: Any = service
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> "Node":
        await self.service.subscribe()
        for bus in self.buses:
            await bus.__aenter__()
        self.task = asyncio.create_task(self.service.run())
        await asyncio.sleep(0.1)
        return self

    async def stop(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task])
        for bus in self.buses:
            bus.crash()


class Hand:
    """A party moved by the test: what it hears is kept in order."""

    def __init__(self, world: "World", name: str, broker: LoopbackBroker | None = None) -> None:
        self.bus = LoopbackBus(broker or world.broker, client_id=name)
        self.party = Party(bus=self.bus, stamp=Stamp(name, world.wall_s), counters=Counters())
        self.heard: list[tuple[str, AnyMessage]] = []

    async def start(self, *filters: str) -> "Hand":
        await self.bus.__aenter__()
        self.task = asyncio.create_task(self._listen())
        await self.bus.subscribe(*filters)
        await asyncio.sleep(0.01)
        return self

    async def _listen(self) -> None:
        async for received in self.party.received():
            levels = dict(received.levels)
            self.heard.append((received.topic.name(**levels), received.message))

    def of(self, kind: type[M]) -> list[M]:
        return [message for _, message in self.heard if isinstance(message, kind)]

    async def send(self, topic: topics.Topic, message: AnyMessage, **levels: str) -> None:
        await self.party.send(topic, message, expiry_s=None, **levels)
        await asyncio.sleep(0.01)


class World:
    """One broker for the cloud; clusters use it too unless a test gives them one of their own."""

    def __init__(self) -> None:
        self.broker = LoopbackBroker(random.Random(1), reconnect_s=0.1)
        self.counters = Counters()

    @staticmethod
    def wall_s() -> float:
        return 1.0e9 + asyncio.get_running_loop().time()

    def party(self, bus: LoopbackBus, sender: str) -> Party:
        return Party(bus=bus, stamp=Stamp(sender, self.wall_s), counters=self.counters)

    def edge(self, cluster: str = "c1", *, store: Store | None = None, own: LoopbackBroker | None = None) -> Node:
        buses: list[LoopbackBus] = []

        def opener(broker: LoopbackBroker, client_id: str) -> Any:
            def opened(**given: Any) -> LoopbackBus:
                given |= {"client_id": client_id, "will": None}
                buses.append(LoopbackBus(broker, **given))
                return buses[-1]

            return opened

        service = edge_of(
            Config(
                cluster=Cluster(name=cluster), edge=Edge(batch_max=8, batch_wait_ms=0.0, memory=64), federation=RULES
            ),
            Runtime(self.counters, wall_s=self.wall_s, in_thread=inline, store=store),
            open_down=opener(own or self.broker, f"{cluster}-down"),
            open_up=opener(self.broker, f"{cluster}-up"),
            bridges=own is not None,
        )
        return Node(buses, service)

    def cloud(self, *, store: Store | None = None, grouping: Any = None, assign_s: float = 0.0) -> Node:
        buses: list[LoopbackBus] = []

        def opened(**given: Any) -> LoopbackBus:
            buses.append(LoopbackBus(self.broker, **given))
            return buses[-1]

        service = cloud_of(
            Config(
                cloud=Cloud(batch_max=8, batch_wait_ms=0.0, sessions_max=8),
                federation=replace(RULES, assign_s=assign_s),
            ),
            Runtime(self.counters, wall_s=self.wall_s, in_thread=inline, store=store),
            LargeModel(
                Engine(toy.ToyCache(), toy.large_forward), toy.FINGERPRINT, frozenset({toy.EOS_ID}), toy.CONTEXT
            ),
            open_bus=opened,
            coordinator=Coordinator(Members(RULES, mean_of_clusters, of_clusters=True), grouping),
        )
        return Node(buses, service)


async def contribute(
    agent: Hand,
    number: int,
    tokens: float,
    *,
    cluster: str = "c1",
    harm: float = 0.5,
    threshold: PaperThreshold | None = None,
) -> None:
    """An agent's whole sums."""
    message = Contribution(
        **agent.party.stamp(),
        round=number,
        members=1,
        thresholds={} if threshold is None else {"u": threshold},
        curves={"u": curve(tokens, harm).to_bytes()},
    )
    await agent.send(topics.FL_UPDATE, message, cluster=cluster, agent=agent.party.stamp.sender)
