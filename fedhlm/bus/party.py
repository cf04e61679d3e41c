"""An endpoint on the bus: adds headers to outgoing messages and validates incoming ones.

A payload that is no valid message of its topic, or names another sender than its topic does, is counted and dropped.
"""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from fedhlm.bus.interface import Bus, Delivery, Extras, publish_wire_bytes, topic_matches
from fedhlm.bus.journal import JournalWriter
from fedhlm.bus.pieces import divided
from fedhlm.errors import ProtocolError
from fedhlm.protocol.codec import comparable_bytes, encode
from fedhlm.protocol.messages import SCHEMA_VERSION, AnyMessage, Fingerprint, Journal, Presence
from fedhlm.protocol.topics import DEFAULT_ROOT, Topic, check_sender, decode_for, lookup
from fedhlm.spans import PASSING, BlockSpans, Tracer
from fedhlm.telemetry import Counters, warn_once
from fedhlm.version import __version__

log = logging.getLogger(__name__)

_SEQUENCE_END: Final = 2**31


class Received(NamedTuple):
    """A valid message, its row of the topic table, and the levels of its topic's name.

    `retained` is true for a message that the broker kept from before the subscription. `wire_bytes` is the size of its
    PUBLISH packet; it is 0 for a message that did not come over a bus. `extras` are its further properties, if any.
    """

    topic: Topic
    levels: dict[str, str]
    message: AnyMessage
    retained: bool = False
    wire_bytes: int = 0
    extras: Extras | None = None


OnRefused = Callable[[Delivery, ProtocolError], Awaitable[None]]
Admits = Callable[[Received], Awaitable[bool]]
OnForeign = Callable[[Delivery], Awaitable[None]]


class Sent(NamedTuple):
    """Bytes of a PUBLISH packet: as it travelled, and with a header of fixed size. False where nothing was sent.

    Decisions use `comparable_bytes`, which a replayed journal gives again although its messages have other times and
    numbers. `too_large` lists the message, or the parts of it, that are larger than the broker accepts. They were
    dropped, and the sender must tell the client that waits for an answer (`Party.why_too_large`).
    """

    packet_bytes: int = 0
    comparable_bytes: int = 0
    too_large: tuple[AnyMessage, ...] = ()

    def __bool__(self) -> bool:
        return self.packet_bytes > 0


class Stamp:
    """Makes the header fields of a party's messages. `wall_s` returns the Unix time in seconds."""

    def __init__(self, sender: str, wall_s: Callable[[], float] = time.time) -> None:
        self.sender = sender
        self._wall_s = wall_s
        self._sequence = 0

    def __call__(self) -> dict[str, Any]:
        """Return the header fields of one message. The sequence number grows by one at every call."""
        self._sequence = (self._sequence + 1) % _SEQUENCE_END
        return {
            "version": SCHEMA_VERSION,
            "sender": self.sender,
            "sequence": self._sequence,
            "sent_ms": self.wall_ms(),
        }

    def wall_ms(self) -> int:
        """Unix time in milliseconds."""
        return max(0, int(self._wall_s() * 1000.0))


def presence(
    stamp: Stamp,
    role: Any,
    *,
    online: bool,
    fingerprint: Fingerprint | None = None,
    upstream: Fingerprint | None = None,
    connection: str | None = None,
) -> Presence:
    """Make a presence message, to be published retained or left with the broker as a last will."""
    return Presence(
        **stamp(),
        role=role,
        online=online,
        software=f"fedhlm {__version__}",
        fingerprint=fingerprint,
        upstream=upstream,
        connection=connection,
    )


