"""`fedhlm top`: a fleet in a terminal, as it works."""

import asyncio
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from fedhlm_fleet.commands.common import Keys, parse_keys

if TYPE_CHECKING:
    from fedhlm_fleet.console.wiring import Watch

OPTIONS: Final = ("--broker", "--once", "--config", "--help")
HEARD_S: Final = 1.5  # in which the broker's retained messages come
REDRAW_S: Final = 0.5


def top(
    *keys: Keys,
    broker: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    once: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    config: Path | None = None,
) -> int:
    """Show a fleet in the terminal as it works: parts, who decides the tokens, the newest texts, and events.

    Ctrl-C ends it. Without a terminal it prints one screen, as --once does.
    Every configuration key is also a flag: --broker.ca ca.pem.

    Parameters
    ----------
    broker
        URL of a broker; may be given several times, once for each cluster's. By default broker.url.
    once
        Print one screen and exit.
    config
        TOML file.
    """
    from fedhlm_fleet.console.wiring import watch_of

    return asyncio.run(_show(watch_of("top", broker, config, parse_keys(keys, OPTIONS)), once=once))


async def _show(watch: "Watch", *, once: bool) -> int:
    from rich.console import Console
    from rich.live import Live

    from fedhlm_fleet.console.feeds import LiveFeed
    from fedhlm_fleet.console.screen import screen
    from fedhlm_fleet.console.wiring import state_maker

    feed, terminal = LiveFeed(state_maker(watch.settings)()), Console(highlight=False)
    async with asyncio.TaskGroup() as group:
        listening = group.create_task(feed.listen(watch.brokers, f"top-{secrets.token_hex(4)}"))
        await feed.connected.wait()
        await asyncio.sleep(HEARD_S)
        if once or not terminal.is_terminal:
            terminal.print(screen(feed.snapshot()))
            listening.cancel()
            return 0
        with Live(console=terminal, screen=True, auto_refresh=False) as live:
            while True:
                live.update(screen(feed.snapshot()), refresh=True)
                await asyncio.sleep(REDRAW_S)
