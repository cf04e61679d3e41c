"""Continuous batching without I/O: many sessions' blocks driven in lockstep, one block of a session at a time.

`submit` takes work in, `take` gives out what to run next, `advance` takes the logits back. A session's next block
starts only after its previous one is settled, because it may rest on it.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from numpy.typing import NDArray

from cloud_verifier.sessions import Admission, Entry, Key, Refused, Sessions
from cloud_verifier.verifier import Block, Feed, Settled, settle
from fedhlm.messages import Escalation

WAITING_MAX: Final = 65_536


class Cache(Protocol):
    """Keys and values of a prefix."""

    def truncated(self, length: int, /) -> "Cache":
        """The cache of the first `length` tokens."""


class Output(NamedTuple):
    """Logits of the ids that were fed, shape (n, V), and the cache that ends with them."""

    logits: NDArray[Any]
    cache: Any


class Job(NamedTuple):
    """An escalation as it came in; `expires_s` is on the batcher's clock."""

    key: Key
    escalation: Escalation
    expires_s: float


class Done(NamedTuple):
    """What became of a job: settled, or why not."""

    job: Job
    outcome: Settled | Admission


@dataclass
class Running:
    """A block on its way: the generator that settles it and what it wants fed next."""

    job: Job
    entry: Entry
    steps: Generator[Feed, NDArray[Any], Settled]
    feed: Feed


@dataclass
class Batcher:
    """Work of all sessions; `empty_cache` is what a session starts from, `batch_max` bounds one model call."""

    sessions: Sessions
    empty_cache: Any
    batch_max: int
    expired: int = 0
    overflowed: int = 0
    _waiting: dict[Key, deque[Job]] = field(default_factory=dict)
    _running: dict[Key, Running] = field(default_factory=dict)
    _count: int = 0

    def submit(self, job: Job) -> None:
        """Queue a job; beyond WAITING_MAX it is dropped and counted (its sender will ask again)."""
        if self._count >= WAITING_MAX:
            self.overflowed += 1
            return
        self._count += 1
        self._waiting.setdefault(job.key, deque()).append(job)

    @property
    def idle(self) -> bool:
        """Nothing to run."""
        return not (self._running or self._waiting)

    def take(self, now_s: float) -> tuple[list[Running], list[Done]]:
        """Start what can start; give at most `batch_max` blocks to run, longest waiting first, and jobs that ended here."""
        done: list[Done] = []
        for key in [k for k in self._waiting if k not in self._running]:
            while key in self._waiting and key not in self._running:
                self._start(self._next_of(key), now_s, done)
        return list(self._running.values())[: self.batch_max], done

    def _next_of(self, key: Key) -> Job:
        queue = self._waiting[key]
        job = queue.popleft()
        self._count -= 1
        if not queue:
            del self._waiting[key]
        return job

    def _start(self, job: Job, now_s: float, done: list[Done]) -> None:
        if now_s > job.expires_s:
            self.expired += 1
            return
        admission = self.sessions.admit(job.key, job.escalation)
        entry = self.sessions.entry(job.key)
        if not isinstance(admission, Block) or entry is None:
            done.append(Done(job, admission))
            return
        steps = settle(entry.state, admission)
        self._running[job.key] = Running(job, entry, steps, next(steps))

    def inputs(self, running: Running) -> tuple[Any, list[int]]:
        """The cache to start from and the ids to feed."""
        cache = self.empty_cache if running.entry.cache is None else running.entry.cache
        return cache.truncated(running.feed.keep), running.feed.ids

    def advance(self, batch: Sequence[Running], outputs: Sequence[Output]) -> list[Done]:
        """Give every block of `take` its output; the blocks that are settled now."""
        done: list[Done] = []
        for running, output in zip(batch, outputs, strict=True):
            running.entry.cache = output.cache
            del self._running[running.job.key]
            try:
                running.feed = running.steps.send(output.logits)
                self._running[running.job.key] = running  # to the end of the line
            except StopIteration as stop:
                done.append(Done(running.job, stop.value))
        return done

    def fail(self, batch: Sequence[Running], reason: str) -> list[Done]:
        """The model failed on this batch: forget its sessions, refuse its blocks."""
        for running in batch:
            running.steps.close()
            del self._running[running.job.key]
            self.sessions.forget(running.job.key)
        return [Done(r.job, Refused(reason)) for r in batch]
