"""`fedhlm status`: the parts on a broker."""

import asyncio
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fedhlm_fleet.commands.common import Keys, parse_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from fedhlm_fleet.status import FleetError, PartStatus

_DAY_S = 86_400.0


def status(
    *keys: Keys,
    broker: str | None = None,
    json: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    config: Path | None = None,
) -> int:
    """Show which parts are on a broker, their software and models, and whether they reach one another.

    A fleet with certificates shows the limit of its error per token.
    The broker of a cluster knows its edge and agents; the broker of the cloud knows the cloud.
    The other broker keys are flags too: --broker.ca ca.pem.
    Exit code 1: a part is missing, offline, out of reach, or of another version.

    Parameters
    ----------
    broker
        URL of the broker; sets broker.url.
    json
        Print one JSON object instead of text.
    config
        TOML file.
    """
    import msgspec
    from rich.console import Console

    from fedhlm.config import load
    from fedhlm_fleet.status import errors_of_fleet, listen, missing, rows

    given = parse_keys(keys) | ({} if broker is None else {"broker.url": broker})
    settings = load(file=config, flags=given).config
    heard, evidence = asyncio.run(listen(settings.broker, client_id=f"status-{secrets.token_hex(4)}"))
    found = rows(heard)
    lacking = missing(found)
    errors = errors_of_fleet(evidence, confidence=settings.generation.confidence)
    if json:
        print(msgspec.json.encode({"parts": found, "missing": lacking, "errors": errors}).decode())
    else:
        console = Console(highlight=False)
        if found:
            console.print(_table(found))
        wrong = [f"{row.cluster} {row.name}: {row.wrong}".lstrip() for row in found if row.wrong]
        for line in [*map(_error, errors), *wrong, *lacking]:
            console.print(line, markup=False)
    return 1 if lacking or any(row.wrong for row in found) else 0


def _error(known: "FleetError") -> str:
    return (
        f"error of the fleet at most {known.limit:.4f} at {known.confidence:.0%} "
        f"({known.tokens:,.0f} tokens in {age(known.since_s)}, models {known.pair})"
    )


def _table(found: "Sequence[PartStatus]") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("cluster", "part", "state", "software", "model", "reaches"):
        table.add_column(heading)
    for row in found:
        state = "offline" if row.since_s is None else f"online {age(row.since_s)}"
        table.add_row(row.cluster, row.name, state, row.software, row.model, row.link)
    return table


def age(seconds: float) -> str:
    """Format a time span in its largest whole unit: 5 s, 3 min, 2 h, 4 d."""
    for unit, size_s in (("d", _DAY_S), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.0f} s"
