"""Read an agent's journal for its stories: each committed token's draft, its doubt and the gate's decision.

The functions are pure. A session with a missing note is not told at all, because its decisions would be attributed to
the wrong tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edge_agent.events import Committed, Judged
from edge_agent.journal import Began, Planned, unpack
from fedhlm.errors import ProtocolError
from fedhlm.protocol import codec, messages
from fedhlm.protocol.messages import Journal, Note


@dataclass
class ToldGeneration:
    """One generation as its agent noted it.

    `drafts` are keyed by the index of the generated token; tokens without a draft are absent.
    """

    session: int
    prompt_tokens: int
    request: str = ""
    tau: float | None = None
    drafts: dict[int, Judged] = field(default_factory=dict)


class JournalReader:
    """Reads the pieces of one agent's journal in order of arrival."""

    def __init__(self) -> None:
        self._next: tuple[int, int] | None = None  # life and number of the next note
        self._told: ToldGeneration | None = None
        self._tail: dict[int, Judged] = {}
        self._count = 0

    def read(self, journal: Journal) -> Iterator[ToldGeneration]:
        """Return the generations that ended in this piece."""
        place = journal.life, journal.number
        if self._next is not None and self._next[0] == place[0] and place[1] < self._next[1]:
            return  # a duplicate
        if place != self._next:
            self._told = None  # notes are missing
        self._next = journal.life, journal.number + len(journal.notes)
        for note in journal.notes:
            try:
                yield from self._take(note)
            except ProtocolError:
                self._told = None

    def _take(self, note: Note) -> Iterator[ToldGeneration]:
        if note.kind == "began":
            began = unpack(note.data, Began)
            self._told = ToldGeneration(began.session, len(began.prompt))
            self._tail, self._count = {}, 0
        told = self._told
        if told is None:
            return
        if note.kind == "plan":
            told.tau = unpack(note.data, Planned).tau
        elif note.kind == "judged":
            judged: Judged = unpack(note.data, Judged)
            self._tail[judged.position] = judged
        elif note.kind == "committed":
            self._commit(told, unpack(note.data, list[Committed]))
        elif note.kind == "sent" and not told.request:
            told.request = _request_of(note.data)
        elif note.kind == "ended":
            self._told = None
            yield told

    def _commit(self, told: ToldGeneration, tokens: list[Any]) -> None:
        for token in tokens:
            judged = self._tail.pop(told.prompt_tokens + self._count, None)
            if judged is not None:
                told.drafts[self._count] = judged
                if judged.token != token.token:
                    self._tail.clear()  # a rejection discards all later drafts
            self._count += 1


def _request_of(payload: bytes) -> str:
    """The request of an output; "" for any other message."""
    try:
        message = codec.decode(payload)
    except ProtocolError:
        return ""
    return message.request if isinstance(message, messages.Output) else ""
