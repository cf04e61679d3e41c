"""The offline bundle: wheels for the device's processor and Python, and a model unless it is the shipped one.

pip downloads wheels for another machine if it gets every platform tag of that machine. A complete folder is used as it
is, so that cards can be written without internet. Nothing is built on a device.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Final

from fedhlm.decoding.decoder import load_info
from fedhlm.errors import ConfigError
from fedhlm_fleet.flash.plan import CUDA, INSTALLER, PLAIN, UNIT, FlashError, PlannedFile

PROJECT: Final = "fedhlm"
NEEDED: Final = (PROJECT, "pip", "numpy", "onnxruntime", "tokenizers", "aiomqtt", "msgspec")
# The Pythons of Debian 12, Ubuntu 24.04 and Debian 13 (Raspberry Pi OS Trixie).
PYTHONS: Final = ("3.11", "3.12", "3.13")
MACHINE: Final = "aarch64"
# The oldest supported system, Ubuntu 22.04, has glibc 2.35; wheels for an older glibc run there too.
_GLIBC_MINORS: Final = range(17, 36)
_WHEEL: Final = re.compile(
    r"(?P<name>[A-Za-z0-9_.]+)-(?P<version>[^-]+)(-\d[^-]*)?-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<platform>[^-]+)\.whl"
)
_NO_SOURCE: Final = (
    ".*",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "tests",
    "benchmarks",
    "deploy",
    "docs",
    "examples",
)


def tags(python: str, machine: str = MACHINE) -> list[str]:
    """Return pip's options for a Python version ("3.13") and machine, with all platform tags of the device."""
    digits = python.replace(".", "")
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC_MINORS]
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", digits]
    for abi in (f"cp{digits}", "abi3", "none"):
        options += ["--abi", abi]
    for platform in (*platforms, f"manylinux2014_{machine}", "any"):
        options += ["--platform", platform]
    return options


def wheels(folder: Path, *, python: str, machine: str = MACHINE) -> list[Path]:
    """Return the wheels of a folder, after checking that they are all an agent needs and run on the device.

    Raises:
        FlashError: a wheel is missing, in the folder twice, or for another machine or Python.
    """
    if not folder.is_dir():
        raise FlashError(f"--wheels must be a folder (got {str(folder)!r})")
    found = sorted(folder.glob("*.whl"))
    names: dict[str, Path] = {}
    for wheel in found:
        match = _WHEEL.fullmatch(wheel.name)
        if match is None:
            raise FlashError(f"name of a wheel must be name-version-python-abi-platform.whl (got {str(wheel)!r})")
        name = _normal(match["name"])
        if name in names:
            raise FlashError(f"each wheel must be there in one version (got {wheel} and {names[name].name})")
        if not _runs(match, python, machine):
            raise FlashError(f"wheel must be for Python {python} on {machine} (got {str(wheel)!r})")
        names[name] = wheel
    if missing := [name for name in NEEDED if name not in names]:
        raise FlashError(f"{folder} lacks wheels of {', '.join(missing)}: a folder filled by --bundle has them")
    return found


def fill(folder: Path, *, python: str, machine: str = MACHINE) -> list[Path]:
    """Download the wheels into `folder`, unless they are there already, and return them.

    Raises:
        FlashError: pip fails; the message contains its last lines.
    """
    if folder.is_dir() and any(folder.glob(f"{PROJECT}-*.whl")):
        return wheels(folder, python=python, machine=machine)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedhlm-bundle-") as scratch:
        staged = Path(scratch, "wheels")
        staged.mkdir()
        source = source_folder()
        source = source_folder()
        where = ("--dest", str(staged), "--find-links", str(staged))
        wanted = [f"{PROJECT}[agent]=={metadata.version(PROJECT)}", "pip"]
        if source is not None:
            _build(source, Path(scratch, "source"), staged)
            # What is ours is built here; every other file must have one of the hashes in the lock.
            lock = source / "deploy" / "docker" / "locks" / "bundle.txt"
            wanted = ["--require-hashes", "--requirement", str(lock)]
        _pip("download", *where, *tags(python, machine), *wanted)
        found = wheels(staged, python=python, machine=machine)
        # The project's own wheel is copied last: its presence means that the folder is complete.
        for wheel in sorted(found, key=lambda path: path.name.startswith(f"{PROJECT}-")):
            shutil.copyfile(wheel, folder / wheel.name)
    return wheels(folder, python=python, machine=machine)


def parts(found: Sequence[Path], *, model: Path | None = None, interpreter: Path | None = None) -> list[PlannedFile]:
    """Return the files of the bundle as parts of a payload.

    Raises:
        ModelError: `model` is not a usable model folder.
        ConfigError: `interpreter` is not a .tar.gz file.
    """
    listed = [PlannedFile(f"wheels/{wheel.name}", wheel) for wheel in found]
    if model is not None:
        names = {"model.json", *load_info(model).files}
        listed += [PlannedFile(f"model/{name}", model / name) for name in sorted(names)]
    if interpreter is not None:
        if not interpreter.name.endswith((".tar.gz", ".tgz")) or not interpreter.is_file():
            raise ConfigError("--interpreter", str(interpreter), "a .tar.gz with python/bin/python3 in it")
        listed.append(PlannedFile("python.tar.gz", interpreter))
    return listed


def shipped_units() -> dict[str, bytes]:
    """Return the installer, the systemd unit and its drop-ins, which come with this package."""
    here = resources.files("fedhlm_fleet.flash")
    return {name: here.joinpath(name).read_bytes() for name in (INSTALLER, UNIT, PLAIN, CUDA)}


def source_folder() -> Path | None:
    """Return the source folder of this program, or None if it was installed from a wheel."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def _build(source: Path, copy: Path, wheels_to: Path) -> None:
    # The wheel is built from a copy: setuptools leaves build folders behind, and reuses those of earlier builds.
    ignore_top, ignore = shutil.ignore_patterns(*_NO_SOURCE), shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, copy, ignore=lambda at, names: (ignore_top if Path(at) == source else ignore)(at, names))
    _pip("wheel", "--no-deps", "--wheel-dir", str(wheels_to), str(copy))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own interpreter
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise FlashError(f"pip {arguments[0]} failed: {'; '.join(lines[-3:]) or done.returncode}")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _runs(match: re.Match[str], python: str, machine: str) -> bool:
    digits = python.replace(".", "")
    minor = int(digits[1:])
    pythons, abis, platforms = (match[group].split(".") for group in ("python", "abi", "platform"))
    # NVIDIA's own wheels use plain linux_ tags.
    if not any(p == "any" or (p.startswith(("manylinux", "linux_")) and p.endswith(f"_{machine}")) for p in platforms):
        return False
    if f"cp{digits}" in pythons and {f"cp{digits}", "abi3", "none"} & set(abis):
        return True
    stable = "abi3" in abis and any(p.startswith("cp3") and int(p[3:] or 0) <= minor for p in pythons)
    return stable or ("none" in abis and any(p in {"py3", f"py{digits}"} for p in pythons))
