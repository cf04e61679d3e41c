"""The blocks of clusters and agents at the cloud: those that wait, by session and lane, and those that run. No I/O."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from cloud_verifier.calls import BlockJob, Running
from cloud_verifier.sessions import Key
from fedhlm.protocol.fields import MAX_PAYLOAD_BYTES

WAITING_MAX: Final = 16_384
WAITING_BYTES: Final = 64 * 1024 * 1024
WAITING_OF_ONE: Final = 256  # blocks that wait, per agent
BYTES_OF_ONE: Final = 2 * MAX_PAYLOAD_BYTES
LOOKED_AT: Final = 1_024
GOING_FIRST: Final = 8  # blocks of an agent that start before an audit that was there earlier


@dataclass
class Load:
    """How many blocks wait, and how many bytes they take."""

    count: int = 0
    bytes: int = 0

    def weigh(self, job: BlockJob, sign: int) -> None:
        """Add a block (`sign` 1), or take it away (-1)."""
        self.count += sign
        self.bytes += sign * job.size_bytes

    @property
    def share(self) -> float:
        """The part of the room for all blocks that these take, by number or by bytes, whichever is larger."""
        return max(self.count / WAITING_MAX, self.bytes / WAITING_BYTES)


class AgentQueue:
    """The blocks of one agent. Of the sessions in a lane, the one that has waited longest is first.

    No text waits for an audit. So it lets others go first, GOING_FIRST at most.

    `short_max` is the largest number of tokens of a short block, and `id_bytes` the size of a token id.
    """

    def __init__(self, *, short_max: int, id_bytes: int) -> None:
        self.running: dict[Key, Running] = {}
        self.load = Load()
        self._short_max = short_max
        self._id_bytes = id_bytes
        self._went_first = 0  # blocks since the last audit, while another one waited
        self._waiting: dict[Key, deque[BlockJob]] = {}
        # Sessions by whether their next block is short, and whether it is an audit.
        self._lanes: dict[tuple[bool, bool], dict[Key, None]] = {
            (s, a): {} for s in (True, False) for a in (True, False)
        }

    def __bool__(self) -> bool:
        return bool(self._waiting or self.running)

    def is_short(self, job: BlockJob) -> bool:
        """Whether the model has little to compute for a block."""
        return job.tokens(self._id_bytes) <= self._short_max

    def is_audit(self, job: BlockJob) -> bool:
        """Whether a block only asks for scores."""
        return job.only_scores(self._id_bytes)

    def replaced(self, job: BlockJob) -> list[BlockJob]:
        """Remove and return the blocks that a new one replaces: its earlier copies, or, if it ends the session, all."""
        queue = self._waiting.get(job.key, deque())
        doubles = [waiting for waiting in queue if job.escalation.closes or job.repeats(waiting)]
        for double in doubles:
            queue.remove(double)
            self.load.weigh(double, -1)
        if doubles:
            self._place(job.key)
        return doubles

    def append(self, job: BlockJob) -> None:
        """Queue a block behind those of its session."""
        self._waiting.setdefault(job.key, deque()).append(job)
        self.load.weigh(job, 1)
        if len(self._waiting[job.key]) == 1:
            self._place(job.key)

    def startable(self, *, short: bool, at_most: int) -> Key | None:
        """The session whose next block may start in a lane; None if there is none, or if `at_most` blocks run there."""
        if sum(running.short is short for running in self.running.values()) >= at_most:
            return None
        first, audit = (
            next((key for key in self._lanes[short, kind] if key not in self.running), None) for kind in (False, True)
        )
        return first if audit is None or (first is not None and self._went_first < GOING_FIRST) else audit

    def renew(self, renewed: Callable[[BlockJob], BlockJob | None]) -> list[tuple[BlockJob, int]]:
        """Put `renewed` in the place of every block, or leave it where that is None.

        Return those that were put, and how many tokens of each one's text are cached.
        """
        put = []
        for running in self.running.values():
            if (job := renewed(running.job)) is not None:
                running.job = job
                put.append((job, running.entry.cached))
        for queue in self._waiting.values():
            for place, waiting in enumerate(queue):
                if (job := renewed(waiting)) is not None:
                    queue[place] = job
                    put.append((job, 0))
        return put

    def withdraw(self, key: Key) -> list[BlockJob]:
        """Remove and return all blocks of a session that wait."""
        dropped = list(self._waiting.get(key, ()))
        if dropped:
            self._waiting[key].clear()
            self._place(key)
        for job in dropped:
            self.load.weigh(job, -1)
        return dropped

    def newest(self) -> BlockJob:
        """Remove and return the last block of the session that was queued last."""
        key = next(reversed(self._waiting))
        job = self._waiting[key].pop()
        self.load.weigh(job, -1)
        self._place(key)
        return job

    def peek(self, key: Key) -> BlockJob:
        """A session's next block, which stays."""
        return self._waiting[key][0]

    def next_of(self, key: Key) -> BlockJob:
        """Remove and return a session's next block. The session goes behind the agent's others."""
        job = self._waiting[key].popleft()
        self.load.weigh(job, -1)
        self._place(key)
        audits = any(self._lanes[short, True] for short in (True, False))
        self._went_first = 0 if self.is_audit(job) or not audits else self._went_first + 1
        return job

    def _place(self, key: Key) -> None:
        for lane in self._lanes.values():
            lane.pop(key, None)
        if self._waiting[key]:
            first = self._waiting[key][0]
            self._lanes[self.is_short(first), self.is_audit(first)][key] = None
        else:
            del self._waiting[key]


