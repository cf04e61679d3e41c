"""What a crowd does to the cloud: many long contexts at once, one quiet agent beside hogs, names that an edge invents.

    python benchmarks/load.py

The real service and the shipped LLM on one thread, without a bus. Each scenario runs in a process of its own, so its
peak of memory is its own. Times are wall-clock. Those called "computed" are what the process computed until then, which
other programs on the machine do not change; the ratio is one of these.
"""

import asyncio
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from cloud_verifier.backends.in_process import threaded
from cloud_verifier.service import CloudService
from cloud_verifier.wiring import LargeModel, cloud_of
from fedhlm.bus.party import Received
from fedhlm.decoding.decoder import Decoder
from fedhlm.process.runtime import Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    Escalation,
    EscalationBatch,
    Prime,
    RoutedEscalation,
    Sampling,
    Verdict,
    VerdictBatch,
)
from fedhlm.protocol.packing import pack_ids, unpack_ids
from fedhlm.settings import Config
from fedhlm.telemetry import Counters
from fedhlm_lab.studies.command_line import Parser
from fedhlm_traces.check.captured import CapturingBus
from fedhlm_zoo.shipped import model_folder

HEADER: Final[dict[str, Any]] = {"version": SCHEMA_VERSION, "sender": "edge", "sequence": 1, "sent_ms": 0}
PATIENCE_S: Final = 60.0  # as long as the cloud keeps a block
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


