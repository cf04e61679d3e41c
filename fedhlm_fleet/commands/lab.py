"""`fedhlm lab`: studies, which print their figures and can write them to a file."""

import os
from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, Parameter
from cyclopts.validators import Number

from fedhlm.errors import ConfigError
from fedhlm_fleet.commands.common import Positive, Seed, Share, needing, print_facts

CORES: Final = os.cpu_count() or 1

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

    if json is not None and not os.access(json.resolve().parent, os.W_OK):
        raise ConfigError("--json", str(json), "a file in a writable folder")
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
