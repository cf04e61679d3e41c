"""Which agents are online and which edges see the cloud, from the presences that a client hears."""

from collections.abc import Collection
from typing import Final, NamedTuple

from fedhlm.protocol import topics
from fedhlm.protocol.messages import Presence
from fedhlm.protocol.roles import ROLES


class Place(NamedTuple):
    """An agent and its cluster."""

    cluster: str
    agent: str


class Attendance:
    """The parts of a fleet that can serve: `agents` that are online, and `clusters` whose edge sees the cloud."""

    ROWS: Final = (topics.AGENT_STATUS, topics.EDGE_STATUS)

    def __init__(self) -> None:
        self.agents: set[str] = set()
        self.clusters: set[str] = set()

    def filters(self, root: str) -> tuple[str, ...]:
        """Return the subscriptions that deliver the presences."""
        return tuple(row.name(root, cluster="+", agent="+") for row in self.ROWS)

    def hear(self, presence: Presence, levels: dict[str, str]) -> None:
        """Take in a presence; `levels` are those of its topic."""
        role = ROLES[presence.role]
        if role.drafts:
            (self.agents.add if presence.online else self.agents.discard)(levels["agent"])
        elif role.relays:
            linked = presence.online and presence.upstream is not None
            (self.clusters.add if linked else self.clusters.discard)(levels["cluster"])

    def forget(self) -> None:
        """Forget everything, as after a lost connection."""
        self.agents.clear()
        self.clusters.clear()

    def complete(self, places: Collection[Place]) -> bool:
        """Return whether every agent is online and every edge sees the cloud."""
        return {p.agent for p in places} <= self.agents and {p.cluster for p in places} <= self.clusters
