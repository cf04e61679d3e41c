"""A child on a leash ends with its parent, however that ends."""

import os
import signal
import subprocess
import sys
import time

from fedhlm.process.leash import USAGE, leashed
from tests.processes import marked, until_gone

LEASH = [sys.executable, "-m", "fedhlm.process.leash"]
PARENT = """
import subprocess, time
from fedhlm.process.leash import leashed
child = subprocess.Popen(leashed("sleep", "600"))
print("started", flush=True)
time.sleep(600)
"""


def test_a_child_of_any_program_ends_when_its_parent_is_killed() -> None:
    marker = f"leash-test-{os.getpid()}"
    environ = {**os.environ, "LEASH_TEST_MARKER": marker}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        while "sleep 600 " not in marked(marker):  # until then the leash itself sees that its parent has changed
            time.sleep(0.01)
        parent.send_signal(signal.SIGKILL)
    assert until_gone(marker) == []


def test_a_child_whose_parent_is_gone_already_does_not_begin() -> None:
    # The parent of this child is this process, and not its parent: to the child its own has changed.
    done = subprocess.run([*LEASH, str(os.getppid()), "sleep", "600"], timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM


def test_the_command_takes_the_place_of_the_leash() -> None:
    done = subprocess.run(leashed("sh", "-c", "echo $$; exit 3"), stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout.strip().isdigit()


def test_a_command_that_is_not_there_is_one_line() -> None:
    done = subprocess.run(leashed("/nowhere/program"), capture_output=True, text=True, check=False)
    assert done.returncode == USAGE
    assert done.stderr == "/nowhere/program cannot be started: No such file or directory\n"
