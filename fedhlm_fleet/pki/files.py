"""Files of a PKI folder: replaced atomically, private if they are keys, and changed by one process at a time.

An unreadable file is always an error and never replaced by an empty one: no revocation may be lost silently.
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
    """A certificate cannot be issued, found or used as requested."""


def write(path: Path, data: bytes, *, mode: int = PUBLIC) -> None:
    """Replace a file atomically: after a power failure it has its old or its new content. It is created with this mode.

    Raises:
        PkiError: the file cannot be written.
    """
    try:
        path.parent.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
        replace_file(path, data, mode=mode)
    except OSError as exc:
        raise PkiError(f"cannot write {path}: {exc.strerror or exc}") from exc


def read(path: Path, what: str) -> bytes:
    """Return the content of a file.

    Raises:
        PkiError: the file is missing or cannot be read; `what` names it in the message.
    """
    try:
        return path.read_bytes()
    except OSError as exc:
        raise PkiError(f"cannot read {what} {path}: {exc.strerror or exc}") from exc


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of this folder, once no other process holds it; create the folder if it is missing.

    Raises:
        PkiError: the folder cannot be created or written.
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
