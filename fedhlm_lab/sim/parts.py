"""Parts of a simulated fleet: the disk that outlasts a crash, and the clock, pace and queues that faults change."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Protocol

from fedhlm.bus.interface import DEFAULT_MAX_INCOMING, DEFAULT_MAX_OUTGOING, Delivery
from fedhlm.process.state import Store
from fedhlm_lab.sim.loopback import LoopbackBus

log = logging.getLogger(__name__)

OTHERS: Final = (
    16  # packets in a queue to the broker that no limit counts: subscriptions, birth, retained state sent again
)

Launch = Callable[["Part"], "tuple[list[PartBus], Service]"]


class Service(Protocol):
    """The interface of every part."""

    async def subscribe(self) -> None: ...

    async def run(self) -> None: ...


class Disk:
    """Files in memory. A store of it stops writing when its part crashes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.rejected: list[str] = []
        self._life = 0

    def store(self) -> Store:
        """The disk in one life of a part."""
        life = self._life

        def save(name: str, data: bytes) -> None:
            if life == self._life:
                self.files[name] = data

        return Store(self.files.get, save, lambda name, _why: self.rejected.append(name))

    def unplug(self) -> None:
        """Disconnect every store given out so far."""
        self._life += 1


class Part:
    """A part that can crash and start again; `launch` makes its buses and its service anew.

    `skew_s` is its clock's error and `pace_s` its time per message. `room` bounds its queues (None: the product's own
    bounds). `lie` names a false contribution in `liars.LIES` (None: the truth). `failure` is the exception that ended
    its service; none should.
    """

    def __init__(self, name: str, launch: Launch | None = None, *, pace_s: float = 0.0) -> None:
        self.name: Final = name
        self.disk: Final = Disk()
        self.buses: list[PartBus] = []
        self.service: Service | None = None
        self.skew_s = 0.0
        self.pace_s = pace_s
        self.lie: str | None = None
        self.lives = 0
        self.failure: BaseException | None = None
        self._room: int | None = None
        self._launch = launch
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether it runs."""
        return self._task is not None

    @property
    def room(self) -> int | None:
        """Messages that each of its queues holds; None for the product's own bounds."""
        return self._room

    @room.setter
    def room(self, value: int | None) -> None:
        self._room = value
        for bus in self.buses:
            bus.fit(value)

    def start(self) -> None:
        """Start the part."""
        if self._launch is None:
            raise ValueError(f"part {self.name} has nothing to start")
        self.lives += 1
        self.buses, self.service = self._launch(self)
        for bus in self.buses:
            bus.fit(self._room)
        self._task = asyncio.create_task(self._live(self.buses, self.service), name=self.name)

    async def _live(self, buses: "list[PartBus]", service: Service) -> None:
        try:
            await service.subscribe()
            for bus in list(buses):
                await bus.__aenter__()
            await service.run()
        except Exception as exc:  # whatever it is, the part is dead, and the monitor must know
            log.exception("%s ended by itself", self.name)
            self.failure = exc

    async def crash(self) -> None:
        """Kill the part as a power cut does: it says nothing and saves nothing."""
        self.disk.unplug()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        for bus in self.buses:
            bus.crash()
        self.buses, self.service = [], None


class PartBus(LoopbackBus):
    """The bus of a part; it delivers at the part's pace."""

    def __init__(self, part: Part, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._part = part
        self.room_in = self.max_incoming
        self.room_out = self.max_outgoing + OTHERS

    def fit(self, room: int | None) -> None:
        """Bound both queues; `room_in` and `room_out` include the messages already queued."""
        self.max_incoming = DEFAULT_MAX_INCOMING if room is None else room
        self.max_outgoing = DEFAULT_MAX_OUTGOING if room is None else room
        self.room_in = max(self.max_incoming, self.unread)
        self.room_out = max(self.max_outgoing + OTHERS, self.unsent)

    async def deliveries(self) -> AsyncIterator[Delivery]:
        async for delivery in super().deliveries():
            if self._part.pace_s:
                await asyncio.sleep(self._part.pace_s)
            yield delivery
