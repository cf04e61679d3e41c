"""The journal of a part: its inputs and decisions in their order, published in pieces (docs/checking.md).

`fedhlm replay --check` feeds the inputs to the same code later, without broker, model or clock. Notes for which the
bus has no room are lost; a gap in the running numbers shows the loss.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from fedhlm.protocol.fields import MAX_NOTES, Kind
from fedhlm.protocol.messages import Note

FLUSH_S: Final = 0.5
FLUSH_BYTES: Final = 64 * 1024
WAITING_BYTES: Final = 8 * 1024 * 1024


class JournalPiece(NamedTuple):
    """Consecutive notes of one journal, as fields of a `Journal` message; `number` is the number of the first note."""

    life: int
    number: int
    notes: tuple[Note, ...]


class JournalWriter:
    """Collects the notes of one life of a part until they are published. `life` is the id of this life."""

    def __init__(self, life: int, clock_s: Callable[[], float]) -> None:
        self.clock_s = clock_s
        self._life = life
        self._notes: deque[Note] = deque()
        self._bytes = 0
        self._first = 0  # number of the oldest waiting note
        self._full = asyncio.Event()

    def note(self, kind: Kind, subject: str = "", data: bytes = b"", *, at_s: float | None = None) -> None:
        """Add a note with the time `at_s` on the part's monotonic clock, in seconds (None: now).

        The oldest notes are dropped when more than WAITING_BYTES are waiting.
        """
        self._notes.append(Note(self.clock_s() if at_s is None else at_s, kind, subject, data))
        self._bytes += len(data)
        while self._bytes > WAITING_BYTES:
            self._bytes -= len(self._notes.popleft().data)
            self._first += 1
        if self._bytes >= FLUSH_BYTES or len(self._notes) >= MAX_NOTES:
            self._full.set()

    async def due(self) -> None:
        """Return after FLUSH_S seconds, or as soon as enough notes for a full piece are waiting."""
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._full.wait()
        except TimeoutError:
            pass

    def pieces(self) -> Iterator[JournalPiece]:
        """Remove all waiting notes and yield them, oldest first, in pieces that fit into a message."""
        self._full.clear()
        while self._notes:
            notes: list[Note] = []
            size = 0
            while self._notes and len(notes) < MAX_NOTES and size < FLUSH_BYTES:
                notes.append(self._notes.popleft())
                size += len(notes[-1].data)
            self._bytes -= size
            number, self._first = self._first, self._first + len(notes)
            yield JournalPiece(self._life, number, tuple(notes))
