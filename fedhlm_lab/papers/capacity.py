"""How many agents one verifier serves at equal tokens a second and agent: presets beside one another in the simulator.

Every agent of a fleet writes texts without a pause. The LLM's calls take the measured time of their batch, and the
devices draft at the measured pace, so speed falls when the verifier is busy.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import count, cycle
from typing import Final, NamedTuple

from msgspec.structs import replace

from edge_agent.core import AgentCore
from fedhlm import settings
from fedhlm.config import presets
from fedhlm.process.saver import SAVE_S
from fedhlm.progress import progress
from fedhlm.settings import Config
from fedhlm.telemetry import Counters
from fedhlm_lab.papers.desk import learns, names_of
from fedhlm_lab.papers.experiment import CapacityExperiment, VerifierKind
from fedhlm_lab.papers.pair import LabPair
from fedhlm_lab.papers.texts import TextOrder, TimedText, ordered
from fedhlm_lab.sim import links
from fedhlm_lab.sim.pace import CallTally, ModelPace, Paces
from fedhlm_lab.sim.verifier_costs import PairCosts
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet, Pair

SETTLE_S: Final = 2.0  # seconds in which all agents come online
BEGIN_S: Final = 1.0  # seconds within which they begin their first text
LEARNERS: Final = 8  # agents of the fleet from which others have learnt
LONG: Final = 4  # one agent of so many in a mixed fleet has long prompts
MIXED: Final = "mixed"

Files = Mapping[str, Mapping[str, bytes]]
"""The files of parts, by part and name."""


class CapacityPoint(NamedTuple):
    """A fleet of so many agents: the tokens of all texts, the sum of their seconds, and each agent's speed.

    `calls` and `positions` are those of the LLM, `busy_s` the time that they took, and `wall_s` that of the whole.
    `waits` are the seconds of each block at the cloud, audits left out.
    """

    verifier: str
    preset: str
    agents: int
    seed: int
    tokens: int
    seconds: float
    speeds: Sequence[float]
    calls: int
    positions: int
    busy_s: float
    wall_s: float
    waits: Sequence[float]

    @property
    def speed(self) -> float:
        """Tokens a second and agent."""
        return self.tokens / self.seconds


class CapacityRuns(NamedTuple):
    """All points."""

    experiment: CapacityExperiment
    source: str
    costs: PairCosts
    points: Sequence[CapacityPoint]


class WaitCounters(Counters):
    """Counters that keep the seconds of every block at the cloud."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """See `Counters.observe`."""
        super().observe(name, value, times)
        if name == "verifier_latency_seconds":
            self.waits.append(value)


class Crowd(NamedTuple):
    """The agents of a fleet: the presets that they take in turn, and their prompts' least length, `long` for one in LONG."""

    presets: Sequence[str]
    agents: int
    long: int = 1


def run(
    experiment: CapacityExperiment, pair: LabPair, costs: PairCosts, source: str, prompts: Sequence[list[int]]
) -> CapacityRuns:
    """Run every preset on every verifier with every number of agents and every seed."""
    names_of(experiment.mixed, presets(), "mixed")
    fleets: dict[str, tuple[str, ...]] = {name: (name,) for name in names_of(experiment.presets, presets(), "presets")}
    fleets |= {MIXED: experiment.mixed} if experiment.mixed else {}
    names_of([experiment.link], links.names(), "link")
    names_of([experiment.baseline], experiment.presets, "baseline")
    seeds = range(experiment.seed, experiment.seed + experiment.seeds)
    plan = [(v, f, n, s) for v in experiment.verifiers for f in fleets for n in experiment.agents for s in seeds]
    made: dict[float, tuple[Pair, CallTally]] = {}
    learnt: dict[tuple[str, int], Files] = {}
    points = []
    with progress("fleets", len(plan)) as ended:
        for name, fleet, agents, seed in plan:
            kind = experiment.verifiers[name]
            if kind.cheaper not in made:
                tally = CallTally()
                paces, batches = Paces(costs.small, costs.small, ModelPace(0.0)), costs.pace(kind.cheaper)
                made[kind.cheaper] = pair.fleet(paces=paces, tally=tally, batches=batches), tally
            counted = partial(CountedFleet, experiment, *made[kind.cheaper], kind, seed=seed, prompts=prompts)
            teachers = [p for p in fleets[fleet] if learns(_order(experiment, p, seed).config.generation)]
            for teacher in teachers[:1]:
                if (teacher, seed) not in learnt:
                    learnt[teacher, seed] = run_virtual(counted(Crowd((teacher,), LEARNERS)).learn())
            files = learnt[teachers[0], seed] if teachers else {}
            crowd = Crowd(fleets[fleet], agents, experiment.long if fleet == MIXED else 1)
            points.append(run_virtual(counted(crowd, files=files).point(name, fleet)))
            ended()
    return CapacityRuns(experiment, source, costs, points)


