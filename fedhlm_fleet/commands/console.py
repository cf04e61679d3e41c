"""`fedhlm console`: show a fleet, or a recording of one, as a page in a browser."""

import asyncio
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from fedhlm_fleet.commands.common import Keys, needing, parse_keys

if TYPE_CHECKING:
    from fedhlm_fleet.console.wiring import Watch

LISTEN: Final = "127.0.0.1:8808"
OPTIONS: Final = ("--broker", "--trace", "--listen", "--config", "--help")


def console(
    *keys: Keys,
    broker: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    trace: Path | None = None,
    listen: str = LISTEN,
    config: Path | None = None,
) -> int:
    """Show a fleet in a browser: its parts, texts as they are written and who decided each token, errors and events.

    It listens to the broker and publishes nothing; the certificate of an observer lets it see everything.
    Texts appear token by token if agent.model, or the shipped model, has the fleet's tokenizer.
    Every configuration key is also a flag: --broker.ca ca.pem.

    Parameters
    ----------
    broker
        URL of a broker; may be given several times, once for each cluster's. By default broker.url.
    trace
        Show this recording instead, at any second of it.
    listen
        HOST:PORT on which the page is served, on this machine only.
    config
        TOML file.
    """
    from fedhlm_fleet.console.wiring import watch_of

    watch = watch_of("console", broker, config, parse_keys(keys, OPTIONS))
    with needing("serve"):
        return asyncio.run(_serve(watch, trace, listen))


async def _serve(watch: "Watch", trace: Path | None, listen: str) -> int:
    from fedhlm_doors.console import ConsolePage
    from fedhlm_doors.serving import page
    from fedhlm_fleet.console.feeds import LiveFeed, RecordedFeed
    from fedhlm_fleet.console.wiring import state_maker
    from fedhlm_traces.file import read

    make = state_maker(watch.settings)
    recorded = None if trace is None else RecordedFeed(read(trace), make)
    live = LiveFeed(make()) if recorded is None else None
    async with page(ConsolePage(recorded or live or LiveFeed(make())).app(), listen, key="--listen") as address:
        print(f"open {address}", flush=True)
        if live is not None:
            await live.listen(watch.brokers, f"console-{secrets.token_hex(4)}")
        else:
            await asyncio.Event().wait()
    return 0
