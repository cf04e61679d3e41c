"""Small state files that survive power cuts. They are written aside, synced and renamed, and checked when read.

A truncated or garbled file is kept under another name with a warning, and the part starts without it. `save` waits for
the disk; it starts no thread of its own.
"""

import errno
import hashlib
import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from fedhlm.errors import ConfigError
from fedhlm.process.files import PRIVATE, replace_file

log = logging.getLogger(__name__)

# A full or failing disk must not stop a device. Any other error is a mistake in its configuration.
FAILING: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
MAGIC: Final = b"fedhlm state 1\n"
_DIGEST_BYTES: Final = 32


def save(folder: Path | str, name: str, payload: bytes, *, key: str = "state") -> None:
    """Replace the file `name` atomically: after a power cut it has its old or its new payload.

    Raises:
        ConfigError: the folder cannot be created or written. `key` is the setting that names it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What a device has learnt is private.
        replace_file(folder / name, MAGIC + hashlib.sha256(payload).digest() + payload, mode=PRIVATE)
    except OSError as exc:
        _refuse(key, folder, "a writable folder", f"cannot write {name}", exc)


def load(folder: Path | str, name: str, *, key: str = "state") -> bytes | None:
    """Return what `save` wrote last; None if there is no file or it cannot be used.

    Raises:
        ConfigError: the file exists but cannot be read. `key` is the setting that names the folder.
    """
    folder = Path(folder)
    path = folder / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno in FAILING:
            log.warning("%s cannot be read, starting afresh: %s", path, exc.strerror)
            return None
        _refuse(key, folder, "a readable folder", f"cannot read {name}", exc)
    head = len(MAGIC) + _DIGEST_BYTES
    payload = data[head:]
    if data[:head] == MAGIC + hashlib.sha256(payload).digest():
        return payload
    put_aside(folder, name, "is truncated or garbled", key=key)
    return None


def put_aside(folder: Path | str, name: str, why: str, *, key: str = "state") -> None:
    """Rename a file that cannot be used to the next free name `{name}.bad-N`, with a warning.

    Raises:
        ConfigError: the file cannot be renamed.
    """
    folder = Path(folder)
    path = folder / name
    kept = next(p for p in (folder / f"{name}.bad-{n}" for n in count(1)) if not p.exists())
    try:
        path.rename(kept)
    except OSError as exc:
        _refuse(key, folder, "a writable folder", f"cannot rename {name}", exc)
    log.warning("%s %s: starting afresh, the old file is kept as %s", path, why, kept.name)


class Store(NamedTuple):
    """State as a part uses it: payloads by name. `reject` puts aside a payload that cannot be used, and why."""

    load: Callable[[str], bytes | None]
    save: Callable[[str, bytes], None]
    reject: Callable[[str, str], None]


def store_of(folder: str, *, key: str) -> Store | None:
    """Make the store of a folder and test it with a write; None if no folder is configured.

    A full or failing disk causes a warning only.

    Raises:
        ConfigError: the folder cannot be created or written for another reason. `key` is the setting that names it.
    """
    if not folder:
        return None
    try:
        save(folder, ".probe", b"", key=key)
        (Path(folder) / ".probe").unlink(missing_ok=True)
    except ConfigError as exc:
        if not (isinstance(exc.__cause__, OSError) and exc.__cause__.errno in FAILING):
            raise
        log.warning("state cannot be saved now: %s", exc)
    return Store(
        load=lambda name: load(folder, name, key=key),
        save=lambda name, payload: save(folder, name, payload, key=key),
        reject=lambda name, why: put_aside(folder, name, why, key=key),
    )


def _refuse(key: str, folder: Path, expectation: str, failure: str, error: OSError) -> NoReturn:
    raise ConfigError(key, str(folder), expectation, why=f"{failure}, {error.strerror or error}") from error
