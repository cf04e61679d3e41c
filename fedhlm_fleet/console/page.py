"""Runs the console: what it hears, the page that shows it, and the prompts that the page may send."""

import asyncio
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from fedhlm.client import Client
from fedhlm.process.notify import Notifier
from fedhlm_doors.console import Ask, ConsolePage, TypedPrompt
from fedhlm_doors.serving import page
from fedhlm_fleet.console.feeds import LiveFeed, RecordedFeed
from fedhlm_fleet.console.wiring import Watch, state_maker
from fedhlm_traces.file import read

NAME: Final = "console"
ANSWER_S: Final = 120.0


async def show(
    watch: Watch,
    trace: Path | None,
    listen: str,
    *,
    opened: Callable[[str], object],
    allow_prompts: bool = False,
    published: bool = False,
    notifier: Notifier | None = None,
) -> int:
    """Serve the page until cancelled, of the fleet or of a recording. `opened` is called with its address.

    `published` lets in other addresses than loopback ones, see `fedhlm_doors.serving.page`. `notifier` is told which
    brokers are connected.

    Raises:
        ConfigError: the address cannot be used.
        BusError: a broker refuses the connection for good.
    """
    make = state_maker(watch.settings)
    recorded = None if trace is None else RecordedFeed(read(trace), make)
    live = LiveFeed(make()) if recorded is None else None
    async with AsyncExitStack() as stack:
        ask = None
        if allow_prompts:
            ask = asker(await stack.enter_async_context(Client(watch.brokers[0], name=NAME)))
        shown = ConsolePage(recorded or live or LiveFeed(make()), ask)
        opened(await stack.enter_async_context(page(shown.app(), listen, key="--listen", published=published)))
        if live is None:
            await asyncio.Event().wait()
        else:
            await live.listen(watch.brokers, f"{NAME}-{secrets.token_hex(4)}", notifier)
    return 0


def asker(client: Client, *, answer_s: float = ANSWER_S) -> Ask:
    """Return what asks an agent through a client, for the page's form. An answer may take `answer_s` seconds."""

    async def ask(wanted: TypedPrompt) -> None:
        async with client.ask(wanted.agent, wanted.text, cluster=wanted.cluster, deadline_s=answer_s) as answer:
            await answer.whole()

    return ask
