"""A bus that only keeps what is published on it, and a way to run a service's methods where nothing is waited for."""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

from fedhlm.bus.interface import BusStatistics, Delivery, LinkHook, ProtocolVersion, Retained
from fedhlm.errors import ProtocolError
from fedhlm.process.state import Store


class Captured(NamedTuple):
    """What was published: the topic's name, the message, and whether the bus had room for it."""

    name: str
    payload: bytes
    room: bool


class CapturingBus:
    """Keeps what is published in `sent`; `has_room` is asked with the running number since the last `take`."""

    def __init__(self, has_room: Callable[[int], bool]) -> None:
        self.sent: list[Captured] = []
        self.connected = True
        self.statistics = BusStatistics()
        self.protocol: ProtocolVersion | None = "5"
        self.max_packet_bytes: int | None = None
        self._has_room = has_room

    def opened(
        self,
        *,
        client_id: str,
        birth: Retained | None = None,
        will: Retained | None = None,
        on_link: LinkHook | None = None,
    ) -> Self:
        """This bus, whatever connection is asked for: see `fedhlm.process.runtime.OpenBus`."""
        return self

    def take(self) -> list[Captured]:
        """What was published since the last call."""
        taken, self.sent = self.sent, []
        return taken

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        return None

    async def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: float | None = None
    ) -> bool:
        """See `fedhlm.bus.interface.Bus`."""
        self.sent.append(Captured(topic, payload, self._has_room(len(self.sent))))
        return self.sent[-1].room

    async def subscribe(self, *filters: str) -> None:
        """There is nothing to hear."""

    def deliveries(self) -> AsyncIterator[Delivery]:
        """See `fedhlm.bus.interface.Bus`; what a part heard is in its journal."""
        raise RuntimeError("nothing is delivered on a bus that only captures")

    async def wait_connected(self) -> None:
        """It always is."""


def recorded_store(files: Mapping[str, bytes]) -> Store:
    """A disk as a part found it when it began; nothing is written to it.

    What is restored from it may raise ProtocolError: it cannot be used, and there is no other.
    """

    def reject(name: str, why: str) -> None:
        raise ProtocolError(f"{name} of the journal {why}")

    return Store(files.get, lambda _name, _data: None, reject)


def at_once(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing.

    Raises:
        RuntimeError: it waits for something after all.
    """
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise RuntimeError(f"{work!r} waits for something: nothing happens while a journal is checked")
