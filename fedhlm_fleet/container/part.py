"""`python -m fedhlm_fleet.container.part agent`: a part as a container's process.

What it tells a service manager (`fedhlm.process.notify`) is received by a thread of its own process and kept for the health check.
A part that was alive and whose event loop stops turning is ended, for the engine to start it again.
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

# After a pause of the whole container one span is over before the part can speak.
SILENT_SPANS: Final = 3
HUNG: Final = 70  # EX_SOFTWARE
_DATAGRAM_BYTES: Final = 4_096
_END: Final = b""  # our own word that nothing follows; a part's notices are never empty
_MICROSECONDS: Final = 1_000_000


def listen(channel: socket.socket, folder: Path, *, span_s: float, hung: Callable[[], None]) -> None:
    """Keep what arrives on the channel until `_END`; `hung` is called once nothing has come for SILENT_SPANS spans after the first word."""
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


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Run one command line of `fedhlm` with its health noted in the folder; the exit code."""
    from fedhlm_fleet import cli

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
            return cli.main(arguments)
        finally:
            # Datagrams stay in order: once this one has been read, the part's last word has been kept.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ours:
                ours.sendto(_END, str(path))
            listener.join()


def _end() -> None:
    print(f"fedhlm: the event loop has not turned for {SILENT_SPANS * SPAN_S:g} s, ending", file=sys.stderr, flush=True)
    # Nothing that hangs can be asked to clean up; states are replaced as whole files.
    os._exit(HUNG)


if __name__ == "__main__":
    sys.exit(main())
