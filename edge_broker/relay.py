"""The cluster's relay, without I/O: sends escalations up in batches, and passes verdicts down to the agents that asked.

Only the newest epoch of a session matters, so blocks and verdicts of older epochs are dropped here. Each agent has its
own queue, and a batch takes one block of each in turn. If all of this state is lost, agents retry, and nothing else
happens.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count
from typing import Final, NamedTuple

from fedhlm.protocol.fields import MAX_BATCH, MAX_BATCH_BYTES, MAX_PAYLOAD_BYTES
from fedhlm.protocol.messages import Escalation, RoutedEscalation, RoutedVerdict, Verdict, VerdictBatch

SESSIONS_MAX: Final = 4_096
PENDING_OF_ONE: Final = 256  # blocks that wait, per agent
BYTES_OF_ONE: Final = 2 * MAX_PAYLOAD_BYTES
BUSY: Final = "the edge is busy: too many blocks of this agent wait"
TAILS_MAX: Final = 16_384
_FIXED_BYTES: Final = 512  # an upper bound of a block's bytes without its packed fields


class _BlockPlace(NamedTuple):
    epoch: int
    base: int


class _Waiting(NamedTuple):
    number: int  # in order of arrival
    routed: RoutedEscalation


@dataclass
class _AgentBlocks:
    """The blocks of one agent: by arrival, and by session and place."""

    sessions: dict[int, dict[_BlockPlace, int]] = field(default_factory=dict)
    blocks: OrderedDict[int, RoutedEscalation] = field(default_factory=OrderedDict)
    bytes: int = 0

    def add(self, number: int, routed: RoutedEscalation) -> None:
        escalation = routed.escalation
        self.sessions.setdefault(escalation.session, {})[_BlockPlace(escalation.epoch, escalation.base)] = number
        self.blocks[number] = routed
        self.bytes += block_bytes(escalation)

    def remove(self, number: int) -> RoutedEscalation:
        routed = self.blocks.pop(number)
        escalation = routed.escalation
        places = self.sessions[escalation.session]
        del places[_BlockPlace(escalation.epoch, escalation.base)]
        if not places:
            del self.sessions[escalation.session]
        self.bytes -= block_bytes(escalation)
        return routed


@dataclass
class Relay:
    """The pending escalations by agent, and the newest epoch of every recent session."""

    batch_max: int = MAX_BATCH
    stale_escalations: int = 0
    stale_verdicts: int = 0
    repeated: int = 0
    _agents: OrderedDict[str, _AgentBlocks] = field(default_factory=OrderedDict)
    _epochs: OrderedDict[tuple[str, int], int] = field(default_factory=OrderedDict)
    _numbers: "count[int]" = field(default_factory=count)
    _tails: OrderedDict[tuple[str, int, int, int], int] = field(default_factory=OrderedDict)  # fixed ids by block

    def __len__(self) -> int:
        # A copy, because metrics are read by another thread.
        return sum(len(agent.blocks) for agent in tuple(self._agents.values()))

    @property
    def pending(self) -> list[RoutedEscalation]:
        """The blocks that wait, in order of arrival."""
        return [waiting.routed for waiting in sorted(self._waiting(), key=lambda w: w.number)]

    def _waiting(self) -> list[_Waiting]:
        return [_Waiting(n, routed) for agent in self._agents.values() for n, routed in agent.blocks.items()]

    def escalate(self, agent: str, escalation: Escalation) -> bool:
        """Queue a block, and return False if its epoch is outdated.

        A block that is sent again replaces the earlier copy.
        """
        session = (agent, escalation.session)
        newest = self._epochs.get(session, 0)
        if escalation.epoch < newest:
            self.stale_escalations += 1
            return False
        queue = self._agents.setdefault(agent, _AgentBlocks())
        places = queue.sessions.get(escalation.session, {})
        if escalation.epoch > newest or escalation.closes:
            for number in list(places.values()):
                queue.remove(number)
                self.stale_escalations += 1
        elif (earlier := places.get(_BlockPlace(escalation.epoch, escalation.base))) is not None:
            queue.remove(earlier)
            self.repeated += 1
        self._epochs[session] = escalation.epoch
        self._epochs.move_to_end(session)
        while len(self._epochs) > SESSIONS_MAX:
            self._epochs.popitem(last=False)
        queue.add(next(self._numbers), RoutedEscalation(agent, escalation))
        if escalation.fixed and not escalation.extend:
            self._tails[(agent, escalation.session, escalation.epoch, escalation.base)] = escalation.fixed
            while len(self._tails) > TAILS_MAX:
                self._tails.popitem(last=False)
        return True

    def audits(self, agent: str, verdict: Verdict) -> bool:
        """Whether a verdict answers an audit: the block had committed tokens only, and asked for none. Ask once."""
        if verdict.status == "working":
            return False
        fixed = self._tails.pop((agent, verdict.session, verdict.epoch, verdict.base), 0)
        return fixed > 0 and verdict.accepted == fixed and not verdict.ids

    def crowded(self, agent: str) -> bool:
        """Whether more blocks of an agent wait than may wait; the newest is to be taken back (`settle`)."""
        queue = self._agents.get(agent)
        return queue is not None and (len(queue.blocks) > PENDING_OF_ONE or queue.bytes > BYTES_OF_ONE)

    def newest_epoch(self, agent: str, session: int) -> int | None:
        """The newest epoch seen of a session; None for an unknown session."""
        return self._epochs.get((agent, session))

    def settle(self, agent: str, escalation: Escalation) -> None:
        """Remove a queued block, because the edge has answered it."""
        queue = self._agents[agent]
        queue.remove(queue.sessions[escalation.session][_BlockPlace(escalation.epoch, escalation.base)])
        self._tidy(agent)

    def take_batch(self) -> tuple[RoutedEscalation, ...]:
        """Remove and return the next batch, in order of arrival: at most `batch_max` blocks and MAX_BATCH_BYTES bytes.

        It takes the oldest block of each agent in turn. A block that is larger than MAX_BATCH_BYTES goes alone. The batch
        is empty if nothing is pending.
        """
        taken: list[_Waiting] = []
        size = 0
        while self._agents and len(taken) < self.batch_max:
            agent = next(iter(self._agents))
            queue = self._agents[agent]
            number, routed = next(iter(queue.blocks.items()))
            size += block_bytes(routed.escalation)
            if taken and size > MAX_BATCH_BYTES:
                break
            taken.append(_Waiting(number, queue.remove(number)))
            self._agents.move_to_end(agent)
            self._tidy(agent)
        return tuple(waiting.routed for waiting in sorted(taken, key=lambda w: w.number))

    def answers(self, batch: VerdictBatch) -> list[RoutedVerdict]:
        """The verdicts of the batch that their agents still wait for, in order."""
        current = [a for a in batch.items if a.verdict.epoch >= self._epochs.get((a.agent, a.verdict.session), 0)]
        self.stale_verdicts += len(batch.items) - len(current)
        return current

    def _tidy(self, agent: str) -> None:
        if not self._agents[agent].blocks:
            del self._agents[agent]


def block_bytes(escalation: Escalation) -> int:
    """An upper bound of the bytes that a block takes on the wire."""
    context = len(escalation.prime.context) if escalation.prime else 0
    return len(escalation.ids) + len(escalation.laws) + context + len(escalation.branches) + _FIXED_BYTES
