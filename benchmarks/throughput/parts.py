"""One part of the fleet of the throughput benchmark as a process: `broker`, `edge`, `cloud` or `agent`.

The parts are the product's own; around their models is a stopwatch. Each line on standard input is a JSON object and is
answered by one line: `{}` takes what was measured since the last such line, and a `TextOrder` (agent) has texts written.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from slow_link import go_first

from cloud_verifier.backends.in_process import engine_of
from cloud_verifier.wiring import LargeModel, cloud_of
from edge_agent.model import Slm, SlmDrafter, TreeDraft
from edge_agent.wiring import SmallModel, agent_of
from edge_broker.embedded import EmbeddedBroker
from edge_broker.wiring import edge_of
from fedhlm.bus.mqtt import MqttBus
from fedhlm.config import load
from fedhlm.decoding.decoder import Decoder
from fedhlm.decoding.sampling import NOISE
from fedhlm.peers.context_keys import load_projection
from fedhlm.process.run import bus_of
from fedhlm.process.runtime import Runtime
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.settings import Config
from fedhlm.telemetry import Counters
from fedhlm_lab.papers.texts import TextOrder, ordered
from fedhlm_lab.sim.world import reading
from fedhlm_zoo.shipped import model_folder

PORT: Final = 1883
USER: Final = "bench"
CLUSTER: Final = "home"
AGENT: Final = "porch"


class Measured(msgspec.Struct):
    """What one part did.

    The seconds that its event loop ran or waited for a processor, the messages that it received, and the calls of its
    model: tokens, and seconds by the clock on the wall.
    """

    own_s: float
    messages: int
    calls: list[tuple[int, float]]


class Stopwatch:
    """Measures a part, whose event loop is on the main thread. `messages` returns how many it has received so far."""

    def __init__(self) -> None:
        self.messages: Callable[[], int] = lambda: 0
        self._calls: list[tuple[int, float]] = []
        self._before = (0.0, 0)

    async def inside(self, size: Callable[[Any], int], work: Callable[[], Any]) -> Any:
        """Compute on a thread, and note how long that took, the wait for a processor included, and how many tokens."""
        began_s, ended_s = time.perf_counter(), 0.0

        def timed() -> Any:
            nonlocal ended_s
            found = work()
            ended_s = time.perf_counter()
            return found

        found = await asyncio.get_running_loop().run_in_executor(None, timed)
        self._calls.append((size(found), ended_s - began_s))
        return found

    def take(self) -> Measured:
        """What was measured since the last call."""
        now = (time.thread_time() + waited_s(), self.messages())
        own_s, messages = now[0] - self._before[0], now[1] - self._before[1]
        self._before = now
        calls, self._calls = self._calls, []
        return Measured(own_s, messages, calls)


def waited_s() -> float:
    """For how long the main thread could run and had no processor, in seconds; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/self/schedstat").read_text("ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def config_of(url: str) -> Config:
    """The settings of every part; the rest are the product's own."""
    return load(environ={"FEDHLM_BROKER__URL": url}, flags={"cluster.name": CLUSTER, "agent.id": AGENT}).config


def opened(config: Config, buses: list[MqttBus], **given: Any) -> MqttBus:
    """Open a connection to the broker, and keep it in `buses`."""
    buses.append(bus_of(config.broker, **given))
    return buses[-1]


@asynccontextmanager
async def broker(_url: str, watch: Stopwatch) -> AsyncIterator[None]:
    """The project's own broker."""
    async with EmbeddedBroker("0.0.0.0", PORT, users={USER: USER}) as found:  # noqa: S104 - in a namespace of its own
        watch.messages = lambda: found.counts.received
        yield


