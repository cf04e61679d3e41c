"""What a crowd does to the cloud: many long contexts at once, one quiet agent beside hogs, names that an edge invents.

    python benchmarks/load.py

The real service and the shipped LLM, without a bus. Each scenario runs in a process of its own, so its peak of memory is
its own. Times are wall-clock: compare the columns of one run.
"""

import argparse
import asyncio
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from cloud_verifier.backends.onnx import threaded
from cloud_verifier.service import CloudService
from cloud_verifier.wiring import LargeModel, cloud_of
from fedhlm.bus.party import Received
from fedhlm.decoding.decoder import Decoder
from fedhlm.process.runtime import Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    Escalation,
    EscalationBatch,
    Prime,
    RoutedEscalation,
    Sampling,
    Verdict,
    VerdictBatch,
    decode,
)
from fedhlm.protocol.packing import pack_ids, unpack_ids
from fedhlm.settings import Config
from fedhlm.telemetry import Counters
from fedhlm_traces.check.captured import CapturingBus
from fedhlm_zoo.shipped import model_folder

HEADER: Final[dict[str, Any]] = {"version": SCHEMA_VERSION, "sender": "edge", "sequence": 1, "sent_ms": 0}
PATIENCE_S: Final = 30.0
TEXT: Final = 24  # tokens of the quiet agent's text
BLOCK: Final = 4


class Answers(CapturingBus):
    """Hands each verdict to whoever waits for it."""

    def __init__(self) -> None:
        super().__init__(lambda _number: True)
        self.waiting: dict[tuple[str, int], asyncio.Future[Verdict]] = {}

    async def publish(self, topic: str, payload: bytes, **named: Any) -> bool:
        """Take a verdict batch to pieces."""
        message = decode(payload)
        for item in message.items if isinstance(message, VerdictBatch) else ():
            future = self.waiting.pop((item.agent, item.verdict.session), None)
            if future is not None and not future.done():
                future.set_result(item.verdict)
        return True


class Cloud:
    """The service, asked directly."""

    def __init__(self, service: CloudService, bus: Answers, model: LargeModel) -> None:
        self.service, self.bus, self.model = service, bus, model

    async def ask(
        self,
        cluster: str,
        agent: str,
        session: int,
        context: list[int],
        ids: list[int],
        *,
        prime: bool,
        epoch: int = 0,
    ) -> Verdict | None:
        """One block; its verdict, or None after the deadline."""
        vocab_size = self.model.fingerprint.vocab_size
        before = Prime(Sampling(session), self.model.fingerprint, pack_ids(context, vocab_size)) if prime else None
        escalation = Escalation(
            **HEADER, session=session, epoch=epoch, base=len(context), ids=pack_ids(ids, vocab_size),
            patience_ms=round(PATIENCE_S * 1000), extend=1, before=before,
        )  # fmt: skip
        future = self.bus.waiting[agent, session] = asyncio.get_running_loop().create_future()
        batch = EscalationBatch(**HEADER, items=(RoutedEscalation(agent, escalation),))
        await self.service.handle(Received(topics.CLOUD_VERIFY, {"cluster": cluster}, batch))
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await future
        except TimeoutError:
            return None


def prompt(seed: int, length: int) -> list[int]:
    """Random ids."""
    rng = random.Random(seed)
    return [rng.randrange(1, 4_000) for _ in range(length)]


async def quiet_text(cloud: Cloud, cluster: str, session: int) -> float:
    """Seconds that the blocks of one short text take, one after the other."""
    context, prime, epoch, began = prompt(session, 20), True, 0, time.perf_counter()
    vocab_size = cloud.model.fingerprint.vocab_size
    end = len(context) + TEXT
    while len(context) < end:
        drafts = prompt(session + len(context), BLOCK)
        verdict = await cloud.ask(cluster, "quiet", session, context, drafts, prime=prime, epoch=epoch)
        if verdict is None:
            return float("inf")
        context += drafts[: verdict.accepted] + unpack_ids(verdict.ids, vocab_size)
        prime = False
        epoch += verdict.accepted < len(drafts)
    return time.perf_counter() - began


async def hog(cloud: Cloud, cluster: str, name: str, numbers: Iterator[int]) -> None:
    """Long contexts, one after the other, as fast as they are answered."""
    for number in numbers:
        await cloud.ask(cluster, name, number, prompt(number, 505), [], prime=True)


async def alone(cloud: Cloud) -> dict[str, float]:
    """A quiet agent and nobody else."""
    return {"quiet s": statistics.median([await quiet_text(cloud, "home", n) for n in range(1, 6)])}


async def beside(cloud: Cloud, hogs: int, cluster: str) -> dict[str, float]:
    """A quiet agent of cluster "home" beside hogs."""
    before = await alone(cloud)
    crowd = [
        asyncio.create_task(hog(cloud, cluster, f"hog{n}", iter(range(1_000 * n, 1_000 * n + 999))))
        for n in range(1, hogs)
    ]
    await asyncio.sleep(3.0)
    times = [await quiet_text(cloud, "home", n) for n in range(10, 15)]
    for task in crowd:
        task.cancel()
    beside_s = statistics.median(times)
    return {**before, "beside s": beside_s, "ratio": beside_s / before["quiet s"], "worst s": max(times)}


async def burst(cloud: Cloud, agents: int) -> dict[str, float]:
    """Many agents send a context of 500 tokens at the same moment."""
    began = time.perf_counter()

    async def one(n: int) -> float:
        verdict = await cloud.ask("home", f"a{n}", n, prompt(n, 500), [], prime=True)
        return float("inf") if verdict is None else time.perf_counter() - began

    times = sorted(await asyncio.gather(*(one(n) for n in range(1, agents + 1))))
    return {"first s": times[0], "median s": times[len(times) // 2], "last s": times[-1]}


SCENARIOS: Final[dict[str, Callable[[Cloud], Awaitable[dict[str, float]]]]] = {
    "alone": alone,
    "64 contexts of 500 tokens at once": partial(burst, agents=64),
    "beside 63 hogs of its cluster": partial(beside, hogs=64, cluster="home"),
    "beside 300 names of another cluster": partial(beside, hogs=301, cluster="loud"),
}


def resident_mb() -> float:
    """What the process takes now, MB."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize() / 1e6


async def measure(name: str) -> dict[str, float]:
    """One scenario in this process."""
    config, bus = Config(), Answers()
    decoder = Decoder.load(model_folder("", "llm"), threads=0, keeps_memory=False)
    async with threaded(decoder) as engine:
        model = LargeModel.of(decoder, engine)
        runtime = Runtime.of_process(Counters(), store=None, journal=False)
        cloud = Cloud(cloud_of(config, runtime, model, open_bus=lambda **_: bus), bus, model)
        working = asyncio.create_task(cloud.service._verify())  # noqa: SLF001 - without its bus it does not run
        found = await SCENARIOS[name](cloud)
        found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        await asyncio.sleep(3.0)
        found["afterwards MB"] = resident_mb()
        found["caches dropped"] = cloud.service.batcher.evicted
        working.cancel()
    return found


def main() -> None:
    """Print a line for each scenario and, last, JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SCENARIOS, help="one scenario, in this process")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(asyncio.run(measure(options.only))))
        return
    results = {}
    for name in SCENARIOS:
        words = [sys.executable, __file__, "--only", name]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        results[name] = json.loads(done.stdout)
        print(f"{name}: " + ", ".join(f"{what} {value:.3g}" for what, value in results[name].items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
