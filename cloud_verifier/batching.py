"""Continuous batching of many sessions, without I/O.

`submit` queues blocks, `take` returns the pieces to run in the next model call, and `advance` takes the logits back. A
session runs one block at a time, because its next block may depend on the result of the previous one.

A model call is bounded in tokens. A long context is therefore fed in pieces, and other blocks are served between them.
Caches are bounded in bytes and may be evicted at any time, because their tokens can be fed again.

Blocks that ask for little go first until they have used half of the model's time, and long ones have the rest. In
either lane, the cluster that has used the model least is first (`cloud_verifier.shares`), and there the agent that has.
With a `pace`, the earliest deadline is first among agents that have used about as much (`cloud_verifier.deadlines`).

While short blocks come in, calls for long ones are a quarter as large. A party that asks for little therefore waits for
one small call of the others at most. While none come in, calls for long ones are four times as large, because a model
computes large calls faster.
"""

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Final, NamedTuple

import numpy as np

from cloud_verifier.calls import BlockJob, CacheRoom, Call, Running
from cloud_verifier.deadlines import Rank, due_s, rank_of
from cloud_verifier.engine import DraftModel, Engine, EngineInput, EngineOutput
from cloud_verifier.queues import AgentQueue, Waiting
from cloud_verifier.reports import WorkReports
from cloud_verifier.sessions import Declined, Key, RefusedBlock, Sessions, TextStart
from cloud_verifier.shares import Lane
from cloud_verifier.verifier import Block, Settled, settle
from fedhlm.protocol.packing import id_bytes

RUNNING_OF_ONE: Final = 4  # per agent and lane
RUNNING_MAX: Final = 1_024
QUANTUM: Final = 512.0  # tokens after which a block's place in line is computed again
CREDIT: Final = 256.0  # tokens for which short blocks alone are served after a time of long ones
RECENT_S: Final = 1.0  # seconds after a short block for which calls for long ones stay small
SMALL: Final = 4  # how much smaller these are; with 3, a quiet agent beside 63 hogs took 2.04 times its time alone
LARGE: Final = 4  # how much larger they are otherwise; the shipped LLM on one core: 32 tokens 1,900/s, 128 2,300/s
BUSY: Final = "the cloud is busy: too many blocks of this agent or cluster wait"
NEAR: Final = 64.0  # tokens; whoever has used so much more than the first in a call does not lengthen the call

Outcome = Settled | Declined
"""The result of a block: a settled block, or the reason why it was declined."""


class Done(NamedTuple):
    """A job and its outcome."""

    job: BlockJob
    outcome: Outcome


class _QueuePlace(NamedTuple):
    """A place in a cluster's line: a running block, or an agent whose next block may start (`running` is None).

    The lowest `rank` is served first, and `number` breaks ties.
    """

    rank: Rank
    number: int
    agent: str
    running: Running | None


class _QueueLine(NamedTuple):
    """The places in a cluster's line, as a heap, and the service of whoever has received the least."""

    places: list[_QueuePlace]
    least: float


