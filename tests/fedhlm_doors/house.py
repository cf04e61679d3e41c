"""Parts with open doors for tests: an agent with its edge and cloud, an agent without any, and the cloud by itself."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import httpx

import cloud_verifier.__main__ as cloud
import edge_agent.__main__ as agent
import edge_broker.__main__ as edge
from fedhlm.config import load
from fedhlm.receipts import Receipt, Sign, unsigned
from fedhlm.spans import PASSING, Tracer
from fedhlm.telemetry import Counters
from fedhlm_doors.serving import door_of
from fedhlm_zoo.shipped import with_agent_model, with_cloud_model

READY_S = 60.0
SEED = 7
TOKENS = 12
PROMPT = "Oil prices rise"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class House:
    """Running parts by name: their URLs, and the counters of each."""

    def __init__(self, **flags: object) -> None:
        self.tracer: Tracer = PASSING
        self.urls: dict[str, str] = {}
        self.counters: dict[str, Counters] = {}
        self.sign: Sign = unsigned
        self._broker = free_port()
        self._flags = flags
        self._loop = asyncio.new_event_loop()
        self._tasks: list[asyncio.Task[Any]] = []
        self._thread = threading.Thread(target=self._turn, name="house", daemon=True)
        self._failed: BaseException | None = None

    def _turn(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    @property
    def broker(self) -> str:
        """The address of the edge's broker."""
        return f"mqtt://127.0.0.1:{self._broker}"

    def _loaded(self, **more: object) -> Any:
        flags = {"broker.url": self.broker, "agent.threads": 1, "cloud.threads": 1, **self._flags, **more}
        return load(environ={}, flags={key: str(value) for key, value in flags.items()})

    def _door(self, name: str) -> dict[str, object]:
        port = free_port()
        self.urls[name] = f"http://127.0.0.1:{port}"
        return {"api.listen": f"127.0.0.1:{port}"}

    def start(self, name: str) -> None:
        """Start "edge", "cloud", "agent", or "lonely", an agent whose broker does not exist."""
        counters = self.counters[name] = Counters()
        if name == "edge":
            loaded = self._loaded(**{"broker.url": "", "edge.embedded_port": self._broker})
            work = edge.run(loaded.config, counters)
        elif name == "cloud":
            loaded = with_cloud_model(self._loaded(**self._door(name)))
            work = cloud.run(loaded.config, counters, tracer=self.tracer, door=door_of(loaded.config.api))
        else:
            away = {"broker.url": f"mqtt://127.0.0.1:{free_port()}"} if name == "lonely" else {}
            loaded = with_agent_model(self._loaded(**self._door(name), **{"agent.id": name}, **away))
            door = door_of(loaded.config.api)
            work = agent.run(loaded, counters, tracer=self.tracer, door=door, sign=self._signed)
        future = asyncio.run_coroutine_threadsafe(self._spawn(name, work), self._loop)
        future.result(READY_S)

    def _signed(self, receipt: Receipt) -> Receipt:
        return self.sign(receipt)

    async def _spawn(self, name: str, work: Any) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))
        if name == "edge":
            await asyncio.sleep(0.3)

    def wait(self, name: str) -> None:
        """Return once a part's door is open."""
        end_s = time.monotonic() + READY_S
        while time.monotonic() < end_s:
            for task in self._tasks:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    raise AssertionError(task.get_name()) from task.exception()
            try:
                if httpx.get(self.urls[name]).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"{name} did not open its door")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            for task in reversed(self._tasks):
                task.cancel()
                await asyncio.wait([task])

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(READY_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(READY_S)
        self._loop.close()


@contextmanager
def house(*parts: str, **flags: object) -> Iterator[House]:
    """The parts, with open doors. An agent's cluster has its cloud when this begins."""
    with House(**flags) as built:
        for part in parts:
            built.start(part)
        for part in parts:
            if part in built.urls:
                built.wait(part)
        if {"edge", "cloud", "agent"} <= set(parts):
            verified(built.urls["agent"])
        yield built


def verified(url: str) -> None:
    """Return once an agent's tokens are verified."""
    end_s = time.monotonic() + READY_S
    body = {"model": "fedhlm:exact", "prompt": PROMPT, "max_tokens": 1}
    while time.monotonic() < end_s:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=READY_S).json()
        if all(token["verified"] for token in answer["choices"][0]["fedhlm"]["tokens"]):
            return
        time.sleep(0.1)
    raise AssertionError("nothing is verified")
