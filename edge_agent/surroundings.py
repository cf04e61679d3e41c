"""What the parts of an agent around its generations work with."""

from collections.abc import Callable
from typing import NamedTuple

from edge_agent.learner import Learner
from edge_agent.peers import Peers
from fedhlm.bus.party import Party, Sent
from fedhlm.protocol.messages import AnyMessage
from fedhlm.protocol.topics import Topic


class Surroundings(NamedTuple):
    """An agent's endpoint, its learner, and its present peers and cluster, which change when it moves."""

    party: Party
    learner: Learner
    peers: Callable[[], Peers]
    cluster: Callable[[], str]

    async def send(self, topic: Topic, message: AnyMessage, *, expiry_s: float | None = None) -> Sent:
        """Publish a message of this agent in its present cluster."""
        return await self.party.send(
            topic, message, expiry_s=expiry_s, cluster=self.cluster(), agent=self.party.stamp.sender
        )
