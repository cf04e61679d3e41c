"""`fedhlm lab`: studies, which print their figures and can write them to a file, and the experiments of papers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, Parameter

from fedhlm.errors import ConfigError
from fedhlm.progress import progress
from fedhlm_fleet import figures as figures_file
from fedhlm_fleet.commands.common import Jobs, Positive, Seed, Share, Tokens, needing, present, print_facts
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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PaperFlags:
    """The flags of every experiment of a paper."""

    quick: Annotated[bool, Parameter(negative="")] = False
    """Run a smaller sample, which the report says."""

    parameters: Path | None = None
    """TOML file whose keys replace those of the experiment's file (docs/lab.md); the report names them."""

    out: Path = Path("lab-results")
    """Folder for the results; each experiment has a folder in it."""

    cache: Path | None = None
    """Folder for the laws of the models; by default fedhlm/laws in the user's cache folder."""

    slm: str = ""
    """Folder or GGUF file of the SLM; by default the shipped one."""

    llm: str = ""
    """Folder or GGUF file of the LLM; by default the shipped one."""


PAPER: Final = PaperFlags()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """The flags of every experiment that writes texts."""

    prompts: Path | None = None
    """File with one prompt a line, or one JSON object with the key prompt; by default news items."""

    workload: str = "continue"
    """What the texts are: continue a title, headline of an article, topic of an article, or chat with the template of
    the LLM, which the prompts of a file get too."""


PROMPTS: Final = PromptFlags()

app = App(name="lab", help="Run a study, or repeat the figures of a paper.")


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
    seeds: Positive = 1,
    given: StudyFlags = STUDY,
    temperature: Annotated[float, Parameter(validator=Between(gte=0, lte=10))] = 0.0,
) -> int:
    """Measure what lying members of a federation do to the errors and messages of the honest ones.

    Each fleet has a cluster with liars and an honest one, on toy models under the preset `budget`; and under the
    threshold rule `paper-fl`, which promises no budget; there a liar claims the largest count for the threshold 1 or 0.
    Exit code 1: somewhere the honest had an error above the budget, or sent over a tenth more messages.

    Parameters
    ----------
    members
        Sizes of the cluster with liars. Each runs with one liar, and with as many as stay below half.
    lies
        Names of lies; by default all.
    most_below
        Largest cluster that runs with more than one liar.
    seeds
        Fleets of each kind, with seeds that count up; errors and messages are means over them.
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
        seeds=seeds,
    )
    with progress("clusters", 2 * len(plan.settings())) as ended:
        found = study(plan, jobs=given.jobs, ended=lambda _cell: ended())
    figures_file.write(given.json, found)
    print(table(found))
    return int(found.missed > 0)


@app.command
def fedhlm(*, given: PaperFlags = PAPER) -> int:
    """Repeat the tables and figures of FedHLM (arXiv 2507.00082) beside the paper's values.

    20 clients in 4 clusters name the topics of 18,000 news articles in 30 rounds of learning, under the published rules
    and under the calibrated ones. The articles are those of AG News, whose folder FEDHLM_DATA names; without it, 200
    items that ship with the project.
    """
    return _papers(["fedhlm"], given)


@app.command(name="u-hlm")
def u_hlm(*, given: PaperFlags = PAPER) -> int:
    """Repeat the figures of U-HLM (arXiv 2412.12687) and CU-HLM (arXiv 2505.11788) beside the papers' values.

    Doubt against rejection with the fitted line, transmission rate and accuracy by threshold, throughput on links, and
    bytes by vocabulary. FEDHLM_DATA names the folder of AG News; without it, the items that ship with the project.
    """
    return _papers(["u-hlm"], given)


@app.command
def pareto(*, given: PaperFlags = PAPER, asked: PromptFlags = PROMPTS) -> int:
    """Run all presets on all links in the simulator, with the measured compute times of the shipped pair.

    Agreement with the LLM against messages, bytes each way, tokens a second, and calls and positions of the LLM, over
    at least five seeds with intervals; texts without a link; and what is skipped under a certificate. The preset
    `colocated` has both models at the cloud, and is what the others must beat.
    """
    return _papers(["pareto"], given, asked)


@app.command
def capacity(*, given: PaperFlags = PAPER, asked: PromptFlags = PROMPTS) -> int:
    """Measure how many agents one verifier serves at equal tokens a second and agent, in the simulator.

    The LLM's calls are measured once at several batch sizes and contexts, and kept in a file. Split presets are compared
    with serving from the cloud alone (`llm-only`) and with both models at the cloud (`colocated`).
    """
    return _papers(["capacity"], given, asked)


@app.command
def ablations(*, given: PaperFlags = PAPER) -> int:
    """Measure what each part of the system is worth: the same fleets with it and without it, in the simulator.

    Cache, peers, federation, calibration, the async pipeline and trees are switched off one at a time by their own
    settings. The report has the differences, paired by seed, with intervals, on two links, for continued titles and
    topic questions.
    """
    return _papers(["ablations"], given)


@app.command(name="all")
def everything(*, given: PaperFlags = PAPER) -> int:
    """Run the experiments of papers, all presets on all links, and the system without each of its parts."""
    return _papers(None, given)


def _papers(names: list[str] | None, given: PaperFlags, asked: PromptFlags | None = None) -> int:
    with needing("lab"):
        present("matplotlib")
        from fedhlm_lab.papers.catalogue import EXPERIMENTS
        from fedhlm_lab.papers.experiment import LabSample
        from fedhlm_lab.papers.laws import default_cache
        from fedhlm_lab.papers.pair import folder_pair
        from fedhlm_lab.papers.report import write
        from fedhlm_lab.papers.workloads import PromptChoice
    if names is None and given.parameters is not None:
        raise ConfigError("--parameters", given.parameters, "given to one experiment: each has keys of its own")
    sample = LabSample.of(given.quick, given.parameters)
    chosen = {} if asked is None else {"chosen": PromptChoice(asked.prompts, asked.workload)}
    pair = folder_pair(given.slm, given.llm)
    for name in names or EXPERIMENTS:
        result = EXPERIMENTS[name](pair, given.cache or default_cache(), sample=sample, **chosen)
        write(result, given.out / name)
        print("\n".join([f"{result.title}: {given.out / name / 'report.md'}", *(f"  {s}" for s in result.sentences)]))
    return 0
