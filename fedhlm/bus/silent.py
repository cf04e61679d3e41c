"""A bus without a broker, for a part that runs alone: it drops what is published and delivers nothing."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from fedhlm.bus.gate import Sheds
from fedhlm.bus.interface import BusStatistics, Delivery, Extras, LinkHook, ProtocolVersion, Retained


class SilentBus:
    """A bus that accepts every message. It is never connected, so that no part waits for an answer."""

    def __init__(self) -> None:
        self.sheds: Sheds | None = None
        self._statistics = BusStatistics()
        self._closed = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Always False."""
        return False

    @property
    def statistics(self) -> BusStatistics:
        """Counts that stay 0."""
        return self._statistics

    @property
    def protocol(self) -> ProtocolVersion | None:
        """Always None."""
        return None

    @property
    def max_packet_bytes(self) -> int | None:
        """None: there is no limit."""
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._closed.set()

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: float | None = None,
        extras: Extras | None = None,
    ) -> bool:
        """Drop the message and return True."""
        return True

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Do nothing."""

    async def deliveries(self) -> AsyncIterator[Delivery]:
        """Yield nothing, and end when the bus is closed."""
        nothing: tuple[Delivery, ...] = ()
        await self._closed.wait()
        for delivery in nothing:
            yield delivery

    async def wait_connected(self) -> None:
        """Return at once, although the bus is never connected."""


def silent(
    *, client_id: str, birth: Retained | None = None, will: Retained | None = None, on_link: LinkHook | None = None
) -> SilentBus:
    """Open a silent bus, with the signature of the function that opens connections. The arguments are ignored."""
    return SilentBus()
