"""All presets on all links, in the simulator with measured compute times: what each one saves, and what that costs.

For each preset and seed there is one fleet. Presets that learn read `warm` texts first, and then the agents' links take
each profile in turn. Texts differ from link to link, because peers remember what was verified; all presets have the
same. The order of the links turns with the seed.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Final, NamedTuple, Self, TypeVar

from edge_agent.core import AgentCore
from edge_agent.events import Committed
from edge_agent.result import Job
from fedhlm import choices
from fedhlm.config import load, presets
from fedhlm.errors import ConfigError
from fedhlm.learning.certificate import Certificate
from fedhlm.progress import progress
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Config, Generation
from fedhlm.telemetry import Counters
from fedhlm_lab.papers.experiment import ParetoExperiment
from fedhlm_lab.papers.laws import LawModel, LawPrompt
from fedhlm_lab.papers.pair import LabPair
from fedhlm_lab.papers.texts import PATIENT, TimedText, timed_text
from fedhlm_lab.sim import links
from fedhlm_lab.sim.pace import CallTally, ModelPace, Paces
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet, Pair

Item = TypeVar("Item")

CLUSTER: Final = "c0"
REST_S: Final = 30.0  # after the texts of a link, for audits and contributions under way
ALONE_S: Final = 60.0  # seconds without a link in which a text may be written


class PresetPoint(NamedTuple):
    """One preset on one link with one seed: sums over the texts of all agents. Times are in seconds.

    `agreed` counts tokens that the LLM would have emitted after the same text, and `same` texts of only such tokens.
    `up_bytes` and `down_bytes` are those of the agents' links, `sent` messages towards the cloud. `calls` are those of
    the LLM, and `positions` the tokens that it computed.
    """

    preset: str
    link: str
    seed: int
    texts: int
    tokens: int
    agreed: int
    same: int
    settled: Mapping[str, int]
    seconds: float
    first_s: float
    sent: float
    up_bytes: float
    down_bytes: float
    calls: int
    positions: int


class AlonePoint(NamedTuple):
    """A text of each agent without a link, within ALONE_S seconds, under the preset's own deadlines.

    `first_s` is the mean time to the first token; ALONE_S where none came. The device's own model writes the tokens.
    """

    preset: str
    seed: int
    tokens: int
    wanted: int
    first_s: float


class ParetoRuns(NamedTuple):
    """All points, and the limits on the error per token that certificates give, by preset and seed."""

    experiment: ParetoExperiment
    source: str
    points: Sequence[PresetPoint]
    alone: Sequence[AlonePoint]
    certified: Mapping[tuple[str, int], float]


class SeedRun(NamedTuple):
    """What one preset did with one seed."""

    points: list[PresetPoint]
    alone: AlonePoint
    limit: float | None


def paces_of(experiment: ParetoExperiment) -> Paces:
    """The paces of the file."""
    return Paces(ModelPace(*experiment.device_s), ModelPace(*experiment.beside_s), ModelPace(*experiment.large_s))


def run(experiment: ParetoExperiment, pair: LabPair, source: str, prompts: Sequence[list[int]]) -> ParetoRuns:
    """Run every preset with every seed on the prompts, of which there are `prompts_needed`."""
    points: list[PresetPoint] = []
    alone: list[AlonePoint] = []
    certified: dict[tuple[str, int], float] = {}
    names = names_of(experiment.presets or tuple(presets()), presets(), "presets")
    names_of(experiment.links, links.names(), "links")
    tally = CallTally()
    fleet = pair.fleet(paces=paces_of(experiment), tally=tally)
    with progress("presets and seeds", len(names) * experiment.seeds) as ended:
        for preset in names:
            for seed in range(experiment.seed, experiment.seed + experiment.seeds):
                found = run_virtual(partial(one_seed, experiment, pair.large, fleet, tally, preset, seed, prompts)())
                points += found.points
                alone.append(found.alone)
                if found.limit is not None:
                    certified[preset, seed] = found.limit
                ended()
    return ParetoRuns(experiment, source, points, alone, certified)


def prompts_needed(experiment: ParetoExperiment) -> int:
    """The prompts of one seed: to learn from, for each link, and one for each agent without a link."""
    return experiment.warm + len(experiment.links or links.names()) * experiment.texts + experiment.agents


def names_of(wanted: Sequence[str], known: Iterable[str], key: str) -> list[str]:
    """The names in an experiment.

    Raises:
        ConfigError: a name is not known.
    """
    for name in wanted:
        if name not in known:
            raise ConfigError(key, name, f"one of {', '.join(known)}")
    return list(wanted)


def learns(config: Generation) -> bool:
    """Whether a preset learns from texts."""
    return choices.THRESHOLDS[config.threshold].learns


async def one_seed(
    experiment: ParetoExperiment,
    large: LawModel,
    pair: Pair,
    tally: CallTally,
    preset: str,
    seed: int,
    prompts: Sequence[list[int]],
    settings: Mapping[str, str] | None = None,
) -> SeedRun:
    """One preset with one seed, and with other `settings` by key: on every link in turn, then without one."""
    config = load(preset=preset, environ={}, flags={**PATIENT, **(settings or {})}).config
    fleet = Fleet(pair, seed=seed, clusters=1, delay_s=0.0, sessions_max=64, federation=config.federation)
    for node in fleet.nodes.values():
        node.start()
    for edge in ("edge-0-up", "edge-0-down", "cloud"):
        links.load("lan").apply(fleet.link(edge))
    await asyncio.sleep(1.0)
    desk = _Desk(experiment, fleet, config, seed)
    turned = _turned(prompts, seed * experiment.texts)
    async with desk:
        if learns(config.generation):
            await desk.write(turned[: experiment.warm])
        names = experiment.links or links.names()
        rest, count = turned[experiment.warm :], experiment.texts
        shares = {name: rest[place * count :][:count] for place, name in enumerate(names)}
        points = [await _on(desk, large, tally, preset, name, shares[name]) for name in _turned(names, seed)]
        limit = desk.limit
        alone = await desk.alone(preset, turned[-experiment.agents :])
    for node in fleet.nodes.values():
        await node.crash()
    return SeedRun(points, alone, limit)


async def _on(
    desk: "_Desk", large: LawModel, tally: CallTally, preset: str, link: str, prompts: Sequence[list[int]]
) -> PresetPoint:
    for name in desk.agents:
        links.load(link).apply(desk.fleet.link(name))
    before, calls, positions = desk.counted(), tally.calls, tally.tokens
    texts = await desk.write(prompts)
    calls, positions = tally.calls - calls, tally.tokens - positions
    await asyncio.sleep(REST_S)
    spent = {name: value - before[name] for name, value in desk.counted().items()}
    agreed = [agreement(large, text) for text in texts]
    return PresetPoint(
        preset=preset,
        link=link,
        seed=desk.seed,
        texts=len(texts),
        tokens=sum(len(text.ids) for text in texts),
        agreed=sum(agreed),
        same=sum(count == len(text.ids) for count, text in zip(agreed, texts, strict=True)),
        settled=Counter(source for text in texts for source in text.sources),
        seconds=sum(text.seconds for text in texts),
        first_s=sum(text.first_s for text in texts),
        sent=spent["uplink_messages"],
        up_bytes=spent["sent_bytes"],
        down_bytes=spent["received_bytes"],
        calls=calls,
        positions=positions,
    )


def agreement(large: LawModel, text: TimedText) -> int:
    """How many tokens of a greedy text the LLM would have emitted after the same text before them."""
    rows = large.after(LawPrompt((*text.prompt, *text.ids[:-1]), len(text.ids))).logits  # (ids, V)
    return int((rows.argmax(axis=1) == text.ids).sum())


def _turned(items: Sequence[Item], by: int) -> list[Item]:
    by %= len(items)
    return [*items[by:], *items[:by]]


class _Desk:
    """The agents of a fleet, as the clients on their devices see them. Enter it; prompts are dealt out in turn."""

    def __init__(self, experiment: ParetoExperiment, fleet: Fleet, config: Config, seed: int) -> None:
        self.fleet = fleet
        self.seed = seed
        self.agents: dict[str, AgentCore] = {}
        self._pair = fleet.pair
        self._experiment = experiment
        self._config = config
        self._counters = {f"agent-{number}": Counters() for number in range(experiment.agents)}
        self._certificates: dict[str, Certificate] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for name, counters in self._counters.items():
            online = self.fleet.online(CLUSTER, name, self._pair.drafter(), counters)
            self.agents[name] = await self._stack.enter_async_context(online)
        await asyncio.sleep(1.0)
        return self

    async def __aexit__(self, *given: object) -> None:
        await self._stack.aclose()

    @property
    def limit(self) -> float | None:
        """The limit of the agents' certificates together; None if nothing was audited."""
        known = list(self._certificates.values())
        return sum(known, Certificate()).limit(self._config.generation.confidence) if known else None

    def counted(self) -> dict[str, float]:
        """What the agents' links and the way to the cloud carried so far."""
        names = ("uplink_messages", "sent_bytes", "received_bytes")
        return {name: sum(counters[name] for counters in self._counters.values()) for name in names}

    async def write(self, prompts: Sequence[list[int]]) -> list[TimedText]:
        """Write a text for each prompt; the agents write side by side, each one text after the other."""
        count = len(self.agents)
        done = await asyncio.gather(
            *(self._share(name, prompts[place::count]) for place, name in enumerate(self.agents))
        )
        return [text for texts in done for text in texts]

    async def _share(self, name: str, prompts: Sequence[list[int]]) -> list[TimedText]:
        return [await self._text(name, prompt) for prompt in prompts]

    async def _text(self, name: str, prompt: list[int]) -> TimedText:
        text = await timed_text(self.agents[name], self._job(self._config), prompt)
        if text.certificate is not None:
            self._certificates[name] = text.certificate
        return text

    def _job(self, config: Config) -> Job:
        sampling = Sampling(self.seed, 0.0, 1.0, config.generation.coupling)
        return Job(config.generation, sampling, self._experiment.tokens, self._pair.context, self._pair.eos_ids)

    async def alone(self, preset: str, prompts: Sequence[list[int]]) -> AlonePoint:
        """Cut every agent's link, and ask each for a text."""
        config, clock_s = load(preset=preset, environ={}).config, asyncio.get_running_loop().time
        for name in self.agents:
            self.fleet.link(name).partitioned = True

        async def ask(agent: AgentCore, prompt: list[int]) -> list[float]:
            began_s, times = clock_s(), list[float]()

            async def saw(tokens: list[Committed]) -> FinishReason | None:
                times.extend([clock_s() - began_s] * len(tokens))
                return None

            with suppress(TimeoutError):
                async with asyncio.timeout(ALONE_S):
                    await agent.generate(self._job(config), prompt, saw)
            return times

        asked = zip(self.agents.values(), prompts, strict=True)
        found = await asyncio.gather(*(ask(agent, prompt) for agent, prompt in asked))
        first_s = sum(times[0] if times else ALONE_S for times in found) / len(found)
        return AlonePoint(preset, self.seed, sum(map(len, found)), len(found) * self._experiment.tokens, first_s)
