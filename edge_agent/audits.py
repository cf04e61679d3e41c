"""Audits: ends of finished texts that wait for a message that goes up anyway, and what the target says of them.

Pure bookkeeping: what is due, what has been said, what is given up. An audit that nobody answers ends all the same, and
its tokens count as wrong (docs/budget.md).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from edge_agent.events import Answered, Observation, Tail
from edge_agent.generation import scored
from edge_agent.learner import Measures, OpenText
from fedhlm.decoding.ids import digest_of
from fedhlm.protocol.messages import Fingerprint, Prime, Rider, Sampling, pack_ids
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Generation

WAIT_S: Final = 60.0  # for a message that carries it; then it goes up in one of its own
ANSWER_S: Final = 20.0  # for the verdict
TRIES: Final = 4
OPEN_MAX: Final = 64  # the oldest is given up beyond
RIDERS_MAX: Final = 8  # in one message


@dataclass
class Audit:
    """One tail that the coin chose. `text` is what the learner waits for; the rest is what a verdict is read with."""

    session: int
    tail: Tail
    text: OpenText
    config: Generation
    measures: Measures
    sampling: Sampling
    similarity: float | None
    harm: Callable[[float, float, bool], float]
    due_s: float
    tries: int = 0
    sent_s: float | None = None
    primed: bool = False
    scores: dict[int, Observation] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every token of the tail is scored."""
        return len(self.scores) == len(self.tail.tokens)

    def rider(self, fingerprint: Fingerprint) -> Rider:
        """The tail as it travels: fixed ids of its session, with the prime where the cloud may not hold it any more."""
        vocab_size, context = fingerprint.vocab_size, self.tail.context
        primed = self.primed and self.tries == 0
        before: Prime | int = (
            digest_of(context) if primed else Prime(self.sampling, fingerprint, pack_ids(context, vocab_size))
        )
        ids = pack_ids([t.token for t in self.tail.tokens], vocab_size)
        return Rider(self.session, self.tail.epoch, len(context), ids, len(self.tail.tokens), before)


class Audits:
    """The audits of one device that are not over, oldest first."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, Audit] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, session: int) -> bool:
        return session in self._open

    def wait(self, audit: Audit) -> list[Audit]:
        """Begin to wait for a message; what is given up to make room."""
        audit.primed = audit.tail.primed
        self._open[audit.session] = audit
        return [self._open.popitem(last=False)[1] for _ in range(len(self._open) - OPEN_MAX)]

    def riders(self, now_s: float) -> list[Audit]:
        """What the message that goes up now should carry; it counts as sent."""
        found = [a for a in self._open.values() if a.sent_s is None][:RIDERS_MAX]
        for audit in found:
            audit.sent_s, audit.due_s = now_s, now_s + ANSWER_S
        return found

    def wake_s(self) -> float:
        """When the next audit is due to go up alone, or its answer is overdue; infinity without any."""
        return min((a.due_s for a in self._open.values()), default=float("inf"))

    def overdue(self, now_s: float) -> tuple[bool, list[Audit]]:
        """Whether a message should go up for audits alone, and which audits are given up.

        One whose answer is overdue is sent again, with its whole context.
        """
        given_up: list[Audit] = []
        for audit in [a for a in self._open.values() if a.due_s <= now_s]:
            if audit.sent_s is not None:
                audit.sent_s, audit.tries = None, audit.tries + 1
            if audit.tries >= TRIES:
                given_up.append(self._open.pop(audit.session))
        return any(a.sent_s is None and a.due_s <= now_s for a in self._open.values()), given_up

    def answered(self, session: int, event: Answered) -> Audit | None:
        """Take in a verdict of the target; the audit that it completes."""
        audit = self._open.get(session)
        if audit is None or not SOURCES[event.source].verified:
            return None
        start = event.base - len(audit.tail.context)
        for offset in range(len(event.target_probs)):
            place = start + offset
            if 0 <= place < len(audit.tail.tokens) and offset <= event.accepted:
                token = audit.tail.tokens[place]
                audit.scores[place] = scored(audit.harm, token, event, offset, skipped=True, audit=True)
        return self._open.pop(session) if audit.complete else None

    def unprimed(self, session: int) -> None:
        """The cloud does not hold the session: the next message carries the whole context."""
        if (audit := self._open.get(session)) is not None:
            audit.sent_s, audit.primed, audit.tries = None, False, audit.tries + 1

    def moved(self) -> None:
        """The device is in another cluster, whose cloud sessions begin anew."""
        for audit in self._open.values():
            audit.primed = False

    def refused(self, session: int) -> Audit | None:
        """The cloud will never score it; the audit that is over."""
        return self._open.pop(session, None)
