"""The cluster's relay, without I/O: sends escalations up in batches, and passes verdicts down to the agents that asked.

Only the newest epoch of a session matters, so blocks and verdicts of older epochs are dropped here. If all of this
state is lost, agents retry, and nothing else happens.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fedhlm.protocol.messages import (
    MAX_BATCH,
    MAX_BATCH_BYTES,
    Escalation,
    RoutedEscalation,
    RoutedVerdict,
    VerdictBatch,
)

SESSIONS_MAX: Final = 4_096
_FIXED_BYTES: Final = 512  # an upper bound of a block's bytes without its packed fields


@dataclass
class Relay:
    """The pending escalations in order of arrival, and the newest epoch of every recent session."""

    batch_max: int = MAX_BATCH
    stale_escalations: int = 0
    stale_verdicts: int = 0
    repeated: int = 0
    pending: list[RoutedEscalation] = field(default_factory=list)
    _epochs: OrderedDict[tuple[str, int], int] = field(default_factory=OrderedDict)

    def escalate(self, agent: str, escalation: Escalation) -> bool:
        """Queue a block, and return False if its epoch is outdated.

        A block that is sent again replaces the earlier copy.
        """
        session = (agent, escalation.session)
        newest = self._epochs.get(session, 0)
        if escalation.epoch < newest:
            self.stale_escalations += 1
            return False
        if escalation.epoch > newest or escalation.closes:
            self.stale_escalations += self._drop(agent, lambda e: e.session == escalation.session)
        self.repeated += self._drop(
            agent, lambda e: (e.session, e.epoch, e.base) == (escalation.session, escalation.epoch, escalation.base)
        )
        self._epochs[session] = escalation.epoch
        self._epochs.move_to_end(session)
        while len(self._epochs) > SESSIONS_MAX:
            self._epochs.popitem(last=False)
        self.pending.append(RoutedEscalation(agent, escalation))
        return True

    def newest_epoch(self, agent: str, session: int) -> int | None:
        """The newest epoch seen of a session; None for an unknown session."""
        return self._epochs.get((agent, session))

    def settle(self, agent: str, escalation: Escalation) -> None:
        """Remove a queued block, because the edge has answered it."""
        self.pending = [r for r in self.pending if r.agent != agent or r.escalation is not escalation]

    def take_batch(self) -> tuple[RoutedEscalation, ...]:
        """Remove and return the next batch, oldest first: at most `batch_max` blocks and MAX_BATCH_BYTES bytes.

        A block that is larger than MAX_BATCH_BYTES goes alone. The batch is empty if nothing is pending.
        """
        count, size = 0, 0
        for routed in self.pending[: self.batch_max]:
            size += block_bytes(routed.escalation)
            if count and size > MAX_BATCH_BYTES:
                break
            count += 1
        batch, self.pending = tuple(self.pending[:count]), self.pending[count:]
        return batch

    def answers(self, batch: VerdictBatch) -> list[RoutedVerdict]:
        """The verdicts of the batch that their agents still wait for, in order."""
        current = [a for a in batch.items if a.verdict.epoch >= self._epochs.get((a.agent, a.verdict.session), 0)]
        self.stale_verdicts += len(batch.items) - len(current)
        return current

    def _drop(self, agent: str, matches: Callable[[Escalation], bool]) -> int:
        kept = [r for r in self.pending if r.agent != agent or not matches(r.escalation)]
        dropped = len(self.pending) - len(kept)
        self.pending = kept
        return dropped


def block_bytes(escalation: Escalation) -> int:
    """An upper bound of the bytes that a block takes on the wire."""
    context = len(escalation.prime.context) if escalation.prime else 0
    branches = len(escalation.hints.branches) if escalation.hints else 0
    return len(escalation.ids) + len(escalation.laws) + context + branches + _FIXED_BYTES
