"""Replay an agent's journal through today's code and compare the decisions.

There is no broker, model or clock: drafts, verdicts and times come from the journal. Everything else is
`edge_agent.core`.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from edge_agent import journal
from edge_agent.core import LEARNER_FILE, AgentCore
from edge_agent.events import Committed, Event, Judged
from edge_agent.growth import TreeRequest
from edge_agent.model import Drawn, TreeDraft
from edge_agent.wiring import SmallModel, agent_of
from fedhlm import choices, settings
from fedhlm.bus.journal import JournalWriter
from fedhlm.errors import ProtocolError
from fedhlm.learning.thresholds import KEEP_NONE
from fedhlm.process.runtime import Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.fields import FinishReason, Kind
from fedhlm.protocol.messages import Escalation, Note, Prompt, Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Config
from fedhlm.telemetry import Counters
from fedhlm_traces.check.captured import CapturingBus, recorded_store
from fedhlm_traces.check.compare import facts_of, same
from fedhlm_traces.check.divergence import CheckOutcome, Divergence
from fedhlm_traces.check.journals import PartJournal
from fedhlm_traces.spelling import Spell, by_number

DECISIONS: Final = frozenset({"plan", "judged", "sent", "dropped", "committed", "ended"})
# What the agent itself sends. Outputs come from its service, and profiles are random samples.
SENDS: Final = (topics.ESCALATE, topics.PEER, topics.FL_UPDATE, topics.AGENT_STATUS)


def check_agent(life: PartJournal, spell: Spell = by_number) -> CheckOutcome:
    """Replay this agent's decisions; `spell` makes token ids readable."""
    try:
        return asyncio.run(_AgentReplay(life, spell).replay())
    except ProtocolError as exc:
        return CheckOutcome(skipped=[life.complaint or f"cannot be replayed: {exc}"], notes=life.notes)


