"""Child processes that end with their parent, even if the parent is ended by `kill -9`.

`python -m fedhlm.process.leash PID COMMAND...` becomes the command. It receives SIGTERM when its parent, the process
PID, has ended. The kernel sends the signal (prctl(2), PR_SET_PDEATHSIG), so the command can be any program. The kernel
watches the thread that started the child. Start children from a thread that lives as long as the process.
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
    """Make this process end with its parent, the process `parent`. It ends at once if the parent has ended already.

    On systems other than Linux this does nothing.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have ended between our start and the call above.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def leashed(*command: str) -> tuple[str, ...]:
    """Return the command line that runs `command` as a child that ends with this process."""
    return (sys.executable, "-m", "fedhlm.process.leash", str(os.getpid()), *command)


def main(arguments: Sequence[str]) -> int:
    """Become the command. Returns an exit status only if the command cannot be started."""
    parent, *command = arguments
    leash(int(parent))
    try:
        os.execvp(command[0], command)  # noqa: S606 - a shell would be one more process to end
    except OSError as exc:
        print(f"{command[0]} cannot be started: {exc.strerror}", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
