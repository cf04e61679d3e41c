"""The agent's connection: a bus that is replaced by another one when the agent has moved to another cluster.

A last will is fixed when a connection begins. The new connection hears everything before the old one is closed, so
that nothing is missed between them; what is heard twice is told apart by those who hear it. Where a certificate is one
connection (mosquitto's `use_username_as_clientid`), the new one would end the old one: there it follows the old one's end.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from fedhlm.bus.interface import Bus
from fedhlm.bus.party import Party


class Connection:
    """Enters and leaves the party's bus. `open_bus` makes one whose birth and last will are in the given cluster.

    `alone` says that the broker may allow one connection at a time.
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

    async def replace(self, cluster: str, filters: Sequence[str]) -> None:
        """End the connection, then go on with another one.

        Raises:
            BusError: the broker does not answer in time, or refuses; the party's bus is closed then.
        """
        bus = self._open_bus(cluster)
        await bus.subscribe(*filters)
        former, self._party.bus, self.cluster = self._party.bus, bus, cluster
        await former.__aexit__(None, None, None)
        await bus.__aenter__()

    async def successor(self, cluster: str, filters: Sequence[str]) -> Bus:
        """A second bus, connected and subscribed; to be adopted, or closed.

        Raises:
            BusError: the broker does not answer, or refuses.
        """
        bus = self._open_bus(cluster)
        await bus.subscribe(*filters)
        return await bus.__aenter__()

    async def adopt(self, bus: Bus, cluster: str) -> None:
        """Go on with a successor, and close the former bus once it has sent what it holds."""
        former, self._party.bus, self.cluster = self._party.bus, bus, cluster
        await former.__aexit__(None, None, None)
