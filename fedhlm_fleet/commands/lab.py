"""`fedhlm lab`: studies, which print their figures and can write them to a file."""

import os
from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, Parameter
from cyclopts.validators import Number

from fedhlm.errors import ConfigError
from fedhlm_fleet.commands.common import Positive, Seed, Share, needing, print_facts

CORES: Final = os.cpu_count() or 1
Sizes = Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="", validator=Number(gte=2, lte=1_024))]
Lies = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)]

app = App(name="lab", help="Run a study and print its figures.")


@app.command
def coverage(
    *,
    lives: Positive = 200,
    texts: Positive = 60,
    tokens: Positive = 24,
    seed: Seed = 0,
    budget: Share = 0.05,
    audit: Share = 0.25,
    temperature: Annotated[float, Parameter(validator=Number(gte=0, lte=10))] = 0.8,
    jobs: Positive = CORES,
    json: Path | None = None,
) -> int:
    """Measure how often the certificate of a device is wrong, and how soon its limit falls below the budget.

    Each life is one device with toy models that learns under the preset `budget`. Exit code 1: the true harm was above
    the limit in more lives than the confidence allows.

    Parameters
    ----------
    lives
        Number of lives; their seeds count up from `seed`.
    texts
        Texts per life.
    tokens
        Tokens per text.
    seed
        Seed of the first life.
    budget
        Allowed error per token.
    audit
        Probability of an audit for each token that nothing else scored.
    temperature
        Temperature of the texts.
    jobs
        Number of parallel processes.
    json
        JSON file to write the figures to.
    """
    import msgspec

    check_writable(json)
    with needing("lab"):
        from fedhlm_fleet.commands.watching import watching_study
        from fedhlm_lab.studies.coverage import CoveragePlan, study
    plan = CoveragePlan(texts=texts, tokens=tokens, budget=budget, audit=audit, temperature=temperature)
    with watching_study("lives", lives) as ended:
        found = study(plan, lives=lives, seed=seed, jobs=min(jobs, lives), ended=lambda _life: ended())
    facts = msgspec.to_builtins(found)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
    print_facts({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in facts.items()})
    return int(found.share_ever_above > 0.05)


@app.command
def liars(
    *,
    members: Sizes = (2, 3, 4, 8, 16, 32),
    lies: Lies = (),
    most_below: Positive = 16,
    texts: Positive = 60,
    tokens: Positive = 24,
    seed: Seed = 0,
    budget: Share = 0.05,
    temperature: Annotated[float, Parameter(validator=Number(gte=0, lte=10))] = 0.0,
    jobs: Positive = CORES,
    json: Path | None = None,
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
    texts
        Texts per agent.
    tokens
        Tokens per text.
    seed
        Seed of the fleets.
    budget
        Allowed error per token.
    temperature
        Temperature of the texts.
    jobs
        Number of parallel processes.
    json
        JSON file to write all cells to.
    """
    import msgspec

    check_writable(json)
    with needing("lab"):
        from fedhlm_fleet.commands.watching import watching_study
        from fedhlm_lab.sim.liars import LIES
        from fedhlm_lab.studies.liars import LiarsPlan, study, table
    for lie in lies:
        if lie not in LIES:
            raise ConfigError("--lies", lie, f"one of {', '.join(LIES)}")
    plan = LiarsPlan(
        members=tuple(members),
        lies=tuple(lies) or tuple(LIES),
        most_below=most_below,
        texts=texts,
        tokens=tokens,
        temperature=temperature,
        budget=budget,
        seed=seed,
    )
    with watching_study("clusters", 2 * len(plan.settings())) as ended:
        found = study(plan, jobs=jobs, ended=lambda _cell: ended())
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    print(table(found))
    return int(found.missed > 0)


def check_writable(json: Path | None) -> None:
    """Check that a file can be written, before a study runs for long.

    Raises:
        ConfigError: its folder cannot be written.
    """
    if json is not None and not os.access(json.resolve().parent, os.W_OK):
        raise ConfigError("--json", str(json), "a file in a writable folder")
