"""The command line of chaos says in one line what is wrong with it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "exakt"], "did you mean 'exact'"),
        (["--minutes", "0"], "minutes"),
        (["--persistence", "maybe"], "persistence"),
        (["--fault", "3"], "--fault"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "fedhlm_fleet.chaos", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("chaos: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
