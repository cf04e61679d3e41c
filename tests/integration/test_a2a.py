"""An agent that is asked over A2A, on mosquitto and on the edge's own broker."""

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, Final

import pytest
from a2a.types import a2a_pb2 as current
from google.protobuf.json_format import Parse, ParseDict

import edge_agent.__main__ as agent
import edge_broker.__main__ as edge
from edge_agent.local import LocalQuestions
from fedhlm.answering import Question, Slice
from fedhlm.bus.interface import Delivery, Extras
from fedhlm.bus.mqtt import MqttBus
from fedhlm.config import Loaded, load
from fedhlm.opentelemetry import OtelTracer
from fedhlm.telemetry import Counters
from fedhlm_zoo.shipped import with_agent_model
from tests.brokers import Mosquitto, TcpProxy, free_port
from tests.fedhlm.test_spans import ABOVE
from tests.field.test_spans import exported, named, parents

LIMIT_S: Final = 60.0
CARD: Final = "$a2a/v1/discovery/fedhlm/home/porch"
REQUEST: Final = "$a2a/v1/request/fedhlm/home/porch"
REPLY: Final = "$a2a/v1/reply/fedhlm/home/desk/1"
LONG: Final = 65_536
OVER: Final = ("TASK_STATE_COMPLETED", "TASK_STATE_CANCELED", "TASK_STATE_REJECTED", "TASK_STATE_FAILED")


def loaded(**flags: object) -> Loaded:
    more = {"a2a.enabled": "true", "agent.threads": "1", "agent.id": "porch", "preset": "slm-only"}
    return load(environ={}, flags={**more, **{key.replace("__", "."): str(value) for key, value in flags.items()}})