@asynccontextmanager
async def edge(url: str, watch: Stopwatch) -> AsyncIterator[None]:
    """The edge, on one connection."""
    config, buses = config_of(url), list[MqttBus]()
    runtime = Runtime.of_process(Counters(), store=None, journal=False)
    service = edge_of(config, runtime, open_down=partial(opened, config, buses), open_up=None, bridges=False)
    watch.messages = lambda: sum(bus.statistics.messages_in for bus in buses)
    await service.subscribe()
    async with AsyncExitStack() as stack:
        for bus in service.buses:
            await stack.enter_async_context(bus)
        async with running(service.run()):
            yield


@asynccontextmanager
async def cloud(url: str, watch: Stopwatch) -> AsyncIterator[None]:
    """The cloud with the shipped LLM on one thread."""
    config, buses = config_of(url), list[MqttBus]()
    decoder = Decoder.load(model_folder("", "llm"), threads=1)
    engine = engine_of(decoder)

    async def forward(requests: Sequence[Any]) -> Any:
        size = len(requests) * max(len(request.ids) for request in requests)
        return await watch.inside(lambda _found: size, lambda: synchronous(engine.forward(requests)))

    large = LargeModel.of(decoder, engine._replace(forward=forward))
    runtime = Runtime.of_process(Counters(), store=None, journal=False)
    service = cloud_of(config, runtime, large, open_bus=partial(opened, config, buses))
    watch.messages = lambda: sum(bus.statistics.messages_in for bus in buses)
    await service.subscribe()
    async with service.bus, running(service.run()):
        yield


def synchronous(work: Any) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("an engine on the caller's thread waits for nothing")


@asynccontextmanager
async def running(work: Any) -> AsyncIterator[None]:
    """Run a service inside the block; its failure ends the process."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: None if done.cancelled() else print(done.exception(), file=sys.stderr))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


class Device:
    """The agent's process: a new agent with its own connection for each order."""

    def __init__(self, url: str, watch: Stopwatch) -> None:
        self._config = config_of(url)
        self._watch = watch
        folder = model_folder("", "slm")
        self._decoder = Decoder.load(folder, threads=1)
        self._projection = load_projection(folder, self._decoder.info.hidden_size)
        self._sessions = np.random.default_rng()

    async def write(self, order: TextOrder) -> Any:
        """Write the texts of an order, one after the other."""
        decoder, info, watch = self._decoder, self._decoder.info, self._watch

        def tokens(found: Any) -> int:
            return len(found.chain) + len(found.branches) if isinstance(found, TreeDraft) else 1

        drafter = SlmDrafter(Slm(decoder, self._projection), partial(watch.inside, tokens))
        model = SmallModel(
            drafter, fingerprint_of(*decoder.vocabulary, noise=NOISE, model=info.label), self._projection.digest[:8]
        )
        runtime = Runtime.of_process(Counters(), store=None, journal=False)
        async with bus_of(self._config.broker, client_id=f"{AGENT}-{self._sessions.integers(2**31)}") as bus:
            watch.messages = lambda: bus.statistics.messages_in
            agent = agent_of(
                self._config, runtime, bus, model, new_session=lambda: int(self._sessions.integers(2**31)),
                rng=self._sessions,
            )  # fmt: skip
            async with reading(agent):
                await asyncio.sleep(order.settle_s)
                watch.take()
                texts = await ordered(agent, order, context_max=info.context, eos_ids=frozenset(info.eos_ids))
                return {"texts": [text._replace(certificate=None) for text in texts], "measured": watch.take()}


async def main(kind: str, url: str) -> None:
    """Serve until standard input ends."""
    watch, parts = Stopwatch(), {"broker": broker, "edge": edge, "cloud": cloud}
    device = Device(url, watch) if kind == "agent" else None
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        if device is None:
            await stack.enter_async_context(parts[kind](url, watch))
        go_first(1)  # not before: loading a model takes seconds, and threads that are made later go first as well
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            if device is None:
                answer: Any = watch.take()
            else:
                answer = await device.write(msgspec.json.decode(line, type=TextOrder))
            print(msgspec.json.encode(answer).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
