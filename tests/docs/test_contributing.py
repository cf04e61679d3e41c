"""The recipes of CONTRIBUTING.md, each applied word by word to a copy of the repository, and its commands run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fedhlm_fleet.commands.common import PACKAGES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
COPIED = (*(package for package in PACKAGES if package != "fedhlm_zoo"), "docs")
STEP = re.compile(
    r"(?:^(?P<where>New file|In) `(?P<file>[\w./-]+)`(?:, (?P<how>before|after|in place of) `(?P<marker>[^\n]+?)`)?:\n\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Step(NamedTuple):
    """An edit of `file`, or with an empty one commands to run."""

    file: str
    how: str
    marker: str
    text: str


def recipes() -> dict[str, list[Step]]:
    """Steps by the heading that they stand under."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        if heading.startswith("Add a "):
            steps = [Step(m["file"] or "", m["how"] or "", m["marker"] or "", m["text"]) for m in STEP.finditer(body)]
            found[heading] = steps
    return found


def apply(step: Step, root: Path) -> None:
    """One edit; its marker must stand in the file exactly once."""
    path = root / step.file
    if not step.how:
        assert not path.exists(), f"{step.file} is there already"
        path.write_text(step.text, "utf-8")
        return
    text = path.read_text("utf-8")
    assert text.count(step.marker) == 1, f"{step.file} has {step.marker!r} {text.count(step.marker)} times"
    head, tail = text.split(step.marker)
    if step.how == "before":
        gap = "" if step.text.startswith(" ") else "\n\n"  # two lines after what stands at the margin
        changed = f"{head}{step.text}{gap}{step.marker}{tail}"
    elif step.how == "after":
        changed = f"{head}{step.marker}\n{step.text.rstrip()}{tail}"
    else:
        changed = f"{head}{step.text.rstrip()}{tail}"
    path.write_text(changed, "utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "golden")
    for name in (*COPIED, "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "fedhlm_zoo").symlink_to(ROOT / "fedhlm_zoo")  # no recipe touches the models
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(line: str, root: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(root), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", line], cwd=root, env=environ, capture_output=True, text=True, check=False)


def test_there_is_a_recipe_for_everything_that_is_meant_to_be_extended() -> None:
    wanted = ["gate", "coupling", "message", "preset", "backend", "command"]
    assert [heading.removeprefix("Add a ") for heading in recipes()] == wanted
    for heading, steps in recipes().items():
        assert any(step.file for step in steps), heading
        assert any(not step.file for step in steps), heading


@pytest.mark.parametrize("heading", recipes())
def test_a_recipe_works_as_it_is_written(heading: str, copy: Path) -> None:
    steps = recipes()[heading]
    commands = [line for step in steps if not step.file for line in step.text.splitlines()]
    # Without the edits the last command must fail, or it shows nothing.
    assert run(commands[-1], copy).returncode != 0
    for step in steps:
        if step.file:
            apply(step, copy)
    for line in commands:
        done = run(line, copy)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    # As `make format` does: names in one more import may need another order or line.
    done = run("python -m ruff check --fix --quiet fedhlm edge_agent cloud_verifier fedhlm_fleet fedhlm_traces", copy)
    assert done.returncode == 0, done.stdout
