"""Card images made here (MBR, FAT boot partition), wheels that stand for the bundle's, and how to read a card back."""

import io
import os
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Final

import pytest

from fedhlm_fleet.flash import bundle
from fedhlm_fleet.flash.image import boot_partition

START: Final = 8_192
BOOT_SECTORS: Final = 131_072
IMAGE_BYTES: Final = 80 * 1024 * 1024
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def need(*programs: str) -> None:
    """Skip where a program is absent."""
    for program in programs:
        if shutil.which(program, path=_PATH) is None:
            pytest.skip(f"{program} is not installed")


def run(*command: str | Path, text: str = "") -> str:
    """The output of a program that must succeed."""
    environ = {**os.environ, "PATH": _PATH, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(list(map(str, command)), input=text, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout


def make(path: Path, *, kind: str = "c", sectors: int = BOOT_SECTORS) -> Path:
    """An image with one partition; a FAT one holds what Raspberry Pi OS has there."""
    need("sfdisk", "mformat", "mcopy")
    with path.open("wb") as file:
        file.truncate(START * 512 + sectors * 512 + 1024 * 1024)
    run("sfdisk", "-q", path, text=f"label: dos\nunit: sectors\nstart={START}, size={sectors}, type={kind}\n")
    if kind == "c":
        drive = f"{path}@@{START * 512}"
        run("mformat", "-i", drive, "-v", "BOOTFS", "-h", "255", "-s", "63", "-T", str(sectors), "-H", str(START), "::")
        for name, content in (("cmdline.txt", "console=tty1\n"), ("config.txt", "arm_64bit=1\n")):
            (path.parent / name).write_text(content)
            run("mcopy", "-i", drive, path.parent / name, "::/")
    return path


def drive(image: Path) -> str:
    return f"{image}@@{boot_partition(image).start}"


def names(image: Path) -> list[str]:
    """Every file of the boot partition."""
    listed = run("mdir", "-i", drive(image), "-/", "-b", "::/").splitlines()
    return sorted(line.removeprefix("::/") for line in listed if line and not line.endswith("/"))


def read(image: Path, name: str) -> str:
    return run("mtype", "-i", drive(image), f"::/{name}")


def take_out(image: Path, to: Path) -> None:
    """Copy all of the boot partition into a folder."""
    to.mkdir(parents=True, exist_ok=True)
    tops = sorted({name.partition("/")[0] for name in names(image)})
    run("mcopy", "-i", drive(image), "-s", "-n", *(f"::/{top}" for top in tops), to)


def wheel(folder: Path, name: str, files: dict[str, str], *, tag: str = "py3-none-any", version: str = "1.0") -> Path:
    """A wheel with these files and the metadata that pip asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: agent\n"
    inside = {
        **files,
        f"{info}/METADATA": head,
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if name == "fedhlm":
        inside[f"{info}/entry_points.txt"] = "[console_scripts]\nfedhlm = stand_in:main\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for inner, content in {**inside, f"{info}/RECORD": ""}.items():
            archive.writestr(inner, content)
    return path


@lru_cache(maxsize=1)
def pip_wheel() -> tuple[str, bytes]:
    """The pip that runs these tests, as the wheel that it was: name and content."""
    distribution = metadata.distribution("pip")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for file in distribution.files or ():
            if not str(file).startswith("..") and file.suffix != ".pyc":
                archive.write(str(distribution.locate_file(file)), str(file))
    return f"pip-{distribution.version}-py3-none-any.whl", content.getvalue()


def wheels(folder: Path, *, says: str = "1.0", leave_out: Sequence[str] = ()) -> Path:
    """A small bundle: empty packages under the names that an agent needs, a program that prints `says`, and a real pip."""
    folder.mkdir(parents=True, exist_ok=True)
    program = f"def main():\n    print({says!r})\n"
    for name in bundle.NEEDED:
        if name not in (*leave_out, "pip"):
            wheel(folder, name, {"stand_in.py": program} if name == "fedhlm" else {f"{name}/__init__.py": ""})
    if "pip" not in leave_out:
        name, content = pip_wheel()
        (folder / name).write_bytes(content)
    return folder
