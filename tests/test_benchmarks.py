"""The benchmarks run as docs/results.md types them, with little work, and say in one line what they cannot use."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import CHROMIUM

ROOT = Path(__file__).parents[1]
# What each prints first; a benchmark that compares systems needs them all.
SHORT = {
    "device.py --rounds 1": "{",
    "delay.py --round-trips 0 --prompts 1 --tokens 4": "round trip 0 ms added",
    "tree.py --prompts 1 --tokens 4 --blocks 4 --nodes 16 --round-trips 0": "round trip 0 ms",
    "vocabulary.py --rounds 1": '{"work": "doubt"',
    "exactness.py --texts 2 --tokens 8": '{"texts": 2',
    "doors.py --pairs 1 --conversations 1 --tokens 8": '{"preset": "slm-only"',
    "load.py --only alone": '{"alone p50 ms"',
    "console.py --agents 20 --seconds 1": '{"agents": 20',
    "record.py --rates 200 --replay-rates 50 --seconds 1": "load of the machine",
}


def benchmark(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT / "benchmarks", env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", SHORT)
def test_every_documented_benchmark_runs(command: str) -> None:
    if command.startswith("record") and shutil.which("mosquitto") is None:
        pytest.skip("mosquitto is not installed")
    if command.startswith("console") and CHROMIUM is None:
        pytest.skip("chromium is not installed")
    done = benchmark(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(SHORT[command])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("delay.py --prompts -1", "delay.py: --prompts must be an integer from 1 up to 1000000 (got '-1')"),
        ("tree.py --tokens x", "tree.py: --tokens must be an integer from 1 up to 1000000 (got 'x')"),
        ("record.py --seconds nan", "record.py: --seconds must be a number from 0.1 up to 3600.0 (got 'nan')"),
        ("load.py --onyl alone", "load.py: unrecognized arguments: --onyl alone"),
    ],
)
def test_what_it_cannot_use_is_one_line(command: str, words: str) -> None:
    done = benchmark(command)
    assert (done.returncode, done.stderr) == (2, f"{words}\n")


def test_every_benchmark_is_here() -> None:
    files = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__.py"}
    assert files - {command.split()[0] for command in SHORT} == set()
