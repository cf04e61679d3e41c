"""The edge as a running service: one bus to its cluster, one to the cloud (they may be the same)."""

import asyncio
import logging

from edge_broker.cluster import Relay
from fedhlm import topics
from fedhlm.messages import Escalation, EscalationBatch, Fingerprint, Presence, VerdictBatch
from fedhlm.party import Party, Received, presence
from fedhlm.telemetry import Counters, warn_once

log = logging.getLogger(__name__)


class EdgeService:
    """Relays between a cluster and the cloud until cancelled.

    `to_announce` is set whenever the edge's retained presence is due; its cluster bus sets it on every connect.
    """

    def __init__(
        self,
        *,
        cluster: str,
        down: Party,
        up: Party,
        counters: Counters,
        batch_max: int,
        batch_wait_s: float,
        to_announce: asyncio.Event,
    ) -> None:
        self.cluster = cluster
        self.relay = Relay(batch_max=batch_max)
        self.agents: dict[str, Presence] = {}
        self.upstream: Fingerprint | None = None
        self._down = down
        self._up = up
        self._counters = counters
        self._batch_wait_s = batch_wait_s
        self._waiting = asyncio.Event()
        self._to_announce = to_announce

    async def subscribe(self) -> None:
        """To be called before the buses connect, so that nobody hears of the edge before it hears them."""
        await self._down.bus.subscribe(
            topics.ESCALATE.name(self._down.root, cluster=self.cluster, agent="+"),
            topics.AGENT_STATUS.name(self._down.root, cluster=self.cluster, agent="+"),
        )
        await self._up.bus.subscribe(
            topics.CLOUD_STATUS.name(self._up.root),
            topics.CLOUD_VERDICT.name(self._up.root, cluster=self.cluster),
        )

    async def run(self) -> None:
        """Serve until cancelled, or until a bus is refused for good (BusError)."""
        parties = [self._down] if self._up.bus is self._down.bus else [self._down, self._up]
        async with asyncio.TaskGroup() as group:
            for party in parties:
                group.create_task(self._receive(party), name="edge-receive")
            group.create_task(self._send_batches(), name="edge-batches")
            group.create_task(self._announce(), name="edge-announce")

    async def _receive(self, party: Party) -> None:
        async for received in party.received():
            await self._handle(received)

    async def _handle(self, received: Received) -> None:
        match received.message:
            case Escalation() as escalation:
                self._counters.add("escalations")
                if self.relay.escalate(received.levels["agent"], escalation):
                    self._waiting.set()
                else:
                    self._counters.add("stale_escalations")
            case VerdictBatch() as batch:
                answers = self.relay.answers(batch)
                self._counters.add("stale_verdicts", len(batch.items) - len(answers))
                for agent, verdict in ((a.agent, a.verdict) for a in answers):
                    self._counters.add("verdicts")
                    await self._down.send(topics.VERDICT, verdict, cluster=self.cluster, agent=agent)
            case Presence(role="agent") as state:
                self._note_agent(received.levels["agent"], state)
            case Presence(role="cloud") as state:
                self._note_cloud(state)
            case _:
                self._counters.add("refused_messages")

    async def _send_batches(self) -> None:
        while True:
            await self._waiting.wait()
            if self._batch_wait_s and len(self.relay.pending) < self.relay.batch_max:
                await asyncio.sleep(self._batch_wait_s)
            self._waiting.clear()
            while items := self.relay.take_batch():
                self._counters.add("batches")
                batch = EscalationBatch(**self._up.stamp(), items=items)
                await self._up.send(topics.CLOUD_VERIFY, batch, cluster=self.cluster)

    def _note_agent(self, agent: str, state: Presence) -> None:
        if state.online:
            self.agents[agent] = state
            ours, theirs = self.upstream, state.fingerprint
            if ours and theirs and (ours.tokenizer, ours.vocab_size) != (theirs.tokenizer, theirs.vocab_size):
                warn_once(log, f"mismatch {agent}", "agent %s has another tokenizer than the cloud", agent)
        else:
            self.agents.pop(agent, None)

    def _note_cloud(self, state: Presence) -> None:
        self.upstream = state.fingerprint if state.online else None
        log.info("cloud is %s", "online" if state.online else "offline")
        self._to_announce.set()

    async def _announce(self) -> None:
        self._to_announce.set()
        while True:
            await self._to_announce.wait()
            self._to_announce.clear()
            message = presence(self._down.stamp, "edge", online=True, upstream=self.upstream)
            await self._down.send(topics.EDGE_STATUS, message, cluster=self.cluster)
