"""Progress and final figures of `fedhlm record` and `fedhlm replay`.

Progress is a live line or bar on a terminal, and an occasional line elsewhere.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedhlm_traces.record import Summary
from fedhlm_traces.replay import Played

_LINE_EVERY_S: Final = 10.0
_REDRAW_EVERY_S: Final = 0.1


class _Pace:
    """Limits an action to once in `every_s` seconds."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._last_s = every_s, time.monotonic()

    def due(self) -> bool:
        now_s = time.monotonic()
        if now_s - self._last_s < self._every_s:
            return False
        self._last_s = now_s
        return True


@contextlib.contextmanager
def watching_record() -> Iterator[Callable[[Summary], None]]:
    """Show the progress of a recording: a live line on a terminal, an occasional line elsewhere."""
    console = Console()

    def line(summary: Summary) -> str:
        lost = f", {summary.dropped:,} dropped" if summary.dropped else ""
        again = f", {summary.reconnects} reconnects" if summary.reconnects else ""
        return (
            f"recording {summary.duration_s:6.1f} s  {summary.messages:,} messages  {summary.rate:,.0f}/s  "
            f"{told_bytes(summary.payload_bytes)} in {told_bytes(summary.file_bytes)}{lost}{again}"
        )

    if not console.is_terminal:
        pace = _Pace(_LINE_EVERY_S)

        def say(summary: Summary) -> None:
            if pace.due():
                print(line(summary), flush=True)

        yield say
        return
    with Live(Text("connecting"), console=console, auto_refresh=False, transient=True) as live:
        yield lambda summary: live.update(Text(line(summary)), refresh=True)


@contextlib.contextmanager
def watching_replay(count: int, *, loop: bool) -> Iterator[Callable[[Played], None]]:
    """Show the progress of a replay, of which one turn has `count` messages: a bar on a terminal, lines elsewhere."""
    console = Console()
    pace = _Pace(_REDRAW_EVERY_S if console.is_terminal else _LINE_EVERY_S)

    def words(played: Played) -> str:
        turn = f"turn {played.turn}, " if loop else ""
        return f"{turn}at {played.position_s:,.1f} s"

    if not console.is_terminal:

        def say(played: Played) -> None:
            if pace.due():
                print(f"replaying {words(played)}, {played.messages:,} messages", flush=True)

        yield say
        return
    columns = (TextColumn("replaying {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=4, transient=True) as bar:
        task = bar.add_task("", total=count)

        def move(played: Played) -> None:
            if pace.due():
                done = played.messages - (played.turn - 1) * count
                bar.update(task, completed=done, description=words(played))

        yield move


def told_record(summary: Summary, out: Path) -> dict[str, object]:
    parts = f" in {summary.files} files" if summary.files > 1 else ""
    lost = f"{summary.dropped:,} dropped: the queue was full, or they were too large" if summary.dropped else "none"
    facts: dict[str, object] = {
        "file": f"{out}, {told_bytes(summary.file_bytes)}{parts}",
        "messages": f"{summary.messages:,} with {told_bytes(summary.payload_bytes)} of payload",
        "rate": f"{summary.rate:,.1f} messages/s for {summary.duration_s:.1f} s",
        "lost": lost,
    }
    if summary.reconnects:
        facts["reconnects"] = f"{summary.reconnects}; messages sent while the link was down are not recorded"
    return facts


def told_replay(played: Played, count: int, end_s: float, lost_bytes: int, *, paced: bool) -> dict[str, object]:
    facts: dict[str, object] = {
        "messages": f"{played.messages:,} of {count:,}"
        if played.turn <= 1
        else f"{played.messages:,} in {played.turn} turns",
        "duration": f"{played.duration_s:.2f} s, to second {played.position_s:.2f} of {end_s:.2f}",
        "rate": f"{played.messages / played.duration_s if played.duration_s else 0.0:,.0f} messages/s",
    }
    if paced:
        jitter = played.jitter()
        facts["jitter"] = f"p50 {jitter.p50_ms:.2f} ms, p99 {jitter.p99_ms:.2f} ms"
    if played.retained:
        facts["retained"] = f"{played.retained:,}, which stay on the broker"
    if played.dropped:
        facts["dropped"] = f"{played.dropped:,}: expired while they waited, QoS 0 without a link, or stopped"
    if lost_bytes:
        facts["recording"] = f"its last {lost_bytes:,} bytes are no whole frame: it was not ended cleanly"
    return facts


def told_bytes(count: int) -> str:
    """Format a number of bytes for people: 1.2 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1_000.0:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1_000.0
    return f"{size:.2f} GB"
