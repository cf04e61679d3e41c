"""Continuous batching of many sessions, without I/O.

`submit` queues blocks, `take` returns the pieces to run in the next model call, and `advance` takes the logits back. A
session runs one block at a time, because its next block may depend on the result of the previous one.

A model call is bounded in tokens. A long context is therefore fed in pieces, and other blocks are served between them.
Caches are bounded in bytes and may be evicted at any time, because their tokens can be fed again. Whoever has used the
model least is served first (`cloud_verifier.shares`).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloud_verifier.engine import Engine, EngineInput, EngineOutput
from cloud_verifier.sessions import Declined, Key, RefusedBlock, SessionEntry, Sessions
from cloud_verifier.shares import Level
from cloud_verifier.verifier import Block, Feed, Settled, settle
from fedhlm.protocol.messages import MAX_PAYLOAD_BYTES, Escalation

WAITING_MAX: Final = 16_384
WAITING_BYTES: Final = 64 * 1024 * 1024
WAITING_OF_ONE: Final = 256  # blocks that wait, per agent
BYTES_OF_ONE: Final = 2 * MAX_PAYLOAD_BYTES
RUNNING_OF_ONE: Final = 4
RUNNING_MAX: Final = 1_024
BURST: Final = 256.0  # tokens of credit of an agent that was idle
CLUSTER_BURST: Final = 1_024.0
QUANTUM: Final = 512.0  # tokens after which a block's place in line is computed again
READS: Final = 24  # reading this many cached tokens costs as much as computing one (benchmarks/load.py)
PIECE_MIN: Final = 16  # a smaller piece is not worth its share of a call


class BlockJob(NamedTuple):
    """An escalation as it arrived; `expires_s` is in seconds on the batcher's clock. For `watch` see `settle`."""

    key: Key
    escalation: Escalation
    expires_s: float
    watch: Callable[[NDArray[Any]], object] | None = None

    @property
    def size_bytes(self) -> int:
        """About how many bytes the job takes while it waits."""
        e = self.escalation
        context = len(e.prime.context) if e.prime else 0
        return len(e.ids) + len(e.laws) + context + (len(e.hints.branches) if e.hints else 0)

    def repeats(self, other: "BlockJob") -> bool:
        """Whether both jobs carry the same block, which was sent again."""
        a, b = self.escalation, other.escalation
        return (self.key, a.epoch, a.base) == (other.key, b.epoch, b.base)


Outcome = Settled | Declined
"""The result of a block: a settled block, or the reason why it was declined."""


class Done(NamedTuple):
    """A job and its outcome."""

    job: BlockJob
    outcome: Outcome


