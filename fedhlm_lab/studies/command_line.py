"""Command lines of the studies: numbers within limits, settings, and one line for whatever cannot be used."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fedhlm.errors import ConfigError, FedhlmError


class Parser(argparse.ArgumentParser):
    """A parser for a study, whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and end with status 2."""
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ').replace(': must be', ' must be', 1)}\n")


def limited(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """Return a parser of numbers of a kind from `least` up to `most`."""
    words = f"{'an integer' if kind is int else 'a number'} from {least} up to {most}"

    def parsed(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:  # nan is not
            raise argparse.ArgumentTypeError(f"must be {words} (got {text!r})")
        return value

    return parsed


def out_file(text: str) -> Path:
    """Parse the path of a file to write, and check before the work that its folder can be written."""
    path = Path(text)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a writable folder (got {text!r})")
    return path


COUNT = limited(int, 1, 1_000_000)
TEMPERATURE = limited(float, 0, 10)


def settings_of(words: Sequence[str]) -> dict[str, str]:
    """Return the settings that `--set KEY=VALUE ...` gives.

    Raises:
        ConfigError: a word has no `=`.
    """
    for word in words:
        if "=" not in word:
            raise ConfigError("--set", word, "KEY=VALUE")
    return dict(word.split("=", 1) for word in words)


def run(main: Callable[[], int], program: str) -> int:
    """Run a study and return its exit status: 2 after an error, which is printed as one line, 130 after Ctrl-C."""
    try:
        return main()
    except FedhlmError as exc:
        print(f"{program}: {' '.join(str(exc).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
