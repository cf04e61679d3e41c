"""Build stories from an ordered stream of records: what became of every token of every request.

The module is pure, and its memory is that of the requests in progress. With journals, doubts and gate decisions are
the agents' own notes. Without them the bus shows escalated drafts and published doubts only; anything unknown is
None.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Final

from fedhlm.protocol.messages import (
    Cancel,
    Escalation,
    EscalationBatch,
    Journal,
    Output,
    Prompt,
    UncertainTokens,
    Verdict,
    VerdictBatch,
)
from fedhlm_traces.decoded import Seen, Vocabularies, look
from fedhlm_traces.file import Header, Record
from fedhlm_traces.journal_reader import JournalReader, ToldGeneration
from fedhlm_traces.request import Run, Story

JOURNAL_WAIT_S: Final = 5.0  # journals come in pieces every half second, and a busy machine may be late
REMEMBERED: Final = 1_024


class _AgentRequests:
    """An agent's requests, one at a time: a session belongs to the request whose output ends next."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.current: Run | None = None
        self.closed: list[Run] = []  # waiting for the journal
        self.journal = JournalReader()
        self._told: OrderedDict[int, ToldGeneration] = OrderedDict()
        self._prompts: OrderedDict[str, tuple[float, Prompt]] = OrderedDict()
        self._past: OrderedDict[str | int, Prompt | None] = OrderedDict()

    def asked(self, prompt: Prompt, at_s: float) -> None:
        if self._past.get(prompt.request) == prompt:
            return  # an MQTT duplicate
        self._past.pop(prompt.request, None)  # another client, or a later run, may use the name again
        self._prompts.setdefault(prompt.request, (at_s, prompt))
        _bound(self._prompts)

    def in_session(self, session: int, at_s: float) -> Run | None:
        """The run of a session; None if the session is over."""
        if session in self._past:
            return None
        run = self.current
        if run is not None and run.story.session not in (None, session):
            self._close(at_s, "another session began before its last output was seen")
            run = None
        if run is None:
            run = self.current = Run(self.name, at_s)
        run.story.session = session
        return run

    def put_out(self, output: Output, cluster: str, at_s: float) -> None:
        if output.request in self._past:
            return
        run = self.current
        refusal = output.finish in ("error", "cancelled") and not output.ids and output.position == 0
        waiting = next(iter(self._prompts), output.request) != output.request
        if run is not None and refusal and run.story.request != output.request and (run.story.request or waiting):
            self.current = None  # refused while another request is served
            self._put_out(Run(self.name, at_s), output, cluster, at_s)
            self.current = run
            return
        if run is not None and run.story.request not in ("", output.request):
            self._close(at_s, "its last output is not in the recording")
            run = None
        self._put_out(run or Run(self.name, at_s), output, cluster, at_s)

    def _put_out(self, run: Run, output: Output, cluster: str, at_s: float) -> None:
        self.current, story = run, run.story
        if not story.request:
            story.request, story.cluster = output.request, cluster
            asked = self._prompts.pop(output.request, None)
            if asked is not None:
                story.began_s, run.prompt = asked
                story.prompt = run.prompt.text
        if output.position >= run.count:
            run.committed(output, at_s)
        if output.finish is not None:
            story.finish, story.error = output.finish, output.error
            self._close(at_s)

    def end(self, at_s: float) -> None:
        """End the recording."""
        if self.current is not None:
            self._close(at_s, "the recording ends before the request does")

    def _close(self, at_s: float, missing: str = "") -> None:
        run, self.current = self.current, None
        if run is None:
            return
        run.close(at_s, missing)
        self.closed.append(run)
        if run.story.session is not None:
            self._past[run.story.session] = None
        if run.story.request:
            self._past[run.story.request] = run.prompt
        _bound(self._past)

    def heard(self, journal: Journal) -> None:
        for told in self.journal.read(journal):
            self._told[told.session] = told
            _bound(self._told)

    def finished(self, at_s: float) -> Iterator[Story]:
        """Yield the stories that are complete or have waited long enough for the journal."""
        waiting = []
        for run in self.closed:
            story = run.story
            told = self._note_of(story)
            if told is not None:
                del self._told[told.session]
                _join(story, told)
                yield story
            elif at_s - story.ended_s >= JOURNAL_WAIT_S:
                yield story
            else:
                waiting.append(run)
        self.closed = waiting

    def _note_of(self, story: Story) -> ToldGeneration | None:
        if story.session is not None:
            return self._told.get(story.session)
        # The device kept every token, so only the journal knows the session.
        return next((told for told in self._told.values() if told.request and told.request == story.request), None)


