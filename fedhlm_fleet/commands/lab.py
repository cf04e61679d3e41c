"""`fedhlm lab`: studies, which print their figures and can write them to a file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, Parameter

from fedhlm.errors import ConfigError
from fedhlm.progress import progress
from fedhlm_fleet import figures as figures_file
from fedhlm_fleet.commands.common import Jobs, Positive, Seed, Share, Tokens, needing, print_facts
from fedhlm_fleet.commands.mistakes import Between

CORES: Final = os.cpu_count() or 1
Sizes = Annotated[
    tuple[int, ...], Parameter(consume_multiple=(1, 64), negative="", validator=Between(gte=2, lte=1_024))
]
Lies = Annotated[tuple[str, ...], Parameter(consume_multiple=(1, 64), negative="", show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class StudyFlags:
    """The flags of every study."""

    texts: Positive = 60
    """Texts per device."""

    tokens: Tokens = 24
    """Tokens per text."""

    seed: Seed = 0
    """First seed; further ones count up from it."""

    budget: Share = 0.05
    """Allowed error per token."""

    jobs: Jobs = CORES
    """Number of parallel processes."""

    json: Path | None = None
    """JSON file to write the figures to."""


STUDY: Final = StudyFlags()

app = App(name="lab", help="Run a study and print its figures.")


@app.command
def coverage(
    *,
    lives: Positive = 200,
    given: StudyFlags = STUDY,
    audit: Share = 0.25,
    temperature: Annotated[float, Parameter(validator=Between(gte=0, lte=10))] = 0.8,
    saved: Path | None = None,
) -> int:
    """Measure how often the certificate of a device is wrong, and how soon its limit falls below the budget.

    Each life is one device with toy models that learns under the preset `budget`. Exit code 1: the true harm was above
    the limit in more lives than the confidence allows.

    Parameters
    ----------
    lives
        Number of lives; their seeds count up from --seed.
    audit
        Probability of an audit for each token that nothing else scored.
    temperature
        Temperature of the texts.
    saved
        File that receives each life as it ends, and whose lives are not run again. Give the same file to go on with a
        study that was ended.
    """
    import msgspec

    figures_file.try_out(given.json)
    figures_file.try_out(saved, "--saved")
    with needing("lab"):
        from fedhlm_lab.studies.coverage import CoveragePlan, SavedLives, study
    plan = CoveragePlan(
        texts=given.texts, tokens=given.tokens, budget=given.budget, audit=audit, temperature=temperature
    )
    with progress("lives", lives) as ended:
        found = study(
            plan,
            lives=lives,
            seed=given.seed,
            jobs=min(given.jobs, lives),
            saved=None if saved is None else SavedLives(saved, plan),
            ended=lambda _life: ended(),
        )
    facts = msgspec.to_builtins(found)
    figures_file.write(given.json, facts)
    print_facts({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in facts.items()})
    return int(found.share_ever_above > 0.05)


@app.command
def liars(
    *,
    members: Sizes = (2, 3, 4, 8, 16, 32),
    lies: Lies = (),
    most_below: Positive = 16,
    given: StudyFlags = STUDY,
    temperature: Annotated[float, Parameter(validator=Between(gte=0, lte=10))] = 0.0,
) -> int:
    """Measure what lying members of a federation do to the errors and messages of the honest ones.

    Each fleet has a cluster with liars and an honest one, on toy models under the preset `budget`; and under the
    threshold rule `paper-fl`, which promises no budget; there a liar claims the largest count. Exit code 1: somewhere
    the honest had an error above the budget, or sent over a tenth more messages.

    Parameters
    ----------
    members
        Sizes of the cluster with liars. Each runs with one liar, and with as many as stay below half.
    lies
        Names of lies; by default all.
    most_below
        Largest cluster that runs with more than one liar.
    temperature
        Temperature of the texts.
    """
    figures_file.try_out(given.json)
    with needing("lab"):
        from fedhlm_lab.sim.liars import LIES
        from fedhlm_lab.studies.liars import LiarsPlan, study, table
    for lie in lies:
        if lie not in LIES:
            raise ConfigError("--lies", lie, f"one of {', '.join(LIES)}")
    plan = LiarsPlan(
        members=tuple(members),
        lies=tuple(lies) or tuple(LIES),
        most_below=most_below,
        texts=given.texts,
        tokens=given.tokens,
        temperature=temperature,
        budget=given.budget,
        seed=given.seed,
    )
    with progress("clusters", 2 * len(plan.settings())) as ended:
        found = study(plan, jobs=given.jobs, ended=lambda _cell: ended())
    figures_file.write(given.json, found)
    print(table(found))
    return int(found.missed > 0)
