"""The edge as a running service, with one bus to its cluster and one to the cloud (they may be the same).

The decisions are made elsewhere: in `relay`, in `memory` (answers from verified tokens) and in
`fedhlm.learning.federation` (rounds).
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from msgspec.structs import replace

from edge_broker.admission import AgentRates
from edge_broker.federation import ClusterFederation
from edge_broker.heard import BELOW, HEARD
from edge_broker.journal import EdgeStart
from edge_broker.memory import DIGEST_MAX, ClusterMemory, PeersAnswer
from edge_broker.relay import BUSY, Relay
from fedhlm.bus.interface import Bus
from fedhlm.bus.party import Party, Received, presence
from fedhlm.errors import ProtocolError
from fedhlm.exposition import accepted
from fedhlm.learning.evidence import count_fleet
from fedhlm.learning.learnt_state import State
from fedhlm.learning.roster import roster_of
from fedhlm.learning.rounds import Rounds
from fedhlm.process.runtime import Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.fields import MAX_BATCH, Pair
from fedhlm.protocol.fingerprint import half_of, pair_of
from fedhlm.protocol.messages import (
    AnyMessage,
    Assignment,
    Contribution,
    Escalation,
    EscalationBatch,
    Fingerprint,
    Forget,
    Learned,
    MetricsReport,
    Presence,
    Profile,
    UncertainTokens,
    Verdict,
    VerdictBatch,
    Verified,
    VerifiedTokens,
)
from fedhlm.protocol.packing import id_bytes
from fedhlm.protocol.refusing import refused
from fedhlm.protocol.roles import ROLES
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Config
from fedhlm.spans import contexts_in
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

DIGEST_S: Final = 0.5
ANNOUNCE_AGAIN_S: Final = 1.0
ASSIGNED_MAX: Final = 4_096
AGENTS_MAX: Final = 4_096


def federation_file(cluster: str) -> str:
    """The name of the file that keeps the contributions of the cluster's agents."""
    return f"edge-{cluster}.federation"


def memory_file(cluster: str) -> str:
    """The name of the file that keeps the cluster's verified tokens."""
    return f"edge-{cluster}.memory"