class Clock(NamedTuple):
    """Wall-clock time, and what this process has computed, s. A busy machine lengthens the first, not the second."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> "Clock":
        return cls(time.perf_counter(), time.process_time())

    def since(self, then: "Clock") -> "Clock":
        return Clock(self.wall_s - then.wall_s, self.cpu_s - then.cpu_s)


NEVER: Final = Clock(math.inf, math.inf)


async def quiet_text(cloud: Cloud, cluster: str, session: int) -> list[Clock]:
    """How long each block of one short text takes; the blocks are sent one after the other."""
    context, prime, epoch, times = prompt(session, 20), True, 0, []
    vocab_size = cloud.model.fingerprint.vocab_size
    end = len(context) + TEXT
    while len(context) < end:
        drafts, began = prompt(session + len(context), BLOCK), Clock.now()
        verdict = await cloud.ask(cluster, "quiet", session, context, drafts, prime=prime, epoch=epoch)
        if verdict is None or verdict.status == "refused":
            return [*times, NEVER]
        times.append(Clock.now().since(began))
        context += drafts[: verdict.accepted] + unpack_ids(verdict.ids, vocab_size)
        prime = False
        epoch += verdict.accepted < len(drafts)
    return times


@cache
def contexts(length: int) -> list[list[int]]:
    """A few prompts that are made once, so that an attack costs this process no more than its messages do."""
    return [prompt(number, length) for number in range(64)]


async def hog(cloud: Cloud, cluster: str, name: str, length: int, numbers: Iterator[int]) -> None:
    """Contexts, one after the other, as fast as they are answered."""
    for number in numbers:
        await cloud.ask(cluster, name, number, contexts(length)[number % 64], [], prime=True)


async def flood(cloud: Cloud, cluster: str, name: str, numbers: Iterator[int]) -> None:
    """Contexts of 505 tokens, a hundred a second, whether they are answered or not."""
    async with asyncio.TaskGroup() as group:
        for number in numbers:
            group.create_task(cloud.ask(cluster, name, number, contexts(505)[number % 64], [], prime=True))
            await asyncio.sleep(0.01)


def numbers_of(n: int) -> Iterator[int]:
    """Sessions that nobody else uses."""
    return iter(range(100_000 * (n + 1), 100_000 * (n + 2)))


def described(when: str, texts: list[list[Clock]]) -> dict[str, float]:
    """Percentiles of the blocks of several texts, and the median time of a whole text."""
    blocks = sorted(time for text in texts for time in text)
    computed = sorted(time.cpu_s for text in texts for time in text)
    return {
        f"{when} p50 ms": 1e3 * blocks[len(blocks) // 2].wall_s,
        f"{when} p95 ms": 1e3 * blocks[int(0.95 * len(blocks))].wall_s,
        f"{when} computed p50 ms": 1e3 * computed[len(computed) // 2],
        f"{when} computed p95 ms": 1e3 * computed[int(0.95 * len(computed))],
        f"{when} computed s": statistics.median(sum(time.cpu_s for time in text) for text in texts),
    }


async def alone(cloud: Cloud) -> dict[str, float]:
    """A quiet agent and nobody else."""
    return described("alone", [await quiet_text(cloud, "home", n) for n in range(1, 6)])


async def beside(cloud: Cloud, attack: Callable[[Cloud, int], Awaitable[None]], crowd: int) -> dict[str, float]:
    """A quiet agent of cluster "home" before and beside an attack of many."""
    found = await alone(cloud)
    tasks = [asyncio.ensure_future(attack(cloud, n)) for n in range(crowd)]
    await asyncio.sleep(3.0)
    texts = [await quiet_text(cloud, "home", n) for n in range(10, 15)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    found |= described("beside", texts)
    return {**found, "ratio": found["beside computed s"] / found["alone computed s"]}


async def burst(cloud: Cloud, agents: int) -> dict[str, float]:
    """Many agents send a context of 500 tokens at the same moment."""
    began = Clock.now()

    async def one(n: int) -> Clock:
        verdict = await cloud.ask("home", f"a{n}", n, prompt(n, 500), [], prime=True)
        return NEVER if verdict is None else Clock.now().since(began)

    times = sorted(await asyncio.gather(*(one(n) for n in range(1, agents + 1))))
    return {
        "first s": times[0].wall_s,
        "median s": times[len(times) // 2].wall_s,
        "last s": times[-1].wall_s,
        "last computed s": times[-1].cpu_s,
        "unanswered": sum(time is NEVER for time in times),
    }


SCENARIOS: Final[dict[str, Callable[[Cloud], Awaitable[dict[str, float]]]]] = {
    "alone": alone,
    "64 contexts of 500 tokens at once": partial(burst, agents=64),
    "one flood": partial(beside, crowd=1, attack=lambda c, n: flood(c, "home", f"f{n}", numbers_of(n))),
    "four floods": partial(beside, crowd=4, attack=lambda c, n: flood(c, "home", f"f{n}", numbers_of(n))),
    "63 hogs of its cluster": partial(
        beside, crowd=63, attack=lambda c, n: hog(c, "home", f"hog{n}", 505, numbers_of(n))
    ),
    "300 names of another cluster": partial(
        beside, crowd=300, attack=lambda c, n: hog(c, "loud", f"n{n}", 505, numbers_of(n))
    ),
    "300 names with little": partial(beside, crowd=300, attack=lambda c, n: hog(c, "loud", f"n{n}", 20, numbers_of(n))),
}


def resident_mb() -> float:
    """What the process takes now, MB."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize() / 1e6


async def measure(name: str) -> dict[str, float]:
    """One scenario in this process."""
    config, bus = Config(), Answers()
    decoder = Decoder.load(model_folder("", "llm"), threads=1, keeps_memory=False)
    async with threaded(decoder) as engine:
        model = LargeModel.of(decoder, engine)
        runtime = Runtime.of_process(Counters(), store=None, journal=False)
        cloud = Cloud(cloud_of(config, runtime, model, open_bus=lambda **_: bus), bus, model)
        working = asyncio.create_task(cloud.service._verify())  # noqa: SLF001 - without its bus it does not run
        found = await SCENARIOS[name](cloud)
        found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        await asyncio.sleep(3.0)
        found["afterwards MB"] = resident_mb()
        batcher = cloud.service.batcher
        found |= {"caches dropped": batcher.evicted, "refused": batcher.overflowed, "expired": batcher.expired}
        working.cancel()
    return found


def main() -> None:
    """Print a line for each scenario and, last, JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--only", choices=SCENARIOS, metavar="SCENARIO", help="one scenario, in this process")
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
