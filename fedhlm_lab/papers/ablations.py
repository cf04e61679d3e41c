"""The system with each of its parts and without it, in the simulator with measured compute times.

A part is switched off by its own configuration keys. Both systems run with the same seeds, the same texts and the same
order of links, so that they can be compared seed by seed. Presets that learn read `warm` texts first: the same ones with
every seed, dealt out to other agents. The texts after them are different ones with every seed, as far as there are enough.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from fedhlm.config import load, presets
from fedhlm.errors import ConfigError
from fedhlm.progress import progress
from fedhlm.settings import Config
from fedhlm_lab.papers.desk import Desk, LlmJudge, WrittenTexts, learns, names_of, paces_of, running, turned
from fedhlm_lab.papers.experiment import AblatedPart, AblationsExperiment, AblationWorkload
from fedhlm_lab.papers.pair import LabPair
from fedhlm_lab.papers.texts import PATIENT
from fedhlm_lab.papers.workloads import LabPrompts
from fedhlm_lab.sim import links
from fedhlm_lab.sim.pace import CallTally
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Pair


class System(NamedTuple):
    """A preset with some settings over it."""

    preset: str
    settings: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        changed = " and ".join(f"`{key}` {value}" for key, value in self.settings)
        return f"`{self.preset}` with {changed}" if changed else f"`{self.preset}`"

    @property
    def config(self) -> Config:
        """Its settings.

        Raises:
            ConfigError: a key or a value is wrong.
        """
        return load(preset=self.preset, environ={}, flags={**PATIENT, **dict(self.settings)}).config


class AblationPoint(NamedTuple):
    """What one system wrote on one link with one seed."""

    system: System
    workload: str
    link: str
    seed: int
    written: WrittenTexts


class AblationRuns(NamedTuple):
    """All points, and the limits of the certificates over all texts of a fleet, by system, workload and seed."""

    experiment: AblationsExperiment
    sources: Mapping[str, str]
    points: Sequence[AblationPoint]
    certified: Mapping[tuple[System, str, int], float]


def systems_of(part: AblatedPart) -> tuple[System, System]:
    """The system with the part, and the one without it."""
    return (
        System(part.preset, tuple(part.settings.items())),
        System(part.preset, tuple({**part.settings, **part.without}.items())),
    )


def check(part: AblatedPart) -> None:
    """Check a part.

    Raises:
        ConfigError: the preset or a setting is not known, or nothing is switched off.
    """
    names_of([part.preset], presets(), "parts.preset")
    with_it, without = systems_of(part)
    if with_it.config == without.config:
        raise ConfigError(f"{part.name}.without", str(part.without), "settings that switch the part off")


def workloads_of(part: AblatedPart, experiment: AblationsExperiment) -> list[str]:
    """The workloads on which a part is compared.

    Raises:
        ConfigError: one is not known.
    """
    return names_of(part.workloads or tuple(experiment.workloads), experiment.workloads, f"{part.name}.workloads")


def prompts_needed(experiment: AblationsExperiment, workload: AblationWorkload, seeds: int = 1) -> int:
    """The prompts of so many seeds: to learn from, and for each link."""
    return workload.warm + seeds * len(experiment.links) * workload.texts


def dealt(
    experiment: AblationsExperiment, workload: AblationWorkload, seed: int, prompts: Sequence[list[int]]
) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """The prompts of a seed: to learn from, and for each link."""
    count, place = workload.texts, (seed - experiment.seed) * len(experiment.links)
    rest = turned(prompts[workload.warm :], place * count)
    shares = {link: rest[number * count :][:count] for number, link in enumerate(experiment.links)}
    return turned(prompts[: workload.warm], seed), shares


def run(experiment: AblationsExperiment, pair: LabPair, prompts: Mapping[str, LabPrompts]) -> AblationRuns:
    """Run every system with every seed, on the prompts of each workload."""
    names_of(experiment.links, links.names(), "links")
    for part in experiment.parts:
        check(part)
    plan = dict.fromkeys(
        (system, workload)
        for part in experiment.parts
        for workload in workloads_of(part, experiment)
        for system in systems_of(part)
    )
    seeds = range(experiment.seed, experiment.seed + experiment.seeds)
    points: list[AblationPoint] = []
    certified: dict[tuple[System, str, int], float] = {}
    tally, judge = CallTally(), LlmJudge(pair.large)
    fleet = pair.fleet(paces=paces_of(experiment), tally=tally)
    with progress("systems and seeds", len(plan) * len(seeds)) as ended:
        for system, workload in plan:
            for seed in seeds:
                one = partial(_one, experiment, judge, fleet, tally, system, workload, seed)
                found, limit = run_virtual(one(prompts[workload].ids))
                points += found
                if limit is not None:
                    certified[system, workload, seed] = limit
                ended()
    return AblationRuns(experiment, {name: known.source for name, known in prompts.items()}, points, certified)


async def _one(
    experiment: AblationsExperiment,
    judge: LlmJudge,
    pair: Pair,
    tally: CallTally,
    system: System,
    workload: str,
    seed: int,
    prompts: Sequence[list[int]],
) -> tuple[list[AblationPoint], float | None]:
    """One fleet: its points on every link in turn, and the limit of its certificates."""
    wanted, config = experiment.workloads[workload], system.config
    to_learn, shares = dealt(experiment, wanted, seed, prompts)
    async with (
        running(pair, config, seed=seed, clusters=experiment.clusters) as fleet,
        Desk(
            fleet, config, agents=experiment.agents, tokens=wanted.tokens, clusters=experiment.clusters
        ) as desk,
    ):  # fmt: skip
        if learns(System(system.preset).config.generation):
            await desk.write(to_learn)
        points = [
            AblationPoint(system, workload, link, seed, await desk.write_on(link, shares[link], judge, tally))
            for link in turned(experiment.links, seed)
        ]
        return points, desk.limit
