"""What tests that start programs share."""

import signal


def obey_interrupts() -> None:
    """For `preexec_fn`: a shell's background jobs ignore SIGINT, and a child inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
