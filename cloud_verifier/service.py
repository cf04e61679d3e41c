"""The cloud as a running service: escalation batches in, verdict batches out."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from msgspec.structs import replace

from cloud_verifier.batching import Batcher, Done, Job, Output
from cloud_verifier.sessions import Key, Refused, Sessions, Stale, Unprimed
from cloud_verifier.verifier import Settled
from fedhlm import topics
from fedhlm.messages import MAX_BATCH, Answered, EscalationBatch, Verdict, VerdictBatch, pack_ids, pack_probs
from fedhlm.party import Party
from fedhlm.telemetry import Counters

log = logging.getLogger(__name__)

SHARE_GROUP: Final = "cloud"


class Engine(NamedTuple):
    """A model as the service needs it: an empty cache, and a batched forward call of (cache, ids) pairs."""

    empty_cache: Any
    forward: Callable[[Sequence[tuple[Any, list[int]]]], Awaitable[list[Output]]]


class CloudService:
    """Verifies until cancelled. `clock_s` is monotonic; `shared` joins a shared subscription of several clouds."""

    def __init__(
        self,
        *,
        party: Party,
        engine: Engine,
        sessions: Sessions,
        counters: Counters,
        batch_max: int,
        batch_wait_s: float = 0.0,
        clock_s: Callable[[], float] | None = None,
    ) -> None:
        self.batcher = Batcher(sessions, engine.empty_cache, batch_max)
        self._party = party
        self._engine = engine
        self._counters = counters
        self._batch_wait_s = batch_wait_s
        self._clock_s = clock_s or (lambda: asyncio.get_running_loop().time())
        self._work = asyncio.Event()

    async def subscribe(self) -> None:
        """To be called before the bus connects, so that the cloud is not online before it hears."""
        await self._party.bus.subscribe(topics.CLOUD_VERIFY.name(self._party.root, cluster="+"))

    async def run(self) -> None:
        """Serve until cancelled, or until the bus is refused for good (BusError)."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._receive(), name="cloud-receive")
            group.create_task(self._verify(), name="cloud-verify")

    async def _receive(self) -> None:
        async for received in self._party.received():
            batch = received.message
            if not isinstance(batch, EscalationBatch):
                self._counters.add("refused_messages")
                continue
            now = self._clock_s()
            for agent, escalation in ((i.agent, i.escalation) for i in batch.items):
                key = Key(received.levels["cluster"], agent, escalation.session)
                self._counters.add("escalations")
                self.batcher.submit(Job(key, escalation, now + escalation.patience_ms / 1000.0))
            self._work.set()

    async def _verify(self) -> None:
        while True:
            if self.batcher.idle:
                self._work.clear()
                await self._work.wait()
                if self._batch_wait_s:
                    await asyncio.sleep(self._batch_wait_s)
            batch, done = self.batcher.take(self._clock_s())
            if batch:
                self._counters.add("batches")
                try:
                    outputs = await self._engine.forward([self.batcher.inputs(r) for r in batch])
                except Exception as exc:  # whatever a model runtime raises, the service lives on
                    log.exception("the model failed on a batch of %d blocks", len(batch))
                    done += self.batcher.fail(batch, f"the cloud's model failed: {type(exc).__name__}: {exc}"[:1024])
                else:
                    done += self.batcher.advance(batch, outputs)
            await self._answer(done)

    async def _answer(self, done: list[Done]) -> None:
        by_cluster: defaultdict[str, list[Answered]] = defaultdict(list)
        for item in done:
            verdict = self._verdict(item)
            if verdict is not None:
                by_cluster[item.job.key.cluster].append(Answered(item.job.key.agent, verdict))
        for cluster, answers in by_cluster.items():
            for start in range(0, len(answers), MAX_BATCH):
                items = tuple(answers[start : start + MAX_BATCH])
                message = VerdictBatch(**self._party.stamp(), items=items)
                self._counters.add("verdicts", len(items))
                await self._party.send(topics.CLOUD_VERDICT, message, cluster=cluster)

    def _verdict(self, done: Done) -> Verdict | None:
        match done.outcome:
            case Settled(accepted, ids, probs):
                verdict = self._blank(done, "settled")
                return replace(
                    verdict,
                    accepted=accepted,
                    ids=pack_ids(ids, self.batcher.sessions.fingerprint.vocab_size),
                    target_probs=pack_probs(np.clip(probs, 0.0, 1.0)),
                )
            case Unprimed():
                self._counters.add("reprimes")
                return self._blank(done, "unprimed")
            case Refused(reason):
                self._counters.add("refused_messages")
                return replace(self._blank(done, "refused"), reason=reason[:1024])
            case Stale():
                self._counters.add("stale_escalations")
                return None
            case _:
                raise AssertionError(f"unexpected outcome {done.outcome!r}")

    def _blank(self, done: Done, status: Literal["settled", "unprimed", "refused"]) -> Verdict:
        escalation = done.job.escalation
        return Verdict(
            **self._party.stamp(),
            session=escalation.session,
            epoch=escalation.epoch,
            base=escalation.base,
            status=status,
        )
