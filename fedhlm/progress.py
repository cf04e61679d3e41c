"""How far long work is, on one line of a terminal, which is cleared at the end. Elsewhere nothing is written."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

_REDRAW_EVERY_S: Final = 0.1
_CLEAR: Final = "\r\x1b[K"


@contextmanager
def progress(
    what: str, total: int | None = None, *, stream: TextIO | None = None, clock_s: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[], None]]:
    """Show that something takes time; call what is yielded after each of `total` items.

    `what` names the items, or with None as `total` the work. `stream` is standard error unless it is given.
    """
    stream = stream or sys.stderr
    if stream is None or not stream.isatty():  # it is None in a process without standard error
        yield lambda: None
        return
    began_s, drawn_s, count = clock_s(), clock_s(), 0

    def draw() -> None:
        elapsed_s = clock_s() - began_s
        line = what if total is None else f"{count:,} of {total:,} {what}, {_span(elapsed_s)}"
        if total is not None and 0 < count < total:
            line += f", {_span(elapsed_s * (total - count) / count)} left"
        stream.write(f"{_CLEAR}{line}")
        stream.flush()

    def ended() -> None:
        nonlocal count, drawn_s
        count += 1
        if clock_s() - drawn_s >= _REDRAW_EVERY_S:
            drawn_s = clock_s()
            draw()

    draw()
    try:
        yield ended
    finally:
        stream.write(_CLEAR)
        stream.flush()


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
