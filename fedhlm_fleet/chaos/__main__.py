"""`python -m fedhlm_fleet.chaos`: inject faults into a fleet on this machine, and check every answer.

Exit code 0: every invariant held; 1: one was violated; 2: wrong usage; 130: interrupted.
"""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, CycloptsError, Parameter

from fedhlm.errors import FedhlmError, root_of
from fedhlm.telemetry import configure_logging
from fedhlm_fleet import figures
from fedhlm_fleet.chaos.report import ChaosReport
from fedhlm_fleet.chaos.run import Chaos, Options
from fedhlm_fleet.chaos.schedule import Kind, Persistence
from fedhlm_fleet.commands.common import Positive, Seed
from fedhlm_fleet.commands.mistakes import Between, sentence

USAGE_ERROR: Final = 2
INTERRUPTED: Final = 130

app = App(name="chaos", help="Inject faults into a running fleet, and check every answer.", help_format="plaintext")


@app.default
def chaos(
    *,
    minutes: Annotated[float, Parameter(validator=Between(gt=0))] = 10.0,
    faults: Annotated[int, Parameter(validator=Between(gte=0))] = 0,
    seed: Seed = 0,
    preset: str = "exact",
    clusters: Positive = 2,
    agents: Positive = 1,
    tokens: Positive = 48,
    persistence: Persistence = "both",
    short: bool = False,
    only: Annotated[tuple[Kind, ...], Parameter(consume_multiple=True, negative="", show_default=False)] = (),
    json: Path | None = None,
    logs: Path | None = None,
) -> int:
    """Kill, cut, stall, throttle and delay the parts of a fleet while it writes, and check that every invariant holds.

    Parameters
    ----------
    minutes
        Minutes after which no new fault is injected.
    faults
        Number of faults after which the run ends earlier; 0 for no limit.
    seed
        Seed of the schedule, the prompts and the generations.
    preset
        Name of a shipped preset, or path of a preset file.
    clusters
        Number of clusters, each with one edge.
    agents
        Number of agents in each cluster.
    tokens
        Tokens per request.
    persistence
        Whether a killed broker keeps its state: on, off, or both, where the seed decides each time.
    short
        Inject only the simple faults.
    only
        Inject only faults of these kinds.
    json
        JSON file to write the results to.
    logs
        Folder for the logs of every process; by default they are checked and deleted.
    """
    figures.try_out(json)
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    configure_logging("ERROR", "chaos")  # links break on purpose here, so warnings about them are noise
    options = Options(
        seconds=minutes * 60.0,
        faults=faults,
        seed=seed,
        preset=preset,
        clusters=clusters,
        agents=agents,
        tokens=tokens,
        persistence=persistence,
        short=short,
        only=only,
    )
    run = Chaos(options, say=lambda line: print(line, flush=True), logs=logs)
    report = asyncio.run(_interruptible(run))
    print("\n".join(["", *report.lines()]))
    figures.write(json, report)
    return 0 if report.passed else 1


async def _interruptible(run: Chaos) -> ChaosReport:
    task = asyncio.ensure_future(run.run())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        code = app(sys.argv[1:], result_action="return_value", exit_on_error=False, print_error=False)
    except (FedhlmError, CycloptsError) as exc:
        print(f"chaos: {sentence(exc, 'chaos') if isinstance(exc, CycloptsError) else exc}", file=sys.stderr)
        return USAGE_ERROR
    except BaseExceptionGroup as group:
        raise root_of(group) from group
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
