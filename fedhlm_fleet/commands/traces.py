"""`fedhlm record` and `fedhlm replay`: flags, signals, progress, and the figures at the end."""

import asyncio
import contextlib
import math
import re
import signal
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

from cyclopts import Parameter

from fedhlm.errors import TraceError
from fedhlm.telemetry import silenced
from fedhlm_fleet.commands.common import Keys, Seconds, needing, parse_keys, print_facts
from fedhlm_fleet.commands.mistakes import Between

if TYPE_CHECKING:
    from fedhlm.config import Loaded
    from fedhlm_traces.file import Record

Many = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Moment = Annotated[float, Parameter(validator=Between(gte=0))]
_T = TypeVar("_T")

_UNITS: Final = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def record(
    *keys: Keys,
    out: Path,
    broker: str | None = None,
    topics: Many = (),
    duration: Seconds | None = None,
    root: str | None = None,
    rotate: str | None = None,
    config: Path | None = None,
) -> int:
    """Record every message on the bus with its time, QoS and properties, for a time or until a signal.

    The other broker keys are flags too: --broker.ca ca.pem --broker.username me (the password comes from
    FEDHLM_BROKER__PASSWORD or the file). Exit code 1: messages were dropped.

    Parameters
    ----------
    out
        File to write; it must not exist yet.
    broker
        URL of the broker; sets broker.url.
    topics
        Subscription filters; by default everything under the root.
    duration
        Seconds to record; by default until SIGINT or SIGTERM.
    root
        First levels of all topics; sets broker.root.
    rotate
        File size (100MB) at which a new file begins: NAME.0001.EXT and so on.
    config
        TOML file.
    """
    loaded = _loaded(keys, config, broker, root)
    rotate_bytes = None if rotate is None else parse_size(rotate)
    from fedhlm_fleet.commands.watching import told_record, watching_record
    from fedhlm_traces.record import record as run

    section = loaded.config.broker
    # The preset's settings concern generations, not the recording.
    chosen = {key: value for key, value, source in loaded.rows() if not source.startswith(("default", "preset"))}
    with watching_record() as show:
        summary = asyncio.run(
            _until_signal(
                lambda stop: run(
                    section,
                    out,
                    stop=stop,
                    filters=topics,
                    rotate_bytes=rotate_bytes,
                    facts={"config": chosen},
                    show=show,
                ),
                duration,
            )
        )
    print_facts(told_record(summary, out))
    return 1 if summary.dropped else 0


