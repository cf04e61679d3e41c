"""What the groups of commands share: checked types of parameters, keys as flags, a clear word where a library is absent."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Final

from cyclopts import Parameter
from cyclopts.validators import Number

from fedhlm.errors import ConfigError, FedhlmError

Positive = Annotated[int, Parameter(validator=Number(gte=1))]
Tokens = Annotated[int, Parameter(validator=Number(gte=1, lte=65_536))]  # messages.MAX_TOKENS
Seconds = Annotated[float, Parameter(validator=Number(gt=0))]
Share = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))]
SHOWN: Final = 32  # characters before a byte that is no text
OPTIONS: Final = ("--config", "--preset", "--help")  # of every command that takes keys
Keys = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Say which extra to install when a library is absent."""
    try:
        yield
    except ModuleNotFoundError as exc:
        library = (exc.name or "").partition(".")[0]
        if library in {
            "fedhlm",
            "edge_agent",
            "edge_broker",
            "cloud_verifier",
            "fedhlm_fleet",
            "fedhlm_lab",
            "fedhlm_traces",
            "fedhlm_zoo",
        }:
            raise
        raise FedhlmError(f"{library!r} is not installed: pip install 'fedhlm[{extra}]'") from exc


def present(*libraries: str) -> None:
    """See that libraries are installed, without the time that importing them takes.

    Raises:
        ModuleNotFoundError: names the first that is absent.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)


def parse_keys(tokens: Sequence[str], options: Sequence[str] = OPTIONS) -> dict[str, str]:
    """`--generation.seed 7` or `--generation.seed=7` as dotted keys with their text; a hyphen in a name stands for `_`.

    `options` are those of the command itself, which a misspelt one is compared with.

    Raises:
        FedhlmError: a word that is no flag, a flag without value, or one that is neither a key nor an option.
    """
    found: dict[str, str] = {}
    rest = list(tokens)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        if not flag.startswith("--") or len(flag) == len("--"):
            raise FedhlmError(f"argument must be --key value, such as --generation.seed 7 (got {flag!r})")
        near = difflib.get_close_matches(flag, options, n=1)
        if "." not in flag and near:
            raise FedhlmError(f"{flag} is not an option of this command: did you mean {near[0]}?")
        if not separator:
            if not rest or rest[0].startswith("--"):
                raise FedhlmError(f"{flag} must be given a value (got nothing)")
            value = rest.pop(0)
        found[flag.removeprefix("--").replace("-", "_")] = value
    return found


def require_text(key: str, given: str) -> None:
    """Refuse words of the command line that are no UTF-8; Python keeps such bytes as surrogates.

    Raises:
        ConfigError: shows them as escapes.
    """
    try:
        given.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(key, given[max(0, exc.start - SHOWN) : exc.start + 1], "UTF-8 text") from exc


def print_facts(facts: Mapping[str, object]) -> None:
    """One fact a line, aligned."""
    width = max(map(len, facts))
    for label, fact in facts.items():
        print(f"{label:<{width}}  {fact}")
