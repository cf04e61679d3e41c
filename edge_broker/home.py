"""An edge as a device of Home Assistant; it also says there whether each of its agents is present."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_broker.service import EdgeService
from fedhlm.home import AVAILABLE, EDGE_SENSORS, DeviceTopics, Home, discovery, values
from fedhlm.protocol.open_topics import HOME_AGENT_AVAILABLE, HOME_EDGE_AVAILABLE, HOME_EDGE_VALUES
from fedhlm.protocol.roles import edge_name
from fedhlm.settings import Config
from fedhlm.telemetry import Counters


class EdgeHome:
    """Publishes an edge's device, and the presence of its agents."""

    def __init__(self, service: EdgeService, config: Config, counters: Counters) -> None:
        self._service = service
        self._config = config
        self._counters = counters
        self._home = Home(
            service.down,
            edge_name(service.cluster),
            config.home_assistant,
            place=self._place,
            describe=self._describe,
            measure=self._measure,
            secrets=(config.broker.password, config.edge.upstream.password),
        )

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Publish for as long as the context is entered."""
        self._service.tell_agent.append(self._tell_agent)
        try:
            async with self._home.kept((HOME_EDGE_AVAILABLE, HOME_EDGE_VALUES)):
                yield
        finally:
            self._service.tell_agent.remove(self._tell_agent)

    async def _tell_agent(self, agent: str, online: bool) -> None:
        name = HOME_AGENT_AVAILABLE.name(self._service.down.root, cluster=self._service.cluster, agent=agent)
        await self._home.send(name, AVAILABLE[online], HOME_AGENT_AVAILABLE)

    def _place(self) -> DeviceTopics:
        root, cluster = self._service.down.root, self._service.cluster
        return DeviceTopics(
            HOME_EDGE_AVAILABLE.name(root, cluster=cluster), HOME_EDGE_VALUES.name(root, cluster=cluster)
        )

    def _describe(self, place: DeviceTopics) -> dict[str, object]:
        cluster = self._service.cluster
        period_s = self._config.home_assistant.period_s
        return discovery(edge_name(cluster), f"edge of cluster {cluster}", place, EDGE_SENSORS, period_s=period_s)

    def _measure(self, last_error: str) -> dict[str, object]:
        service = self._service
        counted = ("escalations", "peer_answers", "neighbour_answers", "uplink_bytes")
        figures: dict[str, object] = {name: self._counters[name] for name in counted}
        figures |= self._counters.gauges()
        figures |= {"agents": len(service.agents), "last_error": last_error}
        return values(EDGE_SENSORS, figures, latest=service.cloud_software)
