"""Files of a PKI folder: replaced as a whole or not at all, secret where they are keys, changed by one process at a time.

Nothing here starts afresh on a file that cannot be read: who has been revoked must never be forgotten silently.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedhlm.errors import FedhlmError
from fedhlm.process.files import PRIVATE, PUBLIC, replace_file

_FOLDER: Final = 0o755


class PkiError(FedhlmError):
    """A certificate cannot be made, found or used as asked."""


def write(path: Path, data: bytes, *, mode: int = PUBLIC) -> None:
    """Replace a file: whenever the power fails, the old or the new content is there, with this mode from the start.

    Raises:
        PkiError: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
        replace_file(path, data, mode=mode)
    except OSError as exc:
        raise PkiError(f"cannot write {path}: {exc.strerror or exc}") from exc


def read(path: Path, what: str) -> bytes:
    """A file's content.

    Raises:
        PkiError: it is absent or cannot be read; `what` says in words what was looked for.
    """
    try:
        return path.read_bytes()
    except OSError as exc:
        raise PkiError(f"cannot read {what} {path}: {exc.strerror or exc}") from exc


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process changes this folder; the folder is made where it is absent.

    Raises:
        PkiError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, PRIVATE)
    except OSError as exc:
        raise PkiError(f"{folder} must be a writable folder ({exc.strerror or exc})") from exc
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
