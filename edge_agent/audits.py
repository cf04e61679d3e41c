"""The open audits of a device: ends of finished texts that wait for a message to ride in, and for the target's scores.

Pure bookkeeping: which audits are due, which tokens are scored, which audits are given up. If nobody answers an audit,
it ends all the same, and its tokens count as wrong (docs/budget.md).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from edge_agent.accounts import OpenText
from edge_agent.events import Answered, Observation, Tail
from edge_agent.generation import scored
from edge_agent.measures import Measures
from fedhlm.decoding.ids import digest_of
from fedhlm.protocol.fields import MAX_RIDERS
from fedhlm.protocol.messages import Fingerprint, Prime, Rider, Sampling
from fedhlm.protocol.packing import pack_ids
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Generation

WAIT_S: Final = 60.0  # seconds to wait for a message that carries the audit; then it is sent alone
ANSWER_S: Final = 20.0  # seconds to wait for the verdict
TRIES: Final = 4
OPEN_MAX: Final = 1_024  # beyond this number the oldest audit is given up
FULL: Final = 64  # so many audits that wait are worth a message of their own
RIDERS_BYTES: Final = 16_384  # of all riders of a message; a larger one goes up by itself
ON_THE_WAY: Final = 32  # audits whose answer is awaited; the cloud answers the blocks of a device before its audits


@dataclass
class Audit:
    """The audit of one tail that the coin has chosen.

    `text` is the learner's account that waits for the result. `harm` is the coupling's. `due_s` and `sent_s` are in
    seconds on the agent's clock. `scores` holds the observations so far, by place in the tail.
    """

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
        """The tail as it is sent: fixed ids, with a prime if the cloud may not hold the session any more."""
        vocab_size, context = fingerprint.vocab_size, self.tail.context
        primed = self.primed and self.tries == 0
        before: Prime | int = (
            digest_of(context) if primed else Prime(self.sampling, fingerprint, pack_ids(context, vocab_size))
        )
        ids = pack_ids([t.token for t in self.tail.tokens], vocab_size)
        return Rider(self.session, self.tail.epoch, len(context), ids, len(self.tail.tokens), before)


class Audits:
    """The open audits of one device, oldest first. `fingerprint` is that of its models, which riders carry."""

    def __init__(self, fingerprint: Fingerprint) -> None:
        self._fingerprint = fingerprint
        self._open: OrderedDict[int, Audit] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, session: int) -> bool:
        return session in self._open

    def wait(self, audit: Audit) -> list[Audit]:
        """Add an audit. Return the audits that are given up to make room."""
        audit.primed = audit.tail.primed
        self._open[audit.session] = audit
        return [self._open.popitem(last=False)[1] for _ in range(len(self._open) - OPEN_MAX)]

    def riders(self, now_s: float, *, alone: bool = False) -> list[Audit]:
        """The audits that the message sent at `now_s` must carry. They count as sent.

        A message with a block of its own carries few, so that the next block does not wait behind them. One that is
        sent `alone`, for audits only, carries as many as it can.
        """
        found: list[Audit] = []
        size = 0
        waiting = self._waiting()
        room = MAX_RIDERS if alone else max(0, ON_THE_WAY - (len(self._open) - len(waiting)))
        for audit in waiting[:room]:
            size += len(msgspec.msgpack.encode(audit.rider(self._fingerprint)))
            if found and size > RIDERS_BYTES:
                break
            audit.sent_s, audit.due_s = now_s, now_s + ANSWER_S
            found.append(audit)
        return found

    @property
    def full(self) -> bool:
        """Whether so many audits wait that they go up without waiting for another message."""
        return len(self._waiting()) >= FULL

    def _waiting(self) -> list[Audit]:
        return [a for a in self._open.values() if a.sent_s is None]

    def wake_s(self) -> float:
        """When the next audit must be sent alone, or its answer is overdue; infinity if there is none."""
        return min((a.due_s for a in self._open.values()), default=float("inf"))

    def overdue(self, now_s: float) -> tuple[bool, list[Audit]]:
        """Return whether audits must be sent alone now, and which audits are given up.

        An audit whose answer is overdue is sent again with its whole context.
        """
        given_up: list[Audit] = []
        for audit in [a for a in self._open.values() if a.due_s <= now_s]:
            if audit.sent_s is not None:
                audit.sent_s, audit.tries = None, audit.tries + 1
            if audit.tries >= TRIES:
                given_up.append(self._open.pop(audit.session))
        return self.full or any(a.due_s <= now_s for a in self._waiting()), given_up

    def answered(self, session: int, event: Answered) -> Audit | None:
        """Add the scores of a verdict. Return the audit if it is complete now. Only the target's verdicts count."""
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
        """Note that the cloud does not hold the session. The next message carries the whole context."""
        if (audit := self._open.get(session)) is not None:
            audit.sent_s, audit.primed, audit.tries = None, False, audit.tries + 1

    def clear(self) -> list[Audit]:
        """Remove and return all audits."""
        found = list(self._open.values())
        self._open.clear()
        return found

    def moved(self) -> None:
        """Note that the agent has moved to another cluster, where the cloud holds none of its sessions."""
        for audit in self._open.values():
            audit.primed = False

    def refused(self, session: int) -> Audit | None:
        """Remove and return an audit that the cloud refused to score."""
        return self._open.pop(session, None)