def _order(experiment: CapacityExperiment, preset: str, seed: int) -> TextOrder:
    flags = {"generation.peers": "none"}  # texts repeat, and peers would remember them
    return TextOrder(preset=preset, settings=flags, prompts=(), tokens=experiment.tokens, seed=seed, same_seed=True)


class CountedFleet:
    """One fleet, which begins with what others have learnt (`files`)."""

    def __init__(
        self,
        experiment: CapacityExperiment,
        pair: Pair,
        tally: CallTally,
        kind: VerifierKind,
        crowd: Crowd,
        *,
        seed: int,
        prompts: Sequence[list[int]],
        files: Files | None = None,
    ) -> None:
        self._experiment, self._pair, self._tally, self._kind = experiment, pair, tally, kind
        self._seed, self._prompts, self._files = seed, prompts, files or {}
        self._names = [f"agent-{number}" for number in range(crowd.agents)]
        self._orders = [_order(experiment, p, seed) for p, _ in zip(cycle(crowd.presets), self._names, strict=False)]
        self._least = [1 if (number + 1) % LONG else crowd.long for number in range(crowd.agents)]
        self._shares = _dealt(prompts, seed, crowd.agents)
        self._counters = WaitCounters()

    @asynccontextmanager
    async def _online(self) -> AsyncIterator[tuple[Fleet, list[AgentCore]]]:
        kind, federation = self._kind, self._orders[0].config.federation
        cloud = settings.Cloud(batch_tokens=kind.batch_tokens, text_tokens_s=kind.text_tokens_s)
        services = Config(cloud=cloud, federation=federation)
        fleet = Fleet(
            self._pair, seed=self._seed, clusters=1, delay_s=0.0, sessions_max=cloud.sessions_max, services=services,
            federation=federation, keeps=True,
        )  # fmt: skip
        fleet.counters = self._counters
        for part, node in fleet.nodes.items():
            node.disk.files.update(self._files.get(part, {}))
            node.start()
        for name in self._names:
            links.load(self._experiment.link).apply(fleet.link(name))
        await asyncio.sleep(SETTLE_S)
        async with AsyncExitStack() as stack:
            drafter, enter = self._pair.drafter, stack.enter_async_context
            agents = [await enter(fleet.online("c0", name, drafter())) for name in self._names]
            await asyncio.sleep(SETTLE_S)
            yield fleet, agents
        for node in fleet.nodes.values():
            await node.crash()

    async def _write(self, agents: Sequence[AgentCore], texts: int) -> list[list[TimedText]]:
        """Each agent's texts."""
        pair = self._pair

        async def one(number: int, agent: AgentCore, share: list[list[int]]) -> list[TimedText]:
            await asyncio.sleep(BEGIN_S * random.Random(f"{self._seed}/{number}/begins").random())
            chosen = replace(self._orders[number], prompts=longer(share, self._least[number])[:texts])
            return await ordered(agent, chosen, context_max=pair.context, eos_ids=pair.eos_ids)

        return await asyncio.gather(*(one(n, agent, next(self._shares)) for n, agent in enumerate(agents)))

    async def learn(self) -> Files:
        """The files of edge and cloud after the texts from which a fleet learns."""
        async with self._online() as (fleet, agents):
            await self._write(agents, -(-self._experiment.warm // len(agents)))
            await asyncio.sleep(2.0 * SAVE_S)
            return {part: dict(node.disk.files) for part, node in fleet.nodes.items()}

    async def point(self, verifier: str, preset: str) -> CapacityPoint:
        """The texts that count."""
        clock_s = asyncio.get_running_loop().time
        async with self._online() as (_, agents):
            self._counters.waits.clear()
            before, began_s = self._tally.counted, clock_s()
            done = await self._write(agents, self._experiment.texts)
            after, ended_s = self._tally.counted, clock_s()
            waits = list(self._counters.waits)
        calls, positions, busy_s = (end - start for end, start in zip(after, before, strict=True))
        speeds = [sum(len(t.ids) for t in texts) / sum(t.seconds for t in texts) for texts in done]
        return CapacityPoint(
            verifier, preset, len(agents), self._seed, sum(len(t.ids) for texts in done for t in texts),
            sum(t.seconds for texts in done for t in texts), speeds, int(calls), int(positions), busy_s,
            ended_s - began_s, waits,
        )  # fmt: skip


def longer(prompts: Sequence[list[int]], least: int) -> list[list[int]]:
    """Each prompt, followed by those after it until it has `least` tokens."""
    made = []
    for number in range(len(prompts)):
        ids, following = list(prompts[number]), cycle([*prompts[number + 1 :], *prompts[: number + 1]])
        while len(ids) < least:
            ids += next(following)
        made.append(ids[: max(least, len(prompts[number]))])
    return made


def _dealt(prompts: Sequence[list[int]], seed: int, agents: int) -> Iterator[list[list[int]]]:
    """For each agent in turn all prompts, from another place on."""
    step = max(1, len(prompts) // agents)
    for number in count():
        at = (seed + number * step) % len(prompts)
        yield [*prompts[at:], *prompts[:at]]