def replay(
    file: Path,
    *keys: Keys,
    broker: str | None = None,
    speed: str = "1",
    topics: Many = (),
    rebase_time: Flag = False,
    rename: Many = (),
    loop: Flag = False,
    from_: Annotated[Moment, Parameter(name="--from", show_default=False)] = 0.0,
    until: Seconds | None = None,
    check: Literal["agent", "edge", "cloud", "all"] | None = None,
    update: Path | None = None,
    config: Path | None = None,
) -> int:
    """Publish a recording again at its own pace; or, with --check, replay its inputs through today's code and compare.

    Retained messages are published as retained messages, and stay on the broker.

    Parameters
    ----------
    file
        Recording; the further files of a rotated one are found automatically.
    broker
        URL of the broker; sets broker.url.
    speed
        1 for the recorded pace, 10 for ten times as fast, max for as fast as the broker allows.
    topics
        Subscription filters; by default all topics.
    rebase_time
        Set the sending times of the messages to now; deadlines, which are time spans, count from there.
    rename
        New names in topics and messages: cluster=home:barn agent=porch:attic.
    loop
        Start again at the end, until a signal.
    from_
        Second of the recording at which to begin.
    until
        Second of the recording before which to end.
    check
        Replay the recorded inputs through this part's code, without a broker, and exit with 1 if a decision differs.
    update
        With --check, write the recording with today's decisions to this file.
    config
        TOML file.
    """
    if check is not None:
        played_only = {
            "--broker": broker, "--topics": topics, "--rename": rename, "--loop": loop, "--rebase-time": rebase_time,
            "--from": from_, "--until": until, "--speed": speed != "1",
        }  # fmt: skip
        for option in (option for option, given in played_only.items() if given):
            raise TraceError(
                f"{option} must be left out with --check, which plays nothing and reads the whole recording"
            )
        with needing("agent,edge,cloud"):
            from fedhlm_traces.check.run import check_file
            from fedhlm_traces.file import require_new
        if update is not None:
            require_new(update)
        model = _loaded(keys, config, None, None).config.cloud.model
        with silenced():  # what the parts warned of, they warned of when they were recorded
            return check_file(file, check, update=update, model=Path(model) if model else None)
    if update is not None:
        raise TraceError("--update must be given with --check")
    loaded = _loaded(keys, config, broker, None)
    section = loaded.config.broker
    if not section.url:
        raise TraceError(
            "--broker must be the URL of a broker, unless --check is given, which needs none (got nothing)"
        )
    pace = parse_speed(speed)
    from fedhlm_fleet.commands.watching import told_replay, watching_replay
    from fedhlm_traces.file import read
    from fedhlm_traces.replay import ReplaySelection
    from fedhlm_traces.replay import replay as run
    from fedhlm_traces.rewrite import parse_renames

    renames = parse_renames(rename)
    selection = ReplaySelection(filters=topics, from_s=from_, until_s=math.inf if until is None else until)
    trace = read(file)
    end_s, count = _extent(selection.of(trace))
    with watching_replay(count, loop=loop) as show:
        played = asyncio.run(
            _until_signal(
                lambda stop: run(
                    trace,
                    section,
                    stop=stop,
                    selection=selection,
                    speed=pace,
                    rebase_time=rebase_time,
                    renames=renames,
                    loop=loop,
                    show=show,
                )
            )
        )
    print_facts(told_replay(played, count, end_s, trace.lost_bytes, paced=math.isfinite(pace)))
    return 1 if played.dropped else 0


def parse_size(text: str) -> int:
    """Parse a size such as `100MB`, `1.5 GB` or `4096` into bytes; units are powers of 1000.

    Raises:
        TraceError: the text is not a size, or the size is below one byte.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    size = int(float(matched[1]) * _UNITS[matched[2]]) if matched else 0
    if size < 1:
        raise TraceError(f"--rotate must be a size such as 500kB, 100MB or 1GB (got {text!r})")
    return size


def parse_speed(text: str) -> float:
    """Parse a speed factor; `max` is infinite.

    Raises:
        TraceError: the text is neither `max` nor a finite number above 0.
    """
    if text == "max":
        return math.inf
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not (0.0 < speed < math.inf):
        raise TraceError(f"--speed must be 1, another number above 0, or max (got {text!r})")
    return speed


def _loaded(keys: tuple[str, ...], file: Path | None, broker: str | None, root: str | None) -> "Loaded":
    from fedhlm.config import load
    from fedhlm.telemetry import configure_logging

    flags = parse_keys(keys)
    flags |= {key: value for key, value in (("broker.url", broker), ("broker.root", root)) if value is not None}
    loaded = load(file=file, flags=flags)
    telemetry = loaded.config.telemetry
    level = telemetry.log_level if loaded.sources["telemetry.log_level"] != "default" else "WARNING"
    configure_logging(level, "traces", secrets=(loaded.config.broker.password,), form=telemetry.log_format)
    return loaded


async def _until_signal(work: Callable[[asyncio.Event], Awaitable[_T]], duration_s: float | None = None) -> _T:
    """Run `work` with an event that is set by SIGINT, by SIGTERM, or at the end of the duration."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # event loops of other platforms have no signal handlers
            loop.add_signal_handler(number, stop.set)
    if duration_s is not None:
        loop.call_later(duration_s, stop.set)
    return await work(stop)


def _extent(records: "Iterable[Record]") -> tuple[float, int]:
    """Return the time of the last record in seconds, and the number of records."""
    end_s, count = 0.0, 0
    for entry in records:
        end_s = max(end_s, entry.at_s)
        count += 1
    return end_s, count
