"""The file of `--json`: tried before the work begins, written as a whole after it."""

from pathlib import Path

import msgspec

from fedhlm.errors import ConfigError

KEY = "--json"


def try_out(path: Path | None) -> None:
    """See that the file can be written, and leave what is there as it is.

    Raises:
        ConfigError: it cannot.
    """
    if path is None:
        return
    new = not path.exists()
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as exc:
        raise _refused(path, exc) from exc


def write(path: Path | None, figures: object) -> None:
    """Write the figures as indented JSON; without a path nothing is done.

    Raises:
        ConfigError: the file cannot be written, on a full disk for instance.
    """
    if path is None:
        return
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
    except OSError as exc:
        raise _refused(path, exc) from exc


def _refused(path: Path, error: OSError) -> ConfigError:
    return ConfigError(KEY, str(path), "a writable file", why=error.strerror or str(error))
