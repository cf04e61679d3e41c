"""One generation as a pure state machine: events in, actions out, no I/O (ALGORITHMS 6).

The sequence is a committed context followed by a speculative tail. Within one epoch it only grows, so a verdict is
read against it by position alone; a rollback begins a new epoch, and answers of older epochs are dropped unread.
Committed tokens are never taken back.
"""

import math
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from edge_agent.gate import Gate
from edge_agent.pipeline import Pending, Pipeline, expected_rejection
from fedhlm.messages import FinishReason, Sampling, Source
from fedhlm.sampling import rejection_probability

RETRY_CAP: Final = 8  # the wait between two sends of an unanswered block doubles up to this many times `retry_s`


class Plan(NamedTuple):
    """What stays fixed during a generation; times in seconds, `context_max` and `max_tokens` in tokens."""

    sampling: Sampling
    gate: Gate
    pipeline: Pipeline
    max_tokens: int
    context_max: int
    eos_ids: frozenset[int]
    deadline_s: float
    retry_s: float


class Drafted(NamedTuple):
    """The model's answer to a Draft: a token for `position`, its probability, uncertainty and the law's bytes."""

    revision: int
    position: int
    token: int
    prob: float
    uncertainty: float
    law: bytes = b""


class Answered(NamedTuple):
    """A verdict, decoded and range-checked."""

    epoch: int
    base: int
    accepted: int
    ids: list[int]
    target_probs: list[float]
    source: Source


class Unprimed(NamedTuple):
    """The cloud has lost the session, or never had it."""

    epoch: int


class Refused(NamedTuple):
    """The cloud will never settle this session."""

    reason: str


class LinkUp(NamedTuple):
    """Someone upstream is there to answer. (That nobody is shows at the deadline, and only then is text unverified.)"""


class Cancelled(NamedTuple):
    """Stop now; what is committed stays."""

    reason: FinishReason


class Tick(NamedTuple):
    """Time passed."""


Event = Drafted | Answered | Unprimed | Refused | LinkUp | Cancelled | Tick


class Draft(NamedTuple):
    """Ask the model for the token after `ids`."""

    revision: int
    ids: tuple[int, ...]


class Escalate(NamedTuple):
    """Send a block; `context` is the prime's, None when the cloud holds the session."""

    epoch: int
    base: int
    ids: list[int]
    fixed: int
    extend: int
    laws: bytes
    deadline_s: float
    context: list[int] | None


class Committed(NamedTuple):
    """One token, for good. `drafted` is false where the text comes from elsewhere than the device's own model."""

    token: int
    source: Source
    drafted: bool


class Commit(NamedTuple):
    """Tokens that follow all committed before."""

    tokens: list[Committed]


class Observe(NamedTuple):
    """Feedback for the threshold learner: (uncertainty, beta) of positions that the target has seen."""

    pairs: list[tuple[float, float]]


class Finish(NamedTuple):
    """The generation is over."""

    reason: FinishReason
    error: str = ""


Action = Draft | Escalate | Commit | Observe | Finish


class Token(NamedTuple):
    """A drafted token that is not verified."""

    token: int
    prob: float
    uncertainty: float
    law: bytes
    escalate: bool
    drafted_s: float


@dataclass
class Tally:
    """What happened so far, in tokens and events."""

    drafted: int = 0
    discarded: int = 0
    rollbacks: int = 0
    escalations: int = 0
    retries: int = 0
    reprimes: int = 0
    stale: int = 0
    conflicts: int = 0


