"""The file of `--json`: checked before the work begins, and written after it ends."""

from pathlib import Path

import msgspec

from fedhlm.errors import ConfigError

KEY = "--json"


def try_out(path: Path | None, key: str = KEY) -> None:
    """Check that the file of the flag `key` can be written, without changing it.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    new = not path.exists()
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as exc:
        raise _refused(path, exc, key) from exc


def write(path: Path | None, figures: object) -> None:
    """Write the figures as indented JSON; do nothing without a path.

    Raises:
        ConfigError: the file cannot be written, for instance because the disk is full.
    """
    if path is None:
        return
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
    except OSError as exc:
        raise _refused(path, exc) from exc


def _refused(path: Path, error: OSError, key: str = KEY) -> ConfigError:
    return ConfigError(key, str(path), "a writable file", why=error.strerror or str(error))
