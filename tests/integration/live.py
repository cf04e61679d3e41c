"""Agent, edge and cloud with the shipped models in one process over a real broker, and the client that asks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import cloud_verifier.__main__ as cloud
import edge_agent.__main__ as agent
import edge_broker.__main__ as edge
from fedhlm.answers import Result
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Received
from fedhlm.client import Client
from fedhlm.config import Loaded, load
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Output, Presence
from fedhlm.telemetry import Counters
from fedhlm_zoo.shipped import with_agent_model, with_cloud_model

READY_S = 60.0
ANSWER_S = 120.0


class Live:
    """Running parts by name, their counters, and the client's view of the bus."""

    def __init__(self, client: Client, url: str, flags: dict[str, object]) -> None:
        self.client = client
        self.party = client.party
        self.flags = {"broker.url": url, "agent.threads": "1", "cloud.threads": "1", **flags}
        self.counters: dict[str, Counters] = {}
        self.tasks: dict[str, asyncio.Task[int]] = {}
        self.heard: list[Output] = []  # whoever asked
        self.presence: dict[str, Presence] = {}
        self._changed = asyncio.Event()

    def loaded(self, **flags: object) -> Loaded:
        return load(environ={}, flags={k: str(v) for k, v in {**self.flags, **flags}.items()})

    def start(self, name: str) -> None:
        """Start "cloud", "edge" or an agent of any other name."""
        counters = self.counters[name] = Counters()
        if name == "cloud":
            work = cloud.run(with_cloud_model(self.loaded()).config, counters)
        elif name == "edge":
            work = edge.run(self.loaded().config, counters)
        else:
            work = agent.run(with_agent_model(self.loaded(**{"agent.id": name})), counters)
        self.tasks[name] = asyncio.create_task(work, name=name)

    async def stop(self, name: str) -> None:
        task = self.tasks.pop(name)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()):
            raise error

    def hear(self, received: Received) -> None:
        """What the client hears besides the answers to its questions."""
        match received.message:
            case Output() as output:
                self.heard.append(output)
            case Presence() as state:
                self.presence[received.levels.get("agent", state.role)] = state
        self._changed.set()

    async def until(self, holds: Callable[[], bool], within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def ready(self, *agents: str) -> None:
        def holds() -> bool:
            edge = self.presence.get("edge")
            linked = edge is not None and edge.online and edge.upstream is not None
            return linked and all(a in self.presence and self.presence[a].online for a in agents)

        await self.until(holds, READY_S)

    async def ask(self, text: str, *, name: str = "porch", **options: Any) -> Result:
        """One question and its whole answer."""
        return await self.client.write(name, text, **({"patience_s": ANSWER_S} | options))


@asynccontextmanager
async def live(
    url: str, *, parts: tuple[str, ...] = ("edge", "cloud", "porch"), flags: dict[str, object] | None = None
) -> AsyncIterator[Live]:
    """The parts, started and ready; `flags` are configuration keys."""
    bus = MqttBus(url, client_id="client", connect_timeout_s=10.0)
    async with asking(bus, lambda client: Live(client, url, {"preset": "exact", **(flags or {})})) as system:
        for part in parts:
            system.start(part)
        if {"edge", "cloud"} <= set(parts):
            await system.ready(*(p for p in parts if p not in ("edge", "cloud")))
        yield system


L = TypeVar("L", bound=Live)


@asynccontextmanager
async def asking(bus: MqttBus, make: Callable[[Client], L], *, name: str = "client") -> AsyncIterator[L]:
    """What `make` makes, with a client that shows it who is there; all parts that it started are stopped at the end."""
    systems: list[L] = []
    hear = lambda received: systems[0].hear(received)  # noqa: E731, PLW0108 - it is made later
    async with Client(bus, name=name, hear=hear) as client:
        system = make(client)
        systems.append(system)
        await client.subscribe(
            topics.OUTPUT.name(cluster="+", agent="+", client="+" if name == "client" else name),
            topics.AGENT_STATUS.name(cluster="+", agent="+"),
            topics.EDGE_STATUS.name(cluster="+"),
        )
        try:
            yield system
        finally:
            for name in list(system.tasks):
                await system.stop(name)
