"""Continuous batching without I/O: many sessions' blocks driven in lockstep, one block of a session at a time.

`submit` takes work in, `take` gives out what to run next, `advance` takes the logits back. A session's next block
starts only after its previous one is settled, because it may rest on it. Nobody can take all of it: what one agent may
have waiting and running is bounded, and a block whose deadline has passed is given up.
"""

from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray

from cloud_verifier.engine import EngineInput, EngineOutput, PrefixCache
from cloud_verifier.sessions import Declined, Key, RefusedBlock, SessionEntry, Sessions
from cloud_verifier.verifier import Block, Feed, Settled, settle
from fedhlm.protocol.messages import MAX_PAYLOAD_BYTES, Escalation

WAITING_MAX: Final = 65_536
WAITING_BYTES: Final = 256 * 1024 * 1024
WAITING_OF_ONE: Final = 256  # blocks of one agent
BYTES_OF_ONE: Final = 2 * MAX_PAYLOAD_BYTES
RUNNING_OF_ONE: Final = 4


class BlockJob(NamedTuple):
    """An escalation as it came in; `expires_s` is on the batcher's clock."""

    key: Key
    escalation: Escalation
    expires_s: float

    @property
    def size_bytes(self) -> int:
        """What it takes while it waits, about."""
        e = self.escalation
        context = len(e.prime.context) if e.prime else 0
        return len(e.ids) + len(e.laws) + context + (len(e.hints.branches) if e.hints else 0)


Outcome = Settled | Declined
"""What became of a block: settled, or why not."""


class Done(NamedTuple):
    """A job and what became of it."""

    job: BlockJob
    outcome: Outcome


@dataclass
class Running:
    """A block on its way: the generator that settles it and what it wants fed next."""

    job: BlockJob
    entry: SessionEntry
    steps: Generator[Feed, NDArray[Any], Settled]
    feed: Feed


@dataclass
class Batcher:
    """Work of all sessions; `empty_cache` is what a session starts from, `batch_max` bounds one model call.

    As many blocks run as the model takes at once, or as sessions are kept if those are more: each holds a cache.
    """

    sessions: Sessions
    empty_cache: PrefixCache
    batch_max: int
    expired: int = 0
    overflowed: int = 0
    _waiting: dict[Key, deque[BlockJob]] = field(default_factory=dict)
    _running: dict[Key, Running] = field(default_factory=dict)
    _count: int = 0
    _bytes: int = 0
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # waiting, by agent
    _sizes: Counter[tuple[str, str]] = field(default_factory=Counter)
    _busy: Counter[tuple[str, str]] = field(default_factory=Counter)  # running, by agent

    @property
    def running_max(self) -> int:
        """How many blocks may run."""
        return max(self.batch_max, self.sessions.sessions_max)

    def submit(self, job: BlockJob) -> None:
        """Queue a job; beyond the limits of all, or of its agent, it is dropped and counted (its sender will ask again)."""
        agent, size = job.key.owner, job.size_bytes
        full = self._count >= WAITING_MAX or self._bytes + size > WAITING_BYTES
        if full or self._counts[agent] >= WAITING_OF_ONE or self._sizes[agent] + size > BYTES_OF_ONE:
            self.overflowed += 1
            return
        self._weigh(job, 1)
        self._waiting.setdefault(job.key, deque()).append(job)

    def _weigh(self, job: BlockJob, sign: int) -> None:
        self._count += sign
        self._bytes += sign * job.size_bytes
        self._counts[job.key.owner] += sign
        self._sizes[job.key.owner] += sign * job.size_bytes
        if not self._counts[job.key.owner]:
            del self._counts[job.key.owner], self._sizes[job.key.owner]

    @property
    def idle(self) -> bool:
        """Nothing to run."""
        return not (self._running or self._waiting)

    def take(self, now_s: float) -> tuple[list[Running], list[Done]]:
        """Start what can start; give at most `batch_max` blocks to run, longest waiting first, and jobs that ended here."""
        done: list[Done] = []
        for running in [r for r in self._running.values() if now_s > r.job.expires_s]:
            self._give_up(running)
        for key in [k for k in self._waiting if k not in self._running]:
            if len(self._running) >= self.running_max:
                break
            while key in self._waiting and key not in self._running and self._busy[key.owner] < RUNNING_OF_ONE:
                self._start(self._next_of(key), now_s, done)
        return list(self._running.values())[: self.batch_max], done

    def _give_up(self, running: Running) -> None:
        """Nobody waits for it any more. What it has settled stays settled; of its cache nothing is sure."""
        self._end(running)
        running.steps.close()
        running.entry.state.fed.clear()
        running.entry.cache = None
        self.expired += 1

    def _end(self, running: Running) -> None:
        del self._running[running.job.key]
        self._busy[running.job.key.owner] -= 1
        if not self._busy[running.job.key.owner]:
            del self._busy[running.job.key.owner]

    def _next_of(self, key: Key) -> BlockJob:
        queue = self._waiting[key]
        job = queue.popleft()
        self._weigh(job, -1)
        del self._waiting[key]
        if queue:
            self._waiting[key] = queue  # behind the others
        return job

    def _start(self, job: BlockJob, now_s: float, done: list[Done]) -> None:
        if now_s > job.expires_s:
            self.expired += 1
            return
        admission = self.sessions.admit(job.key, job.escalation)
        entry = self.sessions.entry(job.key)
        if not isinstance(admission, Block):
            done.append(Done(job, admission))
            return
        if entry is None:
            raise AssertionError(f"{job.key} was admitted without a session")
        steps = settle(entry.state, admission)
        self._running[job.key] = Running(job, entry, steps, next(steps))
        self._busy[job.key.owner] += 1

    def request(self, running: Running) -> EngineInput:
        """What a block wants of the model."""
        cache, feed = self.empty_cache if running.entry.cache is None else running.entry.cache, running.feed
        return EngineInput(cache.truncated(feed.keep), feed.ids, feed.rows)

    def advance(self, batch: Sequence[Running], outputs: Sequence[EngineOutput]) -> list[Done]:
        """Give every block of `take` its output; the blocks that are settled now."""
        done: list[Done] = []
        for running, output in zip(batch, outputs, strict=True):
            running.entry.cache = output.cache
            try:
                running.feed = running.steps.send(output.logits)
            except StopIteration as stop:
                self._end(running)
                done.append(Done(running.job, stop.value))
            except Exception as exc:  # noqa: BLE001 - a block that breaks its settling ends its session, not the cloud
                done += self.fail([running], f"the block cannot be settled: {type(exc).__name__}: {exc}")
            else:
                self._running[running.job.key] = self._running.pop(running.job.key)  # to the end of the line
        return done

    def fail(self, batch: Sequence[Running], reason: str) -> list[Done]:
        """The model failed on this batch: forget its sessions, refuse its blocks."""
        for running in batch:
            running.steps.close()
            self._end(running)
            self.sessions.forget(running.job.key)
        return [Done(r.job, RefusedBlock(reason)) for r in batch]
