"""`fedhlm demo`: a whole fleet of real processes on this machine, over MQTT, with news prompts.

The fleet has two clusters of two agents each, two edges and one cloud. First it works and learns under one preset. Then
it gets the same few new prompts under that preset and under those of COMPARED.
"""

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final

import msgspec
from rich.console import Console

from edge_agent.measures import measures_of
from fedhlm import choices, settings
from fedhlm import config as configuration
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.errors import BusError, ConfigError, root_of
from fedhlm.process.run import bus_of
from fedhlm.telemetry import configure_logging
from fedhlm_fleet import figures as figures_file
from fedhlm_fleet.attendance import Place
from fedhlm_fleet.demo.asking import Asker, Task, load_prompts, tasks_of
from fedhlm_fleet.demo.journey import ASCII_BARS, BARS, Journey
from fedhlm_fleet.demo.judge import Judge
from fedhlm_fleet.demo.progress import Progress, wrapped
from fedhlm_fleet.demo.report import Figures, Generated, PresetRun, Report, TruthRow, figures, notes, tables
from fedhlm_fleet.demo.story import outcome, setting, task
from fedhlm_fleet.demo.truth import truth_rows, truth_table
from fedhlm_fleet.pair_files import pair_file
from fedhlm_fleet.processes import Processes
from fedhlm_zoo.partition import dirichlet_partition, skew
from fedhlm_zoo.shipped import model_folder

CLUSTERS: Final = 2
AGENTS: Final = 2
TEMPERATURE: Final = 0.0  # peers can only help at low temperatures (docs/peers.md)
CLOUD: Final = "cloud"
RECORDER: Final = "recorder"
CONSOLE: Final = "console"
READY_S: Final = 90.0
COMPARED: Final = ("exact", "fedhlm", "hlm")
COMPARED_ITEMS: Final = 8
JUDGED_TEXTS: Final = 24  # texts of the run that are compared; comparing all would take longer than the run
NOTHING_ANSWERED: Final = 1  # the exit code if every request failed
_SEEDS_APART: Final = 1_000_003
_COMPARISON_SEEDS: Final = 500_000  # no run has so many requests


