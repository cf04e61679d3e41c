"""Compare every preset on the same news prompts with real models in virtual time: the table of docs/results.md.

Run: python -m fedhlm_lab.studies.compare [--presets exact budget ...] [--prompts 500] [--ag-news] [--set KEY=VALUE]
[--json FILE]
"""

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from msgspec import structs

from edge_agent.core import AgentCore
from edge_agent.events import Committed, Observation
from edge_agent.measures import measures_of
from edge_agent.result import GenerationResult, Job
from fedhlm.config import load, presets
from fedhlm.decoding.alone import Alone
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.models import LoadedModel
from fedhlm.decoding.text import encode_prompt
from fedhlm.learning.certificate import Certificate
from fedhlm.progress import progress
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Config
from fedhlm_lab.sim.shipped import shipped_pair
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet, Pair
from fedhlm_lab.studies.command_line import COUNT, TEMPERATURE, Parser, limited, out_file, settings_of
from fedhlm_lab.studies.command_line import run as run_study
from fedhlm_zoo.corpus import TOPIC_LINE, Article, load_ag_news
from fedhlm_zoo.partition import dirichlet_partition, skew
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder

CLUSTERS: Final = 2
AGENTS: Final = 2


class StudyTask(NamedTuple):
    """One request: prompt ids, seed, limits and, for a topic question, the right topic word."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    topic: str


@dataclass
class FinishedTask:
    """The result of a task under a preset."""

    agent: str
    task: StudyTask
    result: GenerationResult


@dataclass
class Line:
    """One preset's figures. Shares and rates are per token; bytes include MQTT framing.

    `audit_messages` are those for audits alone, a token of the whole run; `transmissions` are the others.
    """

    preset: str
    kind: str
    requests: int = 0
    tokens: int = 0
    topic_accuracy: float | None = None
    agreement: float = 0.0
    exact_match: float = 0.0
    settled: dict[str, float] = field(default_factory=dict)
    transmissions: float = 0.0
    audit_messages: float = 0.0
    escalated: float = 0.0
    uplink_bytes: float = 0.0
    cluster_bytes: float = 0.0
    round_trips: float = 0.0
    risk: float | None = None
    risk_limit: float | None = None
    tau: tuple[float, float] = (0.0, 0.0)


class Oracle:
    """What the LLM (or SLM) alone writes, remembered by task; texts are compared with it."""

    def __init__(self, folder: Path) -> None:
        self._alone = Alone.load(folder, threads=1)
        self.decoder = self._alone.decoder
        self._known: dict[tuple[tuple[int, ...], Sampling, int], list[int]] = {}

    def write(self, task: StudyTask, coupling: str) -> list[int]:
        """Write up to `max_tokens` ids with the target side of a coupling with shared noise."""
        sampling = structs.replace(task.sampling, coupling=coupling)
        key = (tuple(task.prompt), sampling, task.max_tokens)
        if key not in self._known:
            self._known[key] = self._alone.write(task.prompt, sampling, task.max_tokens)
        return self._known[key]


def tasks_of(
    articles: Sequence[Article], kind: str, decoder: LoadedModel, *, tokens: int, temperature: float
) -> list[StudyTask]:
    """A task for each article: continue its title ("continue"), or name its topic ("topic", one greedy token)."""

    def ids(text: str) -> list[int]:
        return encode_prompt(decoder.tokenizer, text, decoder.info.bos_id)

    room = decoder.info.context - 1
    if kind == "topic":
        wanted = [(ids(a.body + TOPIC_LINE), a.topic) for a in articles]
        return [StudyTask(p, Sampling(i, 0.0), 1, t) for i, (p, t) in enumerate(wanted) if len(p) <= room]
    return [StudyTask(ids(a.title + "\n"), Sampling(i, temperature), tokens, "") for i, a in enumerate(articles)]


def shuffled_test_split() -> list[Article]:
    """AG News, test split, always in the same order.

    Raises:
        DataMissing: it is not there and cannot be downloaded.
    """
    articles = list(load_ag_news("test"))
    random.Random(5).shuffle(articles)
    return articles


async def nobody(_tokens: list[Committed]) -> FinishReason | None:
    """Ignore progress."""
    return None


async def work(
    agent: AgentCore,
    config: Config,
    tasks: Iterator[StudyTask],
    eos_ids: frozenset[int],
    context: int,
    read: Callable[[Sequence[int]], str] | None = None,
    ended: Callable[[], object] = lambda: None,
    pause_s: float = 0.0,
) -> list[FinishedTask]:
    """Process one agent's share of the tasks, one at a time with `pause_s` after each; call `ended` after each."""
    done = []
    for task in tasks:
        sampling = Sampling(task.sampling.seed, task.sampling.temperature, 1.0, config.generation.coupling)
        job = Job(config.generation, sampling, task.max_tokens, context, eos_ids)
        done.append(FinishedTask(agent.name, task, await agent.generate(job, task.prompt, nobody, read=read)))
        ended()
        await asyncio.sleep(pause_s)
    return done


