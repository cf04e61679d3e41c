"""One request is one trace: from the client's span over the agent's and the edge's to the cloud's model calls."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from edge_broker.wiring import edge_of
from fedhlm.answering import Question
from fedhlm.client import Client
from fedhlm.errors import ConfigError, RequestNameTaken
from fedhlm.opentelemetry import OtelTracer
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import LoopbackBroker
from tests.fedhlm.test_spans import ABOVE
from tests.field.fleet import LIMIT_S, NEEDS_MOSQUITTO, Fleet, fleets

TEXT = toy.ToyTokenizer().decode([5, 6, 7])
PARTS = ("agent", "edge", "cloud")


class MemoryFleet(Fleet):
    """A fleet on a bus in memory."""

    def bus(self, name: str, **options: Any) -> Any:
        bus: Any = LoopbackBus(self._memory, **options)
        self.buses.setdefault(name, []).append(bus)
        return bus

    async def edge(self, cluster: str = "home", **flags: str) -> None:
        """An edge with one connection to its cluster and another one to the cloud."""
        name = f"edge {cluster}"
        config = self._loaded(cluster, **flags).config
        opener = self._opener(name)
        await self._run(name, edge_of(config, self._runtime(name), open_down=opener, open_up=opener))

    def __init__(self, stack: AsyncExitStack) -> None:
        self._memory = LoopbackBroker(random.Random(1))
        super().__init__(None, stack, root="fedhlm/1", preset="exact")  # type: ignore[arg-type]


@asynccontextmanager
async def fleet_on(kind: str) -> AsyncIterator[Fleet]:
    if kind == "memory":
        async with AsyncExitStack() as stack:
            yield MemoryFleet(stack)
    else:
        async with fleets(kind) as [fleet]:
            yield fleet


def exported() -> tuple[InMemorySpanExporter, TracerProvider]:
    """What keeps finished spans, and a provider that gives it them."""
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    return kept, provider


def watch(fleet: Fleet, *parts: str) -> list[InMemorySpanExporter]:
    """Trace these parts, each with a provider of its own, as in processes of their own."""
    of_parts = {part: exported() for part in parts}
    fleet.tracers.update({part: OtelTracer(provider) for part, (_, provider) in of_parts.items()})
    return [kept for kept, _ in of_parts.values()]


async def ready(fleet: Fleet) -> Client:
    """Edge, cloud, an agent that can have its tokens verified, and a client."""
    await fleet.edge()
    await fleet.cloud()
    service = await fleet.agent()
    async with asyncio.timeout(LIMIT_S):
        while service.agent.upstream is None:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    return await fleet.client()


def finished(kept: Iterable[InMemorySpanExporter]) -> list[ReadableSpan]:
    return [span for part in kept for span in part.get_finished_spans()]


def named(kept: InMemorySpanExporter | list[InMemorySpanExporter], name: str) -> list[ReadableSpan]:
    return [span for span in finished(kept if isinstance(kept, list) else [kept]) if span.name == name]


def parents(children: list[ReadableSpan]) -> set[int]:
    return {child.parent.span_id for child in children if child.parent is not None}


def ids(spans: list[ReadableSpan]) -> set[int]:
    return {span.context.span_id for span in spans}


every_bus = pytest.mark.parametrize("kind", ["memory", "embedded", pytest.param("mosquitto", marks=NEEDS_MOSQUITTO)])


@every_bus
async def test_a_request_is_one_trace_with_every_part_inside_the_one_that_waits_for_it(kind: str) -> None:
    async with fleet_on(kind) as fleet:
        kept = watch(fleet, *PARTS)
        client = await ready(fleet)
        await client.write("porch", TEXT, max_tokens=12, traceparent=ABOVE, request="r1")
    (request,), escalated, settled, verified, calls = (
        named(kept, name) for name in ("request", "escalate", "settle", "verify", "model call")
    )
    assert len(escalated) > 1
    assert {f"{span.context.trace_id:032x}" for span in finished(kept)} == {ABOVE[3:35]}
    assert parents([request]) == {int(ABOVE[36:52], 16)}
    assert parents(escalated) == ids([request])
    assert parents(settled) == ids(escalated)
    assert "settled" in {(span.attributes or {})["fedhlm.status"] for span in escalated}
    assert len(settled) == len(escalated)
    assert parents(verified) == ids(settled)
    assert parents(calls) == ids(verified)
    kinds = {span.name: span.kind for span in finished(kept)}
    assert kinds == {
        "request": SpanKind.SERVER,
        "escalate": SpanKind.CLIENT,
        "settle": SpanKind.SERVER,
        "verify": SpanKind.SERVER,
        "model call": SpanKind.INTERNAL,
    }
    assert request.attributes is not None
    assert (request.attributes["fedhlm.request"], request.attributes["fedhlm.finish"]) == ("r1", "length")
    assert {(span.attributes or {})["fedhlm.source"] for span in verified} == {"cloud"}
    told = "".join(str(span.to_json()) for span in finished(kept))
    assert TEXT not in told


async def test_a_part_that_exports_nothing_hands_the_context_on() -> None:
    async with fleet_on("memory") as fleet:
        kept = watch(fleet, "agent", "cloud")
        client = await ready(fleet)
        await client.write("porch", TEXT, max_tokens=8)
    (request,), escalated, verified = (named(kept, name) for name in ("request", "escalate", "verify"))
    assert request.parent is None
    assert parents(verified) == ids(escalated)
    assert {span.context.trace_id for span in verified} == {request.context.trace_id}


async def test_a_request_that_is_refused_says_why_and_a_local_one_has_the_context_of_its_question() -> None:
    from edge_agent.local import LocalQuestions

    async with fleet_on("memory") as fleet:
        kept = watch(fleet, "agent")
        await fleet.edge()
        await fleet.cloud()
        service = await fleet.agent()
        local = LocalQuestions(service, None)  # type: ignore[arg-type]
        for preset in (None, "absent"):
            question = Question("ann", (5, 6, 7), 4, preset=preset, context=ABOVE)
            assert [slice_ async for slice_ in local.answer(question)]
    served, refused = named(kept, "request")
    assert parents([served, refused]) == {int(ABOVE[36:52], 16)}
    assert (served.status.is_ok, refused.status.description) == (True, "invalid")


async def test_a_prompt_that_is_refused_at_once_has_a_span_that_says_why() -> None:
    async with fleet_on("memory") as fleet:
        kept = watch(fleet, "agent")
        client, other = await ready(fleet), await fleet.client("ann")
        await client.write("porch", TEXT, max_tokens=2, request="r1")
        with pytest.raises(RequestNameTaken):
            await other.write("porch", TEXT, max_tokens=2, request="r1", traceparent=ABOVE)
    _, refused = named(kept, "request")
    assert (refused.status.is_ok, refused.status.description) == (False, "taken")
    assert parents([refused]) == {int(ABOVE[36:52], 16)}


async def test_without_a_tracer_no_message_is_longer() -> None:
    async with fleet_on("memory") as fleet:
        client = await ready(fleet)
        result = await client.write("porch", TEXT, max_tokens=8, seed=1)
        traced = await client.write("porch", TEXT, max_tokens=8, seed=1, traceparent=ABOVE)
    assert traced.ids == result.ids
    per_block = len("traceparent") + len(ABOVE) + 5
    longer = traced.statistics["uplink_bytes"] - result.statistics["uplink_bytes"]
    assert longer > 0
    assert longer <= (per_block + 2) * traced.statistics["uplink_messages"]


@pytest.mark.parametrize("kind", [pytest.param("mosquitto", marks=NEEDS_MOSQUITTO)])
async def test_mqtt_3_carries_no_context(kind: str) -> None:
    async with fleet_on(kind) as fleet:
        fleet.options = {"protocol": "3.1.1"}
        kept = watch(fleet, *PARTS)
        client = await ready(fleet)
        await client.write("porch", TEXT, max_tokens=8, traceparent=ABOVE)
    assert {span.name for span in finished(kept)} == {"request", "escalate"}
    (request,) = named(kept, "request")
    assert request.parent is None


async def test_a_context_that_is_none_is_refused_before_it_is_sent() -> None:
    async with fleet_on("memory") as fleet:
        client = await fleet.client()
        with pytest.raises(ConfigError, match="traceparent must be VERSION-TRACE-SPAN-FLAGS"):
            client.ask("porch", TEXT, traceparent="4bf92f35")