class EdgeService:
    """Serves a cluster until cancelled: relays blocks and verdicts, answers from memory, and pools the agents' sums.

    `to_announce` is set whenever the edge must publish its retained state; the cluster's bus sets it on every connect.
    `bridges` says that cluster and cloud use different brokers, so that assignments must be forwarded. Each of
    `tell_agent` is called with an agent's name whenever its presence comes, and whether it is online. The constructor restores the
    state that an earlier life saved, and begins the journal.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        *,
        down: Party,
        up: Party,
        to_announce: asyncio.Event,
        bridges: bool,
    ) -> None:
        self.cluster = config.cluster.name
        self.down = down
        self.up = up
        self.relay = Relay(batch_max=config.edge.batch_max)
        self.memory = ClusterMemory(config.edge.memory)
        self.federation = ClusterFederation(config.federation)
        self.members = self.federation.members
        self._confidence = config.generation.confidence
        self.agents: dict[str, Presence] = {}
        self.upstream: Fingerprint | None = None
        self.cloud_software = ""
        self.tell_agent: list[Callable[[str, bool], Awaitable[None]]] = []
        self._counters = runtime.counters
        self._counters.follow(self.memory, refused_keys="refused_keys")
        self._counters.follow(
            self.relay,
            stale_escalations="stale_escalations",
            stale_verdicts="stale_verdicts",
            duplicate_messages="repeated",
        )
        self._counters.measure("num_requests_waiting", lambda: len(self.relay))
        self._counters.measure("agents_online", lambda: len(self.agents))
        self._counters.measure("cloud_online", lambda: self.upstream is not None)
        self.rates = AgentRates(config.edge, down, self.cluster, runtime.clock_s)
        self._batch_wait_s = config.edge.batch_wait_ms / 1000.0
        self._waiting = asyncio.Event()
        self._to_announce = to_announce
        self._rounds = Rounds(self.members, down, runtime.clock_s)
        self._learnt = asyncio.Event()
        self._digest_full = asyncio.Event()
        self._assigned: OrderedDict[str, Assignment] = OrderedDict()
        self._bridges = bridges
        self._clock_s = runtime.clock_s
        self._saver = runtime.saver(
            {federation_file(self.cluster): self.members, memory_file(self.cluster): self.memory}
        )
        self.federation.restored()
        self.members.evidence.begin(down.stamp.wall_ms())
        if runtime.journal is not None:
            start = EdgeStart(
                cluster=self.cluster,
                down_root=down.root,
                up_root=up.root,
                batch_max=config.edge.batch_max,
                memory_max=config.edge.memory,
                bridges=bridges,
                federation=config.federation,
                members=self.members.snapshot(),
                memory=self.memory.snapshot(),
            )
            runtime.journal.note("state", "edge", msgspec.msgpack.encode(start))

    @property
    def buses(self) -> tuple[Bus, ...]:
        """The edge's one or two connections. Enter them after `subscribe`."""
        return tuple(dict.fromkeys((self.down.bus, self.up.bus)))

    async def subscribe(self) -> None:
        """Subscribe to the edge's topics, before the buses connect, so that the edge hears everything once online."""
        await self.down.bus.subscribe(
            *(topic.name(self.down.root, cluster=self.cluster, agent="+") for topic in BELOW),
            qos=0,  # an agent whose block is lost asks again, and a flood need not be acknowledged
        )
        # The edge's own retained state from before a restart.
        await self.down.bus.subscribe(topics.FL_STATE.name(self.down.root, cluster=self.cluster))
        await self.up.bus.subscribe(
            topics.CLOUD_STATUS.name(self.up.root),
            topics.CLOUD_VERDICT.name(self.up.root, cluster=self.cluster),
            topics.CLOUD_FL_STATE.name(self.up.root),
            topics.NEIGHBOUR.name(self.up.root, cluster="+"),
            topics.ASSIGN.name(self.up.root, agent="+"),
            topics.FORGET.name(self.up.root, member="+"),
        )

    async def run(self) -> None:
        """Serve until cancelled, or until a broker refuses the connection for good (BusError)."""
        parties = [self.down] if self.up.bus is self.down.bus else [self.down, self.up]
        try:
            async with asyncio.TaskGroup() as group:
                for party in parties:
                    group.create_task(self._receive(party), name="edge-receive")
                group.create_task(self._send_batches(), name="edge-batches")
                group.create_task(self._announce(), name="edge-announce")
                group.create_task(self._send_digests(), name="edge-digests")
                group.create_task(self._rounds.keep(self.end_round, self.send_roster), name="edge-rounds")
                group.create_task(self._saver.keep(), name="edge-save")
                journal = self.down.keep_journal(topics.EDGE_JOURNAL, lambda: {"cluster": self.cluster})
                group.create_task(journal, name="edge-journal")
        finally:
            self._saver.flush()

    async def _receive(self, party: Party) -> None:
        async for received in party.received():
            await self.handle(received)

    async def handle(self, received: Received) -> None:
        """Handle one message. Messages outside the topics of HEARD are counted and dropped."""
        match received.message if received.topic in HEARD else None:
            case Escalation() as escalation:
                await self._escalate_parts(received.levels["agent"], escalation, *contexts_in(received.extras))
            case VerdictBatch() as batch:
                self._counters.add_all(downlink_messages=1, downlink_bytes=received.wire_bytes)
                await self._settle(batch)
            case UncertainTokens() | VerifiedTokens() | MetricsReport() as said:
                self._hear(received.levels, said)
            case Contribution() as contribution:
                self._contribute(received.levels["agent"], contribution)
            case Learned() | Forget() as told:
                self._be_told(received, told)
            case Profile() as profile if profile.agent == received.levels["agent"]:
                await self.up.send(topics.CLOUD_PROFILE, profile, cluster=self.cluster)
            case Assignment() as assignment:
                await self._assign(received.levels["agent"], assignment)
            case Presence() as state if ROLES[state.role].drafts:
                await self._note_agent(received.levels["agent"], state)
            case Presence() as state if ROLES[state.role].verifies:
                await self._note_cloud(state)
            case _:
                self._counters.add("refused_messages")

    def _hear(self, levels: dict[str, str], said: UncertainTokens | VerifiedTokens | MetricsReport) -> None:
        match said:
            case UncertainTokens():
                self.memory.doubt(levels["agent"], said)
            case VerifiedTokens():
                if levels["cluster"] != self.cluster:
                    self.memory.hear(said)
            case MetricsReport():
                if levels["agent"] in self.agents:
                    self._counters.relayed[levels["agent"]] = accepted(said.values)

    # Blocks

    async def _escalate_parts(self, agent: str, escalation: Escalation, context: str) -> None:
        for part in escalation.parts():
            await self._escalate(agent, part, context if part.session == escalation.session else "")

    async def _escalate(self, agent: str, escalation: Escalation, context: str) -> None:
        self._counters.add("escalations")
        if not self.relay.escalate(agent, escalation):
            return
        self.down.spans.begin("settle", "server", agent, escalation, context)
        vocab_size = self._vocab_size(agent)
        answer = None if vocab_size is None else self.memory.answer(agent, escalation, vocab_size)
        if vocab_size is None or answer is None:
            if self.relay.crowded(agent):
                self.relay.settle(agent, escalation)
                self._counters.add("limited_messages")
                await self._send_verdict(agent, refused(self.down.stamp(), escalation, BUSY))
                return
            if not escalation.closes:
                self.memory.await_verdict(agent, escalation)
            self._waiting.set()
            return
        self.relay.settle(agent, escalation)
        self._counters.add("neighbour_answers" if SOURCES[answer.source].from_afar else "peer_answers")
        await self._send_verdict(agent, self._verdict(escalation, answer))

    def _verdict(self, escalation: Escalation, answer: PeersAnswer) -> Verdict:
        return Verdict(
            **self.down.stamp(),
            session=escalation.session,
            epoch=escalation.epoch,
            base=escalation.base,
            status="settled",
            accepted=answer.accepted,
            source=answer.source,
        )

    async def _settle(self, batch: VerdictBatch) -> None:
        answers = self.relay.answers(batch)
        verified: list[Verified] = []
        for agent, verdict in ((a.agent, a.verdict) for a in answers):
            vocab_size = self._vocab_size(agent)
            verified += self.memory.learn(agent, verdict, vocab_size) if vocab_size is not None else ()
        # Sent before the verdicts and on the same connection, so that an agent knows these tokens when its verdict
        # arrives.
        for start in range(0, len(verified), MAX_BATCH):
            items = tuple(verified[start : start + MAX_BATCH])
            message = VerifiedTokens(**self.down.stamp(), space=self.memory.keys, items=items)
            await self.down.send(topics.KNOWN, message, cluster=self.cluster)
        if verified:
            self._counters.add("verified_tokens", len(verified))
            self._learnt.set()
            if self.memory.waiting >= DIGEST_MAX:
                self._digest_full.set()
        for agent, verdict in ((a.agent, a.verdict) for a in answers):
            vocab_size = self._vocab_size(agent)
            added = len(verdict.ids) // id_bytes(vocab_size) if vocab_size is not None else 0
            audit = self.relay.audits(agent, verdict)
            self.federation.settled.note(agent, verdict, self._pair(agent), added=added, audit=audit)
            await self._send_verdict(agent, verdict)
        if self.upstream is None:
            # The cloud answers, so its presence message was lost on the way, for example in a full queue. A new
            # subscription brings the retained message again.
            await self.up.bus.subscribe(topics.CLOUD_STATUS.name(self.up.root))

    async def _send_batches(self) -> None:
        while True:
            await self._waiting.wait()
            if self._batch_wait_s and len(self.relay) < self.relay.batch_max:
                await asyncio.sleep(self._batch_wait_s)
            self._waiting.clear()
            while await self.send_batch():
                pass

    async def send_batch(self) -> bool:
        """Send the blocks that have waited longest to the cloud. Return False if there are none."""
        items = self.relay.take_batch()
        if items:
            self._counters.add("batches")
            batch = EscalationBatch(**self.up.stamp(), items=items)
            sent = await self.up.send(topics.CLOUD_VERIFY, batch, cluster=self.cluster)
            self._counters.add_all(uplink_messages=bool(sent), uplink_bytes=sent.packet_bytes)
            for lone in sent.too_large:
                await self._refuse_too_large(lone)
        return bool(items)

    async def _refuse_too_large(self, message: AnyMessage) -> None:
        """Refuse the blocks that exceed the packet limit of the cloud's broker."""
        for routed in message.items if isinstance(message, EscalationBatch) else ():
            verdict = refused(self.down.stamp(), routed.escalation, self.up.why_too_large())
            await self._send_verdict(routed.agent, verdict)

    async def _send_verdict(self, agent: str, verdict: Verdict) -> None:
        self._counters.add("verdicts")
        self.down.spans.answered(agent, verdict)
        sent = await self.down.send(topics.VERDICT, verdict, cluster=self.cluster, agent=agent)
        if sent.too_large:
            short = refused(self.down.stamp(), verdict, self.down.why_too_large())
            await self.down.send(topics.VERDICT, short, cluster=self.cluster, agent=agent)

    async def _send_digests(self) -> None:
        while True:
            await self._learnt.wait()
            try:
                async with asyncio.timeout(DIGEST_S):
                    await self._digest_full.wait()
            except TimeoutError:
                pass
            self._learnt.clear()
            self._digest_full.clear()
            while await self.send_digest():
                pass

    async def send_digest(self) -> bool:
        """Send the next verified tokens to the neighbours. Return False if there are none."""
        items = self.memory.take_digest()
        if items:
            message = VerifiedTokens(**self.up.stamp(), space=self.memory.keys, items=items)
            await self.up.send(topics.NEIGHBOUR, message, cluster=self.cluster)
        return bool(items)

    def _vocab_size(self, agent: str) -> int | None:
        state = self.agents.get(agent)
        fingerprint = (state.fingerprint if state else None) or self.upstream
        return None if fingerprint is None else fingerprint.vocab_size

    def _pair(self, agent: str) -> Pair:
        """The models under which an agent's tokens are scored now; empty if it has not said what it runs."""
        state = self.agents.get(agent)
        small = state.fingerprint if state else None
        return "" if small is None else pair_of(small, self.upstream)

    # Federation

    def _contribute(self, agent: str, contribution: Contribution) -> None:
        cut, cut_evidence, wall_ms = self.members.cut, self.members.evidence.cut, self.down.stamp.wall_ms()
        self._rounds.count(self.federation.contribute(agent, contribution, self._clock_s(), wall_ms=wall_ms))
        self._counters.add("cut_contributions", self.members.cut - cut)
        self._counters.add("cut_evidence", self.members.evidence.cut - cut_evidence)

    def _be_told(self, received: Received, told: Learned | Forget) -> None:
        wall_ms = self.down.stamp.wall_ms()
        try:
            match told:
                case Forget() as forget:
                    if self.federation.obey(received.levels["member"], forget, wall_ms=wall_ms):
                        self._rounds.obeyed()
                case Learned() as learned if received.topic is topics.FL_STATE:
                    self.members.inherit(replace(learned, evidence=None), wall_ms=wall_ms)  # that is the fleet's
                case Learned() as learned:
                    if self.federation.note_above(learned, wall_ms=wall_ms):
                        self.members.touch(self._clock_s())
        except ProtocolError as exc:
            self._counters.add("refused_contributions")
            what = received.topic.pattern
            warn_once(log, what, "refused a message on %s: %s", what, exc)
        else:
            self._rounds.changed.set()

    async def end_round(self) -> None:
        """Close the federation's round, tell the cluster and, if the sums have grown, the cloud."""
        self.federation.age(self._rounds.note_end())
        grown = self.members.grown
        state = self.members.close(self.agents)
        await self._send_learned(state)
        if grown:
            await self._send_contribution(state)

    async def _send_contribution(self, state: State) -> None:
        contribution = state.contribution(self.members.orders.stamped(self.up.stamp()))
        await self.up.send(topics.CLOUD_FL_UPDATE, contribution, cluster=self.cluster)

    async def _send_learned(self, state: State) -> None:
        header = self.members.orders.stamped(self.down.stamp())
        told = self.federation.state_below(state)
        count_fleet(self._counters, told.evidence, half_of(self.upstream), self._confidence)
        learned = told.learned(header)
        await self.down.send(topics.FL_STATE, learned, cluster=self.cluster)

    async def send_roster(self) -> None:
        """Publish the list of members for operators."""
        await self.up.send(topics.ROSTER, roster_of(self.members, self.up.stamp()), cluster=self.cluster)

    async def _assign(self, agent: str, assignment: Assignment) -> None:
        if self._assigned.get(agent) == assignment:
            return  # a repetition; or, if both sides are one broker after all, the edge's own message
        self._assigned[agent] = assignment
        self._assigned.move_to_end(agent)
        while len(self._assigned) > ASSIGNED_MAX:
            self._assigned.popitem(last=False)
        if agent in self.agents:
            await self._carry_over(agent)
        else:
            self._forget_if_moved(agent)

    async def _carry_over(self, agent: str) -> None:
        if self._bridges and agent in self._assigned:
            self._counters.add("assignments")
            await self.down.send(topics.ASSIGN, self._assigned[agent], agent=agent)

    def _forget_if_moved(self, agent: str) -> None:
        """Drop the sums of an agent that now belongs to another cluster.

        An agent that is merely silent keeps its last ones.
        """
        assigned = self._assigned.get(agent)
        if assigned is None or assigned.cluster == self.cluster:
            return
        if self.federation.moved_away(agent):
            self.members.touch(self._clock_s())
            self._rounds.changed.set()

    # Presence

    async def _note_agent(self, agent: str, state: Presence) -> None:
        for tell in self.tell_agent:
            await tell(agent, state.online)
        if state.online:
            former = self.agents.get(agent)
            if former is None or (former.sequence, former.sent_ms) != (state.sequence, state.sent_ms):
                self.members.born(agent)
            self.agents[agent] = state
            while len(self.agents) > AGENTS_MAX:
                eldest = next(iter(self.agents))
                del self.agents[eldest]
                self._counters.relayed.pop(eldest, None)
            ours, theirs = self.upstream, state.fingerprint
            if ours and theirs and (ours.tokenizer, ours.vocab_size) != (theirs.tokenizer, theirs.vocab_size):
                self._counters.add("fingerprint_mismatches")
                warn_once(log, f"mismatch {agent}", "agent %s has another tokenizer than the cloud", agent)
            if former is None:
                await self._carry_over(agent)
        else:
            self.agents.pop(agent, None)
            self._counters.relayed.pop(agent, None)
            self._forget_if_moved(agent)

    async def _note_cloud(self, state: Presence) -> None:
        self.upstream = state.fingerprint if state.online else None
        self.cloud_software = state.software
        if self.upstream is not None:
            self.members.note_large(self.upstream)
            self.memory.belong(f"{self.upstream.tokenizer} {self.upstream.vocab_size} {self.upstream.model}")
        log.info("cloud is %s", "online" if state.online else "offline")
        self._to_announce.set()
        if state.online and self.members.told:
            # A cloud that has lost its state must not have to wait for the next round. Any other cloud knows these
            # sums.
            await self._send_contribution(self.members.state())

    async def _announce(self) -> None:
        self._to_announce.set()
        while True:
            await self._to_announce.wait()
            self._to_announce.clear()
            if not await self.announce():
                # The queue was full, so the broker still retains the former state.
                await asyncio.sleep(ANNOUNCE_AGAIN_S)
                self._to_announce.set()

    async def announce(self) -> bool:
        """Publish the edge's retained messages. Return whether its presence fitted into the queue."""
        message = presence(self.down.stamp, "edge", online=True, upstream=self.upstream)
        sent = await self.down.send(topics.EDGE_STATUS, message, cluster=self.cluster)
        if self.members.told:
            # The broker may have lost the retained messages in a restart of its own.
            await self._send_learned(self.members.state())
            self._rounds.roster_due.set()
        return bool(sent)
