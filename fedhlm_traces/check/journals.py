"""Collect the journals in a recording: every life of every part, with its notes in order.

The notes' running numbers put duplicates and reordered messages right. A gap is reported and ends the notes, because
later decisions depend on earlier ones.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from fedhlm.errors import ProtocolError
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Journal, Note
from fedhlm.protocol.roles import PartRole
from fedhlm_traces.file import Record

_PARTS: Final[dict[str, PartRole]] = {
    topics.AGENT_JOURNAL.pattern: "agent",
    topics.EDGE_JOURNAL.pattern: "edge",
    topics.CLOUD_JOURNAL.pattern: "cloud",
}


class PartJournal(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a part: its notes up to its end or to the first gap.

    `name` is the sender. `levels` are those of the topic where the journal was first seen, as an agent may move.
    `number` is the first note's: not 0 if the recording begins in the middle of the life. `complaint` says what is
    missing, or is empty.
    """

    part: PartRole
    name: str
    levels: dict[str, str]
    life: int
    notes: list[Note]
    number: int = 0
    complaint: str = ""

    @property
    def whole(self) -> bool:
        """Whether no note is missing.

        Notes that a killed part had not published are unknown.
        """
        return not self.complaint


class _Pieces:
    """The messages of one life, in any order."""

    def __init__(self, part: PartRole, name: str, levels: dict[str, str]) -> None:
        self.part, self.name, self.levels = part, name, levels
        self.notes: dict[int, Note] = {}

    def life(self, number: int) -> PartJournal:
        first = min(self.notes)
        end = first
        notes = []
        while end in self.notes:
            notes.append(self.notes[end])
            end += 1
        after = len(self.notes) - len(notes)
        complaints = []
        if first:
            complaints.append(f"the recording begins in the middle of this life: notes 0 to {first - 1} are missing")
        if after:
            again = min(n for n in self.notes if n > end)
            complaints.append(
                f"notes {end} to {again - 1} are missing: what came after them, {after} notes, was passed over"
            )
        return PartJournal(
            part=self.part,
            name=self.name,
            levels=self.levels,
            life=number,
            notes=notes,
            number=first,
            complaint="; ".join(complaints),
        )


def lives(records: Iterable[Record], root: str = topics.DEFAULT_ROOT) -> list[PartJournal]:
    """Return every life whose journal is in the records, in order of first appearance.

    Messages on a journal's topic that are no journal, and journals without notes, are skipped.
    """
    found: dict[tuple[PartRole, str, int], _Pieces] = {}
    for record in records:
        if not record.topic.endswith("/journal"):
            continue
        row = topics.lookup(record.topic, root)
        if row is None or row[0].pattern not in _PARTS:
            continue
        topic, levels = row
        try:
            message = topics.decode_for(topic, record.payload)
        except ProtocolError:
            continue
        if not isinstance(message, Journal) or not message.notes:
            continue
        part = _PARTS[topic.pattern]
        key = (part, message.sender, message.life)
        pieces = found.setdefault(key, _Pieces(part, message.sender, levels))
        for number, note in enumerate(message.notes, start=message.number):
            pieces.notes.setdefault(number, note)
    return [pieces.life(life) for (_, _, life), pieces in found.items()]
