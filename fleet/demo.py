"""`fedhlm demo`: a whole fleet on this machine, as real processes over MQTT, on news prompts.

Two clusters with two agents each, two edges, one cloud. The client here only sends prompts and reads outputs, as any
client would; afterwards it runs both models alone to compare.
"""

import asyncio
import itertools
import os
import random
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from fedhlm import config as configuration
from fedhlm import topics
from fedhlm.errors import BusError, ConfigError, root_of
from fedhlm.messages import Output, Presence, Prompt, Sampling
from fedhlm.party import Party, Stamp
from fedhlm.serve import bus_of, model_folder
from fedhlm.telemetry import Counters, configure_logging
from fleet.processes import Processes
from fleet.progress import Progress
from fleet.reference import Alone
from fleet.report import Alternatives, Figures, Generated, Report, figures, table
from model_zoo.corpus import TOPIC_LINE, Article
from model_zoo.prompts import load_items

CLUSTERS: Final = 2
AGENTS: Final = 2
READY_S: Final = 90.0
ANSWER_S: Final = 120.0
COMPARED: Final = "hlm"
COMPARISON_PROMPTS: Final = 4  # one for each agent


class Task(msgspec.Struct, frozen=True):
    """One request to be: a title to continue, or a whole item whose topic is asked for."""

    kind: str
    text: str
    topic: str
    tokens: int
    temperature: float | None


def tasks_of(articles: tuple[Article, ...], tokens: int) -> Iterator[Task]:
    """For every item a continuation of its title and, where it has a topic, the question for it."""
    for article in articles:
        yield Task("continue", article.title + "\n", article.topic, tokens, None)
        if article.topic:
            yield Task("topic", article.body + TOPIC_LINE, article.topic, 1, 0.0)