class Book(JournalWriter):
    """A journal that keeps its notes and publishes nothing."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        super().__init__(0, clock_s)
        self.notes: list[Note] = []

    def note(self, kind: Kind, subject: str = "", data: bytes = b"", *, at_s: float | None = None) -> None:
        """Keep the note."""
        self.notes.append(Note(self.clock_s() if at_s is None else at_s, kind, subject, data))


class _Still:
    """A drafter without a model: the drafts are in the journal."""

    async def draft(self, ids: Sequence[int], sampling: Sampling, uncertainty: str = "closed-form") -> Drawn:
        return Drawn(0, 0.0, 0.0, b"", b"")

    async def grow(self, request: TreeRequest) -> TreeDraft:
        return TreeDraft([], (), 0.0)


class _OutOfNotes(Exception):
    """The journal has no further input for this generation."""


class _AgentReplay:
    def __init__(self, life: PartJournal, spell: Spell) -> None:
        self._life = life
        self._spell = spell
        self._at = 0  # the next note
        self._now_s = life.notes[0].at_s
        self._book = Book(lambda: self._now_s)
        self._recorded: list[Note] = []  # decisions of the current generation
        self._from = 0  # where its decisions begin in the book
        self._outcome = CheckOutcome(notes=self._book.notes)
        born = journal.unpack(life.notes[0].data, journal.AgentStart) if life.notes[0].kind == "state" else None
        if born is None:
            raise ProtocolError(
                f"the first note in the journal of {life.name} must be 'state' (got {life.notes[0].kind!r})"
            )
        self._born: journal.AgentStart = born
        self._root = born.root
        self._bus = CapturingBus(lambda _number: self._has_room())
        self._sessions: list[int] = []
        self._agent = self._made()

    def _made(self) -> AgentCore:
        born = self._born
        files = {LEARNER_FILE: born.learner} if born.learner else {}
        runtime = Runtime(
            Counters(),
            wall_s=lambda: self._now_s,
            clock_s=lambda: self._now_s,
            store=recorded_store(files),
            journal=self._book,
        )
        config = Config(
            broker=settings.Broker(root=born.root),
            cluster=settings.Cluster(name=born.cluster),
            agent=settings.Agent(id=born.name),
            generation=settings.Generation(consensus=born.consensus),
            federation=born.federation,
        )
        return agent_of(
            config,
            runtime,
            self._bus,
            SmallModel(_Still(), born.fingerprint, born.space),
            new_session=lambda: self._sessions[-1],
            rng=np.random.default_rng(0),
            next_event=self._next_event,
        )

    async def replay(self) -> CheckOutcome:
        """Go through the journal once."""
        if self._life.complaint:
            self._outcome.skipped.append(self._life.complaint)
        self._at = 1
        while self._at < len(self._life.notes):
            note = self._life.notes[self._at]
            if note.kind == "began":
                await self._generate(note)
            else:
                self._at += 1
                await self._take(note)
        return self._outcome

    async def _take(self, note: Note) -> None:
        """Give the agent a message; skip decisions."""
        if note.kind == "round":
            self._now_s = note.at_s
            await self._agent.auditor.send_overdue()
        elif note.kind == "heard":
            self._now_s = note.at_s
            self._book.note("heard", note.subject, note.data)
            received = self._agent.party.read(note.subject, note.data)
            if not isinstance(received.message, Prompt):
                await self._agent.handle(received)

    async def _next_event(self, _queue: asyncio.Queue[Event], _wake_s: float) -> Event:
        notes = self._life.notes
        while self._at < len(notes) and notes[self._at].kind != "began":
            note = notes[self._at]
            self._at += 1
            if note.kind == "fed":
                self._now_s = note.at_s
                return journal.unpack_event(note.subject, note.data)
            await self._take(note)
        raise _OutOfNotes

    async def _generate(self, note: Note) -> None:
        began: journal.Began = journal.unpack(note.data, journal.Began)
        self._at += 1
        end = next(
            (i for i in range(self._at, len(self._life.notes)) if self._life.notes[i].kind == "began"),
            len(self._life.notes),
        )
        self._recorded = [n for n in self._life.notes[self._at : end] if self._counts(n)]
        self._from = len(self._book.notes)
        self._now_s = note.at_s
        self._sessions.append(began.session)
        self._agent.link_up = began.link_up
        self._bus.protocol = "3.1.1" if began.protocol == "3.1.1" else "5"
        try:
            await self._agent.generate(began.job, began.prompt, _agree)
        except* _OutOfNotes:
            pass
        while self._at < end:  # messages and decisions after the generation's end
            await self._take(self._life.notes[self._at])
            self._at += 1
        self._bus.take()  # the book has the same messages
        self._compare(began, note, cut=end == len(self._life.notes))

    def _counts(self, note: Note) -> bool:
        """Whether a note is a decision to compare."""
        if note.kind not in DECISIONS:
            return False
        if note.kind not in ("sent", "dropped"):
            return True
        found = topics.lookup(note.subject, self._root)
        noisy = self._born.federation.epsilon > 0.0  # privacy's noise differs in every run
        return found is not None and found[0] in SENDS and not (noisy and found[0] is topics.FL_UPDATE)

    def _has_room(self) -> bool:
        """Whether the bus had room for the message that the agent sends now; the journal says so."""
        made = sum(self._counts(n) for n in self._book.notes[self._from :])
        return not (made < len(self._recorded) and self._recorded[made].kind == "dropped")

    def _compare(self, began: journal.Began, note: Note, *, cut: bool) -> None:
        """Compare the decisions of one generation.

        With `cut` the journal ends in this generation, perhaps before its last decisions were published.
        """
        made = [n for n in self._book.notes[self._from :] if self._counts(n)]
        self._outcome.decisions += len(self._recorded) if cut else max(len(made), len(self._recorded))
        then, now = self._recorded, made
        first = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if not _agrees(a, b)), None)
        if first is None and (len(then) > len(now) or (len(then) < len(now) and not cut)):
            first = min(len(then), len(now))
        if first is not None:
            told = _Telling(began, self._spell, then, now)
            since_s = note.at_s - self._life.notes[0].at_s
            self._outcome.diverge(told.divergence(self._life.name, since_s, first))


async def _agree(_tokens: list[Committed]) -> FinishReason | None:
    return None


def _agrees(then: Note, now: Note) -> bool:
    return then.kind == now.kind and then.subject == now.subject and same(facts_of(then), facts_of(now))


class _Telling:
    """Describes in words where two lists of decisions of one generation diverge."""

    def __init__(self, began: journal.Began, spell: Spell, then: list[Note], now: list[Note]) -> None:
        self._began = began
        self._spell = spell
        self._then, self._now = then, now

    def divergence(self, name: str, at_s: float, first: int) -> Divergence:
        """The first token with another decision or, if there is none, the first other decision."""
        place = self._first_token()
        if place is not None and (first == 0 or self._kind(first) == "judged"):
            then, now = place
            number = (then or now or Judged(0, 0, 0, 0.0, False, "local", None)).position - len(self._began.prompt)
            where, recorded, decided = f"token {number}", self._judged(then, self._then), self._judged(now, self._now)
        else:
            where = self._place(first)
            recorded, decided = self._words(self._then, first), self._words(self._now, first)
        return Divergence(
            part="agent",
            name=name,
            at_s=at_s,
            where=f"session {self._began.session}, {where}",
            recorded=recorded,
            now=decided,
            why=self._why(),
        )

    def _kind(self, index: int) -> str:
        return next((notes[index].kind for notes in (self._then, self._now) if index < len(notes)), "")

    def _first_token(self) -> tuple[Judged | None, Judged | None] | None:
        then, now = (
            [journal.unpack(n.data, Judged) for n in notes if n.kind == "judged"] for notes in (self._then, self._now)
        )
        for i in range(max(len(then), len(now))):
            a, b = (x[i] if i < len(x) else None for x in (then, now))
            if a is None or b is None or not same(a, b):
                return a, b
        return None

    def _plan(self, notes: list[Note]) -> journal.Planned | None:
        data = next((n.data for n in notes if n.kind == "plan"), None)
        plan: journal.Planned | None = None if data is None else journal.unpack(data, journal.Planned)
        return plan

    def _judged(self, token: Judged | None, notes: list[Note]) -> str:
        if token is None:
            return "nothing: the generation diverged before this token"
        plan, gate = self._plan(notes), self._began.config.gate
        word = self._spell(token.own)
        if choices.GATES[gate].by_doubt and plan is not None:
            sign = ">" if token.uncertainty > plan.tau else "<="
            reason = f"u {token.uncertainty:.4g} {sign} tau {_tau(plan.tau)}"
        else:
            reason = f"gate {gate!r}, u {token.uncertainty:.4g}"
        if token.score is not None:
            reason += f", peers' similarity {1.0 - token.score:.4g}"
        if token.escalate:
            replaced = "" if token.token == token.own else f" as {self._spell(token.token)}"
            return f"{word} escalated{replaced}: {reason}"
        return f"{word} {'kept' if SOURCES[token.source].kept else f'settled by {token.source}'}: {reason}"

    def _place(self, first: int) -> str:
        """The length of the text at the divergence."""
        done = sum(len(facts_of(n)) for n in self._then[:first] if n.kind == "committed")
        return f"after {done} tokens"

    def _words(self, notes: list[Note], index: int) -> str:
        if index >= len(notes):
            return "nothing more"
        note = notes[index]
        match note.kind:
            case "plan":
                plan = self._plan([note])
                return "" if plan is None else f"tau {_tau(plan.tau)}, similarity {_number(plan.similarity)}"
            case "judged":
                return self._judged(journal.unpack(note.data, Judged), notes)
            case "committed":
                tokens = journal.unpack(note.data, list[Committed])
                return "committed " + ", ".join(f"{self._spell(t.token)} by {t.source}" for t in tokens)
            case "ended":
                ended = journal.unpack(note.data, journal.Ended)
                return f"ended: {ended.reason} {ended.error}".rstrip()
            case _:
                return f"{note.kind} {_gist(note)}"

    def _why(self) -> str:
        """What differs in the thresholds, which determine all other decisions here."""
        then, now = self._plan(self._then), self._plan(self._now)
        config = self._began.config
        if then is None or now is None:
            return "the generation was never planned"
        reasons = []
        if not same(then.tau, now.tau):
            reasons.append(
                f"tau was {_tau(then.tau)} and is {_tau(now.tau)} (generation.threshold {config.threshold!r})"
            )
        if not same(then.similarity, now.similarity):
            reasons.append(f"similarity was {_number(then.similarity)} and is {_number(now.similarity)}")
        same_as = f"tau {_tau(now.tau)} and similarity {_number(now.similarity)} are the same, the rule is another"
        return "; ".join(reasons) or same_as


def _tau(tau: float) -> str:
    return "none (no token may be kept)" if tau == KEEP_NONE else f"{tau:.6g}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _gist(note: Note) -> str:
    facts: Any = facts_of(note)
    if isinstance(facts, Escalation):
        return f"a block from {facts.base}, {len(facts.ids)} bytes of ids, {facts.fixed} fixed, extend {facts.extend}"
    return note.subject.rpartition("/")[0] or note.subject
