"""Replay a cloud's journal: the same blocks to the same model, and the same sums to today's rounds.

Verdicts need the model that gave them; without it only the federation is replayed. The assignment of agents to
clusters depends on timers and threads, and is not compared.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec

from cloud_verifier import journal
from cloud_verifier.engine import Engine
from cloud_verifier.sessions import Key
from fedhlm.bus.party import Party, Stamp
from fedhlm.errors import ProtocolError, TraceError
from fedhlm.learning.federation import Members, mean_of_clusters
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.fields import MAX_CONTEXT
from fedhlm.protocol.messages import (
    Escalation,
    EscalationBatch,
    Fingerprint,
    Learned,
    Note,
    Presence,
    RoutedVerdict,
    Verdict,
    VerdictBatch,
)
from fedhlm.protocol.packing import id_bytes
from fedhlm.protocol.roles import ROLES, PartRole
from fedhlm.settings import Federation
from fedhlm.telemetry import Counters
from fedhlm_traces.check.captured import Captured, CapturingBus
from fedhlm_traces.check.compare import HEADER, same
from fedhlm_traces.check.divergence import CheckOutcome, Divergence
from fedhlm_traces.check.explain import federation_words, plural
from fedhlm_traces.check.journals import PartJournal
from fedhlm_traces.check.pairing import Said, paired
from fedhlm_traces.check.verdicts import Verifier, agree, no_sessions, service_of
from fedhlm_traces.file import Record
from fedhlm_traces.spelling import Spell, by_number

_DUE_SLACK_S: Final = 1e-6


class _Place(NamedTuple):
    """Position of an answer: the number of its note and the index of its item in the batch."""

    note: int
    item: int


def check_cloud(life: PartJournal, engine: Engine | None, spell: Spell = by_number) -> CheckOutcome:
    """Replay this cloud's decisions; without an `engine` only its federation.

    A journal without its beginning, or with settings of another version, is skipped.
    """
    outcome = CheckOutcome(skipped=[life.complaint] if life.complaint else [], notes=list(life.notes))
    if life.number or not life.notes or life.notes[0].kind != "state":
        outcome.skipped.append(f"{life.name}: a journal without the beginning of its life cannot be replayed")
        return outcome
    try:
        born = born_of(life)
        replay = _CloudReplay(life, born, engine, outcome, spell)
    except ProtocolError as exc:
        outcome.skipped.append(f"{life.name}: its state is not one of this version ({exc})")
        return outcome
    asyncio.run(replay.replay())
    return outcome


def born_of(life: PartJournal) -> journal.CloudStart:
    """Read how a cloud's life began.

    Raises:
        ProtocolError: the first note says something else, or is of another version.
    """
    try:
        return msgspec.msgpack.decode(life.notes[0].data, type=journal.CloudStart)
    except (msgspec.DecodeError, UnicodeDecodeError, IndexError) as exc:
        raise ProtocolError(f"the first note does not say how a cloud began: {exc}") from exc


class _CloudReplay:
    def __init__(
        self, life: PartJournal, born: journal.CloudStart, engine: Engine | None, outcome: CheckOutcome, spell: Spell
    ) -> None:
        self._life = life
        self._born = born
        self._outcome = outcome
        self._spell = spell
        self._verifier = None if engine is None else Verifier(born, engine)
        self._now_s = life.notes[0].at_s
        self._bus = CapturingBus(lambda _number: True)
        ahead_s = _ahead_s(life)
        self._service = service_of(
            born,
            engine,
            self._bus,
            sessions=no_sessions(born),
            clock_s=lambda: self._now_s,
            wall_s=lambda: self._now_s + ahead_s,
        )
        self._party = Party(bus=self._bus, stamp=Stamp(life.name, lambda: 0.0), counters=Counters(), root=born.root)
        self._closed: list[Captured] | None = None  # what closing a round sends now; None once it has been compared
        self._counts: Counter[str] = Counter()
        self._unsure: set[Key] = set()  # sessions with missing messages
        self._primed: set[Key] = set()
        self._answers = self._paired()
        self._now: dict[_Place, Verdict | None] = {}  # answers that differ now
        self._spoiled: set[Key] = set()

    async def replay(self) -> None:
        """Go through the journal once."""
        for number, note in enumerate(self._life.notes):
            self._now_s = note.at_s
            if note.kind == "heard":
                await self._hear(number, note)
            elif note.kind == "round":
                await self._close(note)
            elif note.kind in ("sent", "dropped"):
                await self._compare_sent(number, note)
        if self._closed:
            self._outcome.skipped.append("the journal ends before what its last round led to")
        self._rewrite()
        for count, words in (
            (self._counts["blocks"], f"not settled again: that takes the model {self._born.fingerprint.model!r}"),
            (self._counts["unanswered"], "without an answer in the journal: out of time, or at its end"),
            (self._counts["unsure"], "of sessions of which messages are missing, decided otherwise"),
        ):
            if count:
                self._outcome.skipped.append(f"{plural(count, 'block')} {words}")
        if self._counts["unasked"]:
            self._outcome.skipped.append(
                f"{plural(self._counts['unasked'], 'verdict')} on blocks that were not recorded before"
            )
        if self._counts["assignments"]:
            self._outcome.skipped.append(
                f"{plural(self._counts['assignments'], 'assignment')} to clusters: grouping is not decided again"
            )

    # Verdicts

    def _paired(self) -> dict[_Place, tuple[_Place, Verdict]]:
        """Find the recorded answer to each block; both are given by position."""
        asked: defaultdict[Key, list[tuple[_Place, Escalation]]] = defaultdict(list)
        given: defaultdict[Key, list[tuple[_Place, Verdict]]] = defaultdict(list)
        for number, note in enumerate(self._life.notes):
            if (sent := self._batch(note)) is not None:
                for item, a in enumerate(sent[1].items):
                    given[Key(sent[0], a.agent, a.verdict.session)].append((_Place(number, item), a.verdict))
            elif (heard := self._blocks(note)) is not None:
                for item, r in enumerate(heard[1].items):
                    asked[Key(heard[0], r.agent, r.escalation.session)].append((_Place(number, item), r.escalation))
        pairs: dict[_Place, tuple[_Place, Verdict]] = {}
        for key, answers in given.items():
            blocks = asked[key]
            found = paired(
                [Said((e.epoch, e.base), place.note) for place, e in blocks],
                [Said((v.epoch, v.base), place.note) for place, v in answers],
                lambda i, j, blocks=blocks, answers=answers: self._could(blocks[i][1], answers[j][1]),  # type: ignore[misc]
            )
            if len(found) < len(answers):
                self._counts["unasked"] += len(answers) - len(found)
                self._unsure.add(key)
            pairs.update({blocks[i][0]: answers[j] for i, j in found.items()})
        return pairs

    def _could(self, escalation: Escalation, verdict: Verdict) -> bool:
        """Whether an answer fits a block: the ids that it examined, and the tokens that it adds if asked."""
        ids = len(escalation.ids) // id_bytes(self._born.fingerprint.vocab_size)
        looked_at = len(verdict.target_probs) // 2
        goes_on = verdict.accepted < ids or escalation.extend > 0
        return verdict.status != "settled" or (
            looked_at == min(verdict.accepted + 1, ids) and bool(verdict.ids) == goes_on
        )

    def _blocks(self, note: Note) -> tuple[str, EscalationBatch] | None:
        try:
            received = self._party.read(note.subject, note.data) if note.kind == "heard" else None
        except ProtocolError:
            return None
        if received is None or not isinstance(received.message, EscalationBatch):
            return None
        return received.levels["cluster"], received.message

    def _batch(self, note: Note) -> tuple[str, VerdictBatch] | None:
        if note.kind not in ("sent", "dropped"):
            return None
        levels = topics.CLOUD_VERDICT.parse(note.subject, self._born.root)
        if levels is None:
            return None
        try:
            message = topics.decode_for(topics.CLOUD_VERDICT, note.data)
        except ProtocolError:
            return None
        return (levels["cluster"], message) if isinstance(message, VerdictBatch) else None

    async def _hear(self, number: int, note: Note) -> None:
        try:
            received = self._party.read(note.subject, note.data)
        except ProtocolError as exc:
            self._report(note.at_s, f"message on {note.subject}", "taken in", "refused", str(exc))
            return
        cluster = received.levels.get("cluster", "")
        match received.message:
            case EscalationBatch() as batch:
                for item, routed in enumerate(batch.items):
                    key = Key(cluster, routed.agent, routed.escalation.session)
                    await self._settle(_Place(number, item), note.at_s, key, routed.escalation)
            case _:
                await self._service.handle(received)  # nothing is sent because of it

    async def _settle(self, asked: _Place, at_s: float, key: Key, escalation: Escalation) -> None:
        if self._verifier is None:
            self._counts["blocks"] += 1
            return
        if escalation.prime is not None:
            self._primed.add(key)
        if asked not in self._answers:
            if await self._verifier.pass_over(key, escalation):
                self._outcome.decisions += 1
            else:
                self._counts["unanswered"] += 1
            return
        place, recorded = self._answers[asked]
        now = await self._verifier.settle(key, escalation, recorded)
        if not agree(recorded, now) and (key in self._unsure or key not in self._primed):
            self._counts["unsure"] += 1
            return
        self._outcome.decisions += 1
        if agree(recorded, now):
            return
        self._now[place] = now
        if key not in self._spoiled:
            self._spoiled.add(key)  # the rest of this session depends on it
            told = await self._verifier.told(key, escalation, recorded, now, self._spell)
            where = f"session {key.session} of {key.agent} in {key.cluster}, {told.where}"
            self._report(at_s, where, told.recorded, told.now, told.why)

    # Federation

    async def _close(self, note: Note) -> None:
        self._outcome.decisions += 1
        self._check_closed()
        members = self._service.coordinator.members
        if not members.due(note.at_s + _DUE_SLACK_S):
            why = f"{plural(members.fresh, 'new contribution')} of {members.federation.round_updates}"
            self._report(note.at_s, f"round {members.round + 1}", "closed", "not due yet", why)
        self._bus.take()
        await self._service.end_round()
        self._closed = self._bus.take()

    def _check_closed(self) -> None:
        """Compare what the last round sends now but did not send then."""
        for sent in self._closed or []:
            self._report(self._now_s, "end of a round", "nothing", f"sent on {sent.name}", "it is sent more often")
        self._closed = None

    async def _compare_sent(self, number: int, note: Note) -> None:
        if topics.ASSIGN.parse(note.subject, self._born.root) is not None:
            self._counts["assignments"] += 1
        if topics.CLOUD_FL_STATE.parse(note.subject, self._born.root) is None:
            return
        self._outcome.decisions += 1
        if self._closed is None:  # a new link to the broker: the state is announced again
            self._bus.take()
            await self._service.announce()
            made = self._bus.take()
        else:
            made, self._closed = self._closed[:1], self._closed[1:] or None
        then, now = _learned(note.data), _learned(made[0].payload) if made else None
        if then is None or (now is not None and same(then, now)):
            return
        if now is not None:
            header = {name: getattr(then, name) for name in HEADER}
            kept = encode(msgspec.structs.replace(now, **header))
            self._outcome.notes[number] = Note(note.at_s, note.kind, note.subject, kept)
        federation = self._born.federation
        why = (
            f"the same contributions of {plural(len(self._service.coordinator.members), 'cluster')} are put together "
            f"otherwise: weight_cap {federation.weight_cap:g}, trim {federation.trim:g}"
        )
        self._report(note.at_s, f"state of round {then.round}", *federation_words(then, now), why)

    # Output

    def _rewrite(self) -> None:
        """Replace recorded decisions by today's, and remove answers that no longer exist."""
        by_note: defaultdict[int, dict[int, Verdict | None]] = defaultdict(dict)
        for place, verdict in self._now.items():
            by_note[place.note][place.item] = verdict
        gone = set()
        for number, changed in by_note.items():
            note = self._life.notes[number]
            batch = self._batch(note)
            if batch is None:
                continue
            items = []
            for i, answered in enumerate(batch[1].items):
                verdict = changed.get(i, answered.verdict)
                if verdict is not None:
                    header = {name: getattr(answered.verdict, name) for name in HEADER}
                    items.append(RoutedVerdict(answered.agent, msgspec.structs.replace(verdict, **header)))
            message = msgspec.structs.replace(batch[1], items=tuple(items))
            self._outcome.notes[number] = Note(note.at_s, note.kind, note.subject, encode(message))
            if not items:
                gone.add(number)
        if gone:
            self._outcome.notes[:] = [note for i, note in enumerate(self._outcome.notes) if i not in gone]

    def _report(self, at_s: float, where: str, recorded: str, now: str, why: str) -> None:
        self._outcome.diverge(Divergence("cloud", self._life.name, at_s, where, recorded, now, why))


