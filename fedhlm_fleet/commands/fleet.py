"""`fedhlm fleet`: the parts of a fleet as a list, for people and for scripts."""

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import App, Parameter

from fedhlm_fleet.commands.common import Keys, Seconds, parse_keys

if TYPE_CHECKING:
    from rich.table import Table

    from fedhlm_fleet.console.wiring import Watch

OPTIONS: Final = ("--broker", "--wait", "--json", "--config", "--help")
HEARD_S: Final = 1.5  # in which the broker's retained messages come

app = App(name="fleet", help="List the parts of a fleet.")


@app.command(name="list")
def list_(
    *keys: Keys,
    broker: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    wait: Seconds = HEARD_S,
    json: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    config: Path | None = None,
) -> int:
    """List clusters with their edges and agents: presence, version, model, threshold, and error per token at most.

    Agents tell their thresholds and errors in reports and with each text, so wait longer to see them.
    Every configuration key is also a flag: --broker.ca ca.pem.
    Exit code 1: no part has announced itself, or one is missing, offline or out of reach.

    Parameters
    ----------
    broker
        URL of a broker; may be given several times, once for each cluster's. By default broker.url.
    wait
        Seconds to listen.
    json
        Print one JSON object instead of the table: clusters, and what is missing.
    config
        TOML file.
    """
    import json as jsons

    from rich.console import Console

    from fedhlm_fleet.console.wiring import watch_of

    found = asyncio.run(_heard(watch_of("fleet", broker, config, parse_keys(keys, OPTIONS)), wait))
    clusters = clusters_of(found)
    if json:
        print(jsons.dumps({"clusters": clusters, "missing": found["missing"]}))
    else:
        terminal = Console(highlight=False)
        if clusters:
            terminal.print(_table(clusters, found["confidence"]))
        wrong = [
            f"{part['cluster']} {part['name']}: {part['wrong']}".lstrip() for part in found["parts"] if part["wrong"]
        ]
        nothing = [] if clusters else ["no part has announced itself on this broker"]
        for line in [*nothing, *wrong, *found["missing"]]:
            terminal.print(line, markup=False)
    return 0 if clusters and not found["missing"] and not any(part["wrong"] for part in found["parts"]) else 1


async def _heard(watch: "Watch", wait_s: float) -> dict[str, Any]:
    from fedhlm_fleet.console.feeds import LiveFeed
    from fedhlm_fleet.console.wiring import state_maker

    feed = LiveFeed(state_maker(watch.settings)())
    async with asyncio.TaskGroup() as group:
        listening = group.create_task(feed.listen(watch.brokers, f"fleet-{secrets.token_hex(4)}"))
        await feed.connected.wait()
        await asyncio.sleep(wait_s)
        listening.cancel()
    return feed.snapshot()


def clusters_of(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the clusters of a snapshot of `ConsoleState`, each with its parts; the cloud is in the cluster "".

    `threshold` is tau and `error` the limit of the error per token: of a cluster by its edge's last round, of an agent
    by its last report or text. None: not heard.
    """
    rounds = {cluster["cluster"]: cluster for cluster in state["clusters"]}
    found: dict[str, dict[str, Any]] = {}
    for part in state["parts"]:
        name = part["cluster"]
        learnt = rounds.get(name, {})
        cluster = found.setdefault(
            name,
            {
                "cluster": name,
                "round": learnt.get("round"),
                "members": learnt.get("members"),
                "threshold": max(learnt.get("tau", {}).values(), default=None),
                "error": learnt["errors"][0]["limit"] if learnt.get("errors") else None,
                "parts": [],
            },
        )
        shown = {key: part[key] for key in ("name", "role", "online", "software", "model", "link", "wrong", "remedy")}
        cluster["parts"].append(shown | {"threshold": part.get("tau"), "error": part.get("risk_limit")})
    return list(found.values())


def _table(clusters: list[dict[str, Any]], confidence: float) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fedhlm.protocol.roles import ROLES
    from fedhlm_fleet.console.screen import shown_limit, shown_tau

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("cluster", "part", "state", "version", "model"):
        table.add_column(heading)
    for heading in ("tau", f"error <=, {confidence:.0%}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cluster in clusters:
        for part in cluster["parts"]:
            whole = {} if ROLES[part["role"]].drafts else cluster
            tau, error = (part[key] if part[key] is not None else whole.get(key) for key in ("threshold", "error"))
            table.add_row(
                cluster["cluster"],
                part["name"],
                Text("online") if part["online"] else Text("offline", "bright_red"),
                part["software"].removeprefix("fedhlm "),
                part["model"],
                shown_tau(tau),
                shown_limit(error),
            )
    return table
