"""Replay an edge's journal: give the same messages to today's service and compare what it sends.

The journal says what timers did: when a batch or digest left, when a round closed, when the edge announced itself.
The content of these messages is decided again.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from edge_broker import journal
from edge_broker.service import EdgeService, federation_file, memory_file
from edge_broker.wiring import edge_of
from fedhlm import settings
from fedhlm.bus.party import Received
from fedhlm.errors import ProtocolError
from fedhlm.process.runtime import Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import (
    Contribution,
    Escalation,
    EscalationBatch,
    Learned,
    Note,
    Presence,
    UncertainTokens,
    Verdict,
    VerdictBatch,
    VerifiedTokens,
)
from fedhlm.settings import Config
from fedhlm.telemetry import Counters
from fedhlm_traces.check.captured import Captured, CapturingBus, at_once, recorded_store
from fedhlm_traces.check.compare import same
from fedhlm_traces.check.divergence import CheckOutcome, Divergence
from fedhlm_traces.check.explain import Doubts, evidence, federation_words, place_of, plural, verdict_words
from fedhlm_traces.check.journals import PartJournal
from fedhlm_traces.spelling import Spell, by_number

_DUE_SLACK_S: Final = 1e-6
_BY_TIMER: Final = (topics.CLOUD_VERIFY, topics.NEIGHBOUR, topics.EDGE_STATUS, topics.ROSTER)
_NOTHING: Final = "nothing of the kind"

Name = tuple[Any, ...]
"""What a decision is about; the same in both runs."""


class Decision(NamedTuple):
    """One decision: its subject, its description, and a fact to compare."""

    where: str
    words: str
    fact: Any


class ReplayStep(NamedTuple):
    """An incoming message or a timer's action, and the messages sent because of it."""

    trigger: Note
    outputs: list[Note]


def check_edge(life: PartJournal, spell: Spell = by_number) -> CheckOutcome:
    """Replay this edge's decisions; `spell` makes token ids readable.

    A journal without its beginning, or with settings of another version, is skipped.
    """
    outcome = CheckOutcome(skipped=[life.complaint] if life.complaint else [])
    if life.number or not life.notes or life.notes[0].kind != "state":
        outcome.skipped.append(f"{life.name}: a journal without the beginning of its life cannot be replayed")
        return CheckOutcome(skipped=outcome.skipped, notes=life.notes)
    try:
        born = msgspec.msgpack.decode(life.notes[0].data, type=journal.EdgeStart)
        replay = _EdgeReplay(life, born, outcome, spell)
    except (msgspec.DecodeError, UnicodeDecodeError, ProtocolError) as exc:
        outcome.skipped.append(f"{life.name}: its state is not one of this version ({exc})")
        return CheckOutcome(skipped=outcome.skipped, notes=life.notes)
    replay.replay()
    return outcome


