"""The agent's connection: a bus that is replaced when the agent moves to another cluster.

A connection's last will cannot be changed, so a move needs a new connection. The new one subscribes to everything
before the old one is closed, so that no message is lost. Receivers recognise messages that arrive twice. If the broker
allows one connection per certificate (mosquitto's `use_username_as_clientid`), the new connection would end the old
one; then the old one is closed first.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from fedhlm.bus.interface import Bus, subscribe_to
from fedhlm.bus.party import Party


class Connection:
    """Enters and leaves the bus of a party.

    `open_bus` creates a bus whose birth message and last will name the given cluster. `alone` says that the broker may
    allow only one connection at a time.
    """

    def __init__(self, party: Party, open_bus: Callable[[str], Bus], cluster: str, *, alone: bool = False) -> None:
        self.cluster = cluster
        self.alone = alone
        self._party = party
        self._open_bus = open_bus

    async def __aenter__(self) -> Self:
        await self._party.bus.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._party.bus.__aexit__(kind, error, trace)

    async def replace(self, cluster: str, filters: Mapping[str, int]) -> None:
        """Close the connection, then open one for `cluster`.

        Raises:
            BusError: the broker does not answer in time, or refuses. The party's bus is closed then.
        """
        bus = self._open_bus(cluster)
        await subscribe_to(bus, filters)
        former, self._party.bus, self.cluster = self._party.bus, bus, cluster
        await former.__aexit__(None, None, None)
        await bus.__aenter__()

    async def successor(self, cluster: str, filters: Mapping[str, int]) -> Bus:
        """Open a second bus for `cluster`, connected and subscribed. The caller must adopt or close it.

        Raises:
            BusError: the broker does not answer, or refuses.
        """
        bus = self._open_bus(cluster)
        await subscribe_to(bus, filters)
        return await bus.__aenter__()

    async def adopt(self, bus: Bus, cluster: str) -> None:
        """Use a successor from now on, and close the former bus after it has sent what it holds."""
        former, self._party.bus, self.cluster = self._party.bus, bus, cluster
        await former.__aexit__(None, None, None)
