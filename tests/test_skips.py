"""The rule on skips: nothing is skipped silently where CI=true, anything may be skipped elsewhere."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SKIPPING = """
import pytest

def test_passes(): pass
def test_skips(): pytest.skip("no CUDA device here" if {allowed} else "no time")
@pytest.mark.skipif(True, reason="no CUDA device" if {allowed} else "no mood")
def test_is_marked(): pass
@pytest.mark.xfail(reason="known")
def test_is_known_to_fail(): raise AssertionError
"""
ABSENT = "import pytest\npytest.importorskip('a_library_that_nobody_has')\n"


LACKING = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_a(number): pytest.skip("mosquitto_sub is not installed")
def test_b(): pytest.skip("strace is not installed")
@pytest.mark.skip(reason="makes its models with torch")
def test_c(): pass
def test_d(): pytest.skip("no CUDA device here")
"""
PACKAGES = Path(__file__).parents[1] / ".ci" / "packages"


def run(folder: Path, *, ci: bool, **files: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).with_name("skips.py"), folder / "conftest.py")
    (folder / ".ci").mkdir()
    shutil.copy(PACKAGES, folder / ".ci")
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, "utf-8")
    environ = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--rootdir", str(folder), str(folder)]
    if ci:
        environ["CI"] = "true"
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)


def test_elsewhere_a_skip_is_a_skip(tmp_path: Path) -> None:
    done = run(tmp_path, ci=False, test_a=SKIPPING.format(allowed=False), test_b=ABSENT)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 3 skipped, 1 xfailed" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("reason", ["no time", "no mood"])
def test_in_ci_a_skipped_test_fails_and_says_why(reason: str, tmp_path: Path) -> None:
    done = run(tmp_path, ci=True, test_a=SKIPPING.format(allowed=False))
    assert done.returncode == 1, done.stdout
    assert f"CI allows no skip for: {reason}" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "1 passed" in last
    assert "skipped" not in last


def test_in_ci_a_skipped_module_fails(tmp_path: Path) -> None:
    done = run(tmp_path, ci=True, test_b=ABSENT)
    assert done.returncode != 0, done.stdout
    assert "CI allows no skip for: could not import 'a_library_that_nobody_has'" in done.stdout


def test_in_ci_the_listed_reasons_pass(tmp_path: Path) -> None:
    done = run(tmp_path, ci=True, test_a=SKIPPING.format(allowed=True))
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped, 1 xfailed" in done.stdout.splitlines()[-1]


def test_the_end_says_what_was_skipped_and_what_installs_it(tmp_path: Path) -> None:
    done = run(tmp_path, ci=False, test_a=LACKING)
    assert done.returncode == 0, done.stdout
    told = done.stdout.splitlines()
    for line in ("2 skipped: mosquitto_sub is not installed", "1 skipped: makes its models with torch"):
        assert line in told
    assert "To run them as well: sudo apt-get install mosquitto-clients strace && make models" in told


def test_nothing_is_said_where_nothing_was_skipped(tmp_path: Path) -> None:
    assert "skipped" not in run(tmp_path, ci=False, test_a="def test_passes(): pass").stdout


def reasons_in(path: Path) -> Iterator[str]:
    """The reasons of all skips in a file, as they are written there."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        kind = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if not isinstance(node, ast.Call) or not kind.startswith("pytest."):
            continue
        if kind == "pytest.skip":
            yield ast.unparse(node.args[0]).removeprefix("f").strip("'\"")
        elif kind in ("pytest.mark.skip", "pytest.mark.skipif", "pytest.importorskip"):
            given = [ast.unparse(word.value).strip("'\"") for word in node.keywords if word.arg == "reason"]
            yield from given or [f"no reason in {path}"]


def test_every_skip_of_this_tree_can_be_mended_or_says_that_it_cannot() -> None:
    tests = Path(__file__).parent
    found = {reason for path in tests.rglob("*.py") if path != Path(__file__) for reason in reasons_in(path)}
    assert "mosquitto is not installed" in found
    absent = {reason.removesuffix(" is not installed") for reason in found if reason.endswith(" is not installed")}
    packages = [line.split() for line in PACKAGES.read_text("utf-8").splitlines() if line[0] != "#"]
    assert absent - {program for program, _ in packages} == {"{program}"}, "each with its package"
    others = found - {f"{program} is not installed" for program in absent}
    cannot = re.compile(
        r"no CUDA device|no Python with flwr|a slow link needs root|needs llama.cpp: |needs SmolLM2: |no bundle is made for Python|no file system can be mounted here|.*\b(torch|transformers|optimum|onnx)\b"
    )
    assert not {reason for reason in others if not cannot.match(reason)}
