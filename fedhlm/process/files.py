"""Secrets in files, and atomic replacement: after a power cut, a file has its old or its new content."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from fedhlm.errors import ConfigError

PRIVATE: Final = 0o600
PUBLIC: Final = 0o644


_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def read_secret(path: str, *, key: str) -> str:
    """Read a file of secrets, without white space at its ends. `key` is the setting that names it.

    Raises:
        ConfigError: the file cannot be read, is empty, or others may read it.
    """
    try:
        if Path(path).stat().st_mode & _OTHERS:
            raise ConfigError(key, path, "a file that only its owner can read", why="chmod 600 makes it one")
        text = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigError(key, path, "a readable file", why=why or "") from exc
    if not text:
        raise ConfigError(key, path, "a file with at least one key")
    return text


def aside_of(path: Path) -> Path:
    """Return where `replacing` writes the new content of `path` until the block ends."""
    return path.with_name(f"{path.name}.new")


@contextmanager
def replacing(path: Path, *, mode: int = PUBLIC, owner: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for the new content of `path`. It replaces `path` when the block ends, and is removed if it fails.

    The new file has `mode` from the start, whatever the umask. It belongs to user and group `owner` (None: those of the
    process) before it gets its name.

    Raises:
        OSError: the folder does not exist, cannot be written, or is full. `path` is unchanged.
    """
    aside = aside_of(path)
    aside.unlink(missing_ok=True)  # a file that a crash left behind may have another mode
    try:
        with os.fdopen(os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode), "w+b") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if owner is not None:
                os.fchown(file.fileno(), owner, owner)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_file(path: Path, data: bytes, *, mode: int = PUBLIC, owner: int | None = None) -> None:
    """Replace the content of a file atomically; see `replacing`."""
    with replacing(path, mode=mode, owner=owner) as file:
        file.write(data)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Without this, even a rename may be lost."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
