"""The cluster that an agent belongs to: its subscriptions, its presence, and moves while it runs.

An agent subscribes in its new cluster before it announces itself there. It keeps its subscriptions to prompts and
verdicts in the clusters that it left. It moves only to a cluster whose edge it has seen online, so a wrong assignment
cannot strand it.
"""

import logging
from typing import Final

from fedhlm.bus.interface import Retained, subscribe_to
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.errors import BusError, ProtocolError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Fingerprint, Presence

log = logging.getLogger(__name__)

CLUSTERS_MAX: Final = 32

_REQUESTS: Final = (topics.PROMPT, topics.PROMPT_FROM, topics.CANCEL, topics.CANCEL_FROM)


class Membership:
    """The clusters that an agent visits. `cluster` is the current one.

    A `guest` neither subscribes to prompts nor announces its presence.
    """

    def __init__(self, *, party: Party, cluster: str, fingerprint: Fingerprint, guest: bool = False) -> None:
        self.cluster = cluster
        self._guest = guest
        self.wanted: str | None = None
        self.moves = 0
        self._party = party
        self._name = party.stamp.sender
        self._fingerprint = fingerprint
        self._visited: dict[str, None] = {cluster: None}
        self._considered: set[str] = {cluster}

    def filters(self) -> dict[str, int]:
        """All topic filters of the agent now, with the QoS of each."""
        root, found = self._party.root, dict[str, int]()
        for cluster in self._visited:
            found |= self._personal_in(cluster)
        found |= self._of(self.cluster)
        others = [topics.ASSIGN.name(root, agent=self._name)]
        others += [] if self.wanted is None else [topics.EDGE_STATUS.name(root, cluster=self.wanted)]
        others += [] if self._guest else [topics.CLIENT_STATUS.name(root, client="+")]
        return found | dict.fromkeys(others, 1)

    def _personal_in(self, cluster: str) -> dict[str, int]:
        place = {"cluster": cluster, "agent": self._name, "client": "+"}
        requests = () if self._guest else _REQUESTS
        rows = {topics.VERDICT: 1} | dict.fromkeys(requests, 0)  # a thousand prompts may come at once
        return {row.name(self._party.root, **place): qos for row, qos in rows.items()}

    def _of(self, cluster: str) -> dict[str, int]:
        root = self._party.root
        names = [row.name(root, cluster=cluster) for row in (topics.EDGE_STATUS, topics.FL_STATE, topics.KNOWN)]
        names.append(topics.PEER.name(root, cluster=cluster, agent="+"))
        return self._personal_in(cluster) | dict.fromkeys(names, 1)

    async def subscribe(self) -> None:
        """Subscribe to all filters."""
        await subscribe_to(self._party.bus, self.filters())

    async def assigned(self, cluster: str) -> None:
        """Look for the edge of an assigned cluster. The agent moves when the edge's presence arrives.

        Raises:
            ProtocolError: the broker refuses the subscription, or there were more than CLUSTERS_MAX other assignments.
        """
        if cluster == self.cluster:
            self.wanted = None
            return
        if cluster not in self._considered and len(self._considered) >= CLUSTERS_MAX:
            raise ProtocolError(
                f"assignment.cluster must be one of at most {CLUSTERS_MAX} clusters in a life "
                f"(got {cluster!r} beyond them)"
            )
        self._considered.add(cluster)
        self.wanted = cluster
        try:
            await self._party.bus.subscribe(topics.EDGE_STATUS.name(self._party.root, cluster=cluster))
        except BusError as exc:
            self.wanted = None
            raise ProtocolError(
                f"assignment.cluster must be a cluster whose topics can be joined (got {cluster!r}: {exc})"
            ) from exc

    async def seen(self, cluster: str, edge: Presence) -> bool:
        """Move to the wanted cluster if this is its edge and the cloud is behind it. Return whether the agent moved.

        Raises:
            ProtocolError: the broker refuses a subscription there. The agent stays.
        """
        if cluster != self.wanted or not edge.online or edge.upstream is None:
            return False
        self.wanted = None
        try:
            await subscribe_to(self._party.bus, self._of(cluster))
        except BusError as exc:
            raise ProtocolError(
                f"assignment.cluster must be a cluster whose topics can be joined (got {cluster!r}: {exc})"
            ) from exc
        left, self.cluster = self.cluster, cluster
        self._visited[cluster] = None
        self.moves += 1
        log.info("agent %s moves from cluster %s to %s", self._name, left, cluster)
        if not self._guest:
            # In this order, so that the agent is never absent from all clusters.
            await self._announce(cluster, online=True)
            await self._announce(left, online=False)
        return True

    async def _announce(self, cluster: str, *, online: bool) -> None:
        message = _presence(self._party.stamp, self._fingerprint, online=online)
        await self._party.send(topics.AGENT_STATUS, message, cluster=cluster, agent=self._name)


def birth_and_will(stamp: Stamp, fingerprint: Fingerprint, cluster: str, root: str) -> tuple[Retained, Retained]:
    """The birth message and the last will of a connection for this agent in this cluster."""
    name = topics.AGENT_STATUS.name(root, cluster=cluster, agent=stamp.sender)
    birth, will = (encode(_presence(stamp, fingerprint, online=online)) for online in (True, False))
    return Retained(name, birth), Retained(name, will)


def _presence(stamp: Stamp, fingerprint: Fingerprint, *, online: bool) -> Presence:
    return presence(stamp, "agent", online=online, fingerprint=fingerprint if online else None)
