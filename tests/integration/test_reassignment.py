"""Over real MQTT: an agent is sent to another cluster in the middle of a generation, and nobody can tell from its text."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import edge_broker.__main__ as edge
from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp
from fedhlm.decoding.alone import Alone
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Assignment, Presence, Sampling
from fedhlm.telemetry import Counters
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder
from tests.integration.live import READY_S, Live, live


class Observer:
    """The operator: who is where, what goes up through which cluster; publishes assignments as the cloud does."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self.where: dict[tuple[str, str], bool] = {}
        self.escalated: list[str] = []
        self.changed = asyncio.Condition()

    async def listen(self) -> None:
        async for received in self.party.received():
            async with self.changed:
                cluster = received.levels.get("cluster", "")
                if received.topic is topics.ESCALATE:
                    self.escalated.append(cluster)
                elif isinstance(received.message, Presence):
                    self.where[cluster, received.levels.get("agent", "edge")] = received.message.online
                self.changed.notify_all()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(READY_S), self.changed:
            await self.changed.wait_for(holds)

    async def assign(self, agent: str, cluster: str) -> None:
        await self.party.send(topics.ASSIGN, Assignment(**self.party.stamp(), cluster=cluster), agent=agent)


@asynccontextmanager
async def observer(url: str) -> AsyncIterator[Observer]:
    async with MqttBus(url, client_id="operator", connect_timeout_s=10.0) as bus:
        watching = Observer(Party(bus=bus, stamp=Stamp("operator"), counters=Counters()))
        await bus.subscribe(
            *(topic.name(cluster="+", agent="+") for topic in (topics.AGENT_STATUS, topics.ESCALATE)),
            topics.EDGE_STATUS.name(cluster="+"),
        )
        task = asyncio.create_task(watching.listen(), name="operator")
        try:
            yield watching
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def start_edge(system: Live, cluster: str) -> None:
    work = edge.run(system.loaded(**{"cluster.name": cluster}).config, Counters())
    system.tasks[cluster] = asyncio.create_task(work, name=cluster)


async def test_an_agent_moves_in_the_middle_of_its_text() -> None:
    llm = Alone.load(model_folder("", "llm"), threads=1)
    title = load_items()[4].title
    flags: dict[str, object] = {"preset": "exact", "generation.retry_ms": 500}
    async with EmbeddedBroker() as broker, live(broker.url, flags=flags) as system, observer(broker.url) as operator:
        start_edge(system, "barn")
        await operator.until(lambda: operator.where.get(("barn", "edge"), False))
        asked = asyncio.create_task(system.ask(title, max_tokens=64, seed=6))
        await system.until(lambda: bool(system.heard), READY_S)
        await operator.assign("porch", "barn")
        answer = await asked
        assert list(answer.ids) == llm.write(llm.encode(title), Sampling(6), 64)
        assert set(operator.escalated) == {"home", "barn"}, "it moved before or after its text"
        await operator.until(
            lambda: operator.where.get(("barn", "porch"), False) and not operator.where["home", "porch"]
        )

        operator.escalated.clear()
        there, through_the_old = await asyncio.gather(
            *(system.ask(title, cluster=cluster, max_tokens=16, seed=7) for cluster in ("barn", "home"))
        )
        oracle = llm.write(llm.encode(title), Sampling(7), 16)
        assert list(through_the_old.ids) == list(there.ids) == oracle
        assert set(operator.escalated) == {"barn"}

        await system.stop("porch")
        await operator.until(lambda: not operator.where["barn", "porch"])
        assert not operator.where["home", "porch"]

        # The assignment is retained: the agent follows it again, though it is still configured for its old cluster.
        system.start("porch")
        await operator.until(lambda: operator.where["barn", "porch"] and not operator.where["home", "porch"])
