"""One generation as a pure state machine: events in, actions out, no I/O (docs/algorithms.md, 6).

The sequence is a committed context followed by a speculative tail. Within an epoch it only grows, so a position is
enough to apply a verdict. A rollback begins a new epoch, and verdicts of older epochs are dropped. Committed tokens are
never taken back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from edge_agent.events import (
    Action,
    Answered,
    Cancelled,
    Commit,
    Committed,
    Drafted,
    DraftNext,
    Escalate,
    Event,
    Finish,
    Grown,
    Judged,
    LinkDown,
    LinkUp,
    Observation,
    Observe,
    Plan,
    Refused,
    Tail,
    Token,
    Unprimed,
    Working,
)
from edge_agent.pipeline import Pending, expected_rejection
from fedhlm.decoding.couplings import rejection_probability
from fedhlm.decoding.ids import digest_of
from fedhlm.decoding.tree import Branch, Tree
from fedhlm.protocol.fields import FinishReason, Source
from fedhlm.protocol.messages import Uncertain
from fedhlm.protocol.sources import SOURCES

RETRY_CAP: Final = 8  # the wait between two sends of an unanswered block doubles up to this many times `retry_s`


@dataclass
class Tally:
    """Counts of tokens and events so far."""

    drafted: int = 0
    discarded: int = 0
    rollbacks: int = 0
    escalations: int = 0
    escalated: int = 0
    retries: int = 0
    reprimes: int = 0
    stale: int = 0
    conflicts: int = 0


@dataclass
class GenerationMachine:
    """The state machine. Call `start` once, then `handle` with every event. `wake_s` says when a Tick is due.

    Raises:
        ValueError: the prompt is empty, or fills the model's context.
    """

    plan: Plan
    context: list[int]
    link_up: bool = True
    epoch: int = 0
    finished: bool = False
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        if not self.context:
            raise ValueError("prompt must be at least 1 token (got none)")
        if len(self.context) >= self.plan.context_max:
            raise ValueError(
                f"prompt must be shorter than the model's context of {self.plan.context_max} tokens "
                f"(got {len(self.context)})"
            )
        self.prompt_length = len(self.context)
        self.end = min(self.prompt_length + self.plan.max_tokens, self.plan.context_max)
        self.verified = self.prompt_length  # number of tokens that both ends hold
        self._skipped: list[Token] = []  # tokens committed without a verdict: the context from `verified` on
        self._tail: list[Token] = []
        self._sent = self.verified  # end of what was sent in this epoch
        self._asked = self.verified  # end of what verdicts are expected for
        self._primed = False
        self._drafting = False
        self._early: dict[int, Answered] = {}  # peers' answers by base; they wait for earlier drafts
        self._tree = Tree([])  # the tree whose main chain, or the end of it, is the tail
        self._cut: FinishReason | None = None  # why the caller ended the text
        self._revision = 0  # counts changes of the tail, so that drafts for an old one are recognised
        self._waiting_since = 0.0
        self._retry_at = 0.0
        self._retry_delay = self.plan.retry_s
        self._allowed_s = self.plan.prompt_s  # how much longer a cloud that reports its work may be waited for
        self.working: Working | None = None  # the last report on the context that was sent
        self.late_s = -math.inf  # when a deadline passed last

    @property
    def length(self) -> int:
        """The length of context and tail together, in tokens."""
        return len(self.context) + len(self._tail)

    @property
    def awaiting(self) -> bool:
        """Whether a verdict that brings news is expected."""
        return self._asked > self.verified

    def start(self, now: float) -> list[Action]:
        """Return the first actions."""
        return self._go_on([], now)

    def wake_s(self) -> float:
        """When the next Tick is due, on the clock of `now`; infinity if only an event can change anything."""
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
        """Handle one event at time `now`, in seconds on a monotonic clock, and return the actions that follow."""
        if self.finished:
            return []
        actions: list[Action] = []
        match event:
            case Drafted():
                self._on_drafts(event.revision, event.position, [event], (), actions, now)
            case Grown(revision, position, chain, branches):
                self._on_drafts(revision, position, chain, branches, actions, now)
            case Answered():
                self._on_answer(event, actions, now)
            case Unprimed(epoch):
                self._set_link(True, now)
                if epoch == self.epoch:
                    self.tally.reprimes += 1
                    self._primed = False
                    self._new_epoch()
            case Working():
                self._go_on_waiting(event, now)
            case Refused(reason):
                return self._finish(actions, "error", reason)
            case LinkUp() | LinkDown():
                self._set_link(isinstance(event, LinkUp), now)
            case Cancelled("stop"):
                self._cut = "stop"
                self._drop_tail()
            case Cancelled(reason):
                return self._finish(actions, reason)
        return self._go_on(actions, now)

    def _on_drafts(
        self,
        revision: int,
        position: int,
        drafts: list[Drafted],
        branches: tuple[Branch, ...],
        actions: list[Action],
        now: float,
    ) -> None:
        self._drafting = False
        self.tally.drafted += len(drafts)
        if revision != self._revision or position != self.length:
            self.tally.discarded += len(drafts)
            return
        judged = [self._judged(draft, now) for draft in drafts]
        if branches and all(token.token == token.own for token in judged):
            self._tree = Tree([token.token for token in judged], branches)
        self._tail += judged
        actions += [
            Judged(
                place,
                t.token,
                t.own,
                t.uncertainty,
                t.escalate,
                t.source,
                None if t.match is None else t.match.score,
                t.rule,
            )
            for place, t in enumerate(judged, start=position)
        ]

    def _judged(self, draft: Drafted, now: float) -> Token:
        """Decide who settles a draft: the device, its peers, or the edge and the cloud."""
        escalate = bool(draft.rule) or self.plan.gate(draft.uncertainty, draft.position)
        token = Token(
            draft.token, draft.prob, draft.uncertainty, draft.law, escalate, now, key=draft.key, own=draft.token
        )._replace(rule=draft.rule)
        proposal = self.plan.consult(draft) if escalate and not draft.rule else None
        if proposal is None or not proposal.adopt:
            return token._replace(match=proposal)
        settled = proposal.source is not None
        return token._replace(
            token=proposal.token, escalate=not settled, source=proposal.source or "peer", match=proposal
        )

    def _on_answer(self, event: Answered, actions: list[Action], now: float) -> None:
        self._set_link(True, now)
        if not SOURCES[event.source].verified and event.base > len(self.context) and event.epoch == self.epoch:
            self._early[event.base] = event  # it says nothing about the open drafts before its block
            return
        self._read_answer(event, actions, now)
        while (base := next((b for b in self._early if b <= len(self.context)), None)) is not None:
            self._read_answer(self._early.pop(base), actions, now)

    def _read_answer(self, event: Answered, actions: list[Action], now: float) -> None:
        verified = SOURCES[event.source].verified
        if event.epoch != self.epoch or event.base + event.accepted > self.length:
            self.tally.stale += 1
            return
        if verified:
            self._primed, self.working = True, None
            self._observe(event, actions)
        committed: list[Committed] = []
        while len(self.context) < event.base + event.accepted:
            self._take_draft(event.source, committed)
        known = self._take_on(event, committed, now)
        if not verified:
            self._sent = self._asked = self.verified  # the cloud has not seen these tokens yet
            self._wait_anew(now)
        elif known > self.verified:
            self._advance(known, now)
        if committed:
            actions.append(Commit(committed))

    def _take_on(self, event: Answered, committed: list[Committed], now: float) -> int:
        """Commit the ids that follow the accepted ones. Return up to where both ends agree afterwards."""
        known = event.base + event.accepted
        for token in event.ids:
            if known < len(self.context):
                if self.context[known] != token:
                    self.tally.conflicts += 1  # committed before the answer came, and never taken back
                    break
            elif self._ended():
                break
            elif self._tail and self._tail[0].token == token:
                self._take_draft(event.source, committed)
            else:
                self._roll_back()
                if not SOURCES[event.source].verified:
                    self._skipped.append(Token(token, 0.0, 1.0, b"", False, now, b"", own=token, source=event.source))
                self._accept(token, event.source, False, committed)
            known += 1
        return known

    def _take_draft(self, source: Source, committed: list[Committed]) -> None:
        draft = self._tail.pop(0)
        if not SOURCES[source].verified:
            self._skipped.append(draft._replace(source=source, escalate=False))
        self._accept(draft.token, source, True, committed)

    def _accept(self, token: int, source: Source, drafted: bool, committed: list[Committed]) -> None:
        self.context.append(token)
        committed.append(Committed(token, source, drafted))

    def _advance(self, known: int, now: float) -> None:
        del self._skipped[: known - self.verified]
        self.verified = known
        self._sent = max(self._sent, known)
        self._asked = max(self._asked, known)
        self._wait_anew(now)

    def _wait_anew(self, now: float) -> None:
        self._waiting_since = now
        self._retry_delay = self.plan.retry_s
        self._retry_at = now + self._retry_delay

    def _go_on_waiting(self, report: Working, now: float) -> None:
        """Wait anew for a cloud that reads a context, as long as the text's allowance lasts."""
        waited = now - self._waiting_since
        if not (self.awaiting and self.link_up) or report.epoch != self.epoch:
            return
        self.working = max(report, self.working or report)
        if waited <= self._allowed_s:
            self._allowed_s -= waited
            self._waiting_since = now
            self._retry_at = max(self._retry_at, now + max(self._retry_delay, 2.0 * self.plan.retry_s))

    def _observe(self, event: Answered, actions: list[Action]) -> None:
        unverified = self._skipped + self._tail  # from position `verified` on
        seen = []
        for offset in range(len(event.target_probs)):
            place = event.base + offset - self.verified
            if 0 <= place < len(unverified):
                skipped = place < len(self._skipped)
                seen.append(scored(self.plan.harm, unverified[place], event, offset, skipped=skipped))
        if seen:
            actions.append(Observe(seen))

    def _roll_back(self) -> None:
        if self._tail:
            self.tally.rollbacks += 1
            self._drop_tail()

    def _drop_tail(self) -> None:
        self.tally.discarded += len(self._tail)
        self._tail.clear()
        self._tree = Tree([])
        self._revision += 1
        self._new_epoch()

    def _new_epoch(self) -> None:
        self.epoch += 1
        self._early.clear()
        self._sent = self._asked = self.verified

    def _set_link(self, up: bool, now: float) -> None:
        if up and not self.link_up:
            self._waiting_since = self._retry_at = now
            self._retry_delay = self.plan.retry_s
        elif not up and self.link_up and self._tail:
            self._new_epoch()  # the tail is about to be committed, so answers on their way come too late
        self.link_up = up

    def _go_on(self, actions: list[Action], now: float) -> list[Action]:
        if self.awaiting and self.link_up and now >= self._waiting_since + self.plan.deadline_s:
            self.late_s = now
            self._set_link(False, now)
        self._commit_undisputed(actions)
        if self._ended():
            return self._finish(actions, self._reason())
        self._send_if_due(actions, now)
        pending = self._pending(now)
        alone = not self.link_up  # without a link the device goes on by itself
        if not self._drafting and not pending.ended and (alone or self.plan.pipeline.may_draft(pending)):
            self._drafting = True
            ids = (*self.context, *(t.token for t in self._tail))
            levels = self.end - self.length if self.plan.pipeline.grow and self.link_up else 0
            actions.append(DraftNext(self._revision, ids, self.verified, levels))
        return actions

    def _commit_undisputed(self, actions: list[Action]) -> None:
        """Commit tokens that need no verdict: those that the gate keeps, and all tokens while the link is down."""
        committed: list[Committed] = []
        while self._tail and not (self._tail[0].escalate and self.link_up):
            token = self._tail.pop(0)
            source: Source = "unverified" if token.escalate else token.source
            self._skipped.append(token._replace(source=source))
            self._accept(token.token, source, SOURCES[token.source].kept, committed)
        if committed:
            actions.append(Commit(committed))

    def _unsent(self) -> list[Token]:
        """The tail tokens that have not been sent, if one of them must be verified."""
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
        """Whether the sequence ends with an end-of-text token. `newest` is the last token of the tail."""
        if newest is None:
            return len(self.context) > self.prompt_length and self.context[-1] in self.plan.eos_ids
        return newest in self.plan.eos_ids

    def _ended(self) -> bool:
        return self._cut is not None or len(self.context) >= self.end or self._stopped(None)

    def _reason(self) -> FinishReason:
        if self._cut is not None:
            return self._cut
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
            self._send(actions, now, self.verified)  # a probe, whose answer shows that the link is up again

    def _send(self, actions: list[Action], now: float, base: int) -> None:
        fixed = self.context[base:]
        first = max(base, len(self.context))
        drafts = self._tail[first - len(self.context) :]
        ids = fixed + [t.token for t in drafts]
        room = 0 if self._ended() or self._pending(now).ended else self.end - self.length
        extend = min(room, self.plan.pipeline.extend if self.link_up or not ids else 0)
        if not (ids or extend):
            return
        if not self.awaiting:
            self._waiting_since = now
            self._retry_at = now + self._retry_delay
        repeated = self._asked > first
        self.tally.escalated += 0 if repeated else sum(d.escalate for d in drafts)
        self._sent = self.length
        self._asked = self.length + min(extend, 1)
        self.tally.escalations += 1
        primes = not self._primed and base <= self.verified
        before = [*self.context, *(t.token for t in self._tail)][:base]
        actions.append(
            Escalate(
                self.epoch,
                base,
                ids,
                len(fixed),
                extend,
                laws=b"".join(t.law for t in drafts),
                deadline_s=self.plan.deadline_s,
                context=before if primes else None,
                uncertain=() if repeated else self._doubts(drafts, first),
                branches=self._branches(),
                digest=None if primes else digest_of(before),
                for_target=any(t.rule for t in drafts),
            )
        )

    def _branches(self) -> tuple[Branch, ...]:
        """The branches below what is left of a tree's main chain; none if the tail is not such a chain."""
        steps = len(self._tree.chain) - len(self._tail)
        return self._tree.below(steps).branches if steps >= 0 else ()

    def _doubts(self, drafts: list[Token], first: int) -> tuple[Uncertain, ...]:
        return tuple(
            Uncertain(position, draft.token, draft.uncertainty, draft.key)
            for position, draft in enumerate(drafts, start=first)
            if draft.escalate and draft.key
        )

    def _finish(self, actions: list[Action], reason: FinishReason, error: str = "") -> list[Action]:
        self.finished = True
        tail = Tail(self.epoch, tuple(self.context[: self.verified]), self._primed, tuple(self._skipped))
        actions.append(Finish(reason, error, tail))
        return actions


def scored(
    harm: Callable[[float, float, bool], float],
    token: Token,
    event: Answered,
    offset: int,
    *,
    skipped: bool,
    audit: bool = False,
) -> Observation:
    """What a verdict says of the token at `offset` of its block. `harm` is the coupling's."""
    missed = offset >= event.accepted or (offset < len(event.missed) and event.missed[offset])
    replacement = event.ids[0] if offset == event.accepted and event.ids else None
    right = replacement if missed else token.token  # what the target emits, if the verdict tells
    target_prob = event.target_probs[offset]

    def harm_of(candidate: int) -> float | None:
        if candidate == token.token:
            return harm(token.prob, target_prob, missed)
        return None if right is None else float(candidate != right)

    matched = None if token.match is None else harm_of(token.match.token)
    return Observation(
        uncertainty=token.uncertainty,
        beta=rejection_probability(token.prob, target_prob),
        harm=harm_of(token.own),
        match=None if token.match is None or matched is None else (token.match.score, matched),
        committed_harm=harm(token.prob, target_prob, missed) if skipped else 0.0,
        source=token.source,
        skipped=skipped,
        audit=audit,
        rule=token.rule,
    )
