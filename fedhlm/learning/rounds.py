"""A federation in a running part: contributions are counted, rounds closed when due, lists of members kept current."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from fedhlm.bus.interface import Bus
from fedhlm.bus.party import Party
from fedhlm.errors import BusError
from fedhlm.learning.federation import Members, Taken
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

NOT_CLOSED_S: Final = 10.0  # between attempts to close a round
ROSTER_S: Final = 5.0  # between two lists of members


class Rounds:
    """What a running part does around its `members`: it counts what they send, and closes their rounds.

    `party` is the endpoint towards the members. `clock_s` is the part's monotonic clock. Set `changed` whenever the
    pool has changed, and `roster_due` whenever the list of members has.
    """

    def __init__(self, members: Members, party: Party, clock_s: Callable[[], float]) -> None:
        self.changed = asyncio.Event()
        self.roster_due = asyncio.Event()
        self._members = members
        self._party = party
        self._clock_s = clock_s

    def count(self, taken: Taken) -> None:
        """Count what became of a contribution."""
        counters = self._party.counters
        match taken:
            case "taken":
                counters.add("contributions")
                self.changed.set()
            case "duplicate":
                counters.add("duplicate_messages")
            case "refused":
                counters.add("refused_contributions")
        self.roster_due.set()

    def obeyed(self) -> None:
        """Count an order to forget a member that was obeyed."""
        self._party.counters.add("forgotten_members")
        self.changed.set()
        self.roster_due.set()

    def note_end(self) -> float:
        """Note and count that a round ends now. Return the time."""
        now_s = self._clock_s()
        if self._party.journal is not None:
            self._party.journal.note("round", at_s=now_s)
        self._party.counters.add("rounds")
        self._party.counters.set("round", self._members.round + 1)
        return now_s

    async def keep(self, publish: Callable[[], Awaitable[None]], send_roster: Callable[[], Awaitable[None]]) -> None:
        """Call `publish`, which closes a round, and `send_roster` when they are due, until cancelled."""
        async with asyncio.TaskGroup() as group:
            made = keep_rounds(
                self._members, bus=self._party.bus, changed=self.changed, clock_s=self._clock_s, publish=publish
            )
            group.create_task(made, name="rounds")
            group.create_task(keep_roster(self.roster_due, send_roster), name="roster")


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
