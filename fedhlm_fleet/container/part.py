"""`python -m fedhlm_fleet.container.part agent`: a part as the process of a container.

A part reports its status to a service manager (`fedhlm.process.notify`). Here a thread of the same process receives
these reports and saves them for the health check. If the event loop hangs, the process ends, so that the engine
restarts it.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from fedhlm_fleet.container.healthy import FOLDER, SPAN_S, note

# After a pause of the whole container, one span has passed before the part can report.
SILENT_SPANS: Final = 3
HUNG: Final = 70  # EX_SOFTWARE
_DATAGRAM_BYTES: Final = 4_096
_END: Final = b""  # our own end mark; a part's notices are never empty
_MICROSECONDS: Final = 1_000_000


def listen(channel: socket.socket, folder: Path, *, span_s: float, hung: Callable[[], None]) -> None:
    """Save every status from the channel until `_END`.

    Call `hung` when, after the first report, none arrives for SILENT_SPANS spans of `span_s` seconds.
    """
    channel.settimeout(span_s)
    status, silent, heard = "starting", 0, False
    while silent < SILENT_SPANS:
        try:
            datagram = channel.recv(_DATAGRAM_BYTES)
        except TimeoutError:
            # Loading a large model may take longer than any span.
            silent += heard
            continue
        if datagram == _END:
            return
        heard, silent = True, 0
        fields = dict(line.partition("=")[::2] for line in datagram.decode(errors="replace").splitlines())
        status = fields.get("STATUS", status)
        note(folder, status, time.monotonic())
    hung()


def watched(run: Callable[[], int], folder: Path) -> int:
    """Run a part that reports to a service manager, save its health in the folder, and return its exit code."""
    path = folder / "notify"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.bind(str(path))
        os.environ["NOTIFY_SOCKET"] = str(path)
        os.environ["WATCHDOG_USEC"] = str(int(SPAN_S * _MICROSECONDS))
        os.environ.pop("WATCHDOG_PID", None)
        listener = threading.Thread(
            target=listen, args=(channel, folder), kwargs={"span_s": SPAN_S, "hung": _end}, name="health", daemon=True
        )
        listener.start()
        try:
            return run()
        finally:
            # Datagrams stay in order: once this one is read, the part's last status is saved.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ours:
                ours.sendto(_END, str(path))
            listener.join()


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Run one command line of `fedhlm`, save its health in the folder, and return the exit code."""
    from fedhlm_fleet import cli

    return watched(lambda: cli.main(arguments), folder)


def _end() -> None:
    print(f"fedhlm: the event loop has not run for {SILENT_SPANS * SPAN_S:g} s, ending", file=sys.stderr, flush=True)
    # A hung process cannot clean up, and need not: state files are always replaced as a whole.
    os._exit(HUNG)


if __name__ == "__main__":
    sys.exit(main())