async def settle_audits(agent: AgentCore, config: Config, done: Sequence[FinishedTask]) -> None:
    """Wait until the agent's open audits have ended, and give the last result the certificate of all texts."""
    while len(agent.auditor.audits):  # noqa: ASYNC110 - they tell nobody, and time is virtual
        await asyncio.sleep(1.0)
    if done and done[-1].result.certificate is not None:
        sampling = structs.replace(done[-1].task.sampling, coupling=config.generation.coupling)
        measures = measures_of(config.generation, sampling, agent.learner.pair)
        done[-1].result.certificate = agent.learner.certificate(measures, config.generation)


async def run_fleet(
    pair: Pair,
    config: Config,
    parts: Sequence[Sequence[StudyTask]],
    delay_s: float,
    read: Callable[[Sequence[int]], str] | None = None,
    ended: Callable[[], object] = lambda: None,
    pause_s: float = 0.0,
) -> tuple[list[FinishedTask], float]:
    """Run all tasks through a fleet without faults, and call `ended` after each.

    `read` returns the text of ids (`AgentCore.generate`). A device pauses for `pause_s` between two tasks.

    Returns:
        The answers in the order of the agents, and the number of messages for audits alone.
    """
    fleet = Fleet(pair, seed=1, clusters=CLUSTERS, delay_s=delay_s, sessions_max=64, federation=config.federation)
    for node in fleet.nodes.values():
        node.start()
    await asyncio.sleep(1.0)

    async def live(place: int) -> list[FinishedTask]:
        name = f"agent-{place}"
        async with fleet.online(f"c{place // AGENTS}", name, pair.drafter()) as agent:
            await asyncio.sleep(1.0)
            done = await work(agent, config, iter(parts[place]), pair.eos_ids, pair.context, read, ended, pause_s)
            await settle_audits(agent, config, done)
            return done

    groups = await asyncio.gather(*(live(place) for place in range(CLUSTERS * AGENTS)))
    for node in fleet.nodes.values():
        await node.crash()
    return [done for group in groups for done in group], fleet.counters.snapshot().get("audit_messages", 0.0)


def line_of(preset: str, kind: str, done: Sequence[FinishedTask], large: Oracle, config: Config) -> Line:
    """The figures of one preset on one kind of task."""
    line = Line(preset, kind, requests=len(done), tokens=sum(len(d.result.ids) for d in done))
    if not line.tokens:
        return line
    coupling = COUPLINGS[config.generation.coupling].alone
    with progress("texts of the LLM alone", len(done)) as ended:
        oracle = []
        for one in done:
            oracle.append(large.write(one.task, coupling))
            ended()
    line.agreement = sum(
        a == b for d, o in zip(done, oracle, strict=True) for a, b in zip(d.result.ids, o, strict=False)
    ) / sum(max(len(d.result.ids), len(o)) for d, o in zip(done, oracle, strict=True))
    line.exact_match = sum(d.result.ids == o for d, o in zip(done, oracle, strict=True)) / len(done)
    if kind == "topic":
        texts = [large.decoder.tokenizer.decode(d.result.ids) for d in done]
        line.topic_accuracy = sum(t.strip() == d.task.topic for t, d in zip(texts, done, strict=True)) / len(done)
    sources = Counter(s for d in done for s in d.result.sources)
    line.settled = {s: n / line.tokens for s, n in sorted(sources.items())}
    for name in ("uplink_bytes", "cluster_bytes", "round_trips", "escalated"):
        setattr(line, name, sum(getattr(d.result, name) for d in done) / line.tokens)
    line.transmissions = sum(d.result.uplink_messages for d in done) / line.tokens
    known = certificate_of(done)
    if known is not None:
        line.risk, line.risk_limit = known.estimate, known.limit(done[0].result.confidence)
    line.tau = (done[0].result.tau, done[-1].result.tau)
    return line


def certificate_of(done: Sequence[FinishedTask]) -> Certificate | None:
    """The agents' newest certificates added up; None if nothing was audited."""
    last = {d.agent: d.result.certificate for d in done if d.result.certificate is not None}
    return sum(last.values(), Certificate()) if last else None


