"""Where the console's messages come from: brokers that it listens to, or a recording."""

import asyncio
import contextlib
import logging
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final

from fedhlm import settings
from fedhlm.bus.interface import Bus
from fedhlm.bus.party import Party, Stamp
from fedhlm.process.notify import Notifier
from fedhlm.process.run import address_of, bus_of
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Output
from fedhlm.telemetry import Counters
from fedhlm_fleet.console.state import ConsoleState
from fedhlm_traces.decoded import look
from fedhlm_traces.file import Record, Trace

log = logging.getLogger(__name__)

EVERY_S: Final = 0.1  # between two updates of the pages
RETAINED_S: Final = 1.0  # a recorder marks all retained messages; those of earlier times come at once
BEHIND_MAX: Final = 64  # updates that wait for a page; one that falls farther behind begins anew
SHOWN: Final = (
    topics.CLOUD_STATUS,
    topics.EDGE_STATUS,
    topics.AGENT_STATUS,
    topics.CLOUD_FL_STATE,
    topics.FL_STATE,
    topics.PROMPT,
    topics.PROMPT_FROM,
    topics.OUTPUT,
    topics.VERDICT,
    topics.ASSIGN,
    topics.AGENT_METRICS,
    topics.AGENT_JOURNAL,
)


class LiveFeed:
    """Listens to brokers and publishes nothing. `connected` is set once a broker has answered."""

    length_s: float | None = None
    opens_s: float = 0.0
    began_s: float = 0.0

    def __init__(self, state: ConsoleState) -> None:
        self.connected = asyncio.Event()
        self._state = state
        self._pages: set[asyncio.Queue[dict[str, Any] | None]] = set()

    def snapshot(self, _at_s: float | None = None) -> dict[str, Any]:
        """See `fedhlm_doors.console.ConsoleFeed`."""
        return self._state.snapshot()

    async def follow(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `fedhlm_doors.console.ConsoleFeed`."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(BEHIND_MAX)
        self.tell()  # others get what is new; the snapshot holds it
        self._pages.add(queue)
        try:
            yield self._state.snapshot()
            while (change := await queue.get()) is not None:
                yield change
        finally:
            self._pages.discard(queue)

    async def listen(
        self, brokers: Sequence[settings.Broker], client_id: str, notifier: Notifier | None = None
    ) -> None:
        """Listen until cancelled, or until a broker refuses the connection for good (BusError).

        `notifier` is told which brokers are connected, and one that is not there is waited for. Without it that is an
        error (BusError).
        """
        buses = [self._bus(broker, client_id, notifier) for broker in brokers]
        if notifier is not None:
            notifier.serving()
        async with asyncio.TaskGroup() as group:
            for broker, bus in zip(brokers, buses, strict=True):
                group.create_task(self._hear(bus, broker.root, client_id), name=f"console {broker.url}")
            group.create_task(self.tell_pages(), name="console-pages")

    def _bus(self, broker: settings.Broker, client_id: str, notifier: Notifier | None) -> Bus:
        if notifier is None:
            return bus_of(broker, client_id=client_id, connect_timeout_s=broker.connect_timeout_s)
        return bus_of(broker, client_id=client_id, on_link=notifier.link(address_of(broker).host))

    async def _hear(self, bus: Bus, root: str, client_id: str) -> None:
        party = Party(bus=bus, stamp=Stamp(client_id), counters=Counters(), root=root)
        await bus.subscribe(*(row.filter(root) for row in SHOWN), qos=0)
        async with bus:
            await bus.wait_connected()
            self.connected.set()
            async for received in party.received():
                self._state.put(received.message, received.levels, time.time(), retained=received.retained)

    async def tell_pages(self) -> None:
        """Tell the pages what is new, again and again."""
        while True:
            await asyncio.sleep(EVERY_S)
            self.tell()

    def tell(self) -> None:
        """Tell the pages what is new."""
        if change := self._state.changes():
            for queue in self._pages:
                if queue.full():
                    with contextlib.suppress(asyncio.QueueEmpty):
                        while True:
                            queue.get_nowait()
                    queue.put_nowait(None)
                else:
                    queue.put_nowait(change)


class RecordedFeed:
    """Shows a recording as it was at any second of it."""

    def __init__(self, trace: Trace, make: Callable[[], ConsoleState]) -> None:
        self._make = make
        self._root = trace.header.root
        self._records = sorted(trace, key=lambda record: record.at_s)
        self._times = [record.at_s for record in self._records]
        self._state, self._done = make(), 0
        self.began_s = self._records[0].wall_ms / 1000.0 - self._times[0] if self._times else 0.0
        self.length_s: float | None = self._times[-1] if self._times else 0.0
        self.opens_s = max((r.at_s for r in self._records if self._writes(r)), default=self.length_s)

    def _writes(self, record: Record) -> bool:
        """Whether tokens are committed. The last of them come before the parts of a recorded run stop."""
        message = look(record, self._root).message if record.topic.endswith("/output") else None
        return isinstance(message, Output) and bool(message.ids)

    def snapshot(self, at_s: float | None = None) -> dict[str, Any]:
        """See `fedhlm_doors.console.ConsoleFeed`."""
        end = len(self._records) if at_s is None else bisect_right(self._times, at_s)
        if end < self._done:
            self._state, self._done = self._make(), 0
        for record in self._records[self._done : end]:
            seen = look(record, self._root)
            if seen.message is not None:
                self._state.put(
                    seen.message,
                    seen.levels,
                    record.wall_ms / 1000.0,
                    retained=record.retain and record.at_s < RETAINED_S,
                )
        self._done = end
        return self._state.snapshot()

    async def follow(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `fedhlm_doors.console.ConsoleFeed`: a recording does not change."""
        yield self.snapshot(self.opens_s)
        await asyncio.Event().wait()
