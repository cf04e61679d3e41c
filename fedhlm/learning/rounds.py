"""The timers of a federation: a round is closed when it is due, and the list of members follows its changes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from fedhlm.bus.interface import Bus
from fedhlm.errors import BusError
from fedhlm.learning.federation import Members
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

NOT_CLOSED_S: Final = 10.0  # between attempts to close a round
ROSTER_S: Final = 5.0  # between two lists of members


async def keep_rounds(
    members: Members,
    *,
    bus: Bus,
    changed: asyncio.Event,
    clock_s: Callable[[], float],
    publish: Callable[[], Awaitable[None]],
) -> None:
    """Call `publish`, which closes the round, whenever a round is due.

    The caller sets `changed` after each contribution. Rounds wait for the connection, so that a restarted part receives
    its own retained state before it writes a new one.
    """
    while True:
        due_s = members.due_s()
        if due_s is not None and clock_s() >= due_s:
            try:
                await bus.wait_connected()
            except BusError:  # the bus is closed; the task that reads from it raises the reason
                return
            number = members.round
            await publish()
            if members.round == number:
                # The round would be due again at once, without end.
                warn_once(log, "not closed", "round %d was published and not closed", number + 1)
                await asyncio.sleep(NOT_CLOSED_S)
            continue
        changed.clear()
        try:
            async with asyncio.timeout(None if due_s is None else due_s - clock_s()):
                await changed.wait()
        except TimeoutError:
            continue


async def keep_roster(changed: asyncio.Event, publish: Callable[[], Awaitable[None]]) -> None:
    """Call `publish` whenever the caller has set `changed`, but at most once in ROSTER_S seconds."""
    while True:
        await changed.wait()
        changed.clear()
        await publish()
        await asyncio.sleep(ROSTER_S)
