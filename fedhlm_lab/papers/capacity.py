"""How many agents one verifier serves at equal tokens a second and agent: presets beside one another in the simulator.

Every agent of a fleet writes texts without a pause. The LLM's calls take the measured time of their batch, and the
devices draft at the measured pace, so speed falls when the verifier is busy.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from itertools import count
from typing import Final, NamedTuple

from msgspec.structs import replace

from edge_agent.core import AgentCore
from fedhlm import settings
from fedhlm.config import presets
from fedhlm.progress import progress
from fedhlm.settings import Config
from fedhlm_lab.papers.desk import learns, names_of
from fedhlm_lab.papers.experiment import CapacityExperiment
from fedhlm_lab.papers.pair import LabPair
from fedhlm_lab.papers.texts import TextOrder, TimedText, ordered
from fedhlm_lab.sim import links
from fedhlm_lab.sim.pace import CallTally, ModelPace, Paces
from fedhlm_lab.sim.verifier_costs import PairCosts
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet, Pair

SETTLE_S: Final = 2.0  # seconds in which all agents come online


class CapacityPoint(NamedTuple):
    """A preset with so many agents: the tokens of all texts, the sum of their seconds, and the slowest agent's speed.

    `calls` and `positions` are those of the LLM, `busy_s` the time that they took, and `wall_s` that of the whole.
    """

    verifier: str
    preset: str
    agents: int
    seed: int
    tokens: int
    seconds: float
    slowest: float
    calls: int
    positions: int
    busy_s: float
    wall_s: float

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


def run(
    experiment: CapacityExperiment, pair: LabPair, costs: PairCosts, source: str, prompts: Sequence[list[int]]
) -> CapacityRuns:
    """Run every preset on every verifier with every number of agents and every seed."""
    names = names_of(experiment.presets, presets(), "presets")
    names_of([experiment.link], links.names(), "link")
    seeds = range(experiment.seed, experiment.seed + experiment.seeds)
    points = []
    plan = [(v, p, n, s) for v in experiment.verifiers for p in names for n in experiment.agents for s in seeds]
    made: dict[str, tuple[Pair, CallTally]] = {}
    with progress("fleets", len(plan)) as ended:
        for verifier, preset, agents, seed in plan:
            if verifier not in made:
                tally, cheaper = CallTally(), experiment.verifiers[verifier].cheaper
                paces, batches = Paces(costs.small, costs.small, ModelPace(0.0)), costs.pace(cheaper)
                made[verifier] = pair.fleet(paces=paces, tally=tally, batches=batches), tally
            points.append(run_virtual(_one(experiment, *made[verifier], verifier, preset, agents, seed, prompts)))
            ended()
    return CapacityRuns(experiment, source, costs, points)


async def _one(
    experiment: CapacityExperiment,
    pair: Pair,
    tally: CallTally,
    verifier: str,
    preset: str,
    agents: int,
    seed: int,
    prompts: Sequence[list[int]],
) -> CapacityPoint:
    """One fleet."""
    flags = {"generation.peers": "none"}  # texts repeat, and peers would remember them
    order = TextOrder(preset=preset, settings=flags, prompts=(), tokens=experiment.tokens, seed=seed, same_seed=True)
    cloud = settings.Cloud(batch_tokens=experiment.verifiers[verifier].batch_tokens)
    services = Config(cloud=cloud, federation=order.config.federation)
    fleet = Fleet(
        pair, seed=seed, clusters=1, delay_s=0.0, sessions_max=cloud.sessions_max, services=services,
        federation=services.federation,
    )  # fmt: skip
    for node in fleet.nodes.values():
        node.start()
    names = [f"agent-{number}" for number in range(agents)]
    for name in names:
        links.load(experiment.link).apply(fleet.link(name))
    await asyncio.sleep(SETTLE_S)
    clock_s = asyncio.get_running_loop().time
    async with AsyncExitStack() as stack:
        fleet_agents = [await stack.enter_async_context(fleet.online("c0", name, pair.drafter())) for name in names]
        await asyncio.sleep(SETTLE_S)
        shares = _dealt(prompts, seed, agents)

        async def write(agent: AgentCore, share: Sequence[list[int]]) -> list[TimedText]:
            return await ordered(agent, replace(order, prompts=share), context_max=pair.context, eos_ids=pair.eos_ids)

        if learns(order.config.generation):
            each = -(-experiment.warm // agents)
            await asyncio.gather(*(write(a, next(shares)[:each]) for a in fleet_agents))
        before, began_s = tally.counted, clock_s()
        done = await asyncio.gather(*(write(a, next(shares)[: experiment.texts]) for a in fleet_agents))
        after, ended_s = tally.counted, clock_s()
    for node in fleet.nodes.values():
        await node.crash()
    calls, positions, busy_s = (end - start for end, start in zip(after, before, strict=True))
    speeds = [sum(len(t.ids) for t in texts) / sum(t.seconds for t in texts) for texts in done]
    return CapacityPoint(
        verifier, preset, agents, seed, sum(len(t.ids) for texts in done for t in texts),
        sum(t.seconds for texts in done for t in texts), min(speeds), int(calls), int(positions), busy_s,
        ended_s - began_s,
    )  # fmt: skip


def _dealt(prompts: Sequence[list[int]], seed: int, agents: int) -> Iterator[list[list[int]]]:
    """For each agent in turn all prompts, from another place on."""
    step = max(1, len(prompts) // agents)
    for number in count():
        at = (seed + number * step) % len(prompts)
        yield [*prompts[at:], *prompts[:at]]
