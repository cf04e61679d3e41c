"""`fedhlm federation`: the members that learn together, and the order to forget one of them."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from fedhlm_fleet.commands.common import Keys, parse_keys
from fedhlm_fleet.commands.status import age

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedhlm.settings import Broker
    from fedhlm_fleet.federation import MemberRow

app = App(name="federation", help="List the members of the federation, and have one forgotten.")


@app.command(name="list")
def list_(
    *keys: Keys,
    broker: str | None = None,
    json: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    config: Path | None = None,
) -> int:
    """List what each member contributes, and how often its contributions were cut or rejected.

    The broker between the edges and the cloud knows all lists. A member is an agent, or an edge with its whole cluster.
    The other broker keys are flags too: --broker.ca ca.pem.
    Exit code 1: no edge and no cloud has published a list.

    Parameters
    ----------
    broker
        URL of the broker; sets broker.url.
    json
        Print one JSON array instead of the table.
    config
        TOML file.
    """
    import msgspec

    from fedhlm_fleet.federation import listed, rows

    found = asyncio.run(listed(section(keys, broker, config)))
    members = rows(found)
    if json:
        print(msgspec.json.encode(members).decode())
    elif members:
        _print(members)
    else:
        print("no member has contributed" if found else "no edge and no cloud has listed its members on this broker")
    left_out = sum(roster.left_out for roster in found.values())
    if left_out and not json:
        print(f"and {left_out} members of less weight")
    return 0 if found else 1


@app.command
def forget(name: str, /, *keys: Keys, broker: str | None = None, config: Path | None = None) -> int:
    """Have all edges and the cloud drop what a member has contributed, and what was learnt from it.

    What it contributes later counts again: revoke its certificate first if it lies (fedhlm pki revoke).
    The other broker keys are flags too: --broker.ca ca.pem.
    Exit code 1: a part has not obeyed yet; it will when it is back, because the broker keeps the order.

    Parameters
    ----------
    name
        Name of the member: agent.id, or edge-CLUSTER for a whole cluster.
    broker
        URL of the broker between the edges and the cloud; sets broker.url.
    config
        TOML file.
    """
    from fedhlm.protocol.prompts import check
    from fedhlm.protocol.roles import cluster_of

    check("agent", cluster_of(name) or name)  # the name of an edge holds one, too
    return have_forgotten(section(keys, broker, config), name, known_only=True)


def section(keys: "Sequence[str]", broker: str | None, config: Path | None) -> "Broker":
    """Return the settings of the broker that flags and files name."""
    from fedhlm.config import load

    given = parse_keys(keys) | ({} if broker is None else {"broker.url": broker})
    return load(file=config, flags=given).config.broker


def have_forgotten(broker: "Broker", name: str, *, known_only: bool) -> int:
    """Give the order, print what became of it, and return the exit code."""
    from fedhlm_fleet.federation import CLOUD
    from fedhlm_fleet.federation import forget as give

    missing = asyncio.run(give(broker, name, known_only=known_only))
    if not missing:
        print(f"forgot {name} at the cloud and at every edge")
        return 0
    parts = ", ".join("the cloud" if cluster == CLOUD else f"the edge of {cluster}" for cluster in missing)
    print(f"{name} will be forgotten by {parts} as soon as they are back; all others have forgotten it")
    return 1


def _print(members: "Sequence[MemberRow]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("cluster", "member", "agents", "weight", "seen", "harm", "age", "cut", "refused"):
        table.add_column(heading, justify="left" if heading in ("cluster", "member", "refused") else "right")
    for row in members:
        refused = ", ".join(f"{reason} {count}" for reason, count in row.refused.items())
        numbers = (f"{row.weight:,.0f}", f"{row.seen:,.0f}", f"{row.harm:,.1f}", age(row.silent_s), str(row.cut))
        table.add_row(row.cluster or "-", row.name, str(row.agents), *numbers, refused)
    Console(highlight=False).print(table)