def _learned(payload: bytes) -> Learned | None:
    try:
        message = decode(payload)
    except ProtocolError:
        return None
    return message if isinstance(message, Learned) else None


def from_bus(
    records: Iterable[Record],
    part: PartRole,
    root: str = topics.DEFAULT_ROOT,
    *,
    eos_ids: frozenset[int] = frozenset(),
    context_max: int = MAX_CONTEXT,
) -> PartJournal:
    """Replay a cloud's verdicts without a journal, in the order in which the recorder saw blocks and answers.

    This is exact within a session, because a block waits for the previous answer. `eos_ids` and `context_max` are the
    model's, which the bus does not carry. Rounds of the federation are not compared: only journals say when they
    closed.

    Raises:
        TraceError: another part than the cloud, or the records do not say which model answers.
    """
    if not ROLES[part].verifies:
        raise TraceError(
            f"the recording must be made with telemetry.journal on: without its journal what the {part} took in is not known"
        )
    notes: list[Note] = []
    fingerprint: Fingerprint | None = None
    sender = "cloud"
    heard, sent = (topics.CLOUD_VERIFY, topics.CLOUD_VERDICT)
    for record in records:
        row = topics.lookup(record.topic, root)
        if row is None or row[0] not in (heard, sent, topics.CLOUD_STATUS):
            continue
        try:
            message = topics.decode_for(row[0], record.payload)
        except ProtocolError:
            continue
        if isinstance(message, Presence):
            fingerprint, sender = message.fingerprint or fingerprint, message.sender
        else:
            kind: Any = "heard" if row[0] is heard else "sent"
            notes.append(Note(record.at_s, kind, record.topic, record.payload))
    if fingerprint is None:
        raise TraceError(f"the recording lacks {topics.CLOUD_STATUS.name(root)}: the model that answered is unknown")
    born = journal.CloudStart(
        root=root,
        fingerprint=fingerprint,
        eos_ids=eos_ids,
        context_max=context_max,
        sessions_max=len(notes) + 1,
        batch_max=1,
        federation=Federation(),
        members=Members(Federation(), mean_of_clusters, of_clusters=True).snapshot(),
    )
    began_s = notes[0].at_s if notes else 0.0
    notes.insert(0, Note(began_s, "state", "cloud", msgspec.msgpack.encode(born)))
    return PartJournal(part="cloud", name=sender, levels={}, life=0, notes=notes)


def _ahead_s(life: PartJournal) -> float:
    """How far the wall clock was ahead of the journal's clock, in seconds, by the first message sent in this life."""
    for note in life.notes:
        if note.kind in ("sent", "dropped"):
            try:
                return decode(note.data).sent_ms / 1000.0 - note.at_s
            except ProtocolError:
                continue
    return 0.0
