"""Node programs of this repository, each with the packages of its package-lock.json."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import pytest

_KEPT: Final = tempfile.TemporaryDirectory(prefix="fedhlm-npm-")  # until the tests end
_INSTALL: Final = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")


def installed(folder: Path) -> Path:
    """A copy of a folder with package.json, package-lock.json and programs, in which `npm ci` has run; else a skip."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    return _installed(folder)


@functools.cache
def _installed(folder: Path) -> Path:
    copy = Path(_KEPT.name, folder.name, str(abs(hash(folder))))
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("node_modules"))
    done = subprocess.run(["npm", *_INSTALL], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return copy
