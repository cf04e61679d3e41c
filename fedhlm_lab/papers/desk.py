"""The agents of a simulated fleet as the clients on their devices see them: what they write, and what that takes."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, NamedTuple, Self, TypeVar

from msgspec.structs import replace

from edge_agent.core import AgentCore
from edge_agent.result import Job
from fedhlm import choices
from fedhlm.errors import ConfigError
from fedhlm.learning.certificate import Certificate
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Config, Generation
from fedhlm.telemetry import Counters
from fedhlm_lab.papers.experiment import PacedExperiment
from fedhlm_lab.papers.laws import LawModel, LawPrompt
from fedhlm_lab.papers.texts import TimedText, timed_text
from fedhlm_lab.sim import links
from fedhlm_lab.sim.pace import CallTally, ModelPace, Paces
from fedhlm_lab.sim.world import CLOUD, EDGE, Fleet, Pair

Item = TypeVar("Item")

REST_S: Final = 30.0  # after the texts of a link, for audits and contributions under way


class WrittenTexts(NamedTuple):
    """Sums over the texts of all agents. Times are in seconds.

    `agreed` counts tokens that the LLM would have emitted after the same text, and `same` texts of only such tokens.
    `up_bytes` and `down_bytes` are those of the agents' links, `sent` messages towards the cloud. `calls` are those of
    the LLM, and `positions` the tokens that it computed.
    """

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


def paces_of(experiment: PacedExperiment) -> Paces:
    """The paces of the file."""
    return Paces(ModelPace(*experiment.device_s), ModelPace(*experiment.beside_s), ModelPace(*experiment.large_s))


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


def turned(items: Sequence[Item], by: int) -> list[Item]:
    """The same items, from place `by` on."""
    by %= len(items)
    return [*items[by:], *items[:by]]


class LlmJudge:
    """Says how much of a greedy text is the LLM's. It remembers its answers, because systems write the same texts."""

    def __init__(self, large: LawModel) -> None:
        self._large = large
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}

    def agreed(self, text: TimedText) -> int:
        """How many tokens the LLM would have emitted after the same text before them."""
        name = (tuple(text.prompt), tuple(text.ids))
        if name not in self._known:
            rows = self._large.after(LawPrompt((*text.prompt, *text.ids[:-1]), len(text.ids))).logits  # (ids, V)
            self._known[name] = int((rows.argmax(axis=1) == text.ids).sum())
        return self._known[name]


@asynccontextmanager
async def running(pair: Pair, config: Config, *, seed: int, clusters: int = 1) -> AsyncIterator[Fleet]:
    """A fleet whose edges and cloud run inside the block, on a LAN, with the configuration's federation and memory."""
    services = Config(cloud=CLOUD, edge=replace(EDGE, memory=config.edge.memory))
    fleet = Fleet(
        pair, seed=seed, clusters=clusters, delay_s=0.0, sessions_max=64, federation=config.federation,
        services=services,
    )  # fmt: skip
    for node in fleet.nodes.values():
        node.start()
    for name in ("cloud", *(f"edge-c{c}-{side}" for c in range(clusters) for side in ("up", "down"))):
        links.load("lan").apply(fleet.link(name))
    await asyncio.sleep(1.0)
    try:
        yield fleet
    finally:
        for node in fleet.nodes.values():
            await node.crash()


class Desk:
    """The agents of a fleet, dealt out to its clusters. Enter it; prompts are dealt out in turn.

    Texts are greedy, and have at most `tokens` tokens.
    """

    def __init__(self, fleet: Fleet, config: Config, *, agents: int, tokens: int, clusters: int = 1) -> None:
        self.fleet = fleet
        self.tokens = tokens
        self.agents: dict[str, AgentCore] = {}
        self._config = config
        self._clusters = {f"agent-{number}": f"c{number % clusters}" for number in range(agents)}
        self._counters = {name: Counters() for name in self._clusters}
        self._certificates: dict[str, Certificate] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for name, cluster in self._clusters.items():
            online = self.fleet.online(cluster, name, self.fleet.pair.drafter(), self._counters[name])
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

    def job(self, config: Config) -> Job:
        """A text under a configuration."""
        pair, sampling = self.fleet.pair, Sampling(self.fleet.seed, 0.0, 1.0, config.generation.coupling)
        return Job(config.generation, sampling, self.tokens, pair.context, pair.eos_ids)

    async def write(self, prompts: Sequence[list[int]]) -> list[TimedText]:
        """Write a text for each prompt; the agents write side by side, each one text after the other."""
        count = len(self.agents)
        done = await asyncio.gather(
            *(self._share(name, prompts[place::count]) for place, name in enumerate(self.agents))
        )
        return [text for texts in done for text in texts]

    async def write_on(
        self, link: str, prompts: Sequence[list[int]], judge: LlmJudge, tally: CallTally
    ) -> WrittenTexts:
        """Write texts while every agent has this link, and count what they took; `tally` counts the LLM's calls."""
        for name in self.agents:
            links.load(link).apply(self.fleet.link(name))
        before, calls, positions = self._counted(), tally.calls, tally.tokens
        texts = await self.write(prompts)
        calls, positions = tally.calls - calls, tally.tokens - positions
        await asyncio.sleep(REST_S)
        spent = {name: value - before[name] for name, value in self._counted().items()}
        agreed = [judge.agreed(text) for text in texts]
        return WrittenTexts(
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

    def _counted(self) -> dict[str, float]:
        """What the agents' links and the way to the cloud carried so far."""
        names = ("uplink_messages", "sent_bytes", "received_bytes")
        return {name: sum(counters[name] for counters in self._counters.values()) for name in names}

    async def _share(self, name: str, prompts: Sequence[list[int]]) -> list[TimedText]:
        return [await self._text(name, prompt) for prompt in prompts]

    async def _text(self, name: str, prompt: list[int]) -> TimedText:
        text = await timed_text(self.agents[name], self.job(self._config), prompt)
        if text.certificate is not None:
            self._certificates[name] = text.certificate
        return text
