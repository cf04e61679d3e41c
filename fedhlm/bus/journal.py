"""A part's journal: what it took in and what it decided, in its own order, published in pieces (docs/checking.md).

With it `fedhlm replay --check` feeds the same inputs to the same code later, without broker, model or clock. Notes that
the bus has no room for are lost, and the running number of the next ones says so.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from fedhlm.bus.party import Party
from fedhlm.protocol.messages import MAX_NOTES, Journal, Kind, Note
from fedhlm.protocol.topics import Topic

FLUSH_S: Final = 0.5
FLUSH_BYTES: Final = 64 * 1024
WAITING_BYTES: Final = 8 * 1024 * 1024


class Diary:
    """Notes of one life of a part, waiting to be published. `life` tells this life from the part's others."""

    def __init__(self, life: int, clock_s: Callable[[], float]) -> None:
        self.clock_s = clock_s
        self._life = life
        self._notes: deque[Note] = deque()
        self._bytes = 0
        self._first = 0  # number of the oldest waiting note
        self._full = asyncio.Event()

    def note(self, kind: Kind, subject: str = "", data: bytes = b"", *, at_s: float | None = None) -> None:
        """Add a note, at `at_s` on the part's monotonic clock (None: now); the oldest goes where too much waits."""
        self._notes.append(Note(self.clock_s() if at_s is None else at_s, kind, subject, data))
        self._bytes += len(data)
        while self._bytes > WAITING_BYTES:
            self._bytes -= len(self._notes.popleft().data)
            self._first += 1
        if self._bytes >= FLUSH_BYTES or len(self._notes) >= MAX_NOTES:
            self._full.set()

    async def flush(self, party: Party, topic: Topic, levels: dict[str, str]) -> None:
        """Publish all that waits under the topic's `levels`."""
        self._full.clear()
        while self._notes:
            notes: list[Note] = []
            taken = 0
            while self._notes and len(notes) < MAX_NOTES and taken < FLUSH_BYTES:
                notes.append(self._notes.popleft())
                taken += len(notes[-1].data)
            self._bytes -= taken
            number, self._first = self._first, self._first + len(notes)
            message = Journal(**party.stamp(), life=self._life, number=number, notes=tuple(notes))
            await party.send(topic, message, expiry_s=None, **levels)

    async def keep(self, party: Party, topic: Topic, levels: Callable[[], dict[str, str]]) -> None:
        """Publish every FLUSH_S seconds, and sooner where much is waiting; `levels` are the topic's at that moment."""
        try:
            while True:
                try:
                    async with asyncio.timeout(FLUSH_S):
                        await self._full.wait()
                except TimeoutError:
                    pass
                await self.flush(party, topic, levels())
        finally:
            await self.flush(party, topic, levels())  # the last words of a part that is stopped