def load_prompts(path: Path | None) -> tuple[Article, ...]:
    """News items of a .jsonl file, or any other file's lines as titles; the shipped items without a path.

    Raises:
        DataMissing: the file cannot be read or holds nothing.
    """
    if path is None or path.suffix in (".jsonl", ".json"):
        return load_items(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError("--prompts", str(path), f"a readable UTF-8 text file expected ({exc})") from exc
    titles = [line.strip() for line in lines if line.strip()]
    if not titles:
        raise ConfigError("--prompts", str(path), "at least one line of text expected")
    return tuple(Article(title, "", "") for title in titles)


class Client:
    """Sends prompts and collects outputs; one request at a time for each agent."""

    def __init__(self, party: Party, agents: list[tuple[str, str]], progress: Progress) -> None:
        self.agents = agents
        self.requests: list[Generated] = []
        self._party = party
        self._progress = progress
        self._open: dict[str, tuple[Generated, asyncio.Future[None]]] = {}
        self._numbers = itertools.count()
        self._online: set[str] = set()
        self._linked: set[str] = set()
        self._ready = asyncio.Event()

    async def listen(self) -> None:
        """Read the bus until it closes."""
        root = self._party.root
        await self._party.bus.subscribe(
            topics.AGENT_STATUS.name(root, cluster="+", agent="+"),
            topics.EDGE_STATUS.name(root, cluster="+"),
            topics.OUTPUT.name(root, cluster="+", agent="+"),
        )
        async for received in self._party.received():
            match received.message:
                case Presence(role="agent") as state:
                    (self._online.add if state.online else self._online.discard)(received.levels["agent"])
                case Presence(role="edge") as state:
                    linked = state.online and state.upstream is not None
                    (self._linked.add if linked else self._linked.discard)(received.levels["cluster"])
                case Output() as output:
                    self._take(output)
            if {a for _, a in self.agents} <= self._online and {c for c, _ in self.agents} <= self._linked:
                self._ready.set()

    async def wait_ready(self) -> None:
        """Return when every agent is online and every edge sees the cloud."""
        await self._ready.wait()

    async def ask(self, place: tuple[str, str], task: Task, seed: int, preset: str | None) -> Generated:
        """Send one prompt and wait for its last output."""
        cluster, agent = place
        generated = Generated(
            agent=agent,
            task=task.kind,
            prompt=task.text,
            topic=task.topic,
            seed=seed,
            max_tokens=task.tokens,
            temperature=task.temperature,
        )
        self.requests.append(generated)
        request = f"r{next(self._numbers)}"
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open[request] = generated, done
        prompt = Prompt(
            **self._party.stamp(),
            request=request,
            text=task.text,
            max_tokens=task.tokens,
            seed=seed,
            temperature=task.temperature,
            preset=preset,
        )
        try:
            await self._party.send(topics.PROMPT, prompt, cluster=cluster, agent=agent)
            async with asyncio.timeout(ANSWER_S):
                await done
        except TimeoutError:
            generated.finish, generated.error = "error", f"{agent} did not answer within {ANSWER_S:g} s"
        finally:
            del self._open[request]
        return generated

    def _take(self, output: Output) -> None:
        generated, done = self._open.get(output.request, (None, None))
        if generated is None or done is None or output.position != len(generated.ids):
            return  # not ours, or an MQTT duplicate
        generated.ids += output.ids
        generated.sources += output.sources
        generated.text += output.text
        self._progress.heard(generated)
        if output.finish is not None:
            generated.finish, generated.error = output.finish, output.error
            generated.statistics = dict(output.statistics)
            self._progress.finished(generated)
            if not done.done():
                done.set_result(None)


class Demo:
    """One run with its options; `report` is what was measured up to now."""

    def __init__(
        self, *, preset: str, prompts: Path | None, tokens: int, seed: int, broker: str, duration_s: float
    ) -> None:
        flags = {"broker.url": broker} if broker else {}
        self.config = configuration.load(preset=preset, flags=flags).config
        self.preset = preset
        self.preset_source = str(Path(preset).resolve()) if preset.endswith(".toml") else preset
        self.seed = seed
        self.tokens = tokens
        self.duration_s = duration_s
        self.articles = load_prompts(prompts)
        self.slm = model_folder(self.config.agent.model, "slm")
        self.llm = model_folder(self.config.cloud.model, "llm")
        self.report: Report | None = None
        self.wall_s = 0.0
        self.root = f"fedhlm-demo-{random.SystemRandom().getrandbits(32):08x}/1"

    async def run(self, console: Console) -> None:
        """Start the fleet, ask, compare, stop the fleet."""
        agents = [(f"cluster-{c + 1}", f"agent-{c + 1}{'ab'[a]}") for c in range(CLUSTERS) for a in range(AGENTS)]
        progress = Progress([a for _, a in agents], plain=not console.is_terminal, console=console)
        async with Processes() as processes:
            broker = await self._start_broker(processes)
            bus = bus_of(broker, client_id=f"demo-{os.getpid()}", connect_timeout_s=broker.connect_timeout_s)
            async with bus:
                await self._start_parts(processes, broker, agents)
                party = Party(bus=bus, stamp=Stamp("demo"), counters=Counters(), root=self.root)
                client = Client(party, agents, progress)
                main = asyncio.create_task(self._ask_all(client, progress), name="demo-main")
                helpers = [
                    asyncio.create_task(client.listen(), name="demo-listen"),
                    asyncio.create_task(processes.watch(), name="demo-watch"),
                ]
                try:
                    await asyncio.wait([main, *helpers], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (main, *helpers):
                        task.cancel()
                    await asyncio.wait([main, *helpers])
                for task in (*helpers, main):
                    if not task.cancelled() and (error := task.exception()) is not None:
                        raise error

    async def _start_broker(self, processes: Processes) -> configuration.Broker:
        if self.config.broker.url:
            return self.config.broker
        await processes.start("broker", "edge_broker.embedded", "--port", "0")
        async with asyncio.timeout(READY_S):
            while not (printed := processes.log_of("broker").strip()):
                processes.check()
                await asyncio.sleep(0.05)
        return msgspec.structs.replace(self.config.broker, url=printed.splitlines()[0])

    async def _start_parts(
        self, processes: Processes, broker: configuration.Broker, agents: list[tuple[str, str]]
    ) -> None:
        cores = os.cpu_count() or 1
        common = {
            "FEDHLM_BROKER__URL": broker.url,
            "FEDHLM_BROKER__ROOT": self.root,
            "FEDHLM_PRESET": self.preset_source,
            "FEDHLM_TELEMETRY__LOG_LEVEL": "WARNING",
        }
        await processes.start(
            "cloud", "fleet.cli", "cloud", env={**common, "FEDHLM_CLOUD__THREADS": str(max(1, cores // 2))}
        )
        for cluster in dict.fromkeys(c for c, _ in agents):
            await processes.start(
                f"edge-{cluster}", "fleet.cli", "edge", env={**common, "FEDHLM_CLUSTER__NAME": cluster}
            )
        for cluster, agent in agents:
            own = {"FEDHLM_CLUSTER__NAME": cluster, "FEDHLM_AGENT__ID": agent, "FEDHLM_AGENT__THREADS": "1"}
            await processes.start(agent, "fleet.cli", "agent", env={**common, **own})

    async def _ask_all(self, client: Client, progress: Progress) -> None:
        progress.status = "starting the fleet"
        with progress.live():
            try:
                async with asyncio.timeout(READY_S):
                    await client.wait_ready()
            except TimeoutError:
                raise BusError(f"the fleet was not ready within {READY_S:g} s") from None
            progress.status = f"preset {self.preset}"
            began = time.monotonic()
            try:
                await self._round(client, self.duration_s, self.articles, None)
            finally:
                self.wall_s = time.monotonic() - began
                self.report = self._summary(client.requests, self.wall_s)
            await self._compare(client, progress)

    async def _compare(self, client: Client, progress: Progress) -> None:
        """Ask a few prompts again under the preset COMPARED, then let both models write alone."""
        main, compared = list(client.requests), None
        if self.preset != COMPARED:
            progress.status = f"the same under preset {COMPARED}"
            began = time.monotonic()
            await self._round(client, self.duration_s, self.articles[:COMPARISON_PROMPTS], COMPARED)
            compared = client.requests[len(main) :], time.monotonic() - began
        progress.status = "both models alone"
        comparison = None if compared is None else await asyncio.to_thread(self._judged, COMPARED, *compared)
        judged = await asyncio.to_thread(self._judged, self.preset, main, self.wall_s)
        self.report = Report(**msgspec.structs.asdict(judged), comparison=comparison)

    async def _round(
        self, client: Client, duration_s: float, articles: tuple[Article, ...], preset: str | None
    ) -> None:
        """Every agent takes the next task until none is left or the time is over."""
        numbered = enumerate(tasks_of(articles, self.tokens))
        until = time.monotonic() + duration_s

        async def work(place: tuple[str, str]) -> None:
            while time.monotonic() < until:
                number, task = next(numbered, (0, None))
                if task is None:
                    return
                await client.ask(place, task, self.seed * 1_000_003 + number, preset)

        async with asyncio.TaskGroup() as group:
            for place in client.agents:
                group.create_task(work(place), name=f"ask-{place[1]}")

    def _summary(self, requests: list[Generated], wall_s: float) -> Report:
        plain = figures(self.preset, self.seed, requests, {}, wall_s)
        return Report(**msgspec.structs.asdict(plain), stopped_early=True)

    def _judged(self, preset: str, requests: list[Generated], wall_s: float) -> Figures:
        """Figures with what both models write alone beside the system's text."""
        large, small = Alone.load(self.llm, threads=0), Alone.load(self.slm, threads=0)
        generation = configuration.load(preset=preset).config.generation
        # Only gumbel and greedy texts are functions of the seed; others are compared with the gumbel text.
        coupling = "greedy" if generation.coupling == "greedy" else "gumbel"
        alone: dict[int, Alternatives] = {}
        for i, request in enumerate(requests):
            temperature = generation.temperature if request.temperature is None else request.temperature
            sampling = Sampling(request.seed, temperature, generation.top_p, coupling)
            prompt = large.encode(request.prompt)
            ids = large.write(prompt, sampling, request.max_tokens)
            word = small.decode(small.write(prompt, sampling, 1)) if request.task == "topic" else ""
            alone[i] = Alternatives(ids, large.decode(ids), word)
        return figures(preset, self.seed, requests, alone, wall_s)


def run(
    *,
    preset: str = configuration.DEFAULT_PRESET,
    prompts: Path | None = None,
    tokens: int = 64,
    seed: int = 0,
    broker: str = "",
    duration_s: float = 30.0,
    json_file: Path | None = None,
) -> int:
    """Run the demo and print its table; 130 when it was interrupted, with the table so far."""
    console = Console()
    configure_logging("ERROR", "demo")  # what is wrong with the broker comes as an error of ours
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError("--json", str(json_file), "a file in an existing folder expected")
    demo = Demo(preset=preset, prompts=prompts, tokens=tokens, seed=seed, broker=broker, duration_s=duration_s)
    code = 0
    try:
        asyncio.run(_interruptible(demo.run(console)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted")
        code = 130
    except BaseExceptionGroup as group:
        raise root_of(group) from group
    if demo.report is not None:
        console.print(table(demo.report))
        if json_file is not None:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(demo.report), indent=2) + b"\n")
    return code


async def _interruptible(work: Coroutine[None, None, None]) -> None:
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    await task
