"""What tests that start programs share."""

import signal
import time
from pathlib import Path
from typing import Final

GONE_S: Final = 30.0


def obey_interrupts() -> None:
    """For `preexec_fn`: a shell's background jobs ignore SIGINT, and a child inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def marked(marker: str) -> list[str]:
    """Command lines of the processes whose environment holds `marker`; of one that has ended nothing can be read."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def until_gone(marker: str) -> list[str]:
    """Wait until no marked process is left; those that are still there after GONE_S."""
    end_s = time.monotonic() + GONE_S
    while (left := marked(marker)) and time.monotonic() < end_s:
        time.sleep(0.05)
    return left
