"""What the groups of commands share: checked types of parameters, and a clear word where a library is absent."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from fedhlm.errors import FedhlmError

Positive = Annotated[int, Parameter(validator=Number(gte=1))]
Seconds = Annotated[float, Parameter(validator=Number(gt=0))]
Share = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))]


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


def print_facts(facts: Mapping[str, object]) -> None:
    """One fact a line, aligned."""
    width = max(map(len, facts))
    for label, fact in facts.items():
        print(f"{label:<{width}}  {fact}")
