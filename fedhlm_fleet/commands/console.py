"""`fedhlm console`: show a fleet, or a recording of one, as a page in a browser."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter

from fedhlm.errors import ConfigError
from fedhlm_fleet.commands.common import Keys, needing, parse_keys

LISTEN: Final = "127.0.0.1:8808"
OPTIONS: Final = ("--broker", "--trace", "--listen", "--allow-prompts", "--config", "--help")


def console(
    *keys: Keys,
    broker: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    trace: Path | None = None,
    listen: str = LISTEN,
    allow_prompts: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    config: Path | None = None,
) -> int:
    """Show a fleet in a browser: its parts, texts as they are written and who decided each token, errors and events.

    It listens to the broker and publishes nothing, unless --allow-prompts is given; the certificate of an observer lets
    it see everything.
    Texts appear token by token if agent.target_tokenizer, agent.model or the shipped model has the fleet's tokenizer.
    Every configuration key is also a flag: --broker.ca ca.pem.

    Parameters
    ----------
    broker
        URL of a broker; may be given several times, once for each cluster's. By default broker.url.
    trace
        Show this recording instead, at any second of it.
    listen
        HOST:PORT on which the page is served, on this machine only.
    allow_prompts
        Let the page ask agents, through a second connection with the same certificate.
    config
        TOML file.
    """
    from fedhlm_fleet.console.wiring import watch_of

    if allow_prompts and (trace is not None or len(broker) > 1):
        raise ConfigError("--allow-prompts", True, "used with one --broker and without --trace")
    watch = watch_of("console", broker, config, parse_keys(keys, OPTIONS))
    with needing("serve"):
        from fedhlm_fleet.console.page import show

        opened = partial(print, "open", flush=True)
        return asyncio.run(show(watch, trace, listen, opened=opened, allow_prompts=allow_prompts))