def observations_of(done: Sequence[FinishedTask]) -> list[Observation]:
    """What the target said about the drafts, in order."""
    return [o for d in done for o in d.result.observed]


def show(lines: Sequence[Line]) -> str:
    """The table in Markdown."""
    head = "| preset | task | tokens | topic right | tokens equal | texts equal | local | peer | neighbour | cloud | sent/token | for audits | B/token up | B/token cluster | round trips/token | R-hat (limit) | tau |"
    rows = [head, "|" + "---|" * 17]
    for x in lines:
        settled = [f"{x.settled.get(s, 0.0):.1%}" for s in ("local", "peer", "neighbour", "cloud")]
        risk = "-" if x.risk is None else f"{x.risk:.3f} ({x.risk_limit:.3f})"
        accuracy = "-" if x.topic_accuracy is None else f"{x.topic_accuracy:.2%}"
        cells = [
            f"`{x.preset}`",
            x.kind,
            str(x.tokens),
            accuracy,
            f"{x.agreement:.2%}",
            f"{x.exact_match:.1%}",
            *settled,
        ]
        cells += [
            f"{x.transmissions:.4f}",
            f"{x.audit_messages:.4f}",
            f"{x.uplink_bytes:,.1f}",
            f"{x.cluster_bytes:,.1f}",
            f"{x.round_trips:.3f}",
        ]
        rows.append(f"| {' | '.join([*cells, risk, f'{x.tau[0]:.2f} → {x.tau[1]:.2f}'])} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(prog="python -m fedhlm_lab.studies.compare", description="presets side by side on news prompts")
    parser.add_argument("--presets", nargs="+", default=list(presets()))
    parser.add_argument("--kinds", nargs="+", default=["topic", "continue"], choices=["topic", "continue"])
    parser.add_argument("--prompts", type=COUNT, default=200)
    parser.add_argument(
        "--skip",
        type=limited(int, 0, 1_000_000),
        default=0,
        help="leave out so many items at the beginning; they follow the last one",
    )
    parser.add_argument(
        "--warm",
        type=limited(int, 0, 1_000_000),
        default=0,
        help="so many further items go before, to learn from; not counted",
    )
    parser.add_argument("--tokens", type=COUNT, default=48)
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.8)
    parser.add_argument("--delay", type=limited(float, 0, 60), default=0.02, help="seconds, one way, on every link")
    parser.add_argument(
        "--pause", type=limited(float, 0, 3_600), default=0.0, help="seconds between two requests of a device"
    )
    parser.add_argument(
        "--alpha", type=limited(float, 1e-6, 1e6), help="Dirichlet partition of the topics over the agents"
    )
    parser.add_argument("--items", type=Path, help="news items, one JSON object a line; default: the shipped ones")
    parser.add_argument("--ag-news", action="store_true", help="the AG News test split, shuffled (see FEDHLM_DATA)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for every preset")
    parser.add_argument("--json", type=out_file)
    options = parser.parse_args(arguments)
    slm, llm = model_folder("", "slm"), model_folder("", "llm")
    pair, large = shipped_pair(slm, llm), Oracle(llm)
    known = shuffled_test_split() if options.ag_news else load_items(options.items)
    first = options.skip % len(known)
    articles = [*known[first:], *known[:first]][: options.prompts + options.warm]
    places = CLUSTERS * AGENTS
    lines: list[Line] = []
    for kind in options.kinds:
        tasks = tasks_of(articles, kind, large.decoder, tokens=options.tokens, temperature=options.temperature)
        warm = {id(task) for task in tasks[: options.warm]}
        if options.alpha is None:
            parts = [tasks[place::places] for place in range(places)]
        else:
            topics = [a.topic for a in articles][: len(tasks)]
            split = dirichlet_partition(topics, places, options.alpha, seed=1)
            parts = [[tasks[i] for i in part] for part in split]
            print(f"{kind}: skew {skew(topics, split):.2f}", file=sys.stderr)
        for preset in options.presets:
            config = load(preset=preset, environ={}, flags=settings_of(options.set)).config
            with progress(f"requests under {preset}", sum(map(len, parts))) as ended:
                read = large.decoder.tokenizer.decode
                done, alone = run_virtual(
                    partial(run_fleet, pair, config, parts, options.delay, read, ended, options.pause)()
                )
            line = line_of(preset, kind, [d for d in done if id(d.task) not in warm], large, config)
            line.audit_messages = alone / max(1, sum(len(d.result.ids) for d in done))
            lines.append(line)
            print(show(lines[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(show(lines))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_study(main, "python -m fedhlm_lab.studies.compare"))
