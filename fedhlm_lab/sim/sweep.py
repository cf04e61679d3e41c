"""Run many seeds over presets and links in turn, in one process or several, and sum the results."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import msgspec

from fedhlm import choices
from fedhlm_lab.sim import links
from fedhlm_lab.sim.invariants import Violation
from fedhlm_lab.sim.scenario import Scenario, command
from fedhlm_lab.sim.simulator import RunTotals, simulate
from fedhlm_lab.workers import across

BLOCK: Final = "generation.pipeline.block"


class SweepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to run for each seed: presets and links alternate with the seed, all else is equal."""

    presets: tuple[str, ...]
    links: tuple[str, ...]
    upstream: str = "lan"
    faults: str = "all"
    agents: int = 4
    clusters: int = 2
    prompts: int = 2
    tokens: int = 16
    temperature: float = 0.8
    deadline_s: float = 600.0
    settings: tuple[str, ...] = ()

    def link_of(self, seed: int) -> str:
        """The link of a seed; it changes after each round of presets."""
        return self.links[seed // len(self.presets) % len(self.links)]

    def scenario(self, seed: int) -> Scenario:
        """The scenario of a seed.

        Raises:
            ConfigError: a preset, link, setting or fault that cannot be used.
        """
        scenario = Scenario(
            seed=seed,
            preset=self.presets[seed % len(self.presets)],
            agents=self.agents,
            clusters=self.clusters,
            prompts=self.prompts,
            tokens=self.tokens,
            temperature=self.temperature,
            link=links.load(self.link_of(seed)),
            upstream=links.load(self.upstream, key="--upstream"),
            deadline_s=self.deadline_s,
            settings=self.settings,
        )
        scenario = msgspec.structs.replace(scenario, settings=(*self.settings, *_variety(scenario)))
        return scenario.with_faults(self.faults)

    def command(self, seed: int) -> str:
        """The shell command that repeats one seed."""
        return command(self.scenario(seed), link=self.link_of(seed), upstream=self.upstream, spec=self.faults)


def _variety(scenario: Scenario) -> Iterator[str]:
    """Settings drawn from the seed where none were given; small blocks overtake one another more often."""
    pipeline = scenario.loaded.config.generation.pipeline
    drawn = random.Random(f"{scenario.seed}/block").choice((1, 2, pipeline.block))
    if (
        choices.PIPELINES[pipeline.kind].runs_ahead
        and drawn < pipeline.block
        and not any(BLOCK in s for s in scenario.settings)
    ):
        yield f"{BLOCK}={drawn}"


class Failure(NamedTuple):
    """A seed that violated an invariant."""

    seed: int
    name: str
    text: str
    at_s: float

    @property
    def violation(self) -> Violation:
        """Rebuild the exception."""
        return Violation(self.name, self.text, self.at_s)


class SeedDone(NamedTuple):
    """The result of one seed: its totals or its failure."""

    seed: int
    outcome: RunTotals | None
    failure: Failure | None


class Totals:
    """Sums over seeds."""

    def __init__(self) -> None:
        self.seeds = 0
        self.messages = 0
        self.virtual_s = 0.0
        self.tokens: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        self.failures: list[Failure] = []

    def add(self, ended: SeedDone) -> None:
        """Add a seed."""
        self.seeds += 1
        if ended.failure is not None:
            self.failures.append(ended.failure)
        if ended.outcome is not None:
            self.messages += ended.outcome.messages
            self.virtual_s += ended.outcome.virtual_s
            self.tokens.update(ended.outcome.tokens)
            self.faults.update(ended.outcome.faults)
            self.counters.update(ended.outcome.counters)

    def figures(self, took_s: float) -> dict[str, object]:
        """All figures as plain data; `took_s` is real time."""
        return {
            "seeds": self.seeds,
            "failed": len(self.failures),
            "virtual_hours": round(self.virtual_s / 3_600.0, 3),
            "messages": self.messages,
            "tokens": dict(sorted(self.tokens.items())),
            "faults": dict(sorted(self.faults.items())),
            **dict(sorted(self.counters.items())),
            "seeds_per_s": round(self.seeds / took_s, 2) if took_s else 0.0,
            "violations": [failure._asdict() for failure in self.failures],
        }


def sweep(plan: SweepPlan, seeds: Sequence[int], *, jobs: int = 1) -> Iterator[SeedDone]:
    """Run the seeds in `jobs` processes; yield results as they end.

    Raises:
        ConfigError: the plan cannot be used; before anything runs.
    """
    for seed in range(len(plan.presets) * len(plan.links)):  # one of each
        _ = plan.scenario(seed).loaded
    yield from across(partial(_run, plan), seeds, jobs)


def _run(plan: SweepPlan, seed: int) -> SeedDone:
    try:
        return SeedDone(seed, simulate(plan.scenario(seed)), None)
    except Violation as violation:
        return SeedDone(seed, None, Failure(seed, violation.name, violation.text, violation.at_s))
