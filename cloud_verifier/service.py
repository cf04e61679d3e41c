"""The cloud as a running service: escalation batches in, verdict batches out; clusters' sums in, the global state out."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace

from cloud_verifier.batching import Batcher, Done, Job, Output
from cloud_verifier.coordinator import Coordinator
from cloud_verifier.journal import CloudStart
from cloud_verifier.sessions import Key, Refused, Sessions, Stale, Unprimed
from cloud_verifier.verifier import Settled
from fedhlm.bus.party import Party
from fedhlm.errors import ProtocolError
from fedhlm.learning import rounds
from fedhlm.process.state import Store
from fedhlm.protocol import topics
from fedhlm.protocol.messages import (
    MAX_BATCH,
    MAX_PAYLOAD_BYTES,
    Answered,
    Assignment,
    Contribution,
    EscalationBatch,
    Learned,
    Profile,
    Verdict,
    VerdictBatch,
    pack_bits,
    pack_ids,
    pack_probs,
)
from fedhlm.settings import Federation
from fedhlm.telemetry import Counters, warn_once

log = logging.getLogger(__name__)

SHARE_GROUP: Final = "cloud"
CLUSTERS: Final = (topics.CLOUD_VERIFY, topics.CLOUD_FL_UPDATE, topics.CLOUD_PROFILE)
HEARD: Final = (*CLUSTERS, topics.CLOUD_FL_STATE)
ANSWER_BYTES: Final = MAX_PAYLOAD_BYTES // 4  # of verdicts in one message
FEDERATION_FILE: Final = "cloud.federation"


class Engine(NamedTuple):
    """A model as the service needs it: an empty cache, and a batched forward call of (cache, ids) pairs."""

    empty_cache: Any
    forward: Callable[[Sequence[tuple[Any, list[int]]]], Awaitable[list[Output]]]


class CloudService:
    """Verifies and coordinates until cancelled. `clock_s` is monotonic.

    Agents are regrouped every `assign_s` seconds (0: never). What the clusters contributed is kept in `store`;
    `in_thread` waits for the disk and for the grouping. `to_announce` is set on every connect where the broker may have
    lost its retained messages.
    """

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
        coordinator: Coordinator | None = None,
        assign_s: float = 0.0,
        store: Store | None = None,
        in_thread: Callable[..., Awaitable[Any]] = asyncio.to_thread,
        to_announce: asyncio.Event | None = None,
    ) -> None:
        self.coordinator = coordinator or Coordinator.of(Federation())
        self.batcher = Batcher(sessions, engine.empty_cache, batch_max)
        self._party = party
        self._engine = engine
        self._counters = counters
        self._batch_wait_s = batch_wait_s
        self._clock_s = clock_s or (lambda: asyncio.get_running_loop().time())
        self._work = asyncio.Event()
        self._contributed = asyncio.Event()
        self._to_announce = to_announce or asyncio.Event()
        self._assign_s = assign_s
        self._in_thread = in_thread
        self._saver = rounds.Saver(store, {FEDERATION_FILE: self.coordinator.members})
        if party.journal is not None:
            life = CloudStart(
                root=party.root,
                fingerprint=sessions.fingerprint,
                eos_ids=sessions.eos_ids,
                context_max=sessions.context_max,
                sessions_max=sessions.sessions_max,
                batch_max=batch_max,
                federation=self.coordinator.members.federation,
                members=self.coordinator.members.snapshot(),
            )
            party.journal.note("state", "cloud", msgspec.msgpack.encode(life))

    async def subscribe(self) -> None:
        """To be called before the bus connects, so that the cloud is not online before it hears."""
        await self._party.bus.subscribe(
            *(topic.name(self._party.root, cluster="+") for topic in CLUSTERS),
            # Its own retained state of before a restart.
            topics.CLOUD_FL_STATE.name(self._party.root),
        )

    async def run(self) -> None:
        """Serve until cancelled, or until the bus is refused for good (BusError)."""
        rounds_made = rounds.keep_rounds(
            self.coordinator.members,
            bus=self._party.bus,
            changed=self._contributed,
            clock_s=self._clock_s,
            publish=self.end_round,
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive(), name="cloud-receive")
                group.create_task(self._verify(), name="cloud-verify")
                group.create_task(rounds_made, name="cloud-rounds")
                group.create_task(self._announce(), name="cloud-announce")
                group.create_task(self._regroup(), name="cloud-regroup")
                group.create_task(self._saver.keep(self._in_thread), name="cloud-save")
                group.create_task(self._party.keep_journal(topics.CLOUD_JOURNAL, dict), name="cloud-journal")
        finally:
            self._saver.write()

    async def _receive(self) -> None:
        async for received in self._party.received():
            if received.topic not in HEARD:
                self._counters.add("refused_messages")
                continue
            cluster = received.levels.get("cluster", "")
            match received.message:
                case EscalationBatch() as batch:
                    self._submit(cluster, batch)
                case Contribution() as contribution:
                    self._contribute(cluster, contribution)
                case Profile() as profile:
                    self._take("profile", self.coordinator.note_profile, cluster, profile)
                case Learned() as learned:
                    self._take("state", self.coordinator.members.inherit, learned)
                case _:
                    self._counters.add("refused_messages")

    def _submit(self, cluster: str, batch: EscalationBatch) -> None:
        now = self._clock_s()
        for agent, escalation in ((i.agent, i.escalation) for i in batch.items):
            key = Key(cluster, agent, escalation.session)
            self._counters.add("escalations")
            self.batcher.submit(Job(key, escalation, now + escalation.patience_ms / 1000.0))
        self._work.set()

    # Federation

    def _contribute(self, cluster: str, contribution: Contribution) -> None:
        match self.coordinator.members.take(cluster, contribution, self._clock_s()):
            case "taken":
                self._counters.add("contributions")
                self._contributed.set()
            case "duplicate":
                self._counters.add("duplicate_messages")
            case "refused":
                self._counters.add("refused_contributions")

    def _take(self, what: str, take: Callable[..., object], *given: object) -> None:
        try:
            take(*given)
        except ProtocolError as exc:
            self._counters.add("refused_messages")
            warn_once(log, what, "refused a %s: %s", what, exc)

    async def end_round(self) -> None:
        """Close the round of the federation and tell the edges."""
        if self._party.journal is not None:
            self._party.journal.note("round", at_s=self._clock_s())
        self._counters.add("rounds")
        self.coordinator.members.close()
        await self._send_learned()

    async def _send_learned(self) -> None:
        learned = self.coordinator.members.state().learned(self._party.stamp())
        await self._party.send(topics.CLOUD_FL_STATE, learned)

    async def _announce(self) -> None:
        self._to_announce.set()
        while True:
            await self._to_announce.wait()
            self._to_announce.clear()
            if self.coordinator.members.told:
                await self._send_learned()

    async def _regroup(self) -> None:
        while self._assign_s:
            await asyncio.sleep(self._assign_s)
            now = self._clock_s()
            if not self.coordinator.prepare(now):
                continue
            try:
                moves = await self._in_thread(self.coordinator.regroup, now)
            except Exception:  # whatever a numerical library raises, the service lives on
                log.exception("the agents could not be regrouped")
                continue
            for agent, cluster in sorted(moves.items()):
                log.info("agent %s belongs to cluster %s", agent, cluster)
                self._counters.add("assignments")
                message = Assignment(**self._party.stamp(), cluster=cluster)
                await self._party.send(topics.ASSIGN, message, agent=agent)

    # Verification

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
            for items in _messages(answers):
                message = VerdictBatch(**self._party.stamp(), items=items)
                self._counters.add("verdicts", len(items))
                await self._party.send(topics.CLOUD_VERDICT, message, cluster=cluster)

    def _verdict(self, done: Done) -> Verdict | None:
        match done.outcome:
            case Settled(accepted, ids, probs, missed):
                verdict = self._blank(done, "settled")
                return replace(
                    verdict,
                    accepted=accepted,
                    ids=pack_ids(ids, self.batcher.sessions.fingerprint.vocab_size),
                    target_probs=pack_probs(np.clip(probs, 0.0, 1.0)),
                    missed=pack_bits(missed),
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


def _messages(answers: list[Answered]) -> Iterator[tuple[Answered, ...]]:
    """Verdicts in portions that a message may carry."""
    portion: list[Answered] = []
    size = 0
    for answer in answers:
        new = len(answer.verdict.ids) + len(answer.verdict.target_probs)
        if portion and (len(portion) == MAX_BATCH or size + new > ANSWER_BYTES):
            yield tuple(portion)
            portion, size = [], 0
        portion.append(answer)
        size += new
    if portion:
        yield tuple(portion)
