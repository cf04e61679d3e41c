"""Files that are replaced as a whole: whenever the power fails, the old or the new content is there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

PRIVATE: Final = 0o600
PUBLIC: Final = 0o644


@contextmanager
def replacing(path: Path, *, mode: int = PUBLIC, owner: int | None = None) -> Iterator[BinaryIO]:
    """A file to write the new content to; it takes the place of `path` when the block ends, and goes when it fails.

    The new file has `mode` from the start, whatever the umask, and belongs to user and group `owner` (None: this process's)
    before it has its name.

    Raises:
        OSError: the folder is absent, cannot be written, or is full; `path` is as it was.
    """
    aside = path.with_name(f"{path.name}.new")
    aside.unlink(missing_ok=True)  # one that a crash left behind may have another mode
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
    """Replace the file's content as a whole; see `replacing`."""
    with replacing(path, mode=mode, owner=owner) as file:
        file.write(data)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk for good: without it even a rename may be lost."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
