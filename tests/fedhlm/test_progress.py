"""Progress is one line on a terminal, which is cleared at the end; elsewhere there is nothing."""

import io
import os
import pty
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedhlm.progress import progress

ROOT = Path(__file__).parents[2]
STUDIES = {
    "lab coverage": ("-m", "fedhlm_fleet.cli", "lab", "coverage", "--lives", "2", "--texts", "2", "--jobs", "1"),
    "compare": ("-m", "fedhlm_lab.studies.compare", "--presets", "exact", "--kinds", "topic", "--prompts", "4"),
    "curves": ("-m", "fedhlm_lab.studies.curves", "--prompts", "4", "--tokens", "4", "--rounds", "2"),
    "neighbours": ("-m", "fedhlm_lab.studies.neighbours", "--prompts", "2", "--tokens", "4", "--agents", "2"),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_says_how_many_are_done_and_how_long_the_rest_takes() -> None:
    told, now = Terminal(), iter((0.0, 0.0, 0.0, 1.0, 1.0, 65.0, 65.0, 65.0, 65.0))
    with progress("lives", 1_000, stream=told, clock_s=lambda: next(now, 65.0)) as ended:
        for _ in range(2):
            ended()
    lines = told.getvalue().split("\r\x1b[K")
    assert lines[1] == "0 of 1,000 lives, 0:00"
    assert lines[-2] == "2 of 1,000 lives, 1:05, 540:35 left"
    assert lines[-1] == "", "the line is cleared"


def test_work_of_one_piece_is_named() -> None:
    told = Terminal()
    with pytest.raises(ValueError, match="broken"), progress("exporting", stream=told):
        raise ValueError("broken")
    assert told.getvalue() == "\r\x1b[Kexporting\r\x1b[K"


def test_nothing_is_written_elsewhere() -> None:
    told = io.StringIO()
    with progress("lives", 2, stream=told) as ended:
        ended()
    assert told.getvalue() == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_shows_it_on_a_terminal(name: str, tmp_path: Path) -> None:
    shown, printed = on_a_terminal(STUDIES[name], tmp_path)
    assert " of " in shown
    assert shown.endswith("\r\x1b[K") or "\r\x1b[K|" in shown, "each line is cleared before the next"
    assert printed
    assert "\r" not in printed


@pytest.mark.slow
def test_a_study_writes_none_of_it_to_a_pipe(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    piped = subprocess.run(
        [sys.executable, *STUDIES["compare"]], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert piped.stdout
    assert not [line for line in piped.stderr.splitlines() if " of " in line or "\r" in line]


def on_a_terminal(words: Sequence[str], folder: Path) -> tuple[str, str]:
    """What a program writes to a terminal as standard error, and to a pipe as standard output."""
    ours, theirs = pty.openpty()
    out = folder / "printed"
    with out.open("wb") as stdout:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=theirs,
            stdout=stdout, stderr=theirs,
        )  # fmt: skip
    os.close(theirs)
    shown = b""
    while process.poll() is None or select.select([ours], [], [], 0.0)[0]:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                shown += os.read(ours, 65_536)
            except OSError:  # the program has closed it
                break
    os.close(ours)
    assert process.wait(60.0) in (0, 1), shown
    return shown.decode(), out.read_text("utf-8")
