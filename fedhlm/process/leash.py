"""Children that end with their parent, however it ends: also by `kill -9`, which no parent can answer.

`python -m fedhlm.process.leash PID COMMAND...` becomes the command and is asked to stop (SIGTERM) when its parent, the process
PID, is gone. The kernel does the watching (prctl(2), PR_SET_PDEATHSIG), also for programs that are not ours. It watches the
thread that started the child: start children from one that lives as long as the process does.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
USAGE: Final = 2


def leash(parent: int) -> None:
    """Have this process end with `parent`, which has started it; it ends at once where that is gone already.

    On systems other than Linux nothing is done.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # Between our start and the call above nobody was watching.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def leashed(*command: str) -> tuple[str, ...]:
    """The command line that runs `command` as a child of this process which ends with it."""
    return (sys.executable, "-m", "fedhlm.process.leash", str(os.getpid()), *command)


def main(arguments: Sequence[str]) -> int:
    """Become the command; a status only where that cannot be."""
    parent, *command = arguments
    leash(int(parent))
    try:
        os.execvp(command[0], command)  # noqa: S606 - a shell would be one process more to end
    except OSError as exc:
        print(f"{command[0]} cannot be started: {exc.strerror}", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
