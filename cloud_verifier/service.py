"""The cloud as a running service: answers escalation batches with verdict batches, and pools the clusters' sums."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, Final, assert_never

import msgspec
from numpy.typing import NDArray

from cloud_verifier.batching import Batcher, Done, Outcome
from cloud_verifier.calls import BlockJob, Running
from cloud_verifier.coordinator import Coordinator
from cloud_verifier.engine import DraftModel, Engine, EngineFailure, EngineOutput
from cloud_verifier.journal import CloudStart
from cloud_verifier.preparing import Preparations
from cloud_verifier.reports import PATIENCE_MAX_S, TELL_S
from cloud_verifier.sessions import Key, RefusedBlock, Sessions, StaleBlock, UnprimedBlock
from cloud_verifier.verdicts import MODEL_FAILED, portions, verdict_of
from cloud_verifier.verifier import Settled
from fedhlm.bus.interface import Bus
from fedhlm.bus.party import Party, Received
from fedhlm.bus.rates import Allowance, UnreadLimit
from fedhlm.errors import ProtocolError
from fedhlm.learning.evidence import count_fleet
from fedhlm.learning.roster import roster_of
from fedhlm.learning.rounds import Rounds
from fedhlm.process.runtime import Runtime
from fedhlm.process.saver import inline
from fedhlm.protocol import topics
from fedhlm.protocol.fingerprint import half_of
from fedhlm.protocol.messages import (
    AnyMessage,
    Assignment,
    Contribution,
    Escalation,
    EscalationBatch,
    Forget,
    Learned,
    Profile,
    RoutedVerdict,
    Verdict,
    VerdictBatch,
)
from fedhlm.protocol.packing import id_bytes
from fedhlm.protocol.refusing import refused
from fedhlm.protocol.roles import cluster_of
from fedhlm.settings import Config
from fedhlm.spans import Tracer, contexts_in
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

CLUSTERS: Final = (topics.CLOUD_VERIFY, topics.CLOUD_FL_UPDATE, topics.CLOUD_PROFILE)
HEARD: Final = (*CLUSTERS, topics.CLOUD_FL_STATE, topics.FORGET)
IDLE_S: Final = 1.0  # seconds without work before memory is released
BUSY_S: Final = 10.0  # seconds with work after which it is released all the same
LOCAL: Final = "@"  # the cluster of clients on this machine; no cluster of a bus can have this name
CACHES_S: Final = 60.0  # seconds more before the caches are dropped
TOO_FAST: Final = "the cluster sends more than the cloud takes (cloud.cluster_blocks_s, cloud.cluster_bytes_s)"
ONLY_TOLD: Final = (
    "some tokens are not certain to be the LLM's own, because its server tells only the likeliest %d: "
    "set generation.top_k to at most that, or cloud.server.logprobs higher (approximate_tokens counts them)"
)
FEDERATION_FILE: Final = "cloud.federation"


class CloudService:
    """Verifies blocks and coordinates the federation until cancelled.

    Agents are regrouped every `federation.assign_s` seconds (0: never). `to_announce` is set on every connect, because
    the broker may have lost its retained messages. The constructor restores the state that an earlier life saved, and
    begins the journal.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        *,
        party: Party,
        engine: Engine,
        small: DraftModel | None = None,
        sessions: Sessions,
        coordinator: Coordinator,
        to_announce: asyncio.Event,
    ) -> None:
        self.coordinator = coordinator
        self.batcher = Batcher(
            sessions,
            engine,
            batch_max=config.cloud.batch_max,
            batch_tokens=config.cloud.batch_tokens,
            cache_bytes=config.cloud.cache_bytes,
            small=small,
            pace=config.cloud.text_tokens_s,
        )
        self._party = party
        self._engine = engine
        self._small = small
        self._counters = runtime.counters
        self._counters.follow(
            self.batcher, expired_messages="expired", dropped_messages="overflowed", evicted_caches="evicted"
        )
        self._counters.follow(sessions, evictions="evicted", fingerprint_mismatches="mismatched")
        self._counters.measure("num_requests_running", lambda: self.batcher.started)
        self._counters.measure("num_requests_waiting", lambda: self.batcher.waiting)
        self._allowance = Allowance(config.cloud.cluster_blocks_s, config.cloud.cluster_bytes_s)
        unread = UnreadLimit(self._allowance, self._owner, runtime.clock_s)
        party.admits, party.bus.sheds = self._admits, unread.sheds
        self._counters.follow(unread, limited_messages="unread")
        self._batch_wait_s = config.cloud.batch_wait_ms / 1000.0
        self._clock_s = runtime.clock_s
        self._released_s = runtime.clock_s()
        self._work = asyncio.Event()
        self._rounds = Rounds(coordinator.members, party, runtime.clock_s)
        self._to_announce = to_announce
        self._assign_s = config.federation.assign_s
        self._in_thread = runtime.in_thread
        # Where nothing runs beside the loop, nothing is gained by waiting for it.
        threads = runtime.in_thread is not inline
        self._preparations = Preparations(engine.constrain, runtime.in_thread, self._queue) if threads else None
        self._local: dict[Key, asyncio.Future[Outcome]] = {}
        self._saver = runtime.saver({FEDERATION_FILE: coordinator.members})
        coordinator.members.note_large(sessions.fingerprint)
        coordinator.members.evidence.begin(party.stamp.wall_ms())
        self._confidence = config.generation.confidence
        if runtime.journal is not None:
            start = CloudStart(
                root=party.root,
                fingerprint=sessions.fingerprint,
                eos_ids=sessions.eos_ids,
                context_max=sessions.context_max,
                sessions_max=sessions.sessions_max,
                sessions_bytes=sessions.sessions_bytes,
                batch_max=config.cloud.batch_max,
                federation=config.federation,
                members=coordinator.members.snapshot(),
            )
            runtime.journal.note("state", "cloud", msgspec.msgpack.encode(start))

    @property
    def tracer(self) -> Tracer:
        """Begins the cloud's spans."""
        return self._party.tracer

    @property
    def bus(self) -> Bus:
        """The cloud's connection. Enter it after `subscribe`."""
        return self._party.bus

    async def subscribe(self) -> None:
        """Subscribe to the cloud's topics.

        Call this before the bus connects, so that the cloud hears everything once online.
        """
        await self._party.bus.subscribe(
            *(topic.name(self._party.root, cluster="+") for topic in CLUSTERS),
            qos=0,  # who is not answered asks again, and a flood need not be acknowledged
        )
        await self._party.bus.subscribe(
            # The cloud's own retained state from before a restart.
            topics.CLOUD_FL_STATE.name(self._party.root),
            topics.FORGET.name(self._party.root, member="+"),
        )

    async def run(self) -> None:
        """Serve until cancelled, or until the broker refuses the connection for good (BusError)."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive(), name="cloud-receive")
                group.create_task(self._verify(), name="cloud-verify")
                group.create_task(self._keep_reporting(), name="cloud-report")
                group.create_task(self._rounds.keep(self.end_round, self.send_roster), name="cloud-rounds")
                group.create_task(self._announce(), name="cloud-announce")
                group.create_task(self._regroup(), name="cloud-regroup")
                group.create_task(self._saver.keep(), name="cloud-save")
                group.create_task(self._party.keep_journal(topics.CLOUD_JOURNAL, dict), name="cloud-journal")
        finally:
            self._saver.flush()

    async def _receive(self) -> None:
        async for received in self._party.received():
            await self.handle(received)

    def _owner(self, name: str) -> str:
        """The cluster whose edge publishes on a topic; empty if it is none's."""
        found = topics.lookup(name, self._party.root)
        return found[1].get("cluster", "") if found is not None and found[0] in CLUSTERS else ""

    async def _admits(self, received: Received) -> bool:
        """Whether a cluster keeps to its rate. Blocks beyond it are refused at once; other messages are only counted."""
        message, now_s = received.message, self._clock_s()
        cluster = received.levels.get("cluster", "")
        items = message.items if isinstance(message, EscalationBatch) else ()
        exceeds = self._allowance.exceeds
        if received.topic not in CLUSTERS or not exceeds(cluster, max(1, len(items)), received.wire_bytes, now_s):
            return True
        self._counters.add("limited_messages")
        warn_once(log, f"rate {cluster}", "cluster %s sends more than it may: its blocks are refused", cluster)
        if items and self._allowance.tells(cluster, now_s):
            stamp = self._party.stamp
            told = tuple(RoutedVerdict(i.agent, refused(stamp(), i.escalation, TOO_FAST)) for i in items)
            await self._party.send_unnoted(topics.CLOUD_VERDICT, VerdictBatch(**stamp(), items=told), cluster=cluster)
        return False

    async def handle(self, received: Received) -> None:
        """Handle one message.

        Blocks wait for `verify_next`; messages outside the topics of HEARD are counted and dropped.
        """
        cluster = received.levels.get("cluster", "")
        match received.message if received.topic in HEARD else None:
            case EscalationBatch() as batch:
                await self._submit(cluster, batch, contexts_in(received.extras, len(batch.items)))
            case Contribution() as contribution:
                self._contribute(cluster, contribution)
            case Profile() as profile:
                self._take("profile", self.coordinator.note_profile, cluster, profile)
            case Learned() as learned:
                self._take("state", self._inherit, learned)
            case Forget() as forget:
                self._take("forget", self._obey, received.levels["member"], forget)
            case _:
                self._counters.add("refused_messages")

    async def _submit(self, cluster: str, batch: EscalationBatch, contexts: Sequence[str]) -> None:
        now = self._clock_s()
        busy: list[Done] = []
        for (agent, escalation), context in zip(((i.agent, i.escalation) for i in batch.items), contexts, strict=True):
            key = Key(cluster, agent, escalation.session)
            self._counters.add("escalations")
            self._party.spans.begin("verify", "server", _asker(key), escalation, context)
            if escalation.drafts and self._small is None:
                warn_once(log, "drafts", "agents ask for this cloud's own drafts, but cloud.draft_model names no model")
            patience_s = min(escalation.patience_ms / 1000.0, PATIENCE_MAX_S)
            job = BlockJob(key, escalation, now + patience_s, came_s=now)
            if self._preparations is None or not self._preparations.hold(job):
                busy += self.batcher.submit(job)
        self._work.set()
        await self._answer(busy)

    async def _queue(self, job: BlockJob) -> None:
        """Queue a block that was held until its grammar was compiled."""
        await self._answer(self.batcher.submit(job))
        self._work.set()

    # Clients on this machine

    async def settle(
        self, key: Key, escalation: Escalation, watch: Callable[[NDArray[Any]], object] | None = None
    ) -> Outcome:
        """Settle a block of the cluster LOCAL in its turn. For `watch` see `cloud_verifier.verifier.settle`."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._local[key] = future
        try:
            job = BlockJob(key, escalation, inf, watch, came_s=self._clock_s())
            await self._answer(self.batcher.submit(job))
            self._work.set()
            return await future
        finally:
            del self._local[key]

    def holds(self, key: Key) -> bool:
        """Whether the cloud holds a session."""
        return self.batcher.sessions.entry(key) is not None

    def forget(self, key: Key) -> None:
        """End a session of the cluster LOCAL, with what is left of its blocks."""
        self.batcher.withdraw(key)
        self.batcher.sessions.forget(key)
        self._work.set()

    # Federation

    def _contribute(self, cluster: str, contribution: Contribution) -> None:
        wall_ms = self._party.stamp.wall_ms()
        self._rounds.count(self.coordinator.members.take(cluster, contribution, self._clock_s(), wall_ms=wall_ms))

    def _inherit(self, learned: Learned) -> None:
        self.coordinator.members.inherit(learned, wall_ms=self._party.stamp.wall_ms())
        self._rounds.changed.set()

    def _obey(self, member: str, forget: Forget) -> None:
        name = cluster_of(member) or member
        if self.coordinator.members.obey(name, forget, wall_ms=self._party.stamp.wall_ms()):
            self._rounds.obeyed()

    def _take(self, what: str, take: Callable[..., object], *given: object) -> None:
        try:
            take(*given)
        except ProtocolError as exc:
            self._counters.add("refused_messages")
            warn_once(log, what, "refused a %s: %s", what, exc)

    async def end_round(self) -> None:
        """Close the federation's round and publish the result to the edges."""
        self.coordinator.members.age(self._rounds.note_end())
        self.coordinator.members.close()
        await self._send_learned()

    async def _send_learned(self) -> None:
        members = self.coordinator.members
        state = members.state()
        large = half_of(self.batcher.sessions.fingerprint)
        count_fleet(self._counters, state.evidence, large, self._confidence)
        learned = state.learned(members.orders.stamped(self._party.stamp()))
        await self._party.send(topics.CLOUD_FL_STATE, learned)

    async def send_roster(self) -> None:
        """Publish the list of clusters for operators."""
        await self._party.send(topics.CLOUD_ROSTER, roster_of(self.coordinator.members, self._party.stamp()))

    async def _announce(self) -> None:
        self._to_announce.set()
        while True:
            await self._to_announce.wait()
            self._to_announce.clear()
            await self.announce()

    async def announce(self) -> None:
        """Publish the retained state of the federation, if a round has been closed."""
        if self.coordinator.members.told:
            await self._send_learned()
            self._rounds.roster_due.set()

    async def _regroup(self) -> None:
        while self._assign_s:
            await asyncio.sleep(self._assign_s)
            now = self._clock_s()
            if not self.coordinator.prepare(now):
                continue
            try:
                moves = await self._in_thread(self.coordinator.regroup, now)
            except Exception:  # whatever a numerical library raises, the service must keep running
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
                await self._wait_for_work()
                if self._batch_wait_s:
                    await asyncio.sleep(self._batch_wait_s)
            await self.verify_next()
            if self._clock_s() - self._released_s > BUSY_S:
                self._release()

    def _release(self) -> None:
        """Return memory to the system. Caches of all sizes come and go, and what they leave is not used again."""
        self._released_s = self._clock_s()
        self._engine.release()

    async def _wait_for_work(self) -> None:
        """Return when there is work. Memory is returned to the system meanwhile, and later that of the caches."""
        if await self._work_within(IDLE_S):
            return
        self._release()
        if await self._work_within(CACHES_S):
            return
        self.batcher.drop_caches()
        self._release()
        await self._work.wait()

    async def _work_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._work.wait()
        except TimeoutError:
            return False
        return True

    async def verify_next(self) -> bool:
        """Run at most one call of each model for the waiting blocks and send the answers.

        Return False if no blocks are left.
        """
        batch, done = self.batcher.take(self._clock_s())
        if batch:
            self._counters.add("batches")
            self._counters.add("computed_tokens", sum(running.piece for running in batch))
            self._counters.observe("verifier_batch_blocks", len(batch))
            done += await self._run(self._engine, batch)
        if self._small is not None and (drafting := self.batcher.take_drafting()):
            done += await self._run(self._small.engine, drafting)
        await self._answer(done)
        return not self.batcher.idle

    async def _run(self, engine: Engine, batch: list[Running]) -> list[Done]:
        """Run one model call, and return the blocks that end with it."""
        blocks = ((_asker(running.job.key), running.job.escalation) for running in batch)
        try:
            with self._party.spans.inside("model call", blocks, batch=len(batch)):
                outputs = await engine.forward([self.batcher.request(r) for r in batch])
        except Exception as exc:  # whatever a model runtime raises, the service must keep running
            log.exception("the model failed on a batch of %d blocks", len(batch))
            return self.batcher.fail(batch, f"{MODEL_FAILED}: {type(exc).__name__}: {exc}")
        return self._advance(batch, outputs)

    def _advance(self, batch: list[Running], outputs: Sequence[EngineOutput | EngineFailure]) -> list[Done]:
        """Give each block its output. Those without one are refused, each with its own reason."""
        done: list[Done] = []
        ran = []
        for running, output in zip(batch, outputs, strict=True):
            if isinstance(output, EngineFailure):
                warn_once(log, output.reason, "the model failed: %s", output.reason)
                done += self.batcher.fail([running], f"{MODEL_FAILED}: {output.reason}")
            else:
                ran.append((running, output))
        return done + self.batcher.advance([r for r, _ in ran], [o for _, o in ran])

    async def _keep_reporting(self) -> None:
        while True:
            await self._work.wait()
            await asyncio.sleep(TELL_S)
            await self.report()

    async def report(self) -> None:
        """Tell the agents of blocks that take long that the cloud is at work. The journal does not know of it."""
        stamp = self._party.stamp
        by_cluster: defaultdict[str, list[RoutedVerdict]] = defaultdict(list)
        for (key, e, *_), fed in self.batcher.reports.due(self._clock_s()):
            working = Verdict(**stamp(), session=e.session, epoch=e.epoch, base=e.base, status="working", fed=fed)
            by_cluster[key.cluster].append(RoutedVerdict(key.agent, working))
        for cluster, answers in by_cluster.items():
            for items in portions(answers):
                message = VerdictBatch(**stamp(), items=items)
                await self._party.send_unnoted(topics.CLOUD_VERDICT, message, cluster=cluster)

    async def _answer(self, done: list[Done]) -> None:
        vocab_size = self.batcher.sessions.fingerprint.vocab_size
        by_cluster: defaultdict[str, list[RoutedVerdict]] = defaultdict(list)
        for job, outcome in done:
            key, escalation = job.key, job.escalation
            if isinstance(outcome, Settled) and not job.only_scores(id_bytes(vocab_size)):
                self._counters.observe("verifier_latency_seconds", self._clock_s() - job.came_s)
            if isinstance(outcome, Settled) and outcome.approximate:
                self._counters.add("approximate_tokens", outcome.approximate)
                warn_once(log, "approximate", ONLY_TOLD, self._engine.told)
            if key.cluster == LOCAL:
                future = self._local.get(key)
                if future is not None and not future.done():
                    future.set_result(outcome)
                continue
            self._count(outcome)
            verdict = verdict_of(escalation, outcome, self._party.stamp, vocab_size=vocab_size)
            if verdict is not None:
                self._party.spans.answered(_asker(key), verdict)
                by_cluster[key.cluster].append(RoutedVerdict(key.agent, verdict))
        for cluster, answers in by_cluster.items():
            for items in portions(answers):
                message = VerdictBatch(**self._party.stamp(), items=items)
                self._counters.add("verdicts", len(items))
                sent = await self._party.send(topics.CLOUD_VERDICT, message, cluster=cluster)
                for lone in sent.too_large:
                    await self._refuse_too_large(cluster, lone)

    async def _refuse_too_large(self, cluster: str, message: AnyMessage) -> None:
        """Refuse the blocks of agents whose verdicts exceed the broker's packet limit."""
        for answer in message.items if isinstance(message, VerdictBatch) else ():
            short = refused(self._party.stamp(), answer.verdict, self._party.why_too_large())
            batch = VerdictBatch(**self._party.stamp(), items=(RoutedVerdict(answer.agent, short),))
            await self._party.send(topics.CLOUD_VERDICT, batch, cluster=cluster)

    def _count(self, outcome: Outcome) -> None:
        match outcome:
            case Settled():
                for drafted, accepted in outcome.guesses:
                    self._counters.add("spec_decode_num_drafts")
                    self._counters.add("spec_decode_num_draft_tokens", drafted)
                    self._counters.add("spec_decode_num_accepted_tokens", accepted)
            case UnprimedBlock():
                self._counters.add("reprimes")
            case RefusedBlock():
                self._counters.add("refused_messages")
            case StaleBlock():
                self._counters.add("stale_escalations")
            case _:
                assert_never(outcome)


def _asker(key: Key) -> str:
    return f"{key.cluster}/{key.agent}"