@dataclass(eq=False)
class Running:
    """A block that has been started and is not settled yet.

    `steps` is the generator that settles the block, and `feed` is what it asks for next. The session's `fed` ids are
    what the cache must hold, and the first `entry.cached` of them are in it. The next call feeds `piece` more ids.

    `turn` orders the blocks of a cluster, and `served` counts the tokens since the turn was computed. `number` is the
    order in which blocks were started. `evictions` counts how often this block lost its cache. `rows` collects logits,
    each of shape (rows, V).
    """

    job: BlockJob
    entry: SessionEntry
    steps: Generator[Feed, NDArray[Any], Settled]
    feed: Feed
    number: int
    turn: float
    served: float = 0.0
    evictions: int = 0
    piece: int = 0
    rows: list[NDArray[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.want(self.feed)

    def want(self, feed: Feed) -> None:
        """Accept the generator's next request."""
        self.feed, self.rows = feed, []
        self.entry.cached = min(self.entry.cached, feed.keep)

    @property
    def left(self) -> int:
        """How many ids remain to be fed."""
        return len(self.entry.state.fed) - self.entry.cached

    @property
    def wanted(self) -> int:
        """How many rows of logits the next piece must return."""
        end = self.entry.cached + self.piece
        first = len(self.entry.state.fed) - self.feed.rows + sum(len(rows) for rows in self.rows)
        return max(0, end - max(self.entry.cached, first))


@dataclass
class _AgentQueue:
    """The blocks of one agent, by session. The session that has waited longest is first."""

    waiting: dict[Key, deque[BlockJob]] = field(default_factory=dict)
    running: dict[Key, Running] = field(default_factory=dict)
    count: int = 0
    bytes: int = 0

    def startable(self) -> Key | None:
        """The session whose next block may start; None if there is none."""
        if len(self.running) >= RUNNING_OF_ONE:
            return None
        return next((key for key in self.waiting if key not in self.running), None)


class _QueuePlace(NamedTuple):
    """A place in a cluster's line: a running block, or an agent whose next block may start (`running` is None).

    The lowest `turn` is served first, and `number` breaks ties.
    """

    turn: float
    number: int
    agent: str
    running: Running | None


class _Call:
    """A model call under construction.

    Its cost is its number of rows times the longest row, because rows are padded.
    """

    def __init__(self, tokens_max: int, rows_max: int) -> None:
        self.batch: list[Running] = []
        self._tokens_max = tokens_max
        self._rows_max = rows_max
        self._width = 0
        self._past = 0

    @property
    def full(self) -> bool:
        """Whether the call has no room for even one more token."""
        return len(self.batch) >= self._rows_max or self._cost(1, 0) > self._tokens_max

    def _cost(self, width: int, past: int) -> float:
        width, past = max(width, self._width), max(past, self._past)
        return (len(self.batch) + 1) * (width + past / READS) if self.batch else 0.0

    def piece_of(self, running: Running) -> int:
        """How many ids of a block fit into this call; 0 if the piece would be too small to be worth it."""
        past, left = running.entry.cached, running.left
        if not self.batch:
            return min(left, max(1, self._tokens_max // 2, self._tokens_max - past // READS))
        room = int(self._tokens_max / (len(self.batch) + 1) - max(past, self._past) / READS)
        # A short block at the head must not wait for pieces of long contexts. They go with the next call.
        piece = min(left, room, max(self.batch[0].piece, PIECE_MIN if left <= PIECE_MIN else 0))
        fits = piece >= min(left, PIECE_MIN) and self._cost(piece, past) <= self._tokens_max
        return piece if fits else 0

    def add(self, running: Running, piece: int) -> None:
        """Add a piece of a block to the call."""
        running.piece = piece
        self.batch.append(running)
        self._width, self._past = max(self._width, piece), max(self._past, running.entry.cached)


class _Room:
    """The cache space that is available while a call is put together.

    Caches of idle sessions are evicted first, the least recently used before the others. Caches of running blocks
    follow, the last in line first. A block can take the cache of a block that was started earlier only once. Without
    this rule two blocks could evict each other's caches for ever.
    """

    def __init__(self, tokens_max: int, entries: Iterable[SessionEntry], running: Sequence[Running]) -> None:
        self.evicted = 0
        owners = {id(r.entry): r for r in running}
        all_of_them = {id(entry): entry for entry in (*entries, *(r.entry for r in running))}
        self._free = tokens_max - sum(entry.cached for entry in all_of_them.values())
        self._idle = deque(e for name, e in all_of_them.items() if e.cached and name not in owners)
        self._running = sorted(running, key=lambda r: r.turn)
        self._oldest = min((r.number for r in running), default=0)

    def grow(self, running: Running, piece: int, batch: Sequence[Running]) -> bool:
        """Make room for a piece of a block.

        If there is not enough room, return False and evict no running block's cache.
        """
        while self._free < piece and self._idle:
            self._drop(self._idle.popleft())
        if self._free < piece:
            victims = [v for v in reversed(self._running) if v is not running and v not in batch and v.entry.cached]
            victims = [v for v in victims if v.number > running.number or not v.evictions]
            alone = not batch and running.number == self._oldest
            if not alone and self._free + sum(v.entry.cached for v in victims) < piece:
                return False
            for victim in victims:
                if self._free >= piece:
                    break
                victim.evictions += 1
                self._drop(victim.entry)
        self._free -= piece
        return True

    def _drop(self, entry: SessionEntry) -> None:
        self._free += entry.cached
        self.evicted += 1
        entry.cache, entry.cached = None, 0


class Batcher:
    """Schedules the blocks of all sessions.

    `batch_max` bounds the blocks in a model call, `batch_tokens` bounds its tokens, and `cache_bytes` bounds the bytes
    of all caches together. `expired`, `overflowed` and `evicted` count blocks that expired, blocks that did not fit
    into the queue, and caches that were evicted.
    """

    def __init__(
        self, sessions: Sessions, engine: Engine, *, batch_max: int, batch_tokens: int, cache_bytes: int
    ) -> None:
        self.sessions = sessions
        self.batch_max = batch_max
        self.batch_tokens = batch_tokens
        self.cache_bytes = cache_bytes
        self.expired = 0
        self.overflowed = 0
        self.evicted = 0
        self._empty_cache = engine.empty_cache
        self._token_bytes = max(1, engine.token_bytes)
        self._clusters: dict[str, dict[str, _AgentQueue]] = {}
        self._cluster_shares = Level(CLUSTER_BURST)
        self._agent_shares: dict[str, Level] = {}
        self._count = 0
        self._bytes = 0
        self._running = 0
        self._numbers = count()

    # Incoming work

    def submit(self, job: BlockJob) -> bool:
        """Queue a job. It replaces the same block if that was sent before, and the end of a session all its blocks.
        Return False if the job is dropped.

        A job beyond the limits of the queue, or of its agent, is dropped and counted. Its sender will ask again.
        """
        agent = self._agent(job.key)
        queue = agent.waiting.get(job.key, deque())
        closes = job.escalation.closes
        for double in [waiting for waiting in queue if closes or job.repeats(waiting)]:
            queue.remove(double)
            self._weigh(agent, double, -1)
        size = job.size_bytes
        full = self._count >= WAITING_MAX or self._bytes + size > WAITING_BYTES
        if full or agent.count >= WAITING_OF_ONE or agent.bytes + size > BYTES_OF_ONE:
            self.overflowed += 1
            if not queue:
                agent.waiting.pop(job.key, None)
            self._tidy(job.key)
            return False
        self._weigh(agent, job, 1)
        queue.append(job)
        agent.waiting[job.key] = queue
        return True

    def withdraw(self, key: Key) -> None:
        """Drop a session's blocks that wait, and stop one that runs before its next call."""
        agent = self._clusters.get(key.cluster, {}).get(key.agent)
        if agent is None:
            return
        for job in agent.waiting.pop(key, ()):
            self._weigh(agent, job, -1)
        running = agent.running.get(key)
        if running is not None:
            running.job = running.job._replace(expires_s=-inf)
        self._tidy(key)

    def _agent(self, key: Key) -> _AgentQueue:
        return self._clusters.setdefault(key.cluster, {}).setdefault(key.agent, _AgentQueue())

    def _tidy(self, key: Key) -> None:
        """Forget an agent that has no blocks here, and a cluster that has no agents."""
        agents = self._clusters[key.cluster]
        agent = agents[key.agent]
        if not (agent.waiting or agent.running):
            del agents[key.agent]
        if not agents:
            del self._clusters[key.cluster]

    def _weigh(self, agent: _AgentQueue, job: BlockJob, sign: int) -> None:
        agent.count += sign
        agent.bytes += sign * job.size_bytes
        self._count += sign
        self._bytes += sign * job.size_bytes

    # State

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run."""
        return not self._clusters

    @property
    def waiting(self) -> int:
        """How many blocks wait to be started."""
        return self._count

    @property
    def running(self) -> list[Running]:
        """The blocks that have been started."""
        return [
            running
            for agents in self._clusters.values()
            for agent in agents.values()
            for running in agent.running.values()
        ]

    @property
    def cached_bytes(self) -> int:
        """How many bytes all caches take."""
        entries = {id(entry): entry for entry in self.sessions.entries()}
        entries |= {id(running.entry): running.entry for running in self.running}
        return self._token_bytes * sum(entry.cached for entry in entries.values())

    # The next call

    def take(self, now_s: float) -> tuple[list[Running], list[Done]]:
        """Return the pieces of blocks to run in one call, and the jobs that ended without one.

        `now_s` is in seconds.
        """
        done: list[Done] = []
        for late in [r for r in self.running if now_s > r.job.expires_s]:
            self._give_up(late)
        call, starting, lines = _Call(self.batch_tokens, self.batch_max), True, self._lines()
        room = _Room(self.cache_bytes // self._token_bytes, self.sessions.entries(), self.running)
        while lines and not call.full:
            cluster = min(lines, key=self._cluster_shares.of)
            line = lines[cluster]
            if not line:
                del lines[cluster]
                continue
            place = heappop(line)
            running = place.running
            if running is None:
                running = self._start_next(cluster, place.agent, now_s, done) if starting else None
                if running is None:
                    continue
                heappush(line, place._replace(turn=self._agent_shares[cluster].of(place.agent)))
            piece = call.piece_of(running)
            if piece and room.grow(running, piece, call.batch):
                call.add(running, piece)
                self._charge(cluster, running)
            else:
                starting = False
        self.evicted += room.evicted
        return call.batch, done

    def _lines(self) -> dict[str, list[_QueuePlace]]:
        """For each cluster, a heap of its running blocks and of the agents that can start one.

        The next in line is first.
        """
        self._cluster_shares.advance(self._clusters)
        lines: dict[str, list[_QueuePlace]] = {}
        for cluster, agents in self._clusters.items():
            shares = self._agent_shares.setdefault(cluster, Level(BURST))
            shares.advance(agents)
            line = lines[cluster] = []
            for name, agent in agents.items():
                for running in agent.running.values():
                    line.append(_QueuePlace(running.turn, len(line), name, running))
                if agent.startable() is not None:
                    line.append(_QueuePlace(shares.of(name), len(line), name, None))
            heapify(line)
        self._forget_shares()
        return lines

    def _forget_shares(self) -> None:
        """Forget the shares of idle clusters when there are many."""
        while len(self._agent_shares) > 2 * len(self._clusters) + 64:
            del self._agent_shares[next(name for name in self._agent_shares if name not in self._clusters)]

    def _charge(self, cluster: str, running: Running) -> None:
        tokens = running.piece + running.entry.cached / READS
        self._cluster_shares.charge(cluster, tokens)
        shares = self._agent_shares[cluster]
        shares.charge(running.job.key.agent, tokens)
        running.served += tokens
        # Not in the middle of a context: otherwise all long contexts would end together, at the very end.
        if running.served >= QUANTUM and running.piece == running.left:
            running.turn, running.served = shares.of(running.job.key.agent), 0.0

    def _start_next(self, cluster: str, name: str, now_s: float, done: list[Done]) -> Running | None:
        """Start an agent's next block; None if no block can start. Jobs that are declined are added to `done`."""
        while (agent := self._clusters.get(cluster, {}).get(name)) is not None:
            key = agent.startable()
            if key is None or self._running >= RUNNING_MAX:
                return None
            job = self._next_of(agent, key)
            if now_s > job.expires_s:
                self.expired += 1
            else:
                admission = self.sessions.admit(key, job.escalation)
                if isinstance(admission, Block):
                    return self._started(agent, job, admission)
                done.append(Done(job, admission))
                self._agent_shares[cluster].charge(name, 1.0)
            self._tidy(key)
        return None

    def _next_of(self, agent: _AgentQueue, key: Key) -> BlockJob:
        queue = agent.waiting.pop(key)
        job = queue.popleft()
        self._weigh(agent, job, -1)
        if queue:
            agent.waiting[key] = queue  # the session goes behind the agent's others
        return job

    def _started(self, agent: _AgentQueue, job: BlockJob, block: Block) -> Running:
        entry = self.sessions.entry(job.key)
        if entry is None:
            raise AssertionError(f"{job.key} was admitted without a session")
        steps = settle(entry.state, block, job.watch)
        turn = self._agent_shares[job.key.cluster].of(job.key.agent)
        running = agent.running[job.key] = Running(job, entry, steps, next(steps), next(self._numbers), turn)
        self._running += 1
        return running

    def request(self, running: Running) -> EngineInput:
        """The model input for a block's next piece."""
        entry = running.entry
        cache = self._empty_cache if entry.cache is None else entry.cache
        ids = entry.state.fed[entry.cached : entry.cached + running.piece]
        return EngineInput(cache.truncated(entry.cached), ids, running.wanted)

    # Results

    def advance(self, batch: Sequence[Running], outputs: Sequence[EngineOutput]) -> list[Done]:
        """Give each block from `take` its output, and return the blocks that are settled now."""
        done: list[Done] = []
        for running, output in zip(batch, outputs, strict=True):
            if len(output.logits):
                running.rows.append(output.logits)
            running.entry.cache, running.entry.cached = output.cache, running.entry.cached + running.piece
            if running.left:
                continue
            rows = running.rows[0] if len(running.rows) == 1 else np.concatenate(running.rows)
            try:
                running.want(running.steps.send(rows))
            except StopIteration as stop:
                self._end(running)
                done.append(Done(running.job, stop.value))
            except Exception as exc:  # noqa: BLE001 - a block that cannot be settled ends its session, not the cloud
                done += self.fail([running], f"the block cannot be settled: {type(exc).__name__}: {exc}")
        return done

    def fail(self, batch: Sequence[Running], reason: str) -> list[Done]:
        """Handle a model failure: forget the sessions of this batch and refuse its blocks with `reason`."""
        for running in batch:
            running.steps.close()
            self._end(running)
            self.sessions.forget(running.job.key)
        return [Done(r.job, RefusedBlock(reason)) for r in batch]

    def _give_up(self, running: Running) -> None:
        """Stop a block that nobody waits for any more. What it settled stays settled, and its cache remains valid."""
        running.steps.close()
        self._end(running)
        self.expired += 1

    def _end(self, running: Running) -> None:
        key = running.job.key
        del self._clusters[key.cluster][key.agent].running[key]
        self._running -= 1
        del running.entry.state.fed[running.entry.cached :]
        self._tidy(key)