class Batcher:
    """Schedules the blocks of all sessions.

    `batch_max` bounds the blocks in a model call, `batch_tokens` the tokens of a call for short blocks, and
    `cache_bytes` the bytes of all caches together. A block of at most `batch_tokens` is short. `pace` is the tokens a
    second by which texts have deadlines (0: they have none). `expired`, `overflowed` and `evicted` count blocks that
    expired, blocks that did not fit into the queue, and caches that were evicted.
    """

    def __init__(
        self,
        sessions: Sessions,
        engine: Engine,
        *,
        batch_max: int,
        batch_tokens: int,
        cache_bytes: int,
        small: DraftModel | None = None,
        pace: float = 0.0,
    ) -> None:
        self.sessions = sessions
        self.batch_max = batch_max
        self.batch_tokens = batch_tokens
        self.cache_bytes = cache_bytes
        self.expired = 0
        self.overflowed = 0
        self.evicted = 0
        self._empty_caches = {False: engine.empty_cache, True: None if small is None else small.engine.empty_cache}
        self._small = small
        self._pace = pace
        self._id_bytes = id_bytes(sessions.fingerprint.vocab_size)
        self._token_bytes = max(1, engine.token_bytes + (0 if small is None else small.engine.token_bytes))
        self._queue = Waiting(short_max=batch_tokens, id_bytes=self._id_bytes)
        self.reports = WorkReports(self._queue, sessions, short_max=batch_tokens)
        self._lanes: Final = {True: Lane(), False: Lane()}  # by whether blocks are short
        self._lead = 0.0  # tokens that short blocks got more than long ones
        self._short_s = -math.inf  # when there was a short block last
        self._running = {True: 0, False: 0}
        self._numbers = count()

    # Incoming work

    def submit(self, job: BlockJob) -> list[Done]:
        """Queue a job. It replaces the same block if that was sent before, and the end of a session all its blocks.

        A job that finds no room, this one or another one in its place, is counted and returned as refused.
        """
        refused = self._queue.enqueue(job)
        if refused is None:
            return []
        self.overflowed += 1
        return [Done(refused, RefusedBlock(BUSY))]

    def withdraw(self, key: Key) -> None:
        """Drop a session's blocks that wait, and stop one that runs before its next call."""
        running = self._queue.withdraw(key)
        if running is not None:
            running.job = running.job._replace(expires_s=-math.inf)

    # State

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run."""
        return not self._queue.clusters

    @property
    def waiting(self) -> int:
        """How many blocks wait to be started."""
        return self._queue.load.count

    @property
    def running(self) -> list[Running]:
        """The blocks that have been started."""
        return [
            running
            for cluster in self._queue.clusters.values()
            for agent in cluster.agents.values()
            for running in agent.running.values()
        ]

    @property
    def started(self) -> int:
        """How many blocks have been started. Any thread may ask."""
        return sum(self._running.values())

    @property
    def cached_bytes(self) -> int:
        """How many bytes all caches take."""
        entries = {id(entry): entry for entry in self.sessions.entries()}
        entries |= {id(running.entry): running.entry for running in self.running}
        return self._token_bytes * sum(entry.cached for entry in entries.values())

    def drop_caches(self) -> None:
        """Drop the caches of all sessions that have no running block."""
        busy = {id(running.entry) for running in self.running}
        for entry in self.sessions.entries():
            if entry.cached and id(entry) not in busy:
                entry.drop_cache()
                self.evicted += 1

    # The next call

    def take(self, now_s: float) -> tuple[list[Running], list[Done]]:
        """Return the pieces of blocks to run in one call, and the jobs that ended without one.

        `now_s` is in seconds.
        """
        done: list[Done] = []
        for late in [r for r in self.running if now_s > r.job.expires_s]:
            self._give_up(late)
        room = CacheRoom(self.cache_bytes // self._token_bytes, self.sessions.entries(), self.running)
        for short in (True, False) if self._lead <= 0.0 else (False, True):
            call = Call(self.tokens_of_call(now_s, short=short), self.batch_max)
            self._fill(call, room, now_s, done, short=short)
            if call.batch:
                self.reports.called_s = now_s
                cost = sum(running.cost for running in call.batch)
                self._lead = self._lead + cost if short else max(self._lead - cost, -CREDIT)
                self._short_s = now_s if short else self._short_s
                break
            self._lead = min(0.0, self._lead)
        self.evicted += room.evicted
        return call.batch, done

    def take_drafting(self) -> list[Running]:
        """Return the pieces of blocks to run in one call of the small model, the oldest blocks first.

        The call is as large as one for short blocks. Whoever asks for drafts is not charged for them.
        """
        call = Call(self.batch_tokens, self.batch_max)
        for running in sorted((r for r in self.running if r.feed.small), key=lambda r: r.number):
            piece = 0 if call.full else call.piece_of(running, call.tokens_max)
            if piece:
                call.add(running, piece)
        return call.batch

    def tokens_of_call(self, now_s: float, *, short: bool) -> int:
        """The most tokens of the next call for a lane."""
        if short:
            return self.batch_tokens
        recently = now_s - self._short_s <= RECENT_S
        return max(1, self.batch_tokens // SMALL) if recently else self.batch_tokens * LARGE

    def _fill(self, call: Call, room: CacheRoom, now_s: float, done: list[Done], *, short: bool) -> None:
        """Add pieces of the lane's blocks to a call, whoever has used the lane least first.

        Who has used much more than the first one may not make its call longer than half of a full one.
        """
        lane, lines = self._lanes[short], self._lines(short=short)
        starting, first = True, None
        while lines and not call.full:
            cluster = min(lines, key=lane.clusters.of)
            line = lines[cluster]
            if not line.places:
                del lines[cluster]
                continue
            place = heappop(line.places)
            running = place.running
            if running is None:
                running = self._start_next(cluster, place.agent, now_s, done, short=short) if starting else None
                if running is None:
                    continue
                self._push_next(line, place, cluster, short=short)
            limit = call.tokens_max
            if first is not None and lane.ahead(cluster, place.agent, first) > NEAR:
                limit = max(1, limit // 2)
            piece = call.piece_of(running, limit)
            if piece and room.grow(running, piece, call.batch):
                first = first or lane.standing(cluster, place.agent)
                call.add(running, piece)
                self._charge(cluster, running)
            else:
                starting = False

    def _lines(self, *, short: bool) -> dict[str, _QueueLine]:
        """For each cluster, its running blocks in a lane and the agents that can start one. The next in line is first."""
        lane = self._lanes[short]
        found: dict[str, list[tuple[str, Running | None, BlockJob]]] = {}
        for cluster, queue in self._queue.clusters.items():
            places: list[tuple[str, Running | None, BlockJob]] = []
            for name, agent in queue.agents.items():
                places += [
                    (name, running, running.job)
                    for running in agent.running.values()
                    if self._in_lane(running, short) and not running.feed.small
                ]
                if (key := agent.startable(short=short, at_most=RUNNING_OF_ONE)) is not None:
                    places.append((name, None, agent.peek(key)))
            if places:
                found[cluster] = places
        lane.advance({cluster: {name for name, *_ in places} for cluster, places in found.items()})
        lines: dict[str, _QueueLine] = {}
        for cluster, places in found.items():
            shares = lane.agents(cluster)
            turns = [
                shares.of(name) if running is None or running.short is not short else running.turn
                for name, running, _ in places
            ]
            line = _QueueLine([], min(turns))
            for number, (turn, (name, running, job)) in enumerate(zip(turns, places, strict=True)):
                line.places.append(_QueuePlace(self._rank(turn - line.least, job), number, name, running))
            heapify(line.places)
            lines[cluster] = line
        return lines

    def _rank(self, ahead: float, job: BlockJob) -> Rank:
        """The rank of a block whose agent has received `ahead` tokens more than the least in line."""
        if not self._pace:
            return ahead, 0.0
        entry = self.sessions.peek(job.key)
        start = None if entry is None else entry.start
        return rank_of(ahead, due_s(job, start, pace=self._pace, id_bytes=self._id_bytes))

    def _push_next(self, line: _QueueLine, place: _QueuePlace, cluster: str, *, short: bool) -> None:
        """Put an agent, a block of which has just been started, in line again if it can start another one."""
        agent = self._queue.agent(cluster, place.agent)
        key = None if agent is None else agent.startable(short=short, at_most=RUNNING_OF_ONE)
        if agent is not None and key is not None:
            ahead = self._lanes[short].agents(cluster).of(place.agent) - line.least
            heappush(line.places, place._replace(rank=self._rank(ahead, agent.peek(key))))

    def _in_lane(self, running: Running, short: bool) -> bool:
        """Whether a running block is served in a lane. A short one that lost its cache is served with the long ones."""
        return short is (running.short and running.left <= self.batch_tokens)

    def _charge(self, cluster: str, running: Running) -> None:
        lane = self._lanes[self._in_lane(running, True)]
        agent, tokens = running.job.key.agent, running.cost
        lane.charge(cluster, agent, tokens)
        running.served += tokens
        # Not in the middle of a context: otherwise all long contexts would end together, at the very end.
        if running.served >= QUANTUM and running.piece == running.left:
            running.turn, running.served = lane.agents(cluster).of(agent), 0.0

    def _start_next(self, cluster: str, name: str, now_s: float, done: list[Done], *, short: bool) -> Running | None:
        """Start an agent's next block; None if no block can start. Jobs that are declined are added to `done`."""
        while (agent := self._queue.agent(cluster, name)) is not None:
            key = agent.startable(short=short, at_most=RUNNING_OF_ONE)
            if key is None or self._running[short] >= RUNNING_MAX:
                return None
            job = self._queue.next_of(key)
            if now_s > job.expires_s:
                self.expired += 1
            else:
                admission = self.sessions.admit(key, job.escalation)
                if isinstance(admission, Block):
                    return self._started(agent, job, admission, short=short)
                done.append(Done(job, admission))
                self._lanes[short].charge(cluster, name, 1.0)
            self._queue.tidy(key)
        return None

    def _started(self, agent: AgentQueue, job: BlockJob, block: Block, *, short: bool) -> Running:
        entry = self.sessions.entry(job.key)
        if entry is None:
            raise AssertionError(f"{job.key} was admitted without a session")
        if not entry.state.fed:
            self.sessions.inherit(job.key, entry, agent.running)
        entry.start = entry.start or TextStart(job.came_s, block.base)
        end = block.base + len(block.ids) + block.extend
        if self._small is None or end > self._small.context:
            block = block._replace(drafts=0)
        steps = settle(entry.state, block, job.watch)
        turn = self._lanes[short].agents(job.key.cluster).of(job.key.agent)
        running = Running(job, entry, steps, next(steps), next(self._numbers), turn, short)
        agent.running[job.key] = running
        self._running[short] += 1
        return running

    def request(self, running: Running) -> EngineInput:
        """The model input for a block's next piece."""
        reader = running.reader
        cache = self._empty_caches[running.feed.small] if reader.cache is None else reader.cache
        ids = running.fed[reader.cached : reader.cached + running.piece]
        return EngineInput(cache.truncated(reader.cached), ids, running.wanted)

    # Results

    def advance(self, batch: Sequence[Running], outputs: Sequence[EngineOutput]) -> list[Done]:
        """Give each block from `take` or `take_drafting` its output, and return the blocks that are settled now."""
        done: list[Done] = []
        for running, output in zip(batch, outputs, strict=True):
            if len(output.logits):
                running.rows.append(output.logits)
            running.reader.cache, running.reader.cached = output.cache, running.reader.cached + running.piece
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
        del self._queue.clusters[key.cluster].agents[key.agent].running[key]
        self._running[running.short] -= 1
        del running.entry.state.fed[running.entry.cached :]
        del running.entry.state.fed_small[running.entry.small.cached :]
        self._queue.tidy(key)
