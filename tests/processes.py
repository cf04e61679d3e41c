"""What tests that start programs share."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

GONE_S: Final = 30.0
PROGRAM: Final = (sys.executable, "-m", "fedhlm_fleet.cli")


def run(*words: str, stdout: int | None = subprocess.PIPE, **environ: str) -> subprocess.CompletedProcess[str]:
    """The program with these words, until it ends."""
    return subprocess.run(
        [*PROGRAM, *words], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        env={**os.environ, **environ}, errors="surrogateescape",
    )  # fmt: skip


def one_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The only line that says why the program ended with this status."""
    assert done.returncode == status, done
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("fedhlm: "))
    assert "Traceback" not in done.stderr
    return line


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
