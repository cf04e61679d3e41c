"""`fedhlm simulate`: whole fleets under faults in virtual time, with the invariants checked at every step."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from fedhlm.errors import ConfigError, FedhlmError
from fedhlm.telemetry import silenced
from fedhlm_fleet import figures as figures_file
from fedhlm_fleet.commands.common import Fleet, Jobs, Positive, Seconds, Tokens
from fedhlm_fleet.commands.mistakes import Between

if TYPE_CHECKING:
    from rich.console import Console

    from fedhlm_lab.sim.invariants import Violation
    from fedhlm_lab.sim.scenario import Scenario
    from fedhlm_lab.sim.sweep import Failure, SeedDone, SweepPlan, Totals

ALL: Final = "all"
LINES_EVERY_S: Final = 60.0
SEEDS: Final = 2**63
SHRUNK_MAX: Final = 3  # failing seeds that are shrunk; the others are only named


def simulate(
    *,
    agents: Fleet = 4,
    clusters: Fleet = 2,
    preset: str = "exact",
    link: str = "lte",
    upstream: str = "lan",
    faults: str = "all",
    seeds: str = "0..99",
    prompts: Positive = 2,
    tokens: Tokens = 16,
    temperature: Annotated[float, Parameter(validator=Between(gte=0, lte=10))] = 0.8,
    deadline: Seconds = 600.0,
    set: Annotated[tuple[str, ...], Parameter(negative="")] = (),  # noqa: A002 - the flag's name
    shrink: Annotated[bool, Parameter(negative="")] = False,
    out: Path = Path("simulated"),
    again: Path | None = None,
    jobs: Jobs = 1,
    json: Path | None = None,
) -> int:
    """Simulate whole fleets of toy models in virtual time, and check every message and token.

    The seed decides everything: prompts, faults, and the fate of every message. Exit code 1: an invariant was violated;
    the failing run is saved as a trace.

    Parameters
    ----------
    agents
        Number of agents, assigned to the clusters in turn.
    clusters
        Number of clusters, each with one edge.
    preset
        Presets, separated by commas, or "all"; the seeds use them in turn.
    link
        Profiles of the agents' links, separated by commas: lan, lora-like, lte, nb-iot, satellite, wifi, a .toml file,
        or "all"; the seeds use them in turn.
    upstream
        Profile of each edge's link to the cloud.
    faults
        Kinds of faults, separated by commas, each optionally with =AMOUNT: drop, duplicate, reorder, spikes, partition,
        crash, crash-disk, skew, slow, full; or "all" or "none".
    seeds
        One seed, or A..B, both included.
    prompts
        Prompts per agent.
    tokens
        Tokens per prompt.
    temperature
        Temperature of all texts.
    deadline
        Seconds of virtual time after which tokens are committed unverified.
    set
        Setting KEY=VALUE that overrides the preset; may be given several times.
    shrink
        Search for the smallest schedule that fails in the same way.
    out
        Folder for the traces of failing seeds.
    again
        Run only the scenario that is saved in this trace.
    jobs
        Number of parallel processes.
    json
        JSON file to write the figures to.
    """
    from rich.console import Console

    from fedhlm.config import presets as shipped
    from fedhlm_lab.sim.links import names
    from fedhlm_lab.sim.sweep import SweepPlan

    console = Console(stderr=True)
    if again is not None:
        return _again(again, console)
    if malformed := [word for word in set if "=" not in word]:
        raise ConfigError("--set", malformed[0], "KEY=VALUE")
    plan = SweepPlan(
        presets=tuple(shipped()) if preset == ALL else tuple(preset.split(",")),
        links=names() if link == ALL else tuple(link.split(",")),
        upstream=upstream,
        faults=faults,
        agents=agents,
        clusters=min(clusters, agents),
        prompts=prompts,
        tokens=tokens,
        temperature=temperature,
        deadline_s=deadline,
        settings=set,
    )
    return _sweep(plan, _seeds(seeds), jobs=jobs, console=console, out=out, shrinks=shrink, json_file=json)


def _seeds(text: str) -> range:
    first, dots, last = text.partition("..")
    try:
        found = range(int(first), int(last if dots else first) + 1)
    except ValueError:
        found = range(0)
    if not found or found[0] < 0 or found[-1] >= SEEDS:
        raise ConfigError("--seeds", text, f"a seed from 0 below {SEEDS}, or A..B with A at most B")
    return found


def _sweep(
    plan: "SweepPlan", seeds: range, *, jobs: int, console: "Console", out: Path, shrinks: bool, json_file: Path | None
) -> int:
    from fedhlm_lab.sim.sweep import Totals, sweep

    figures_file.try_out(json_file)
    _require_folder(out)
    totals, began_s = Totals(), time.monotonic()
    with silenced(), _shown(sweep(plan, seeds, jobs=jobs), len(seeds), console) as ended:
        for one in ended:
            totals.add(one)
            if one.failure is not None:
                _tell(plan, one.failure, console, out, shrinks=shrinks and len(totals.failures) <= SHRUNK_MAX)
    figures = totals.figures(time.monotonic() - began_s)
    _print_summary(totals, figures)
    figures_file.write(json_file, figures)
    return 1 if totals.failures else 0


@contextmanager
def _shown(ended: "Iterator[SeedDone]", count: int, console: "Console") -> "Iterator[Iterator[SeedDone]]":
    """Show a bar on a terminal, an occasional line elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(
        "seeds", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("seeds", total=count)

        def counted() -> "Iterator[SeedDone]":
            told_s = time.monotonic()
            for number, one in enumerate(ended, 1):
                yield one
                bar.advance(task)
                if not console.is_terminal and time.monotonic() - told_s >= LINES_EVERY_S:
                    told_s = time.monotonic()
                    _say(console, f"{number:,} of {count:,} seeds")

        yield counted()


def _tell(plan: "SweepPlan", failure: "Failure", console: "Console", out: Path, *, shrinks: bool) -> None:
    """Print how a seed failed, shrink its schedule on request, and save it."""
    from fedhlm_lab.sim.shrink import shrink

    scenario, violation = plan.scenario(failure.seed), failure.violation
    _say(console, f"seed {failure.seed}: {violation}", f"  {plan.command(failure.seed)}")
    if shrinks:
        small = shrink(scenario, violation)
        scenario, violation = small.scenario, small.violation
        before = len(plan.scenario(failure.seed).schedule)
        _say(
            console,
            f"  {before} events shrunk to {len(scenario.schedule)} in {small.runs} runs:",
            *_story(scenario, violation),
        )
    path = _save(out, failure.seed, scenario)
    _say(console, f"  fedhlm simulate --again {path}")


def _require_folder(out: Path) -> None:
    """Check that failing seeds can be saved, before the work; the folder itself is made only for them."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError("--out", str(out), "a writable folder", why=f"{there} is none")


def _save(out: Path, seed: int, scenario: "Scenario") -> Path:
    from fedhlm_lab.sim.recording import save

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError("--out", str(out), "a writable folder", why=exc.strerror or str(exc)) from exc
    names = (out / f"seed-{seed}{suffix}.trace" for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
    path = next((name for name in names if not name.exists()), None)
    if path is None:
        raise FedhlmError(f"--out must be a folder with fewer traces of seed {seed} (got {str(out)!r})")
    save(path, scenario)
    return path


def _again(path: Path, console: "Console") -> int:
    from fedhlm_lab.sim.recording import scenario_of
    from fedhlm_lab.sim.shrink import attempt

    scenario = scenario_of(path)
    with silenced():
        violation = attempt(scenario)
    _say(console, *_story(scenario, violation))
    return 0 if violation is None else 1


def _story(scenario: "Scenario", violation: "Violation | None") -> Sequence[str]:
    size = f"{scenario.agents} agents in {scenario.clusters} clusters, {scenario.prompts} prompts of {scenario.tokens} tokens"
    return (
        f"  seed {scenario.seed}, preset {scenario.preset}: {size}",
        *(f"  {event}" for event in scenario.schedule),
        f"  {violation}" if violation is not None else "  every invariant holds",
    )


def _say(console: "Console", *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_summary(totals: "Totals", figures: dict[str, object]) -> None:
    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())) or "none"

    print(f"seeds      {totals.seeds:,}, failed {len(totals.failures)}, {figures['seeds_per_s']} a second")
    print(f"time       {totals.virtual_s / 3_600.0:,.1f} virtual hours, {totals.messages:,} messages")
    print(f"faults     {sum(totals.faults.values()):,}: {listed(totals.faults)}")
    print(f"tokens     {sum(totals.tokens.values()):,}: {listed(totals.tokens)}")
    print(f"counts     {listed(totals.counters)}")
    for name, count in sorted(_names(totals).items()):
        print(f"VIOLATED   {name}: {count} seeds")


def _names(totals: "Totals") -> dict[str, int]:
    names = [failure.name for failure in totals.failures]
    return {name: names.count(name) for name in names}
