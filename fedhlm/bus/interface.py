"""The interface of the bus: publish, subscribe, deliveries and presence; no I/O in this module.

`mqtt.MqttBus` implements it over a broker, `loopback.LoopbackBus` in memory. tests/fedhlm/bus/test_bus_contract.py
tests both. Publishing never waits for the network: a message that does not fit is dropped and counted.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, NamedTuple, Protocol, Self

from fedhlm.bus.fair import FairQueue
from fedhlm.bus.gate import Sheds
from fedhlm.errors import BusError
from fedhlm.protocol.fields import MAX_PAYLOAD_BYTES

ProtocolVersion = Literal["5", "3.1.1"]

MAX_TOPIC_BYTES: Final = 65_535
DEFAULT_MAX_OUTGOING: Final = 1_024
DEFAULT_MAX_INCOMING: Final = 4_096
MAX_INCOMING_BYTES: Final = 64 * 1024 * 1024
# The largest payload plus room for topic, properties and packet header.
MAX_PACKET_BYTES: Final = MAX_PAYLOAD_BYTES + 128 * 1024

LinkHook = Callable[[bool], None]


class Extras(NamedTuple):
    """Properties of MQTT 5 for requests of other programs and their answers. Under 3.1.1 they are left out.

    `response_topic` is where the answer is expected (empty: nowhere), with the same `correlation`. `user` holds pairs of
    a name and a value.
    """

    response_topic: str = ""
    correlation: bytes | None = None
    user: tuple[tuple[str, str], ...] = ()

    @property
    def wire_bytes(self) -> int:
        """Their size in a PUBLISH packet."""
        topic = 3 + len(self.response_topic.encode()) if self.response_topic else 0
        correlation = 0 if self.correlation is None else 3 + len(self.correlation)
        return topic + correlation + sum(5 + len(name.encode()) + len(value.encode()) for name, value in self.user)


class Delivery(NamedTuple):
    """One incoming message. `retain` is true for state that the broker kept from before the subscription.

    `extras` is None where the message has none.
    """

    topic: str
    payload: bytes
    retain: bool
    extras: Extras | None = None


class Retained(NamedTuple):
    """A presence message, published retained at QoS 1: the birth message of a party or its last will."""

    topic: str
    payload: bytes


@dataclass(slots=True)
class BusStatistics:
    """Running counts of one bus. Bytes are the sizes of MQTT PUBLISH packets; dropped messages never arrive."""

    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    dropped_in: int = 0
    dropped_out: int = 0
    reconnects: int = 0


class Bus(Protocol):
    """A connection to the bus, as a context manager: entering connects, leaving publishes the will and disconnects.

    Messages of QoS 0 that `sheds` drops are not read; they are neither delivered nor counted here.
    """

    sheds: Sheds | None

    @property
    def connected(self) -> bool:
        """Whether messages can travel right now."""

    @property
    def statistics(self) -> BusStatistics:
        """Counts since construction."""

    @property
    def protocol(self) -> ProtocolVersion | None:
        """The MQTT version in use; None before the first connection."""

    @property
    def max_packet_bytes(self) -> int | None:
        """The largest PUBLISH packet in bytes; None while unknown. A larger packet is dropped and counted."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

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
        """Enqueue one message. False when it was dropped: queue full, bus closed, or packet too large.

        Args:
            topic: full topic name.
            payload: encoded message.
            qos: MQTT quality of service, 0 to 2.
            retain: whether the broker keeps the message for later subscribers.
            expiry_s: seconds after which the message is dropped if it still waits here or, under MQTT 5, at the broker;
                None for never.
            extras: further properties of MQTT 5.

        Raises:
            ValueError: the topic name is malformed.
        """

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Subscribe, now if connected and again after every reconnect.

        With QoS 0 a burst does not wait for our acknowledgements, so fewer messages fill the broker's queue for us.
        Neither QoS brings a message again after a lost connection, because our sessions end with the connection.

        Raises:
            ValueError: a filter is malformed.
            BusError: the broker rejects a filter.
        """

    def deliveries(self) -> AsyncIterator[Delivery]:
        """Incoming messages for one consumer. Ends when the bus is closed.

        Raises:
            BusError: the broker rejects the connection for good.
        """

    async def wait_connected(self) -> None:
        """Return once connected.

        Raises:
            BusError: the broker rejects the connection for good, or the bus is closed.
        """


async def subscribe_to(bus: Bus, filters: Mapping[str, int]) -> None:
    """Subscribe a bus to filters, each with its own QoS.

    Raises:
        BusError: the broker rejects a filter.
    """
    for qos in sorted(set(filters.values()), reverse=True):
        await bus.subscribe(*(pattern for pattern, wanted in filters.items() if wanted == qos), qos=qos)


def publish_wire_bytes(
    topic: str,
    payload_bytes: int,
    *,
    qos: int = 1,
    protocol: ProtocolVersion = "5",
    expiry_s: float | None = None,
    content_type: str | None = None,
    extras: Extras | None = None,
) -> int:
    """Size of one PUBLISH packet in bytes: fixed header, topic, packet id, properties (MQTT 5 only) and payload."""
    body = 2 + len(topic.encode()) + (2 if qos else 0) + payload_bytes
    if protocol == "5":
        properties = 0 if expiry_s is None else 5
        if content_type is not None:
            properties += 3 + len(content_type.encode())
        if extras is not None:
            properties += extras.wire_bytes
        body += varint_bytes(properties) + properties
    return 1 + varint_bytes(body) + body


def varint_bytes(value: int) -> int:
    """Size of a variable-length integer of MQTT in bytes; each byte holds seven bits."""
    return max(1, math.ceil(value.bit_length() / 7))


def expiry_seconds(expiry_s: float) -> int:
    """Round a time in seconds up to MQTT 5's message expiry, at least 1, because 0 would mean expired."""
    return min(max(1, math.ceil(expiry_s)), 2**32 - 1)


