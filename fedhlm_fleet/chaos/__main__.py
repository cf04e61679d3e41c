"""`python -m fedhlm_fleet.chaos`: break a fleet on this machine for some minutes and say what became of it; 1 when a rule was broken."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from fedhlm.errors import FedhlmError, root_of
from fedhlm.telemetry import configure_logging
from fedhlm_fleet.chaos.report import ChaosReport
from fedhlm_fleet.chaos.run import Chaos, Options
from fedhlm_fleet.chaos.schedule import Persistence
from fedhlm_fleet.commands.common import Positive, Seed

USAGE_ERROR: Final = 2
INTERRUPTED: Final = 130

app = App(name="chaos", help="Break a running fleet on purpose and judge it from the outside.", help_format="plaintext")


@app.default
def chaos(
    *,
    minutes: Annotated[float, Parameter(validator=Number(gt=0))] = 10.0,
    faults: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    seed: Seed = 0,
    preset: str = "exact",
    clusters: Positive = 2,
    agents: Positive = 1,
    tokens: Positive = 48,
    persistence: Persistence = "both",
    short: bool = False,
    json: Path | None = None,
    logs: Path | None = None,
) -> int:
    """Kill, cut, stall, throttle and delay the parts of a fleet while it writes; every invariant must hold.

    Parameters
    ----------
    minutes
        After which no new fault is injected.
    faults
        Number of faults after which the run ends earlier; 0 sets none.
    seed
        Of the schedule, the prompts and the generations.
    preset
        Shipped preset or path of a preset file.
    clusters
        Clusters, each with an edge.
    agents
        Agents in each cluster.
    tokens
        Tokens per request.
    persistence
        Whether a killed broker comes back with what it had: on, off, or as the seed wills.
    short
        Only the plain faults.
    json
        File for the results.
    logs
        Folder for the logs of every life of every part; by default they are looked at and dropped.
    """
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    configure_logging("ERROR", "chaos")  # the links that break here are our own doing
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
    )
    run = Chaos(options, say=lambda line: print(line, flush=True), logs=logs)
    report = asyncio.run(_interruptible(run))
    print("\n".join(["", *report.lines()]))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
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
        print(f"chaos: {exc}", file=sys.stderr)
        return USAGE_ERROR
    except BaseExceptionGroup as group:
        raise root_of(group) from group
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
