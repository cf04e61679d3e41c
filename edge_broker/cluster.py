"""The cluster's relay, without I/O: escalations go up in batches, verdicts go down to the agent that asked.

Of one session only the newest epoch is worth the way: older blocks and older answers are dropped here. Losing all of
this state costs retries and nothing else.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fedhlm.messages import MAX_BATCH, Answered, Escalation, Routed, VerdictBatch

SESSIONS_MAX: Final = 4_096


@dataclass
class Relay:
    """Pending escalations in order of arrival, and the newest epoch of every recent session."""

    batch_max: int = MAX_BATCH
    stale: int = 0
    pending: list[Routed] = field(default_factory=list)
    _epochs: OrderedDict[tuple[str, int], int] = field(default_factory=OrderedDict)

    def escalate(self, agent: str, escalation: Escalation) -> bool:
        """Queue a block; False when a newer epoch of its session has passed. A repeated block replaces its double."""
        session = (agent, escalation.session)
        newest = self._epochs.get(session, 0)
        if escalation.epoch < newest:
            self.stale += 1
            return False
        if escalation.epoch > newest:
            self._drop(agent, lambda e: e.session == escalation.session)
        self._drop(
            agent, lambda e: (e.session, e.epoch, e.base) == (escalation.session, escalation.epoch, escalation.base)
        )
        self._epochs[session] = escalation.epoch
        self._epochs.move_to_end(session)
        while len(self._epochs) > SESSIONS_MAX:
            self._epochs.popitem(last=False)
        self.pending.append(Routed(agent, escalation))
        return True

    def settle(self, agent: str, escalation: Escalation) -> None:
        """Take a queued block out again: it was answered here."""
        self.pending = [r for r in self.pending if r.agent != agent or r.escalation is not escalation]

    def take_batch(self) -> tuple[Routed, ...]:
        """The next at most `batch_max` pending blocks, oldest first; empty when there are none."""
        batch, self.pending = tuple(self.pending[: self.batch_max]), self.pending[self.batch_max :]
        return batch

    def answers(self, batch: VerdictBatch) -> list[Answered]:
        """The verdicts that their agents still wait for, in order."""
        current = [a for a in batch.items if a.verdict.epoch >= self._epochs.get((a.agent, a.verdict.session), 0)]
        self.stale += len(batch.items) - len(current)
        return current

    def _drop(self, agent: str, matches: Callable[[Escalation], bool]) -> None:
        kept = [r for r in self.pending if r.agent != agent or not matches(r.escalation)]
        self.stale += len(self.pending) - len(kept)
        self.pending = kept