class _EdgeReplay:
    def __init__(self, life: PartJournal, born: journal.EdgeStart, outcome: CheckOutcome, spell: Spell) -> None:
        self._life = life
        self._outcome = outcome
        self._spell = spell
        self._now_s = life.notes[0].at_s
        self._wall_ms = 0
        self._expected: list[Note] = []  # messages recorded in the current step
        self._doubts = Doubts()
        self._spoiled: set[Name] = set()  # already divergent: consequences are not reported
        self._bus = CapturingBus(self._has_room)
        self._service = self._made(born)
        self._parties = list(dict.fromkeys((self._service.down, self._service.up)))

    def _made(self, born: journal.EdgeStart) -> EdgeService:
        files = {federation_file(born.cluster): born.members, memory_file(born.cluster): born.memory}
        runtime = Runtime(
            Counters(), wall_s=lambda: self._wall_ms / 1000.0, clock_s=lambda: self._now_s, store=recorded_store(files)
        )
        config = Config(
            broker=settings.Broker(root=born.down_root),
            cluster=settings.Cluster(name=born.cluster),
            edge=settings.Edge(
                upstream=settings.Broker(root=born.up_root), memory=born.memory_max, batch_max=born.batch_max
            ),
            federation=born.federation,
        )
        # One bus carries every message of a run. If the roots are equal, the messages are too.
        open_bus = self._bus.opened
        open_up = None if born.down_root == born.up_root else open_bus
        return edge_of(config, runtime, open_down=open_bus, open_up=open_up, bridges=born.bridges)

    def _has_room(self, number: int) -> bool:
        """Whether the bus had room for the message, as recorded."""
        return number >= len(self._expected) or self._expected[number].kind == "sent"

    def replay(self) -> None:
        """Go through the journal once."""
        steps = self._steps()
        self._outcome.notes.append(self._life.notes[0])
        for number, step in enumerate(steps):
            self._now_s = step.trigger.at_s
            self._expected = step.outputs
            self._compare(step, self._act(step), last=number == len(steps) - 1)

    # Steps

    def _steps(self) -> list[ReplayStep]:
        steps: list[ReplayStep] = []
        for note in self._life.notes[1:]:
            if note.kind in ("sent", "dropped"):
                row = self._row(note.subject)
                if row is not None and row[0] in _BY_TIMER:
                    steps.append(ReplayStep(note, [note]))
                elif steps:
                    steps[-1].outputs.append(note)
            elif note.kind in ("heard", "round"):
                steps.append(ReplayStep(note, []))
        return steps

    def _row(self, name: str) -> tuple[topics.Topic, dict[str, str]] | None:
        rows = (topics.lookup(name, party.root) for party in self._parties)
        return next((row for row in rows if row is not None), None)

    def _read(self, note: Note) -> Received:
        error = ProtocolError("")
        for party in self._parties:
            try:
                return party.read(note.subject, note.data)
            except ProtocolError as exc:
                error = exc
        raise error

    def _act(self, step: ReplayStep) -> list[Captured]:
        """Run this step in today's service; return what it sends."""
        trigger = step.trigger
        for note in step.outputs[:1] or [trigger]:
            self._wall_ms = _sent_ms(note, self._wall_ms)
        if trigger.kind == "round":
            self._check_due()
            at_once(self._service.end_round())
        elif trigger.kind == "heard":
            try:
                received = self._read(trigger)
            except ProtocolError as exc:
                self._report(f"message on {trigger.subject}", "taken in", "refused", f"{exc}")
            else:
                at_once(self._service.handle(received))
                if isinstance(received.message, UncertainTokens):
                    self._doubts.take(received.levels["agent"], received.message)
        else:
            row = self._row(trigger.subject)
            act = {
                topics.CLOUD_VERIFY: self._service.send_batch,
                topics.NEIGHBOUR: self._service.send_digest,
                topics.EDGE_STATUS: self._service.announce,
                topics.ROSTER: self._service.send_roster,
            }
            if row is not None:
                at_once(act[row[0]]())
        return self._bus.take()

    def _check_due(self) -> None:
        self._outcome.decisions += 1
        members = self._service.members
        if not members.due(self._now_s + _DUE_SLACK_S):
            due_s = members.due_s()
            self._report(
                f"round {members.round + 1}",
                "closed",
                "not due yet",
                f"{plural(members.fresh, 'new contribution')} of {members.federation.round_updates}, "
                + ("nothing has come in" if due_s is None else f"time is up in {due_s - self._now_s:.3f} s"),
            )

    # Comparison

    def _compare(self, step: ReplayStep, made: Sequence[Captured], *, last: bool) -> None:
        then = dict(self._decisions([(note.subject, note.data) for note in step.outputs]))
        now = dict(self._decisions([(sent.name, sent.payload) for sent in made]))
        self._write(step, made)
        block = self._block_heard(step.trigger)
        self._outcome.decisions += max(len(then.keys() | now.keys()), block is not None)
        if last and not now.keys() <= then.keys():
            self._outcome.skipped.append("the journal ends before what its last input led to")
            now = {name: decision for name, decision in now.items() if name in then}
        clean = True
        for name in dict.fromkeys((*then, *now)):
            a, b = then.get(name), now.get(name)
            if a is not None and b is not None and same(a.fact, b.fact):
                continue
            clean = False
            if name[1:] in self._spoiled:
                continue
            self._spoiled.add(name[1:])
            self._tell(step, name, a, b)
        if clean and list(then) != list(now):
            where = next(iter(then.values())).where
            order = [", ".join(str(name[0]) for name in names) for names in (then, now)]
            self._report(f"{where} and what was sent with it", order[0], order[1], "the order has changed")

    def _block_heard(self, trigger: Note) -> Escalation | None:
        message = self._read(trigger).message if trigger.kind == "heard" and self._readable(trigger) else None
        return message if isinstance(message, Escalation) else None

    def _readable(self, note: Note) -> bool:
        try:
            self._read(note)
        except ProtocolError:
            return False
        return True

    def _write(self, step: ReplayStep, made: Sequence[Captured]) -> None:
        """Write today's journal; a message with equal content keeps its recorded form and header."""
        notes = self._outcome.notes
        if step.trigger.kind in ("heard", "round"):
            notes.append(step.trigger)
        for i, sent in enumerate(made):
            old = step.outputs[i] if i < len(step.outputs) else None
            if old is None or old.subject != sent.name or not _same_message(old.data, sent.payload):
                old = Note(step.trigger.at_s, "sent" if sent.room else "dropped", sent.name, sent.payload)
            notes.append(old)

    def _decisions(self, sent: Sequence[tuple[str, bytes]]) -> Iterator[tuple[Name, Decision]]:
        """The decisions in the messages of one step.

        The first word of a name is its kind, the rest its subject.
        """
        copies: Counter[Name] = Counter()
        for name, payload in sent:
            try:
                row = self._row(name)
                if row is None:
                    continue
                found = list(self._decided(row[0], row[1], topics.decode_for(row[0], payload)))
            except ProtocolError as exc:
                found = [
                    (("message", name), Decision(f"message on {name}", f"not one of this version: {exc}", payload))
                ]
            for key, decision in found:
                yield (*key, copies[key]), decision
                copies[key] += 1

    def _decided(self, topic: topics.Topic, levels: Mapping[str, str], message: Any) -> Iterator[tuple[Name, Decision]]:
        match message:
            case Presence():
                return
            case Verdict() as v:
                block = (levels["agent"], v.session, v.epoch, v.base)
                yield ("verdict", *block), Decision(place_of(*block), verdict_words(v), v)
            case EscalationBatch():
                for agent, e in ((item.agent, item.escalation) for item in message.items):
                    block = (agent, e.session, e.epoch, e.base)
                    yield ("batch", *block), Decision(place_of(*block), "sent to the cloud", e)
            case VerifiedTokens():
                whom = "agents" if topic is topics.KNOWN else "neighbours"
                for item in message.items:
                    words = f"{self._spell(item.token)} is sent to the {whom}"
                    yield (whom, item.key, item.token), Decision(self._doubts.place(item.key), words, message.space)
            case Learned() | Contribution():
                what = "state for the agents" if isinstance(message, Learned) else "contribution to the cloud"
                yield (what,), Decision(f"round {message.round}", what, message)
            case _:
                about = levels.get("agent", getattr(message, "agent", ""))
                what = type(message).__name__.lower()
                yield (what, about), Decision(f"{what} of agent {about}", f"sent on {topic.pattern}", message)

    # Words

    def _tell(self, step: ReplayStep, name: Name, then: Decision | None, now: Decision | None) -> None:
        known = then or now or Decision("", "", None)
        recorded, decided = (d.words if d is not None else _NOTHING for d in (then, now))
        match name[0]:
            case "verdict":
                escalation = self._block_heard(step.trigger)
                absent = "not answered here" if escalation is not None else "not relayed"
                recorded, decided = (d.words if d is not None else absent for d in (then, now))
                why = self._why_verdict(name[1], escalation, known.fact)
            case "batch":
                recorded, decided = (d.words if d is not None else "not sent" for d in (then, now))
                why = self._why_batch(name[1], known.fact)
                if then is not None and now is not None:
                    why = "its content has changed"
            case "agents" | "neighbours":
                recorded, decided = (d.words if d is not None else "not told" for d in (then, now))
                why = "the space of the keys has changed" if then and now else self._why_known(step, name[1])
            case "state for the agents" | "contribution to the cloud":
                recorded, decided = federation_words(then and then.fact, now and now.fact)
                members = self._service.members
                why = (
                    f"the same contributions of {plural(len(members), 'member')} are put together otherwise: "
                    f"weight_cap {members.federation.weight_cap:g}, trim {members.federation.trim:g}"
                )
            case _:
                why = f"after {step.trigger.kind} {step.trigger.subject}".rstrip()
        self._report(known.where, recorded, decided, why)

    def _why_verdict(self, agent: str, escalation: Escalation | None, verdict: Verdict) -> str:
        if escalation is not None:
            state = self._service.agents.get(agent)
            fingerprint = (state.fingerprint if state is not None else None) or self._service.upstream
            reason = evidence(self._service.memory, agent, escalation, fingerprint=fingerprint, spell=self._spell)
            return f"{self._why_epoch(agent, escalation.session, escalation.epoch)}; {reason}"
        return self._why_epoch(agent, verdict.session, verdict.epoch)

    def _why_batch(self, agent: str, escalation: Escalation) -> str:
        return self._why_epoch(agent, escalation.session, escalation.epoch)

    def _why_epoch(self, agent: str, session: int, epoch: int) -> str:
        newest = self._service.relay.newest_epoch(agent, session)
        if newest is None:
            return f"its epoch is {epoch}, and no block of its session was received"
        age = "the newest of its session" if epoch >= newest else f"older than the session's newest, {newest}"
        return f"its epoch is {epoch}, {age}"

    def _why_known(self, step: ReplayStep, key: bytes) -> str:
        if step.trigger.kind != "heard":
            return "the edge has learnt something else, or it was sent before"
        message = self._read(step.trigger).message
        doubt = self._doubts.of(key)
        if not isinstance(message, VerdictBatch) or doubt is None:
            return "no doubt with this key was received"
        for v in (item.verdict for item in message.items if item.agent == doubt.agent):
            if v.session == doubt.session and v.base <= doubt.position:
                return f"the cloud's verdict on base {v.base}: {verdict_words(v)}"
        return "the cloud's verdicts are not about this place"

    def _report(self, where: str, recorded: str, now: str, why: str) -> None:
        self._outcome.diverge(Divergence("edge", self._life.name, self._now_s, where, recorded, now, why))


def _sent_ms(note: Note, otherwise: int) -> int:
    try:
        return decode(note.data).sent_ms
    except ProtocolError:
        return otherwise


def _same_message(a: bytes, b: bytes) -> bool:
    if a == b:
        return True
    try:
        return same(decode(a), decode(b))
    except ProtocolError:
        return False