def _join(story: Story, told: ToldGeneration) -> None:
    """Replace what the bus showed of the drafts by the agent's own notes."""
    story.session, story.tau, story.journal = told.session, told.tau, True
    story.prompt_tokens = told.prompt_tokens
    for step in story.steps:
        draft = told.drafts.get(step.index)
        step.draft = step.standing = step.uncertainty = step.escalate = step.score = None
        if draft is not None:
            step.draft, step.uncertainty, step.escalate = draft.own, draft.uncertainty, draft.escalate
            step.standing = None if draft.token == draft.own else draft.token
            step.score = draft.score


def _bound(memory: "OrderedDict[Any, Any]") -> None:
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)


class Stories:
    """Feed records in order to `add`, then call `end`; both yield the stories that are complete."""

    def __init__(self, header: Header) -> None:
        self.root = header.root
        self.vocabularies = Vocabularies(header)
        self._agents: dict[str, _AgentRequests] = {}
        self._at_s = 0.0

    def add(self, record: Record) -> Iterator[Story]:
        """Add one record."""
        self._at_s = record.at_s
        seen = look(record, self.root)
        if seen.message is None:
            return
        self.vocabularies.learn(seen)
        for name in self._take(seen):
            agent = self._agents.get(name)
            if agent is not None and agent.closed:
                yield from agent.finished(record.at_s)

    def end(self) -> Iterator[Story]:
        """Yield all remaining stories."""
        for agent in self._agents.values():
            agent.end(self._at_s)
            yield from agent.finished(float("inf"))

    def _take(self, seen: Seen) -> tuple[str, ...]:
        """Pass a message to its agent; return the agents that may have a story to yield now."""
        message, at_s, name = seen.message, seen.record.at_s, seen.agent
        match message:
            case Prompt():
                self._agent(name).asked(message, at_s)
            case Escalation():
                self._escalation(name, message, at_s, relayed=False)
            case EscalationBatch(items=items):
                for item in items:
                    self._escalation(item.agent, item.escalation, at_s, relayed=True)
            case UncertainTokens():
                run = self._agent(name).in_session(message.session, at_s)
                if run is not None:
                    run.doubted(message)
            case Verdict():
                self._verdict(name, message, at_s, relayed=False)
            case VerdictBatch(items=answers):
                for answer in answers:
                    self._verdict(answer.agent, answer.verdict, at_s, relayed=True)
            case Output():
                self._agent(name).put_out(message, seen.cluster, at_s)
            case Journal() if name:
                self._agent(name).heard(message)
            case _:
                return tuple(self._agents)  # time has passed for all agents
        return (name,) if name else ()

    def _agent(self, name: str) -> _AgentRequests:
        return self._agents.setdefault(name, _AgentRequests(name))

    def _escalation(self, name: str, message: Escalation, at_s: float, *, relayed: bool) -> None:
        run = self._agent(name).in_session(message.session, at_s)
        if run is not None:
            run.escalated(message, at_s, self.vocabularies.of(name), relayed=relayed)

    def _verdict(self, name: str, verdict: Verdict, at_s: float, *, relayed: bool) -> None:
        run = self._agent(name).current
        if run is not None and run.story.session == verdict.session:
            run.answered(verdict, at_s, self.vocabularies.of(name), relayed=relayed)


def stories(records: Iterable[Record], header: Header) -> Iterator[Story]:
    """Yield a recording's stories as they complete, about in the order in which requests end."""
    builder = Stories(header)
    for record in records:
        yield from builder.add(record)
    yield from builder.end()


def belongs(seen: Seen, story: Story) -> bool:
    """Whether a message is part of a story: its prompt, its outputs, or a message of its session."""
    match seen.message:
        case Prompt(request=request) | Output(request=request) | Cancel(request=request):
            return seen.agent == story.agent and request == story.request
        case Escalation(session=session) | Verdict(session=session) | UncertainTokens(session=session):
            return seen.agent == story.agent and session == story.session
        case EscalationBatch(items=items):
            return any((i.agent, i.escalation.session) == (story.agent, story.session) for i in items)
        case VerdictBatch(items=answers):
            return any((a.agent, a.verdict.session) == (story.agent, story.session) for a in answers)
    return False