@dataclass
class Generation:
    """The machine. Call `start` once, then `handle` with every event; `wake_s` says when a Tick is due.

    Raises:
        ValueError: an empty prompt, or one that fills the model's context.
    """

    plan: Plan
    context: list[int]
    link_up: bool = True
    epoch: int = 0
    finished: bool = False
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        if not self.context:
            raise ValueError("prompt has 0 tokens: at least 1 expected")
        if len(self.context) >= self.plan.context_max:
            raise ValueError(
                f"prompt has {len(self.context)} tokens: fewer than the model's context of {self.plan.context_max} expected"
            )
        self.prompt_length = len(self.context)
        self.end = min(self.prompt_length + self.plan.max_tokens, self.plan.context_max)
        self.verified = self.prompt_length  # tokens that both ends hold
        self._skipped: list[Token] = []  # committed without a verdict: the context from `verified` on
        self._tail: list[Token] = []
        self._sent = self.verified  # how far the sequence went up in this epoch
        self._asked = self.verified  # how far verdicts are due
        self._primed = False
        self._drafting = False
        self._revision = 0  # counts rewritings of the tail, so that a draft of the old one is known
        self._waiting_since = 0.0
        self._retry_at = 0.0
        self._retry_delay = self.plan.retry_s

    @property
    def length(self) -> int:
        """Tokens of context and tail."""
        return len(self.context) + len(self._tail)

    @property
    def awaiting(self) -> bool:
        """A block is out whose verdict would bring news."""
        return self._asked > self.verified

    def start(self, now: float) -> list[Action]:
        """The first actions."""
        return self._go_on([], now)

    def wake_s(self) -> float:
        """When the next Tick is due, on the clock of `now`; infinity when only an event can bring news."""
        due = [float("inf")]
        if self.awaiting:
            due.append(self._retry_at)
            if self.link_up:
                due.append(self._waiting_since + self.plan.deadline_s)
        unsent = self._unsent()
        if unsent and self.link_up:
            due.append(unsent[0].drafted_s + self.plan.pipeline.flush_age_s)
        return min(due)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event at time `now` (seconds, monotonic)."""
        if self.finished:
            return []
        actions: list[Action] = []
        match event:
            case Drafted():
                self._on_draft(event, now)
            case Answered():
                self._on_answer(event, actions, now)
            case Unprimed(epoch):
                self._set_link(True, now)
                if epoch == self.epoch:
                    self.tally.reprimes += 1
                    self._primed = False
                    self._new_epoch()
            case Refused(reason):
                return self._finish(actions, "error", reason)
            case LinkUp():
                self._set_link(True, now)
            case Cancelled(reason):
                return self._finish(actions, reason)
            case Tick():
                pass
        return self._go_on(actions, now)

    def _on_draft(self, event: Drafted, now: float) -> None:
        self._drafting = False
        self.tally.drafted += 1
        if event.revision != self._revision or event.position != self.length:
            self.tally.discarded += 1
            return
        escalate = self.plan.gate(event.uncertainty, event.position)
        self._tail.append(Token(event.token, event.prob, event.uncertainty, event.law, escalate, now))

    def _on_answer(self, event: Answered, actions: list[Action], now: float) -> None:
        self._set_link(True, now)
        if event.epoch != self.epoch or event.base + event.accepted > self.length:
            self.tally.stale += 1
            return
        self._primed = True
        self._observe(event, actions)
        committed: list[Committed] = []
        while len(self.context) < event.base + event.accepted:
            self._accept(self._tail.pop(0).token, event.source, True, committed)
        known = event.base + event.accepted
        for token in event.ids:
            if known < len(self.context):
                if self.context[known] != token:
                    self.tally.conflicts += 1  # committed here before the answer came: ours stands
                    break
            elif self._ended():
                break
            elif self._tail and self._tail[0].token == token:
                self._accept(self._tail.pop(0).token, event.source, True, committed)
            else:
                self._roll_back()
                self._accept(token, event.source, False, committed)
            known += 1
        if known > self.verified:
            self._advance(known, now)
        if committed:
            actions.append(Commit(committed))

    def _accept(self, token: int, source: Source, drafted: bool, committed: list[Committed]) -> None:
        self.context.append(token)
        committed.append(Committed(token, source, drafted))

    def _advance(self, known: int, now: float) -> None:
        del self._skipped[: known - self.verified]
        self.verified = known
        self._sent = max(self._sent, known)
        self._asked = max(self._asked, known)
        self._waiting_since = now
        self._retry_delay = self.plan.retry_s
        self._retry_at = now + self._retry_delay

    def _observe(self, event: Answered, actions: list[Action]) -> None:
        unverified = self._skipped + self._tail  # from position `verified` on
        pairs = []
        for place, target_prob in enumerate(event.target_probs, start=event.base - self.verified):
            if 0 <= place < len(unverified):
                token = unverified[place]
                pairs.append((token.uncertainty, rejection_probability(token.prob, target_prob)))
        if pairs:
            actions.append(Observe(pairs))

    def _roll_back(self) -> None:
        if self._tail:
            self.tally.rollbacks += 1
            self.tally.discarded += len(self._tail)
            self._tail.clear()
            self._revision += 1
            self._new_epoch()

    def _new_epoch(self) -> None:
        self.epoch += 1
        self._sent = self._asked = self.verified

    def _set_link(self, up: bool, now: float) -> None:
        if up and not self.link_up:
            self._waiting_since = self._retry_at = now
            self._retry_delay = self.plan.retry_s
        elif not up and self.link_up and self._tail:
            self._new_epoch()  # the tail is about to be committed: answers under way come too late
        self.link_up = up

    def _go_on(self, actions: list[Action], now: float) -> list[Action]:
        if self.awaiting and self.link_up and now >= self._waiting_since + self.plan.deadline_s:
            self._set_link(False, now)
        self._commit_undisputed(actions)
        if self._ended():
            return self._finish(actions, self._reason())
        self._send_if_due(actions, now)
        pending = self._pending(now)
        alone = not self.link_up  # without a link the device goes on by itself
        if not self._drafting and not pending.ended and (alone or self.plan.pipeline.may_draft(pending)):
            self._drafting = True
            actions.append(Draft(self._revision, (*self.context, *(t.token for t in self._tail))))
        return actions

    def _commit_undisputed(self, actions: list[Action]) -> None:
        """Commit what no verdict is waited for: tokens the gate keeps, and every token while the link is down."""
        committed: list[Committed] = []
        while self._tail and not (self._tail[0].escalate and self.link_up):
            token = self._tail.pop(0)
            self._skipped.append(token)
            self._accept(token.token, "unverified" if token.escalate else "local", True, committed)
        if committed:
            actions.append(Commit(committed))

    def _unsent(self) -> list[Token]:
        """Tail tokens that have not gone up, if one of them must."""
        unsent = self._tail[max(0, self._sent - len(self.context)) :]
        return unsent if any(t.escalate for t in unsent) else []

    def _pending(self, now: float) -> Pending:
        unsent = self._unsent()
        return Pending(
            tail=len(self._tail),
            unsent=len(unsent),
            unsent_age_s=now - unsent[0].drafted_s if unsent else 0.0,
            uncertainty=unsent[-1].uncertainty if unsent else 0.0,
            survival=math.prod(1.0 - expected_rejection(t.uncertainty) for t in self._tail),
            awaiting=self.awaiting,
            ended=self.length >= self.end or self._stopped(self._tail[-1].token if self._tail else None),
        )

    def _stopped(self, newest: int | None) -> bool:
        """Whether the sequence ends with an end of text; `newest` is the tail's last token."""
        if newest is None:
            return len(self.context) > self.prompt_length and self.context[-1] in self.plan.eos_ids
        return newest in self.plan.eos_ids

    def _ended(self) -> bool:
        return len(self.context) >= self.end or self._stopped(None)

    def _reason(self) -> FinishReason:
        if self._stopped(None):
            return "stop"
        return "length" if len(self.context) - self.prompt_length >= self.plan.max_tokens else "context"

    def _send_if_due(self, actions: list[Action], now: float) -> None:
        if self.awaiting and now >= self._retry_at:
            self.tally.retries += 1
            self._retry_delay = min(2 * self._retry_delay, RETRY_CAP * self.plan.retry_s)
            self._retry_at = now + self._retry_delay
            self._send(actions, now, self.verified)
        elif self.link_up:
            if self.plan.pipeline.must_send(self._pending(now)):
                self._send(actions, now, self._sent)
        elif not self.awaiting and any(t.escalate for t in self._skipped):
            self._send(actions, now, self.verified)  # a probe: its answer says that the link is back

    def _send(self, actions: list[Action], now: float, base: int) -> None:
        fixed = self.context[base:]
        drafts = self._tail[max(0, base - len(self.context)) :]
        ids = fixed + [t.token for t in drafts]
        room = 0 if self._pending(now).ended else self.end - self.length
        extend = min(room, self.plan.pipeline.extend if self.link_up or not ids else 0)
        if not (ids or extend):
            return
        if not self.awaiting:
            self._waiting_since = now
            self._retry_at = now + self._retry_delay
        self._sent = self.length
        self._asked = self.length + min(extend, 1)
        self.tally.escalations += 1
        context = None if self._primed or base > self.verified else self.context[:base]
        laws = b"".join(t.law for t in drafts)
        actions.append(Escalate(self.epoch, base, ids, len(fixed), extend, laws, self.plan.deadline_s, context))

    def _finish(self, actions: list[Action], reason: FinishReason, error: str = "") -> list[Action]:
        self.finished = True
        actions.append(Finish(reason, error))
        return actions
