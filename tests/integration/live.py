"""Agent, edge and cloud with the shipped models in one process over a real broker, and a client that asks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import cloud_verifier.__main__ as cloud
import edge_agent.__main__ as agent
import edge_broker.__main__ as edge
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp
from fedhlm.config import Loaded, load
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Output, Presence, Prompt
from fedhlm.telemetry import Counters
from fedhlm_zoo.shipped import with_agent_model, with_cloud_model

READY_S = 60.0
ANSWER_S = 120.0


class Live:
    """Running parts by name, their counters, and the client's view of the bus."""

    def __init__(self, party: Party, url: str, flags: dict[str, object]) -> None:
        self.party = party
        self.flags = {"broker.url": url, "agent.threads": "1", "cloud.threads": "1", **flags}
        self.counters: dict[str, Counters] = {}
        self.tasks: dict[str, asyncio.Task[int]] = {}
        self.outputs: dict[str, list[Output]] = {}
        self.presence: dict[str, Presence] = {}
        self.changed = asyncio.Condition()
        self._count = 0

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

    async def listen(self, party: Party) -> None:
        async for received in party.received():
            async with self.changed:
                match received.message:
                    case Output() as output:
                        self.outputs.setdefault(output.request, []).append(output)
                    case Presence() as state:
                        self.presence[received.levels.get("agent", state.role)] = state
                self.changed.notify_all()

    async def until(self, holds: Callable[[], bool], within_s: float) -> None:
        async with asyncio.timeout(within_s), self.changed:
            await self.changed.wait_for(holds)

    async def ready(self, *agents: str) -> None:
        def holds() -> bool:
            edge = self.presence.get("edge")
            linked = edge is not None and edge.online and edge.upstream is not None
            return linked and all(a in self.presence and self.presence[a].online for a in agents)

        await self.until(holds, READY_S)

    async def ask(self, text: str, *, name: str = "porch", **options: Any) -> list[Output]:
        """One prompt and all its outputs."""
        self._count += 1
        request = f"q{self._count}"
        prompt = Prompt(**self.party.stamp(), request=request, text=text, **options)
        await self.party.send(topics.PROMPT, prompt, cluster="home", agent=name)
        await self.until(lambda: any(o.finish is not None for o in self.outputs.get(request, [])), ANSWER_S)
        return self.outputs[request]


@asynccontextmanager
async def live(
    url: str, *, parts: tuple[str, ...] = ("edge", "cloud", "porch"), flags: dict[str, object] | None = None
) -> AsyncIterator[Live]:
    """The parts, started and ready; `flags` are configuration keys."""
    bus = MqttBus(url, client_id="client", connect_timeout_s=10.0)
    async with bus:
        system = Live(
            Party(bus=bus, stamp=Stamp("client"), counters=Counters()), url, {"preset": "exact", **(flags or {})}
        )
        await bus.subscribe(
            topics.OUTPUT.name(cluster="+", agent="+"),
            topics.AGENT_STATUS.name(cluster="+", agent="+"),
            topics.EDGE_STATUS.name(cluster="+"),
        )
        listener = asyncio.create_task(system.listen(system.party), name="client")
        for part in parts:
            system.start(part)
        try:
            if {"edge", "cloud"} <= set(parts):
                await system.ready(*(p for p in parts if p not in ("edge", "cloud")))
            yield system
        finally:
            for name in list(system.tasks):
                await system.stop(name)
            listener.cancel()
            await asyncio.wait([listener])


def ids_of(outputs: list[Output]) -> list[int]:
    """All ids of one request, checked to come without gap or repetition."""
    ids: list[int] = []
    for output in outputs:
        assert output.position == len(ids), "a gap or a repetition"
        ids += output.ids
    return ids
