"""A bus without a broker, for a part that writes alone: what is published is dropped, and nothing is ever delivered."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from fedhlm.bus.interface import BusStatistics, Delivery, LinkHook, ProtocolVersion, Retained


class SilentBus:
    """Says of every message that it was taken. It is never connected, so that nobody waits for an answer over it."""

    def __init__(self) -> None:
        self._statistics = BusStatistics()
        self._closed = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Never."""
        return False

    @property
    def statistics(self) -> BusStatistics:
        """Counts of nothing."""
        return self._statistics

    @property
    def protocol(self) -> ProtocolVersion | None:
        """None is spoken."""
        return None

    @property
    def max_packet_bytes(self) -> int | None:
        """No limit."""
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._closed.set()

    async def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: float | None = None
    ) -> bool:
        """Drop the message; True, because nothing is amiss."""
        return True

    async def subscribe(self, *filters: str) -> None:
        """Hear nothing."""

    async def deliveries(self) -> AsyncIterator[Delivery]:
        """Nothing, until the bus is closed."""
        nothing: tuple[Delivery, ...] = ()
        await self._closed.wait()
        for delivery in nothing:
            yield delivery

    async def wait_connected(self) -> None:
        """Return at once: there is nothing to wait for."""


def silent(
    *, client_id: str, birth: Retained | None = None, will: Retained | None = None, on_link: LinkHook | None = None
) -> SilentBus:
    """Opens silent buses where others open connections; nobody is told who they are."""
    return SilentBus()
