"""`fedhlm console`: show a fleet, or a recording of one, as a page in a browser."""

import asyncio
import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from fedhlm.errors import ConfigError
from fedhlm_fleet.commands.common import Keys, needing, parse_keys

if TYPE_CHECKING:
    from fedhlm.client import Client
    from fedhlm_doors.console import Ask, TypedPrompt
    from fedhlm_fleet.console.wiring import Watch

NAME: Final = "console"
ANSWER_S: Final = 120.0
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
        return asyncio.run(_serve(watch, trace, listen, allow_prompts=allow_prompts))


async def _serve(watch: "Watch", trace: Path | None, listen: str, *, allow_prompts: bool) -> int:
    from fedhlm_doors.console import ConsolePage
    from fedhlm_doors.serving import page
    from fedhlm_fleet.console.feeds import LiveFeed, RecordedFeed
    from fedhlm_fleet.console.wiring import state_maker
    from fedhlm_traces.file import read

    make = state_maker(watch.settings)
    recorded = None if trace is None else RecordedFeed(read(trace), make)
    live = LiveFeed(make()) if recorded is None else None
    async with AsyncExitStack() as stack:
        ask = None
        if allow_prompts:
            from fedhlm.client import Client

            ask = asker(await stack.enter_async_context(Client(watch.brokers[0], name=NAME)))
        shown = ConsolePage(recorded or live or LiveFeed(make()), ask)
        address = await stack.enter_async_context(page(shown.app(), listen, key="--listen"))
        print(f"open {address}", flush=True)
        if live is not None:
            await live.listen(watch.brokers, f"console-{secrets.token_hex(4)}")
        else:
            await asyncio.Event().wait()
    return 0


def asker(client: "Client", *, answer_s: float = ANSWER_S) -> "Ask":
    """Return what asks an agent through a client, for the page's form. An answer may take `answer_s` seconds."""

    async def ask(wanted: "TypedPrompt") -> None:
        async with client.ask(wanted.agent, wanted.text, cluster=wanted.cluster, deadline_s=answer_s) as answer:
            await answer.whole()

    return ask