@dataclass
class ClusterQueue:
    """The agents of one cluster that have blocks here."""

    agents: dict[str, AgentQueue] = field(default_factory=dict)
    load: Load = field(default_factory=Load)


class Waiting:
    """All blocks of all clusters, bounded in number and bytes.

    If there is no more room, the cluster that takes most of it, and there the agent that does, loses its newest block.
    A cluster or an agent that has nothing here yet can therefore always queue.
    """

    def __init__(self, *, short_max: int, id_bytes: int) -> None:
        self.clusters: dict[str, ClusterQueue] = {}
        self.load = Load()
        self._short_max = short_max
        self._id_bytes = id_bytes

    def enqueue(self, job: BlockJob) -> BlockJob | None:
        """Queue a block in place of those that it replaces. Return the block that found no room, if any."""
        cluster = self.clusters.setdefault(job.key.cluster, ClusterQueue())
        agent = cluster.agents.setdefault(job.key.agent, AgentQueue(short_max=self._short_max, id_bytes=self._id_bytes))
        for double in agent.replaced(job):
            self._weigh(cluster, double, -1)
        if agent.load.count >= WAITING_OF_ONE or agent.load.bytes + job.size_bytes > BYTES_OF_ONE:
            self.tidy(job.key)
            return job
        agent.append(job)
        self._weigh(cluster, job, 1)
        return self._pushed_out() if self.load.share > 1.0 else None

    def _pushed_out(self) -> BlockJob:
        cluster = max(self.clusters.values(), key=lambda c: c.load.share)
        # Among so many agents none has much.
        waiting = (agent for agent in cluster.agents.values() if agent.load.count)
        agent = max(islice(waiting, LOOKED_AT), key=lambda a: a.load.share)
        job = agent.newest()
        self._weigh(cluster, job, -1)
        self.tidy(job.key)
        return job

    def next_of(self, key: Key) -> BlockJob:
        """Remove and return a session's next block."""
        cluster = self.clusters[key.cluster]
        job = cluster.agents[key.agent].next_of(key)
        self._weigh(cluster, job, -1)
        return job

    def withdraw(self, key: Key) -> Running | None:
        """Drop all blocks of a session that wait, and return its running block."""
        agent = self.agent(key.cluster, key.agent)
        if agent is None:
            return None
        for job in agent.withdraw(key):
            self._weigh(self.clusters[key.cluster], job, -1)
        running = agent.running.get(key)
        self.tidy(key)
        return running

    def agent(self, cluster: str, name: str) -> AgentQueue | None:
        """The queue of an agent; None if it has no blocks here."""
        found = self.clusters.get(cluster)
        return None if found is None else found.agents.get(name)

    def tidy(self, key: Key) -> None:
        """Forget an agent that has no blocks here, and a cluster that has no agents."""
        cluster = self.clusters[key.cluster]
        if not cluster.agents[key.agent]:
            del cluster.agents[key.agent]
        if not cluster.agents:
            del self.clusters[key.cluster]

    def _weigh(self, cluster: ClusterQueue, job: BlockJob, sign: int) -> None:
        self.load.weigh(job, sign)
        cluster.load.weigh(job, sign)
