"""All presets on all links, in the simulator with measured compute times: what each one saves, and what that costs.

For each preset and seed there is one fleet. Presets that learn read `warm` texts first, and then the agents' links take
each profile in turn. Texts differ from link to link, because peers remember what was verified; all presets have the
same. The order of the links turns with the seed.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

from edge_agent.core import AgentCore
from edge_agent.events import Committed
from fedhlm.config import load, presets
from fedhlm.progress import progress
from fedhlm.protocol.fields import FinishReason
from fedhlm_lab.papers.desk import Desk, LlmJudge, WrittenTexts, learns, names_of, paces_of, running, turned
from fedhlm_lab.papers.experiment import ParetoExperiment
from fedhlm_lab.papers.pair import LabPair
from fedhlm_lab.papers.texts import PATIENT
from fedhlm_lab.sim import links
from fedhlm_lab.sim.pace import CallTally
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Pair

ALONE_S: Final = 60.0  # seconds without a link in which a text may be written


class PresetPoint(NamedTuple):
    """What one preset wrote on one link with one seed."""

    preset: str
    link: str
    seed: int
    written: WrittenTexts


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


def run(experiment: ParetoExperiment, pair: LabPair, source: str, prompts: Sequence[list[int]]) -> ParetoRuns:
    """Run every preset with every seed on the prompts, of which there are `prompts_needed`."""
    points: list[PresetPoint] = []
    alone: list[AlonePoint] = []
    certified: dict[tuple[str, int], float] = {}
    names = names_of(experiment.presets or tuple(presets()), presets(), "presets")
    names_of(experiment.links, links.names(), "links")
    tally, judge = CallTally(), LlmJudge(pair.large)
    fleet = pair.fleet(paces=paces_of(experiment), tally=tally)
    with progress("presets and seeds", len(names) * experiment.seeds) as ended:
        for preset in names:
            for seed in range(experiment.seed, experiment.seed + experiment.seeds):
                found = run_virtual(partial(one_seed, experiment, judge, fleet, tally, preset, seed, prompts)())
                points += found.points
                alone.append(found.alone)
                if found.limit is not None:
                    certified[preset, seed] = found.limit
                ended()
    return ParetoRuns(experiment, source, points, alone, certified)


def prompts_needed(experiment: ParetoExperiment) -> int:
    """The prompts of one seed: to learn from, for each link, and one for each agent without a link."""
    return experiment.warm + len(experiment.links or links.names()) * experiment.texts + experiment.agents


async def one_seed(
    experiment: ParetoExperiment,
    judge: LlmJudge,
    pair: Pair,
    tally: CallTally,
    preset: str,
    seed: int,
    prompts: Sequence[list[int]],
    settings: Mapping[str, str] | None = None,
) -> SeedRun:
    """One preset with one seed, and with other `settings` by key: on every link in turn, then without one."""
    config = load(preset=preset, environ={}, flags={**PATIENT, **(settings or {})}).config
    order = turned(prompts, seed * experiment.texts)
    async with (
        running(pair, config, seed=seed) as fleet,
        Desk(fleet, config, agents=experiment.agents, tokens=experiment.tokens) as desk,
    ):
        if learns(config.generation):
            await desk.write(order[: experiment.warm])
        names = experiment.links or links.names()
        rest, count = order[experiment.warm :], experiment.texts
        shares = {name: rest[place * count :][:count] for place, name in enumerate(names)}
        points = [
            PresetPoint(preset, name, seed, await desk.write_on(name, shares[name], judge, tally))
            for name in turned(names, seed)
        ]
        limit = desk.limit
        alone = await _alone(desk, preset, order[-experiment.agents :])
    return SeedRun(points, alone, limit)


async def _alone(desk: Desk, preset: str, prompts: Sequence[list[int]]) -> AlonePoint:
    """Cut every agent's link, and ask each for a text."""
    config, clock_s = load(preset=preset, environ={}).config, asyncio.get_running_loop().time
    for name in desk.agents:
        desk.fleet.link(name).partitioned = True

    async def ask(agent: AgentCore, prompt: list[int]) -> list[float]:
        began_s, times = clock_s(), list[float]()

        async def saw(tokens: list[Committed]) -> FinishReason | None:
            times.extend([clock_s() - began_s] * len(tokens))
            return None

        with suppress(TimeoutError):
            async with asyncio.timeout(ALONE_S):
                await agent.generate(desk.job(config), prompt, saw)
        return times

    asked = zip(desk.agents.values(), prompts, strict=True)
    found = await asyncio.gather(*(ask(agent, prompt) for agent, prompt in asked))
    first_s = sum(times[0] if times else ALONE_S for times in found) / len(found)
    return AlonePoint(preset, desk.fleet.seed, sum(map(len, found)), len(found) * desk.tokens, first_s)
