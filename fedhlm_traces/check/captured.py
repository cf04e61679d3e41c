"""A bus that only keeps what is published on it, a recorded disk, and a way to run a coroutine that never waits."""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

from fedhlm.bus.gate import Sheds
from fedhlm.bus.interface import BusStatistics, Delivery, Extras, LinkHook, ProtocolVersion, Retained
from fedhlm.errors import ProtocolError
from fedhlm.process.state import Store


class Captured(NamedTuple):
    """A published message: its topic's name, its payload, and whether the bus had room."""

    name: str
    payload: bytes
    room: bool


class CapturingBus:
    """Keeps what is published in `sent`.

    `has_room` gets the number of the message since the last `take`.
    """

    def __init__(self, has_room: Callable[[int], bool]) -> None:
        self.sent: list[Captured] = []
        self.sheds: Sheds | None = None
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
        """Return this bus for any connection; see `fedhlm.process.runtime.OpenBus`."""
        return self

    def take(self) -> list[Captured]:
        """Return what was published since the last call."""
        taken, self.sent = self.sent, []
        return taken

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        return None

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
        """See `fedhlm.bus.interface.Bus`."""
        self.sent.append(Captured(topic, payload, self._has_room(len(self.sent))))
        return self.sent[-1].room

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Do nothing: nothing is delivered."""

    def deliveries(self) -> AsyncIterator[Delivery]:
        """See `fedhlm.bus.interface.Bus`.

        The messages that a part received are in its journal.
        """
        raise RuntimeError("nothing is delivered on a bus that only captures")

    async def wait_connected(self) -> None:
        """Return at once."""


def recorded_store(files: Mapping[str, bytes]) -> Store:
    """A disk as the part found it at its start; it is never written.

    A snapshot that cannot be restored raises ProtocolError, because there is no other.
    """

    def reject(name: str, why: str) -> None:
        raise ProtocolError(f"{name} of the journal {why}")

    return Store(files.get, lambda _name, _data: None, reject)


def at_once(work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that never waits.

    Raises:
        RuntimeError: it waits for something after all.
    """
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise RuntimeError(f"{work!r} waits for something: nothing happens while a journal is checked")
