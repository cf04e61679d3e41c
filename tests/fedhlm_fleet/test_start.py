"""An interrupt while the command imports its modules."""

import signal
import subprocess
import sys

import pytest

INTERRUPTED_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "fedhlm_fleet.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["fedhlm", "--version"]
if IGNORED:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
from fedhlm_fleet.start import main
sys.exit(main())
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_an_interrupt_amid_imports_ends_the_command_without_a_traceback(ignored: bool) -> None:
    script = INTERRUPTED_IMPORT.replace("IGNORED", str(ignored))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if ignored else -signal.SIGINT)
    assert done.stderr == ""
    assert bool(done.stdout) == ignored
