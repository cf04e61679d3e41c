"""Replay a recording: publish every message at its time, with its QoS, retain flag and properties.

The schedule is absolute, so a late message does not delay later ones. Retained messages are published as retained and
stay on the broker.
"""

import asyncio
import math
import secrets
import time
from array import array
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Final, NamedTuple

import msgspec
import numpy as np

from fedhlm import settings
from fedhlm.bus.identity import client_id
from fedhlm.bus.interface import check_filter, check_topic, topic_matches
from fedhlm.bus.mqtt import MqttBus
from fedhlm.errors import TraceError
from fedhlm_traces.file import Record, Trace
from fedhlm_traces.properties import paho_properties
from fedhlm_traces.rewrite import Renames, rebased, renamed

MAX_OUTGOING: Final = 1_024
# Pause between the last message of a turn and the first of the next, at recorded speed.
LOOP_GAP_S: Final = 1.0
# Publishing does not wait while the queue has room, so yield to the loop after this many messages.
_YIELD_EVERY: Final = 64
_LATE_MAX: Final = 1_000_000

Publish = Callable[[Record], Awaitable[None]]


class ReplaySelection(msgspec.Struct, frozen=True, kw_only=True):
    """Selects the records to replay: by topic filter, and from `from_s` on and before `until_s`."""

    filters: tuple[str, ...] = ()
    from_s: float = 0.0
    until_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= self.from_s < self.until_s:
            raise TraceError(
                f"--from and --until must be 0 <= from < until (got {self.from_s:g} s and {self.until_s:g} s)"
            )
        for pattern in self.filters:
            try:
                check_filter(pattern)
            except ValueError as exc:
                raise TraceError(str(exc)) from exc

    def of(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the selected records; the input must be ordered by time."""
        filters = [pattern.split("/") for pattern in self.filters]
        for record in records:
            if record.at_s >= self.until_s:
                return
            wanted = not filters or any(topic_matches(levels, record.topic) for levels in filters)
            if wanted and record.at_s >= self.from_s:
                yield record


class Jitter(NamedTuple):
    """How late messages were published, in ms."""

    p50_ms: float
    p99_ms: float


class Played(msgspec.Struct, kw_only=True):
    """Progress of a replay. `turn` counts the passes, and `position_s` is the position in the recording.

    `dropped` messages were given up by the bus: they expired while waiting, or had QoS 0 when the link broke.
    """

    messages: int = 0
    payload_bytes: int = 0
    retained: int = 0
    dropped: int = 0
    turn: int = 0
    position_s: float = 0.0
    duration_s: float = 0.0
    late_ms: "array[float]" = msgspec.field(default_factory=lambda: array("f"))  # of the first million messages

    def jitter(self) -> Jitter:
        """Record the difference of publish time and due time."""
        if not self.late_ms:
            return Jitter(0.0, 0.0)
        p50, p99 = np.percentile(np.frombuffer(self.late_ms, np.float32), (50, 99))
        return Jitter(float(p50), float(p99))


class _Due(NamedTuple):
    after_s: float  # recorded seconds since the first message of the first turn
    record: Record
    turn: int


def _schedule(turn: Callable[[], Iterator[Record]], *, loop: bool) -> Iterator[_Due]:
    """Yield every message of every turn; the first one is due at once, so a silent beginning is skipped."""
    begin_s, number = 0.0, 1
    while True:
        first_s, last_s = None, 0.0
        for record in turn():
            first_s = record.at_s if first_s is None else first_s
            # Merged recordings may step back in time; that must not reorder messages.
            last_s = max(last_s, record.at_s - first_s)
            yield _Due(begin_s + last_s, record, number)
        if first_s is None or not loop:
            return
        begin_s += last_s + LOOP_GAP_S
        number += 1


async def play(
    turn: Callable[[], Iterator[Record]],
    publish: Publish,
    *,
    speed: float = 1.0,
    loop: bool = False,
    played: Played | None = None,
) -> Played:
    """Publish the records of `turn`, repeatedly with `loop`, at `speed` times the recorded pace.

    An infinite speed publishes as fast as `publish` allows. `played` is updated on the way.
    """
    done = played or Played()
    clock_s = asyncio.get_running_loop().time
    began_s = clock_s()
    for after_s, record, number in _schedule(turn, loop=loop):
        due_s = began_s + after_s / speed
        if due_s > (now_s := clock_s()):
            await asyncio.sleep(due_s - now_s)
        elif done.messages % _YIELD_EVERY == 0:
            await asyncio.sleep(0)
        await publish(record)
        now_s = clock_s()
        done.messages += 1
        done.payload_bytes += len(record.payload)
        done.retained += record.retain
        done.turn, done.position_s, done.duration_s = number, record.at_s, now_s - began_s
        if math.isfinite(speed) and len(done.late_ms) < _LATE_MAX:
            done.late_ms.append(max(0.0, now_s - due_s) * 1000.0)
    return done


async def replay(
    trace: Trace,
    broker: settings.Broker,
    *,
    stop: asyncio.Event,
    selection: ReplaySelection | None = None,
    speed: float = 1.0,
    rebase_time: bool = False,
    renames: Renames | None = None,
    loop: bool = False,
    show: Callable[[Played], None] = lambda _: None,
) -> Played:
    """Publish a recording to a broker until its end or until `stop` is set, and wait for delivery.

    Raises:
        TraceError: nothing was selected, or a record cannot be published.
        BusError: the broker does not answer in time or refuses.
    """
    chosen, names, root = selection or ReplaySelection(), renames or Renames(), trace.header.root
    bus = MqttBus(
        broker.address(),
        client_id=client_id("replay", secrets.token_hex(8), root=broker.root),
        protocol=broker.protocol,
        connect_timeout_s=broker.connect_timeout_s,
        max_outgoing=MAX_OUTGOING,
    )
    played = Played()

    async def publish(record: Record) -> None:
        if names:
            record = renamed(record, names, root=root)
        if rebase_time:
            record = rebased(record, int(time.time() * 1000.0), root=root)
        await bus.wait_backlog(MAX_OUTGOING - 1)
        expiry_s = record.properties.get("expiry_s")
        await bus.publish(
            _checked(record.topic),
            record.payload,
            qos=record.qos,
            retain=record.retain,
            expiry_s=float(expiry_s) if isinstance(expiry_s, int | float) else None,
            properties=paho_properties(record.properties),
        )
        played.dropped = bus.statistics.dropped_out
        show(played)

    async def work() -> None:
        await play(lambda: chosen.of(trace), publish, speed=speed, loop=loop, played=played)
        await bus.wait_backlog(0)
        played.duration_s = loop_time() - began_s

    async with bus:
        loop_time = asyncio.get_running_loop().time
        began_s = loop_time()
        playing = asyncio.create_task(work(), name="replay")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({playing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            playing.cancel()
            await asyncio.wait({playing, stopping})
        if not playing.cancelled():
            await playing
    played.dropped = bus.statistics.dropped_out
    if not played.messages and not stop.is_set():
        raise TraceError(f"{trace.paths[0]}: no message of the recording was selected")
    return played


def _checked(topic: str) -> str:
    try:
        check_topic(topic)
    except ValueError as exc:
        raise TraceError(f"the recording has a message that no broker accepts: {exc}") from exc
    return topic
