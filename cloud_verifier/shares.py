"""Decides who is served next, without I/O: clusters share the model equally, and agents share their cluster's part.

This is start-time fair queueing on two levels. Service is counted in tokens, and whoever has received the least is
first. A name that was idle returns with at most `burst` tokens of credit. A light user is therefore served at once
beside any number of heavy ones. Inventing a new name for every request gains nothing beyond the cluster's share.
"""

from collections.abc import Iterable, Mapping
from typing import Final

NAMES_MAX: Final = 16_384
BURST: Final = 1_024.0  # tokens of credit of an agent that was idle
CLUSTER_BURST: Final = 4_096.0


class Level:
    """The service that each name has received, in tokens.

    `now` is the least service of any busy name; it never decreases.
    """

    def __init__(self, burst: float) -> None:
        self.now = 0.0
        self._burst = burst
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._served)

    def of(self, name: str) -> float:
        """The service of a name. A new name, or one that was idle for long, has its whole credit."""
        return max(self._served.get(name, 0.0), self.now - self._burst)

    def charge(self, name: str, tokens: float) -> None:
        """Add `tokens` to the service of a name."""
        served = self.of(name) + tokens
        self._served.pop(name, None)
        self._served[name] = served

    def advance(self, busy: Iterable[str]) -> None:
        """Move `now` to the least served busy name.

        Names whose entry no longer changes the result of `of` are forgotten.
        """
        self.now = max(self.now, min((self.of(name) for name in busy), default=self.now))
        if len(self._served) > NAMES_MAX // 2:
            floor = self.now - self._burst
            self._served = {name: served for name, served in self._served.items() if served > floor}
        while len(self._served) > NAMES_MAX:
            del self._served[next(iter(self._served))]


class Lane:
    """The shares of clusters, and of the agents in each cluster, in one kind of work."""

    def __init__(self) -> None:
        self.clusters = Level(CLUSTER_BURST)
        self._agents: dict[str, Level] = {}

    def advance(self, busy: Mapping[str, Iterable[str]]) -> None:
        """Take note of who has work: agents by cluster. The shares of idle clusters are forgotten if there are many."""
        self.clusters.advance(busy)
        for cluster, agents in busy.items():
            self.agents(cluster).advance(agents)
        while len(self._agents) > 2 * len(busy) + 64:
            del self._agents[next(name for name in self._agents if name not in busy)]

    def agents(self, cluster: str) -> Level:
        """The shares of a cluster's agents."""
        return self._agents.setdefault(cluster, Level(BURST))

    def charge(self, cluster: str, agent: str, tokens: float) -> None:
        """Add `tokens` to the service of an agent and of its cluster."""
        self.clusters.charge(cluster, tokens)
        self.agents(cluster).charge(agent, tokens)

    def ahead(self, cluster: str, agent: str, of: tuple[str, float, float]) -> float:
        """How many tokens more an agent, or its cluster, has received than another one (`standing`) had."""
        if cluster == of[0]:
            return self.agents(cluster).of(agent) - of[2]
        return self.clusters.of(cluster) - of[1]

    def standing(self, cluster: str, agent: str) -> tuple[str, float, float]:
        """The cluster's name, its service, and the agent's."""
        return cluster, self.clusters.of(cluster), self.agents(cluster).of(agent)
