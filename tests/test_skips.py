"""The rule on skips: nothing is skipped silently where CI=true, anything may be skipped elsewhere."""

import os
import shutil
import subprocess
import sys
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


def run(folder: Path, *, ci: bool, **files: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
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
