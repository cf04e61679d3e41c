"""The tutorial, run from its first command to its last in one shell, on a free port."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.brokers import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
MARK = "--- step"


@pytest.mark.slow
def test_the_tutorial_works_as_it_is_written(tmp_path: Path) -> None:
    port = str(free_port())
    steps = [block.replace("1883", port) for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)]
    assert len(steps) == 9
    steps[0] = steps[0].replace(" &", f" --edge.embedded_port {port} &")
    # A reader types more slowly than a shell reads: what listens is waited for. After a step the last status is told.
    steps[0] += f"until (: < /dev/tcp/localhost/{port}) 2>/dev/null; do sleep 0.1; done\n"
    steps[1] += "until [ -e first.trace ]; do sleep 0.1; done\n"
    script = "set -m\n" + "".join(f"{step}echo '{MARK}' {i} $?\n" for i, step in enumerate(steps))
    tools = tmp_path / "bin"
    tools.mkdir()
    program = tools / "fedhlm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fedhlm_fleet.cli "$@"\n', "utf-8")
    program.chmod(0o755)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    told = done.stdout + done.stderr
    statuses = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert statuses == [[str(i), "0"] for i in range(len(steps))], told
    assert (tmp_path / "exact.txt").read_text("utf-8").strip(), told
    assert "drafted u=" in done.stdout
    assert "requests ended    9" in done.stdout
