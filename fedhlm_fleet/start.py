"""The entry point of the `fedhlm` command. An interrupt while it is still importing its modules ends it at once."""

import signal


def main() -> int:
    """Run the command line of the process, and return its exit code.

    Imports take seconds on a small device. The default action of SIGINT cannot be lost in them, and leaves no traceback.
    """
    given = signal.getsignal(signal.SIGINT)
    if given is signal.default_int_handler:  # and not ignored, as it is behind nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fedhlm_fleet.cli import main as run

    signal.signal(signal.SIGINT, given)
    return run()
