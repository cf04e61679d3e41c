"""What the groups of commands share: checked types of parameters, keys as flags, a clear word where a library is absent."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from fedhlm.errors import FedhlmError

Positive = Annotated[int, Parameter(validator=Number(gte=1))]
Tokens = Annotated[int, Parameter(validator=Number(gte=1, lte=65_536))]  # messages.MAX_TOKENS
Seconds = Annotated[float, Parameter(validator=Number(gt=0))]
Share = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))]
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


def parse_keys(tokens: Sequence[str]) -> dict[str, str]:
    """`--generation.seed 7` or `--generation.seed=7` as dotted keys with their text; a hyphen in a name stands for `_`.

    Raises:
        FedhlmError: a word that is no flag, or a flag without value.
    """
    found: dict[str, str] = {}
    rest = list(tokens)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        if not flag.startswith("--") or len(flag) == len("--"):
            raise FedhlmError(f"argument must be --key value, such as --generation.seed 7 (got {flag!r})")
        if not separator:
            if not rest or rest[0].startswith("--"):
                near = difflib.get_close_matches(flag, ("--config", "--preset", "--help"), n=1)
                raise FedhlmError(f"{flag} has no value{f', did you mean {near[0]}?' if near else ''}")
            value = rest.pop(0)
        found[flag.removeprefix("--").replace("-", "_")] = value
    return found


def print_facts(facts: Mapping[str, object]) -> None:
    """One fact a line, aligned."""
    width = max(map(len, facts))
    for label, fact in facts.items():
        print(f"{label:<{width}}  {fact}")
