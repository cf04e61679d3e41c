"""Record a bus: a subscriber that writes every message to a file until it is told to stop.

The event loop only stamps and queues messages. A thread packs, compresses and writes them, so a slow disk delays
nothing until the bounded queue is full. Messages that do not fit are dropped, counted and shown.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import aiomqtt
import msgspec

from fedhlm import settings
from fedhlm.bus.identity import client_id
from fedhlm.bus.mqtt import MqttBus
from fedhlm.errors import ProtocolError
from fedhlm.process.run import DEFAULT_URL
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import Fingerprint, Presence
from fedhlm.telemetry import warn_once
from fedhlm_traces.file import MAX_RECORD_BYTES, Header, Record, Writer, direction_of, require_new
from fedhlm_traces.filters import distinct
from fedhlm_traces.properties import properties_of

_log: Final = logging.getLogger(__name__)

MAX_WAITING: Final = 65_536
MAX_WAITING_BYTES: Final = 64 * 1024 * 1024
TAKE_EVERY_S: Final = 0.1
# The header lists the fingerprints in retained messages. It is written when no more of those arrive, or after this
# time.
HEADER_QUIET_S: Final = 0.25
HEADER_WAIT_S: Final = 2.0
_PROPERTIES_ROOM_BYTES: Final = 128 * 1024  # topic, properties and framing of the largest record


class Summary(msgspec.Struct, kw_only=True):
    """Progress of a recording. `dropped` messages did not fit the queue or were too large."""

    messages: int = 0
    payload_bytes: int = 0
    dropped: int = 0
    reconnects: int = 0
    duration_s: float = 0.0
    file_bytes: int = 0
    files: int = 0

    @property
    def rate(self) -> float:
        """Messages per second."""
        return self.messages / self.duration_s if self.duration_s else 0.0


class Recorder:
    """Queues deliveries on the event loop and writes them in a thread; see `record`."""

    def __init__(
        self,
        path: Path,
        header: Header,
        *,
        rotate_bytes: int | None = None,
        max_waiting: int = MAX_WAITING,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        clock_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.summary: Final = Summary()
        self._path, self._header = path, header
        self._rotate_bytes = rotate_bytes
        self._max_waiting, self._max_waiting_bytes = max_waiting, max_waiting_bytes
        self._clock_s, self._wall_s = clock_s, wall_s
        self._began_s = clock_s()
        self._waiting: deque[Record] = deque()
        self._waiting_bytes = 0
        self._retained = 0
        self._fingerprints: dict[str, Fingerprint] = {}
        self._writer: Writer | None = None

    def take(self, message: aiomqtt.Message) -> None:
        """Stamp and queue one delivery.

        MQTT 3.1.1 brokers hide the retain flag, and some deliver with the subscription's QoS. For topics of ours the
        table gives both.
        """
        topic, qos, retain = message.topic.value, message.qos, message.retain
        if message.properties is None and (row := _row(topic, self._header.root)) is not None:
            qos, retain = min(qos, row.qos), retain or row.retain
        self.keep(topic, bytes(message.payload), qos=qos, retain=retain, properties=properties_of(message.properties))

    def keep(self, topic: str, payload: bytes, *, qos: int, retain: bool, properties: dict[str, Any]) -> None:
        """Queue a message received now; drop and count it if the queue is full."""
        summary = self.summary
        full = len(self._waiting) >= self._max_waiting or self._waiting_bytes + len(payload) > self._max_waiting_bytes
        if full or len(payload) > MAX_RECORD_BYTES - _PROPERTIES_ROOM_BYTES:
            summary.dropped += 1
            why = "the disk is too slow" if full else f"a message of {len(payload)} bytes is too large"
            warn_once(_log, f"recorder {why}", "%s: dropped a message on %s", why, topic)
            return
        at_s = self._clock_s() - self._began_s
        direction = direction_of(topic, self._header.root)
        self._waiting.append(
            Record(at_s, int(self._wall_s() * 1000.0), topic, payload, qos, retain, direction, properties)
        )
        self._waiting_bytes += len(payload)
        if retain and self._writer is None:
            self._retained += 1
            self._note_fingerprint(topic, payload)

    async def run(self, stop: asyncio.Event, *, show: Callable[[Summary], None] = lambda _: None) -> None:
        """Write until `stop` is set and everything queued before is in the file.

        Raises:
            TraceError: the file exists or cannot be written; what was written before can be read.
        """
        quiet = False
        while not quiet and not stop.is_set() and self._clock_s() - self._began_s < HEADER_WAIT_S:
            before = self._retained
            await _wait(stop, HEADER_QUIET_S)
            quiet = self._retained == before
        header = msgspec.structs.replace(self._header, fingerprints=dict(self._fingerprints))
        self._writer = await asyncio.to_thread(Writer, self._path, header, rotate_bytes=self._rotate_bytes)
        try:
            while True:
                last = stop.is_set()
                await asyncio.to_thread(self._store, self._writer, self._take_all())
                self._count(self._writer)
                show(self.summary)
                if last:
                    return
                await _wait(stop, TAKE_EVERY_S)
        finally:
            await asyncio.to_thread(self._writer.close)
            self._count(self._writer)

    def _take_all(self) -> deque[Record]:
        batch, self._waiting = self._waiting, deque()
        self._waiting_bytes = 0
        return batch

    @staticmethod
    def _store(writer: Writer, batch: deque[Record]) -> None:
        for record in batch:
            writer.write(record)
        writer.flush_if_old()

    def _count(self, writer: Writer) -> None:
        summary = self.summary
        summary.messages, summary.payload_bytes = writer.records, writer.payload_bytes
        summary.file_bytes, summary.files = writer.file_bytes, writer.parts
        summary.duration_s = self._clock_s() - self._began_s

    def _note_fingerprint(self, topic: str, payload: bytes) -> None:
        try:
            message = decode(payload)
        except ProtocolError:
            return
        if isinstance(message, Presence) and topics.lookup(topic, self._header.root) is not None:
            # An edge has no model; it announces its cloud's.
            fingerprint = message.fingerprint or message.upstream
            if fingerprint is not None:
                self._fingerprints[message.sender] = fingerprint


async def record(
    broker: settings.Broker,
    out: Path,
    *,
    stop: asyncio.Event,
    filters: tuple[str, ...] = (),
    rotate_bytes: int | None = None,
    facts: dict[str, Any] | None = None,
    show: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Record the messages that the filters match (by default all under the root) until `stop` is set.

    A lost connection is made again. Messages sent meanwhile are missing, and retained messages come a second time.

    Raises:
        TraceError: the file exists or cannot be written, or the filters overlap.
        ConfigError: the address cannot be used.
        BusError: the broker does not answer in time, or refuses the connection or a filter.
    """
    section = broker if broker.url else msgspec.structs.replace(broker, url=DEFAULT_URL)
    address = section.address()
    wanted = distinct(filters or (f"{broker.root}/#",))
    require_new(out)
    header = Header(
        created_ms=int(time.time() * 1000.0), root=broker.root, source=str(address), filters=wanted, facts=facts or {}
    )

    def take(message: aiomqtt.Message) -> None:
        recorder.take(message)

    bus = MqttBus(
        address,
        client_id=client_id("recorder", secrets.token_hex(8), root=broker.root),
        protocol=broker.protocol,
        connect_timeout_s=broker.connect_timeout_s,
        tap=take,
    )

    def shown(summary: Summary) -> None:
        summary.reconnects = bus.statistics.reconnects
        show(summary)

    async with bus:
        # Started here, so that connecting is not part of the recording; nothing arrives before the subscription.
        recorder = Recorder(out, header, rotate_bytes=rotate_bytes)
        await bus.subscribe(*wanted)
        await recorder.run(stop, show=shown)
    return recorder.summary


@lru_cache(maxsize=4_096)
def _row(topic: str, root: str) -> topics.Topic | None:
    found = topics.lookup(topic, root)
    return None if found is None else found[0]


async def _wait(stop: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await stop.wait()
    except TimeoutError:
        pass
