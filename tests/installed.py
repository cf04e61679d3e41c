"""The program as a user has it: a wheel built from this tree, installed in a virtual environment of its own.

pip takes libraries from the package index that `make` takes them from, in the versions of constraints.txt.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
_NOT_BUILT: Final = (".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks", "docs", "examples")
_KEPT: Final = tempfile.TemporaryDirectory(
    prefix="fedhlm-installed-"
)  # until the tests end: making one takes half a minute


@functools.cache
def wheel() -> Path:
    """A wheel of this tree. It is built from a copy, for setuptools takes up what an earlier build has left."""
    copy, folder = Path(_KEPT.name, "source"), Path(_KEPT.name, "wheel")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_NOT_BUILT))
    _pip("wheel", "--no-deps", "--wheel-dir", folder, copy)
    (built,) = folder.glob("fedhlm-*.whl")
    return built


@functools.cache
def programs(*extras: str) -> Path:
    """The folder of the programs of an environment that holds the wheel with these extras, and nothing else."""
    folder = Path(_KEPT.name, "-".join(["plain", *extras]))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = (
        "--python",
        folder / "bin" / "python",
        "install",
        "--no-compile",
        "--constraint",
        ROOT / "constraints.txt",
    )
    if not extras:
        _pip(*install, wheel())
        return folder / "bin"
    # What the plain environment has is copied; pip adds the extras, and the program for this environment.
    for packages in (programs().parent / "lib").glob("python*/site-packages"):
        shutil.copytree(packages, folder / packages.relative_to(programs().parent), dirs_exist_ok=True)
    _pip(*install, "--no-deps", "--force-reinstall", wheel())
    _pip(*install, f"{wheel()}[{','.join(extras)}]")
    return folder / "bin"


def environ(folder: Path, **more: str) -> dict[str, str]:
    """An environment as after `source bin/activate` of that folder of programs, without anything of this project's."""
    ours = ("FEDHLM_", "PYTHON", "COVERAGE", "PYTEST", "HYPOTHESIS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PATH": f"{folder}{os.pathsep}{kept['PATH']}", "VIRTUAL_ENV": str(folder.parent), **more}


def _pip(*arguments: Path | str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=environ(ROOT), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
