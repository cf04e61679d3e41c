"""An agent and its edge as devices of Home Assistant, over mosquitto and over the edge's own broker."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

import edge_agent.__main__ as agent
import edge_broker.__main__ as edge
from fedhlm.bus.mqtt import MqttBus
from fedhlm.config import Loaded, load
from fedhlm.telemetry import Counters
from fedhlm_zoo.shipped import with_agent_model
from tests.brokers import Mosquitto, free_port

LIMIT_S = 60.0
HOME = "fedhlm/1/c/home"


class Seen:
    """What Home Assistant has heard: the newest payload of each topic, and every one in order."""

    def __init__(self, bus: MqttBus) -> None:
        self.newest: dict[str, bytes] = {}
        self._bus = bus
        self._changed = asyncio.Event()

    async def listen(self) -> None:
        async for delivery in self._bus.deliveries():
            self.newest[delivery.topic] = delivery.payload
            self._changed.set()

    async def until(self, topic: str, payload: bytes | None = None) -> bytes:
        while topic not in self.newest or payload not in (None, self.newest[topic]):
            self._changed.clear()
            await self._changed.wait()
        return self.newest[topic]


def loaded(**flags: object) -> Loaded:
    more = {"home_assistant.enabled": "true", "agent.threads": "1", "agent.id": "porch", "preset": "slm-only"}
    return load(environ={}, flags={**more, **{key.replace("__", "."): str(value) for key, value in flags.items()}})


@asynccontextmanager
async def running(work: Any) -> AsyncIterator[asyncio.Task[Any]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("broker", ["mosquitto", "embedded"])
async def test_home_assistant_finds_the_parts_asks_and_sees_one_go(broker: str) -> None:
    async with asyncio.timeout(LIMIT_S), AsyncExitStack() as stack:
        if broker == "mosquitto":
            url = (await stack.enter_async_context(Mosquitto())).url
            at_edge = loaded(broker__url=url)
        else:
            port = free_port()
            url = f"mqtt://127.0.0.1:{port}"
            at_edge = loaded(edge__embedded_port=port)
        await stack.enter_async_context(running(edge.run(at_edge.config, Counters())))
        bus = MqttBus(url, client_id="homeassistant")
        mine = f"{HOME}/a/+/to/homeassistant/answer"
        await bus.subscribe("homeassistant/#", f"{HOME}/home/#", f"{HOME}/a/+/home/#", mine)
        await stack.enter_async_context(bus)
        seen = Seen(bus)
        await stack.enter_async_context(running(seen.listen()))
        await seen.until("homeassistant/device/fedhlm-edge-home/config")
        assert await seen.until(f"{HOME}/home/available") == b"online"

        at_agent = with_agent_model(loaded(broker__url=url))
        async with running(agent.run(at_agent, Counters())):
            device = json.loads(await seen.until("homeassistant/device/fedhlm-porch/config"))
            assert device["device"]["via_device"] == "fedhlm-edge-home"
            available = device["availability"][0]["topic"]
            await seen.until(available, b"online")
            figures = json.loads(await seen.until(device["state_topic"]))
            assert figures["tokens_local"] == 0
            assert figures["latest"] == figures["version"]

            ask, answer = (device["components"][name] for name in ("ask", "answer"))
            await bus.publish(ask["command_topic"], b"Oil prices rise")
            said = json.loads(await seen.until(answer["state_topic"]))
            assert said["question"] == "Oil prices rise"
            assert said["answer"]
            assert not said["error"]
            del seen.newest[answer["state_topic"]]
            for payload, reason in ((b"x" * 256, "at most 255 characters"), (b"caf\xc3", "must be UTF-8 text")):
                await bus.publish(ask["command_topic"], payload)
                assert reason in json.loads(await seen.until(answer["state_topic"]))["error"]
                del seen.newest[answer["state_topic"]]
        await seen.until(available, b"offline")


async def test_an_edge_says_that_an_agent_is_gone_whose_connection_broke() -> None:
    """The agent says nothing itself: only its last will, which Home Assistant cannot read, tells the edge."""
    async with asyncio.timeout(LIMIT_S), AsyncExitStack() as stack:
        broker = await stack.enter_async_context(Mosquitto())
        await stack.enter_async_context(running(edge.run(loaded(broker__url=broker.url).config, Counters())))
        bus = MqttBus(broker.url, client_id="homeassistant")
        await bus.subscribe(f"{HOME}/a/+/home/#")
        await stack.enter_async_context(bus)
        seen = Seen(bus)
        await stack.enter_async_context(running(seen.listen()))
        quiet = with_agent_model(loaded(broker__url=broker.url, home_assistant__enabled="false"))
        async with running(agent.run(quiet, Counters())):
            await seen.until(f"{HOME}/a/porch/home/available", b"online")
            assert f"{HOME}/a/porch/home/values" not in seen.newest
        await seen.until(f"{HOME}/a/porch/home/available", b"offline")