class Demo:
    """One run with its options; `report` has the figures so far, `progress` the view.

    With None as `alpha`, all agents share one list of prompts.
    """

    children: ClassVar[type[Processes]] = Processes

    def __init__(
        self,
        *,
        preset: str,
        prompts: Path | None,
        tokens: int,
        seed: int,
        broker: str,
        duration_s: float,
        pair: Path | None = None,
        budget: float | None = None,
        alpha: float | None = None,
        temperature: float = TEMPERATURE,
        recording: Path | None = None,
        truth: bool = False,
        console: bool = False,
    ) -> None:
        # A byte within a cluster costs nothing here: it never leaves the machine.
        self.overrides = {"generation.temperature": f"{temperature:g}", "generation.consensus.lan_price": "0"}
        if budget is not None:
            self.overrides["generation.budget"] = str(budget)
        flags = {"broker.url": broker} if broker else {}
        self.config = configuration.load(file=pair, preset=preset, flags={**flags, **self.overrides}).config
        generation = self.config.generation
        self.has_budget = choices.THRESHOLDS[generation.threshold].keeps_budget
        if budget is not None and not self.has_budget:
            words = f"left to a preset with generation.threshold 'calibrated-fl', unlike {preset} ({generation.threshold!r})"
            raise ConfigError("generation.budget", budget, words, source="flag --budget")
        if truth and not (generation.audit and COUPLINGS[generation.coupling].shared):
            words = f"used with a preset that audits kept tokens under shared noise, unlike {preset}"
            raise ConfigError("--truth", truth, words)
        self.truth = truth
        self.console = console
        self.page = ""  # the console's address
        self.preset = preset
        is_path = preset not in configuration.presets()
        self.preset_source = str(Path(preset).resolve()) if is_path else preset
        self.name = Path(preset).name  # the name of a file keeps its suffix, and so differs from shipped presets
        self.seed = seed
        self.tokens = tokens
        self.duration_s = duration_s
        articles = load_prompts(prompts)
        # The compared prompts must be new to the fleet, whose peers remember; only a short list is used twice.
        self.held_out = len(articles) >= 2 * COMPARED_ITEMS
        self.compared = articles[-COMPARED_ITEMS:]
        self.articles = articles[:-COMPARED_ITEMS] if self.held_out else articles
        self.places = [
            Place(f"cluster-{c + 1}", f"agent-{c + 1}{'ab'[a]}") for c in range(CLUSTERS) for a in range(AGENTS)
        ]
        self.alpha = alpha
        self.parts = None if alpha is None else self._parts(alpha)
        chosen = {"agent.model": self.config.agent.model, "cloud.model": self.config.cloud.model}
        chosen["cloud.draft_model"] = self.config.cloud.draft_model
        self.models = {key: model for key, model in chosen.items() if model}
        self.slm = model_folder(self.config.agent.model, "slm")
        self.llm = model_folder(self.config.cloud.model, "llm")
        self.recording = recording
        self.report: Report | None = None
        self.progress: Progress | None = None
        self.root = f"fedhlm-demo-{random.SystemRandom().getrandbits(32):08x}/1"

    @property
    def skew(self) -> float | None:
        """How much the agents' news differ (`fedhlm_zoo.partition.skew`); None if they share one list."""
        return None if self.parts is None else skew([a.topic for a in self.articles], self.parts)

    async def run(self, console: Console) -> None:
        """Start the fleet, send the requests, compare, and stop the fleet."""
        generation = self.config.generation
        sampling = generation.sampling(self.seed)
        bars = BARS if console.encoding.startswith("utf") else ASCII_BARS
        journey = Journey(generation, measures_of(generation, sampling, pair="").draft, bars=bars)
        progress = Progress([p.agent for p in self.places], journey, plain=not console.is_terminal, console=console)
        self.progress = progress
        async with self.children() as processes:
            broker = await self._start_broker(processes)
            bus = bus_of(broker, client_id=f"demo-{os.getpid()}", connect_timeout_s=broker.connect_timeout_s)
            asker = Asker(bus, self.places, progress, root=self.root)
            async with asker.client:
                await self._start_parts(processes, broker)
                main = asyncio.create_task(self._tell(asker, progress), name="demo-main")
                watch = asyncio.create_task(processes.watch(), name="demo-watch")
                try:
                    await asyncio.wait([main, watch], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (main, watch):
                        task.cancel()
                    await asyncio.wait([main, watch])
                    await self._end_recording(processes)
                for task in (watch, main):
                    if not task.cancelled() and (error := task.exception()) is not None:
                        raise error

    async def _start_broker(self, processes: Processes) -> settings.Broker:
        if self.config.broker.url:
            return self.config.broker
        await processes.start("broker", "edge_broker.embedded", "--port", "0")
        async with asyncio.timeout(READY_S):
            while not (printed := processes.log_of("broker").strip()):
                processes.check()
                await asyncio.sleep(0.05)
        return msgspec.structs.replace(self.config.broker, url=printed.splitlines()[0])

    async def _record(self, processes: Processes, broker: settings.Broker, file: Path) -> None:
        """Start to record everything under the demo's root; return when the recorder is running."""
        where = ("--broker", broker.url, "--root", self.root)
        await processes.start(RECORDER, "fedhlm_fleet.cli", "record", *where, "--out", str(file))
        async with asyncio.timeout(READY_S):
            while not await asyncio.to_thread(file.exists):
                processes.check()
                await asyncio.sleep(0.05)

    async def _open_console(self, processes: Processes, broker: settings.Broker) -> None:
        where = (
            "--broker",
            broker.url,
            "--broker.root",
            self.root,
            "--generation.budget",
            f"{self.config.generation.budget}",
        )
        await processes.start(CONSOLE, "fedhlm_fleet.cli", "console", *where, "--listen", "127.0.0.1:0")
        async with asyncio.timeout(READY_S):
            while not (told := re.search(r"^open (\S+)$", processes.log_of(CONSOLE), re.MULTILINE)):
                processes.check()
                await asyncio.sleep(0.05)
        self.page = told[1]

    async def _end_recording(self, processes: Processes) -> None:
        """Stop the parts before the recorder, so that their last messages are recorded."""
        if self.recording is not None:
            await processes.end(CLOUD, *(f"edge-{p.cluster}" for p in self.places), *(p.agent for p in self.places))
            await processes.end(RECORDER)

    async def _start_parts(self, processes: Processes, broker: settings.Broker) -> None:
        cores = os.cpu_count() or 1
        common = {
            "FEDHLM_BROKER__URL": broker.url,
            "FEDHLM_BROKER__ROOT": self.root,
            "FEDHLM_PRESET": self.preset_source,
            "FEDHLM_TELEMETRY__LOG_LEVEL": "WARNING",
        }
        if self.recording is not None:
            await self._record(processes, broker, self.recording)
            common["FEDHLM_TELEMETRY__JOURNAL"] = "true"
        if self.console:
            await self._open_console(processes, broker)
            common["FEDHLM_TELEMETRY__JOURNAL"] = "true"  # doubts, and what the devices had drafted
        given = self.overrides | self.models
        common |= {configuration.environment_name(key): value for key, value in given.items()}
        await processes.start(
            CLOUD, "fedhlm_fleet.cli", "cloud", env={**common, "FEDHLM_CLOUD__THREADS": str(max(1, cores // 2))}
        )
        for cluster in dict.fromkeys(p.cluster for p in self.places):
            await processes.start(
                f"edge-{cluster}", "fedhlm_fleet.cli", "edge", env={**common, "FEDHLM_CLUSTER__NAME": cluster}
            )
        for cluster, agent in self.places:
            own = {"FEDHLM_CLUSTER__NAME": cluster, "FEDHLM_AGENT__ID": agent, "FEDHLM_AGENT__THREADS": "1"}
            own["FEDHLM_AGENT__PRESETS"] = ",".join(COMPARED)  # the news are public, whatever the preset of the run
            await processes.start(agent, "fedhlm_fleet.cli", "agent", env={**common, **own})

    async def _tell(self, asker: Asker, progress: Progress) -> None:
        with progress.live():
            looked = [f"Watch it in a browser, until the demo ends: {self.page}"] if self.page else []
            progress.stage("A fleet starts.", setting(CLUSTERS, AGENTS), *self._news(), *looked)
            try:
                async with asyncio.timeout(READY_S):
                    await asker.wait_ready()
            except TimeoutError:
                raise BusError(f"the fleet was not ready within {READY_S:g} s") from None
            progress.stage(
                f"The run: all agents write for {self.duration_s:g} s under preset {self.name}.",
                *task(self.config.generation, self._promise(self.name)),
                *progress.journey.legend(),
                watched=True,
            )
            began = time.monotonic()
            try:
                await self._work(asker, self.shares(), self.duration_s, None)
            finally:
                run = self._run_of(self.name, list(asker.requests), time.monotonic() - began)
                self.report = self._reported(figures(run, {}), progress, stopped_early=True)
            progress.stage("The run is over. This is what the fleet knows now:")
            progress.tell()
            # The comparison uses other presets, which do not belong into the recording.
            presets = self._compared_presets() if self.recording is None else []
            if presets:
                new = " that were not in the run" if self.held_out else ""
                progress.stage(
                    f"The comparison: {len(self.compared)} news items{new}, under each of {len(presets)} presets, "
                    "with the same seeds and agents."
                )
            runs = [await self._compare(asker, progress, name) for name in presets]
            progress.stage("The check: each model writes the same requests by itself, to compare the texts.")
            judge = await asyncio.to_thread(
                Judge, llm=self.llm, slm=self.slm, target=self.config.agent.target_tokenizer
            )
            comparisons = [await asyncio.to_thread(judge.figures, other) for other in runs]
            judged = await asyncio.to_thread(judge.figures, run, JUDGED_TEXTS)
            self.report = self._reported(judged, progress, comparisons=comparisons)
            if self.truth:
                progress.stage("The truth: the LLM scores every kept token of the run.")
                self.report.truth = await asyncio.to_thread(self._truth_of, run, judge)

    def _truth_of(self, run: PresetRun, judge: Judge) -> list[TruthRow]:
        generation = run.generation
        scores = [judge.kept_and_wrong(request, generation) for request in run.requests]
        return truth_rows(run.requests, scores, temperature=generation.temperature, confidence=generation.confidence)

    def _news(self) -> list[str]:
        """Describe how the news are distributed."""
        if self.parts is None:
            return [f"{len(self.articles)} news items, one list for all agents"]
        lines = [f"{len(self.articles)} news items, Dirichlet({self.alpha:g}) over the agents, skew {self.skew:.2f}"]
        for place, part in zip(self.places, self.parts, strict=True):
            held = Counter(self.articles[i].topic for i in part)
            lines.append(f"{place.agent}: {', '.join(f'{topic} {count}' for topic, count in held.most_common())}")
        return lines

    def _parts(self, alpha: float) -> list[list[int]]:
        labels = [article.topic for article in self.articles]
        if not all(labels):
            raise ConfigError(
                "--alpha", alpha, "used with prompts that have topics, as in a .jsonl file (see docs/demo.md)"
            )
        try:
            return dirichlet_partition(labels, len(self.places), alpha, self.seed)
        except ValueError as exc:
            raise ConfigError("--alpha", alpha, "a finite number above 0", why=str(exc)) from exc

    def shares(self) -> dict[Place, Iterator[Task]]:
        """Return for each agent the iterator of its tasks."""
        first = self.seed * _SEEDS_APART
        if self.parts is None:
            shared = tasks_of(self.articles, self.tokens, first)
            return dict.fromkeys(self.places, shared)
        return {
            place: tasks_of(tuple(self.articles[i] for i in part), self.tokens, first + 2 * len(self.articles) * number)
            for number, (place, part) in enumerate(zip(self.places, self.parts, strict=True))
        }

    @staticmethod
    def _promise(name: str) -> str:
        """What a shipped preset promises; nothing for a file."""
        return configuration.presets().get(name, "")

    def _compared_presets(self) -> list[str]:
        return [self.name, *(name for name in COMPARED if name != self.name)]

    async def _compare(self, asker: Asker, progress: Progress, name: str) -> PresetRun:
        """Send the requests of the comparison; each agent gets the same ones under every preset."""
        promise = self._promise(name)
        progress.stage(f"Under preset {name}{f': {promise}' if promise else ''}.")
        tasks = list(tasks_of(self.compared, self.tokens, self.seed * _SEEDS_APART + _COMPARISON_SEEDS))
        # Two consecutive tasks belong to one item and go to the same agent, so that each agent gets both kinds.
        agents = len(self.places)
        shares = {
            p: iter([t for i, t in enumerate(tasks) if (i // 2) % agents == n]) for n, p in enumerate(self.places)
        }
        already, began = len(asker.requests), time.monotonic()
        await self._work(asker, shares, None, None if name == self.name else name)
        return self._run_of(name, asker.requests[already:], time.monotonic() - began)

    async def _work(
        self, asker: Asker, shares: dict[Place, Iterator[Task]], duration_s: float | None, preset: str | None
    ) -> None:
        """Let every agent work on its tasks until none is left or the time is over."""
        until = None if duration_s is None else time.monotonic() + duration_s

        async def work(place: Place, tasks: Iterator[Task]) -> None:
            while until is None or time.monotonic() < until:
                task = next(tasks, None)
                if task is None:
                    return
                await asker.ask(place, task, preset)

        async with asyncio.TaskGroup() as group:
            for place, tasks in shares.items():
                group.create_task(work(place, tasks), name=f"ask-{place.agent}")

    def _run_of(self, name: str, requests: list[Generated], wall_s: float) -> PresetRun:
        if name == self.name:
            return PresetRun(name, self.config.generation, self.seed, requests, wall_s)
        other = configuration.load(preset=name, flags=self.overrides).config.generation
        return PresetRun(name, other, self.seed, requests, wall_s)

    def _reported(
        self, own: Figures, progress: Progress, *, comparisons: Sequence[Figures] = (), stopped_early: bool = False
    ) -> Report:
        return Report(
            **msgspec.structs.asdict(own),
            budget=self.config.generation.budget if self.has_budget else None,
            alpha=self.alpha,
            skew=self.skew,
            rounds={name or "all": state.number for name, state in progress.journey.rounds.items()},
            comparisons=list(comparisons),
            stopped_early=stopped_early,
        )


def run(
    *,
    preset: str = settings.DEFAULT_PRESET,
    prompts: Path | None = None,
    tokens: int = 64,
    seed: int = 0,
    broker: str = "",
    duration_s: float = 30.0,
    pair: str = "",
    budget: float | None = None,
    alpha: float | None = None,
    temperature: float = TEMPERATURE,
    json_file: Path | None = None,
    recording: Path | None = None,
    truth: bool = False,
    with_console: bool = False,
) -> int:
    """Run the demo, print its table and return the exit code: 130 if interrupted, 1 if every request failed, else 0."""
    console = Console()
    configure_logging("ERROR", "demo")  # problems with the broker are reported as errors of the demo
    figures_file.try_out(json_file)
    if recording is not None and (recording.exists() or not recording.parent.is_dir()):
        raise ConfigError("--record", str(recording), "a new file in an existing folder")
    demo = Demo(
        preset=preset,
        prompts=prompts,
        tokens=tokens,
        seed=seed,
        broker=broker,
        duration_s=duration_s,
        pair=pair_file(pair) if pair else None,
        budget=budget,
        alpha=alpha,
        temperature=temperature,
        recording=recording,
        truth=truth,
        console=with_console,
    )
    code = 0
    try:
        asyncio.run(_interruptible(demo.run(console)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted")
        code = 130
    except BaseExceptionGroup as group:
        raise root_of(group) from group
    if demo.report is not None:
        console.print(*tables(demo.report, console.width))
        if demo.report.truth:
            console.print(truth_table(demo.report.truth))
        for heading, lines in (
            ("What came of it", outcome(demo.report, demo.config.generation.confidence)),
            ("\nThe words of the table", notes(demo.report)),
        ):
            for line in [heading, *(wrapped(line, console.width, "- ") for line in lines)] if lines else []:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        figures_file.write(json_file, demo.report)
        if 0 < demo.report.requests == demo.report.failed:
            code = code or NOTHING_ANSWERED
    return code


async def _interruptible(work: Coroutine[None, None, None]) -> None:
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    await task
