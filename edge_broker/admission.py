"""How much an edge takes from each agent: what is far too much is dropped unread, and a block too many is refused."""

import logging
from collections.abc import Callable
from typing import Final

from edge_broker.heard import BELOW
from fedhlm.bus.party import Party, Received
from fedhlm.bus.rates import Allowance, UnreadLimit
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Escalation
from fedhlm.protocol.refusing import refused
from fedhlm.settings import Edge
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

TOO_FAST: Final = "the agent sends more than its edge takes (edge.agent_messages_s, edge.agent_bytes_s)"


class AgentRates:
    """Holds the agents of a cluster to their rates, on the connection of `party` to its broker."""

    def __init__(self, settings: Edge, party: Party, cluster: str, clock_s: Callable[[], float]) -> None:
        self.allowance = Allowance(settings.agent_messages_s, settings.agent_bytes_s)
        self._party, self._cluster, self._clock_s = party, cluster, clock_s
        unread = UnreadLimit(self.allowance, self._owner, clock_s)
        party.admits, party.bus.sheds = self.admits, unread.sheds
        party.counters.follow(unread, limited_messages="unread")

    def _owner(self, name: str) -> str:
        """The agent that publishes on a topic; empty if it is no agent's."""
        found = topics.lookup(name, self._party.root)
        return found[1].get("agent", "") if found is not None and found[0] in BELOW else ""

    async def admits(self, received: Received) -> bool:
        """Whether an agent keeps to its rate. A block beyond it is refused at once; other messages are only counted."""
        agent, now_s = received.levels.get("agent", ""), self._clock_s()
        if received.topic not in BELOW or not self.allowance.exceeds(agent, 1.0, received.wire_bytes, now_s):
            return True
        self._party.counters.add("limited_messages")
        warn_once(log, f"rate {agent}", "agent %s sends more than it may: its messages are refused", agent)
        if isinstance(received.message, Escalation) and self.allowance.tells(agent, now_s):
            verdict = refused(self._party.stamp(), received.message, TOO_FAST)
            await self._party.send_unnoted(topics.VERDICT, verdict, cluster=self._cluster, agent=agent)
        return False