class Party:
    """The endpoint of one part on one bus. With a `journal` it notes what it sends and receives.

    `on_refused` is called with every delivery that is no valid message of its topic, and with the error. `admits` is
    asked about every valid message; one that it does not admit is neither handled nor noted. `foreign` holds what is
    called with each delivery on a topic that is no row of the table, such as those of `open_topics`, by filter
    (`listen`). `tracer` begins the part's spans, and `spans` are those of blocks. `extras` returns
    what a message carries besides its payload: by default the contexts of its blocks' spans.
    """

    def __init__(
        self,
        *,
        bus: Bus,
        stamp: Stamp,
        counters: Counters,
        root: str = DEFAULT_ROOT,
        journal: JournalWriter | None = None,
        on_refused: OnRefused | None = None,
        tracer: Tracer = PASSING,
    ) -> None:
        self.stamp = stamp
        self.tracer = tracer
        self.spans = BlockSpans(tracer)
        self.extras: Callable[[AnyMessage], Extras | None] = self.spans.extras
        self.counters = counters
        self.root = root
        self.journal = journal
        self.on_refused = on_refused
        self.admits: Admits | None = None
        self.foreign: dict[str, OnForeign] = {}
        self.bus = bus

    @property
    def bus(self) -> Bus:
        """The connection. The counts of every connection in turn are added to the party's counters."""
        return self._bus

    @bus.setter
    def bus(self, bus: Bus) -> None:
        self._bus = bus
        self.counters.follow(
            bus.statistics,
            reconnects="reconnects",
            sent_messages="messages_out",
            sent_bytes="bytes_out",
            received_messages="messages_in",
            received_bytes="bytes_in",
            dropped_messages="dropped_in",
            unsent_messages="dropped_out",
        )

    async def send(self, topic: Topic, message: AnyMessage, *, expiry_s: float | None = None, **levels: str) -> Sent:
        """Publish a message with the QoS and retain flag of its topic, and return what was sent.

        Nothing is sent when the bus has no room; the message is then counted as dropped. A list of items that is larger
        than the broker accepts is sent in parts. A single item that is too large is dropped and counted.
        """
        name = topic.name(self.root, **levels)
        largest = self.bus.max_packet_bytes
        if largest is None:
            return await self._publish(topic, name, message, expiry_s)

        def fits(part: AnyMessage) -> bool:
            return self._packet_bytes(topic, name, len(encode(part)), expiry_s, self.extras(part)) <= largest

        parts, refused = divided(message, fits, self.stamp)
        sent = [await self._publish(topic, name, part, expiry_s) for part in parts]
        if refused:
            self.counters.add("too_large_messages", len(refused))
            text = "dropped a message for %s: too large, the broker accepts at most %d bytes"
            warn_once(log, f"too large {topic.pattern}", text, name, largest)
        return Sent(sum(s.packet_bytes for s in sent), sum(s.comparable_bytes for s in sent), tuple(refused))

    async def send_unnoted(self, topic: Topic, message: AnyMessage, **levels: str) -> None:
        """Publish the answer to a message that was not admitted. The journal knows neither."""
        await self._publish(topic, topic.name(self.root, **levels), message, None, noted=False)

    def why_too_large(self) -> str:
        """The error text for whoever waits for the answer to a message that was too large."""
        return f"the message is larger than the broker accepts ({self.bus.max_packet_bytes} bytes)"

    def _packet_bytes(
        self, topic: Topic, name: str, size: int, expiry_s: float | None, extras: Extras | None = None
    ) -> int:
        protocol = self.bus.protocol or "5"
        return publish_wire_bytes(name, size, qos=topic.qos, protocol=protocol, expiry_s=expiry_s, extras=extras)

    async def _publish(
        self, topic: Topic, name: str, message: AnyMessage, expiry_s: float | None, *, noted: bool = True
    ) -> Sent:
        payload, extras = encode(message), self.extras(message)
        sent = await self.bus.publish(
            name, payload, qos=topic.qos, retain=topic.retain, expiry_s=expiry_s, extras=extras
        )
        if self.journal is not None and noted and not isinstance(message, Journal):
            self.journal.note("sent" if sent else "dropped", name, payload)
        if not sent:
            self.counters.add("dropped_messages")
            warn_once(log, "no room", "dropped a message for %s: the outgoing queue is full, or the bus closed", name)
            return Sent()
        packet_bytes = self._packet_bytes(topic, name, len(payload), expiry_s, extras)
        comparable = self._packet_bytes(topic, name, comparable_bytes(message, len(payload)), expiry_s)
        return Sent(packet_bytes, comparable)

    async def publish_journal(self, topic: Topic, levels: Mapping[str, str]) -> None:
        """Publish all waiting notes under the topic's `levels`. Without a journal this does nothing."""
        for piece in self.journal.pieces() if self.journal is not None else ():
            await self.send(topic, Journal(**self.stamp(), **piece._asdict()), expiry_s=None, **levels)

    async def keep_journal(self, topic: Topic, levels: Callable[[], Mapping[str, str]]) -> None:
        """Publish the journal until cancelled. Without a journal this returns at once.

        `levels` returns the topic's levels at the moment of publishing. A cancelled task first publishes what waits.
        """
        try:
            while self.journal is not None:
                await self.journal.due()
                await self.publish_journal(topic, levels())
        finally:
            await self.publish_journal(topic, levels())

    async def listen(self, topics: Mapping[str, OnForeign], *, instead_of: Iterable[str] = ()) -> None:
        """Subscribe to filters of foreign topics, each with what is called with its deliveries, and no more to others.

        Raises:
            BusError: the broker rejects a filter.
        """
        for former in instead_of:
            self.foreign.pop(former, None)
        self.foreign.update(topics)
        await self.bus.subscribe(*topics)

    def _stranger(self, topic: str) -> OnForeign | None:
        exact = self.foreign.get(topic)
        if exact is not None or not self.foreign or topic.startswith(f"{self.root}/"):
            return exact
        return next((call for name, call in self.foreign.items() if topic_matches(name.split("/"), topic)), None)

    async def received(self) -> AsyncIterator[Received]:
        """Yield valid messages in order of arrival. Ends when the bus is closed."""
        async for delivery in self.bus.deliveries():
            if (stranger := self._stranger(delivery.topic)) is not None:
                await stranger(delivery)
                continue
            try:
                received = self.read(delivery.topic, delivery.payload)
            except ProtocolError as exc:
                self.counters.add("refused_messages")
                found = lookup(delivery.topic, self.root)
                warn_once(
                    log,
                    found[0].pattern if found else "no topic of ours",
                    "refused a message on %s: %s",
                    delivery.topic,
                    exc,
                )
                if self.on_refused is not None:
                    await self.on_refused(delivery, exc)
                continue
            extras = delivery.extras
            size = publish_wire_bytes(
                delivery.topic, len(delivery.payload), protocol=self.bus.protocol or "5", extras=extras
            )
            received = received._replace(retained=delivery.retain, wire_bytes=size, extras=extras)
            if self.admits is not None and not await self.admits(received):
                continue
            if self.journal is not None:
                self.journal.note("heard", delivery.topic, delivery.payload)
            yield received

    def read(self, name: str, payload: bytes) -> Received:
        """Decode a payload that came on the topic `name`.

        Raises:
            ProtocolError: the topic is not in the table, the payload is no message of it, or the sender or role does
                not match the topic.
        """
        found = lookup(name, self.root)
        if found is None:
            raise ProtocolError(f"{name} is not a topic of {self.root}")
        topic, levels = found
        message = decode_for(topic, payload)
        check_sender(name, topic, levels, message)
        if isinstance(message, Presence) and message.role not in topic.publishers:
            raise ProtocolError(f"message.role on {name} must be {topic.publishers[0]!r} (got {message.role!r})")
        return Received(topic, levels, message)