@pytest.fixture(autouse=True)
def long_answers_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of LONG tokens stops after its first text until it is cancelled, however fast the machine is."""
    answer = LocalQuestions.answer

    async def held(self: LocalQuestions, question: Question) -> AsyncGenerator[Slice, None]:
        async with aclosing(answer(self, question)) as slices:
            async for piece in slices:
                yield piece
                if question.max_tokens == LONG and piece.text:
                    await asyncio.Event().wait()

    monkeypatch.setattr(LocalQuestions, "answer", held)


@asynccontextmanager
async def running(work: Any) -> AsyncIterator[asyncio.Task[Any]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


class Desk:
    """A client: sends requests, and sorts what it hears by correlation. Cards and what it should not hear are apart."""

    def __init__(self, bus: MqttBus) -> None:
        self.bus = bus
        self.cards: asyncio.Queue[Delivery] = asyncio.Queue()
        self.strays: list[Delivery] = []
        self.user: tuple[tuple[str, str], ...] = ()
        self._answers: dict[bytes, asyncio.Queue[Any]] = {}

    async def listen(self) -> None:
        async for delivery in self.bus.deliveries():
            extras = delivery.extras or Extras()
            if delivery.topic == CARD:
                self.cards.put_nowait(delivery)
            elif delivery.topic == REPLY and extras.correlation in self._answers:
                self._answers[extras.correlation].put_nowait(json.loads(delivery.payload))
            else:
                self.strays.append(delivery)

    async def send(self, payload: bytes, correlation: bytes | None = None) -> asyncio.Queue[Any]:
        mark = uuid.uuid4().bytes if correlation is None else correlation
        self._answers[mark] = asyncio.Queue()
        await self.bus.publish(REQUEST, payload, extras=Extras(REPLY, mark, self.user))
        return self._answers[mark]

    async def call(self, method: str, **params: Any) -> asyncio.Queue[Any]:
        return await self.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode())

    async def ask(self, method: str, task: str, tokens: int = 8, **more: Any) -> asyncio.Queue[Any]:
        parts = [{"text": "Oil prices rise"}]
        message = {"messageId": "m", "role": "ROLE_USER", "parts": parts, "taskId": task, "contextId": "c"}
        metadata = {"fedhlm": {"max_tokens": tokens, "seed": 3}}
        return await self.call(method, message=message | more, metadata=metadata)

    async def card(self, status: str, source: str) -> bytes:
        while True:
            delivery = await self.cards.get()
            user = dict(delivery.extras.user) if delivery.extras else {}
            if user == {"a2a-status": status, "a2a-status-source": source}:
                return delivery.payload


def text_of(task: Any) -> str:
    return "".join(part["text"] for artifact in task.get("artifacts", ()) for part in artifact["parts"])


async def streamed(answers: asyncio.Queue[Any]) -> tuple[list[str], str]:
    """The states of a stream up to its end, and its text."""
    states, text = list[str](), ""
    while not states or states[-1] not in OVER:
        result = (await answers.get())["result"]
        ParseDict(result, current.StreamResponse())
        if "statusUpdate" in result:
            states.append(result["statusUpdate"]["status"]["state"])
        else:
            piece = result["artifactUpdate"]
            text = text * piece["append"] + piece["artifact"]["parts"][0]["text"]
    return states, text


@asynccontextmanager
async def desk_at(url: str) -> AsyncIterator[Desk]:
    bus = MqttBus(url, client_id="fedhlm/home/desk")
    await bus.subscribe("$a2a/v1/discovery/fedhlm/home/+", "$a2a/v1/reply/#", "elsewhere/#")
    desk = Desk(bus)
    async with bus, running(desk.listen()):
        yield desk


@pytest.mark.parametrize("broker", ["mosquitto", "embedded"])
async def test_an_agent_is_found_asked_and_cancelled_and_its_card_says_when_it_is_lost(broker: str) -> None:
    async with asyncio.timeout(LIMIT_S), AsyncExitStack() as stack:
        if broker == "mosquitto":
            port = (await stack.enter_async_context(Mosquitto())).port
            at_edge = loaded(broker__url=f"mqtt://127.0.0.1:{port}")
        else:
            port = free_port()
            at_edge = loaded(edge__embedded_port=port)
        await stack.enter_async_context(running(edge.run(at_edge.config, Counters())))
        desk = await stack.enter_async_context(desk_at(f"mqtt://127.0.0.1:{port}"))
        link = await stack.enter_async_context(TcpProxy(port))
        counters, (kept, provider) = Counters(), exported()
        desk.user = (("traceparent", ABOVE),)
        work = agent.run(with_agent_model(loaded(broker__url=link.url)), counters, tracer=OtelTracer(provider))
        async with running(work):
            card = Parse(await desk.card("online", "agent"), current.AgentCard(), ignore_unknown_fields=True)
            assert card.capabilities.streaming
            first, second = str(uuid.uuid4()), str(uuid.uuid4())

            whole = (await (await desk.ask("SendMessage", first)).get())["result"]["task"]
            ParseDict(whole, current.Task())
            assert (whole["id"], whole["contextId"]) == (first, "c")
            assert whole["status"]["state"] == "TASK_STATE_COMPLETED"
            assert whole["metadata"]["fedhlm"]["finish"] == "length"
            assert text_of(whole)

            states, text = await streamed(await desk.ask("SendStreamingMessage", second))
            assert states == ["TASK_STATE_SUBMITTED", "TASK_STATE_WORKING", "TASK_STATE_COMPLETED"]
            assert text == text_of(whole)  # the same seed

            assert parents(named(kept, "request")) == {int(ABOVE[36:52], 16)}

            # Asked again for the same task: its state, and nothing is written a second time.
            tokens = counters["tokens_by_source"]
            assert (await (await desk.ask("SendMessage", first)).get())["result"]["task"] == whole
            assert await streamed(await desk.ask("SendStreamingMessage", second)) == (states[-1:], text)
            assert (await (await desk.call("GetTask", id=first)).get())["result"] == whole
            assert counters["tokens_by_source"] == tokens
            error = (await (await desk.ask("SendMessage", first, contextId="other")).get())["error"]
            assert error["code"] == -32602

            # Cancelled while it is written, and while it waits.
            long, waits = str(uuid.uuid4()), str(uuid.uuid4())
            stream = await desk.ask("SendStreamingMessage", long, tokens=LONG)
            queued = await desk.ask("SendMessage", waits)
            while "artifactUpdate" not in (await stream.get())["result"]:
                pass
            for task in (waits, long):
                told = (await (await desk.call("CancelTask", id=task)).get())["result"]
                assert (told["id"], told["status"]["state"]) == (task, "TASK_STATE_CANCELED")
            assert (await streamed(stream))[0] == ["TASK_STATE_CANCELED"]
            assert (await queued.get())["result"]["task"]["status"]["state"] == "TASK_STATE_CANCELED"
            for task, code in ((long, -32002), (str(uuid.uuid4()), -32001)):
                assert (await (await desk.call("CancelTask", id=task)).get())["error"]["code"] == code

            # What the agent itself refuses is a task that was rejected.
            asked = await desk.call(
                "message/send",
                message={"messageId": "m", "role": "user", "parts": [{"text": "x"}], "taskId": str(uuid.uuid4())},
                metadata={"fedhlm": {"preset": "exact"}},
            )
            old = (await asked.get())["result"]
            assert (old["kind"], old["status"]["state"]) == ("task", "rejected")

            # The link breaks without a word: the last will tells the edge, and the agent comes back.
            await link.cut()
            await desk.card("offline", "lwt")
            await link.mend()
            await desk.card("online", "agent")
        await desk.card("offline", "agent")
        assert desk.strays == []


async def test_bad_requests_get_an_error_and_strange_reply_topics_get_nothing() -> None:
    async with asyncio.timeout(LIMIT_S), AsyncExitStack() as stack:
        broker = await stack.enter_async_context(Mosquitto())
        desk = await stack.enter_async_context(desk_at(broker.url))
        counters = Counters()
        at_agent = with_agent_model(loaded(broker__url=broker.url))
        await stack.enter_async_context(running(agent.run(at_agent, counters)))
        await desk.card("online", "agent")
        bad = (
            (b"{", -32700),
            (b"[]", -32600),
            (b'{"jsonrpc": "2.0", "id": 1, "method": "ListTasks", "params": {}}', -32601),
            (b'{"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {}}', -32602),
        )
        for payload, code in bad:
            assert (await (await desk.send(payload)).get())["error"]["code"] == code
        assert counters["refused_messages"] == len(bad)
        ask = {"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": {"id": "x"}}
        good = json.dumps(ask).encode()
        assert (await (await desk.send(good, b"c" * 257)).get())["error"]["data"] == {
            "a2a_error": "transport_protocol_error"
        }
        # Whoever gives no reply topic of this cluster hears nothing, and nobody else does.
        for extras in (
            None,
            Extras(correlation=b"c"),
            Extras("elsewhere/desk", b"c"),
            Extras(REQUEST, b"c"),
            Extras("$a2a/v1/reply/fedhlm/barn/desk/1", b"c"),
            Extras("$a2a/v1/reply/fedhlm/home/desk/1/2", b"c"),
        ):
            await desk.bus.publish(REQUEST, good, extras=extras)
        await desk.bus.publish(REQUEST, good, retain=True, extras=Extras(REPLY, b"kept"))
        await desk.bus.publish(REQUEST, b"", retain=True)
        last = await desk.send(good)
        assert (await last.get())["error"]["code"] == -32001
        # The task of one client is none of another's.
        mine = str(uuid.uuid4())
        await (await desk.ask("SendMessage", mine, tokens=1)).get()
        other = "$a2a/v1/reply/fedhlm/home/other/1"
        await desk.bus.publish(
            REQUEST, json.dumps(ask | {"params": {"id": mine}}).encode(), extras=Extras(other, b"theirs")
        )
        await (await desk.call("GetTask", id=mine)).get()
        told = [json.loads(stray.payload)["error"]["code"] for stray in desk.strays if stray.topic == other]
        assert told == [-32001]
        assert not [stray for stray in desk.strays if stray.topic.startswith("elsewhere")]


async def test_too_many_tasks_are_told_to_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.a2a.WAITING_MAX", 1)
    async with asyncio.timeout(LIMIT_S), AsyncExitStack() as stack:
        broker = await stack.enter_async_context(Mosquitto())
        desk = await stack.enter_async_context(desk_at(broker.url))
        await stack.enter_async_context(
            running(agent.run(with_agent_model(loaded(broker__url=broker.url)), Counters()))
        )
        await desk.card("online", "agent")
        long, second = str(uuid.uuid4()), str(uuid.uuid4())
        stream = await desk.ask("SendStreamingMessage", long, tokens=LONG)
        error = (await (await desk.ask("SendMessage", second)).get())["error"]
        assert (error["code"], error["data"]) == (-32004, {"a2a_error": "responder_unavailable"})
        # Asked again, a stream goes on where the new request wants it, and no more where the old one did.
        again = await desk.ask("SendStreamingMessage", long)
        await again.get()
        await (await desk.call("CancelTask", id=long)).get()
        assert (await streamed(again))[0][-1] == "TASK_STATE_CANCELED"
        heard = [stream.get_nowait()["result"] for _ in range(stream.qsize())]
        assert all("TASK_STATE_CANCELED" not in json.dumps(result) for result in heard)
        assert (await (await desk.ask("SendMessage", second, tokens=1)).get())["result"]["task"]