def check_topic(topic: str) -> None:
    """Check a topic name.

    Raises:
        ValueError: no broker accepts the name. This is a bug of the caller.
    """
    if not topic or len(topic.encode()) > MAX_TOPIC_BYTES or any(c in topic for c in "+#\0"):
        raise ValueError(f"topic must be 1..{MAX_TOPIC_BYTES} bytes without '+', '#' and NUL (got {topic!r})")


def check_filter(pattern: str) -> None:
    """Check a subscription filter: `+` and `#` take a whole level, and `#` only the last one.

    Raises:
        ValueError: the filter is malformed.
    """
    levels = share_of(pattern)[1].split("/")
    malformed = any(("#" in level and level != "#") or ("+" in level and level != "+") for level in levels)
    if not pattern or malformed or "#" in levels[:-1] or "\0" in pattern or len(pattern.encode()) > MAX_TOPIC_BYTES:
        raise ValueError(f"filter must have '+' for one whole level and '#' for the last levels only (got {pattern!r})")


def share_of(pattern: str) -> tuple[str | None, str]:
    """Split `$share/group/filter` into group and filter; the group of an ordinary filter is None.

    Raises:
        ValueError: group or filter is missing, or the group holds a wildcard.
    """
    if not pattern.startswith("$share/"):
        return None, pattern
    group, _, rest = pattern.removeprefix("$share/").partition("/")
    if not group or not rest or "+" in group or "#" in group:
        raise ValueError(f"filter must be $share/group/filter (got {pattern!r})")
    return group, rest


def topic_matches(levels: list[str], topic: str) -> bool:
    """Whether a filter, split at its slashes, matches a topic. A leading wildcard does not match a leading `$`."""
    names = topic.split("/")
    if topic.startswith("$") and levels[0] in ("+", "#"):
        return False
    for i, level in enumerate(levels):
        if level == "#":
            return True
        if i >= len(names) or level not in ("+", names[i]):
            return False
    return len(levels) == len(names)


class Inbox:
    """Bounded queue between a transport and the one consumer of `deliveries`, fair to topics.

    It is full at `limit` messages or at `limit_bytes` of topics and payloads.
    """

    def __init__(self, limit: int, statistics: BusStatistics, *, limit_bytes: int = MAX_INCOMING_BYTES) -> None:
        self._queue: FairQueue[Delivery] = FairQueue(limit, _size_of, limit_bytes=limit_bytes)
        self._statistics = statistics
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self._error: BusError | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, delivery: Delivery, wire_bytes: int) -> bool:
        """Add a message and count it; False when it was dropped, or another one in its place."""
        dropped = [delivery] if self._closed else self._queue.put(delivery)
        self._statistics.dropped_in += len(dropped)
        if not (dropped and dropped[-1] is delivery):
            self._statistics.messages_in += 1
            self._statistics.bytes_in += wire_bytes
            self._wake()
        return not dropped

    def close(self, error: BusError | None = None) -> None:
        """End the iteration once the queue is empty, and raise `error` there if given. Only the first call counts."""
        if not self._closed:
            self._closed, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        while not self._queue:
            if self._closed:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            if self._waiter is not None:
                raise RuntimeError("deliveries() has one consumer; a second one is waiting already")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._queue.take()


def _size_of(delivery: Delivery) -> int:
    return len(delivery.payload) + len(delivery.topic)
