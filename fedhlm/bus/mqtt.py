"""The bus over a broker, on aiomqtt: MQTT 5, or 3.1.1 where the broker does not support 5.

While the link is down, messages wait in a bounded queue; afterwards they are sent in order. Messages in flight are sent
again, so a message may arrive twice. A rejection is final before the first connection; later, every error is retried.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Final, Literal, Self

import aiomqtt
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fedhlm.bus import aiomqtt_patches as patches
from fedhlm.bus import reasons
from fedhlm.bus.aiomqtt_patches import PatchedClient, RefusedMessage
from fedhlm.bus.backoff import CAP_S, Backoff, Wait
from fedhlm.bus.broker_url import BrokerUrl
from fedhlm.bus.dial import MAX_IN_FLIGHT, Dialler
from fedhlm.bus.gate import Sheds
from fedhlm.bus.interface import (
    DEFAULT_MAX_INCOMING,
    DEFAULT_MAX_OUTGOING,
    BusStatistics,
    Delivery,
    Extras,
    Inbox,
    LinkHook,
    ProtocolVersion,
    Retained,
    check_filter,
    check_topic,
    expiry_seconds,
    publish_wire_bytes,
)
from fedhlm.bus.outgoing import TELLING_BYTES, Outbox, Outgoing
from fedhlm.errors import BusError, root_of
from fedhlm.telemetry import warn_once

_log: Final = logging.getLogger(__name__)

CLOSE_TIMEOUT_S: Final = 2.0
PACKET_HEAD_BYTES: Final = 64  # an upper bound on what a PUBLISH of ours holds besides topic and payload

NO_WILDCARDS: Final = "the broker offers no subscriptions with wildcards"
_FIRST_FAILURE_CODE: Final = 128


class MqttBus:
    """One connection to one broker that reconnects by itself; it implements `interface.Bus`.

    `client_id` is stable and unique per party. `birth` is published retained after every connect. `will` is published
    by the broker when the connection is lost, and by us on a clean exit.

    With `connect_timeout_s`, entering waits that many seconds for the broker and then raises BusError. Without it,
    entering returns after the first attempt, and the bus keeps trying.

    `content_type` (MQTT 5) is for foreign readers. It lengthens every message, so our own parts do not set it. With a
    `tap`, every message goes to it and none to `deliveries`; under MQTT 5 it keeps its QoS, retain flag and properties.
    """

    def __init__(
        self,
        url: str | BrokerUrl,
        *,
        client_id: str,
        birth: Retained | None = None,
        will: Retained | None = None,
        protocol: Literal["auto", "5", "3.1.1"] = "auto",
        connect_timeout_s: float | None = None,
        keepalive_s: int = 30,
        max_outgoing: int = DEFAULT_MAX_OUTGOING,
        max_incoming: int = DEFAULT_MAX_INCOMING,
        content_type: str | None = None,
        on_link: LinkHook | None = None,
        tap: Callable[[aiomqtt.Message], None] | None = None,
        rng: random.Random | None = None,
        backoff_cap_s: float = CAP_S,
    ) -> None:
        self.url: Final = BrokerUrl.parse(url) if isinstance(url, str) else url
        self.client_id: Final = client_id
        self._dial = Dialler(
            self.url,
            client_id,
            will=will,
            protocol=protocol,
            keepalive_s=keepalive_s,
            take=self._take,
            on_refused=self._publish_refused,
            sheds=lambda topic, size: self.sheds is not None and self.sheds(topic, size),
        )
        self.sheds: Sheds | None = None
        self._birth, self._will = birth, will
        self._connect_timeout_s = connect_timeout_s
        self._content_type = content_type
        self._on_link = on_link
        self._tap = tap
        self._backoff = Backoff(rng or random.Random(), backoff_cap_s)
        self._statistics = BusStatistics()
        self._inbox = Inbox(max_incoming, self._statistics)
        self._outbox = Outbox(max_outgoing)
        self._filters: dict[str, int] = {}  # with the QoS of each
        self._client: PatchedClient | None = None
        self._wakeup = asyncio.Event()
        self._settled = asyncio.Event()
        self._tried = asyncio.Event()
        self._moved = asyncio.Event()
        self._open = False
        self._closing = False
        self._ever_connected = False
        self._failure: BusError | None = None
        self._trouble: Exception | None = None
        self._warned_full = False
        self._broke_under = False

    def __repr__(self) -> str:
        return f"MqttBus({str(self.url)!r}, client_id={self.client_id!r})"

    @property
    def connected(self) -> bool:
        return self._client is not None

    @property
    def statistics(self) -> BusStatistics:
        return self._statistics

    @property
    def protocol(self) -> ProtocolVersion | None:
        """The MQTT version in use; None until a broker has answered."""
        return self._dial.protocol

    @property
    def max_packet_bytes(self) -> int | None:
        """The largest packet in bytes that the broker accepts, as stated or learnt; None while unknown."""
        return self._dial.limits.max_packet_bytes

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._open = True
        self._supervisor = self._group.create_task(self._supervise(), name=f"bus {self.client_id}")
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if self._connect_timeout_s is None:
                    await self._tried.wait()
                else:
                    await self.wait_connected()
            if self._failure is not None:
                raise self._failure
        except TimeoutError:
            await self._close()
            reason = f": {self._trouble}" if self._trouble else ""
            raise BusError(f"broker {self.url} not reached within {self._connect_timeout_s:g} s{reason}") from None
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        self._open = False
        self._closing = True
        self._wakeup.set()
        try:
            if self._client is not None:
                await asyncio.wait({self._supervisor}, timeout=CLOSE_TIMEOUT_S)
        finally:
            self._supervisor.cancel()
            await self._group.__aexit__(None, None, None)
            self._statistics.dropped_out += self._outbox.clear()
            self._moved.set()
            self._inbox.close(self._failure)
            self._failure = self._failure or BusError(f"the bus to {self.url} is closed")
            self._settled.set()

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: float | None = None,
        properties: Properties | None = None,
        extras: Extras | None = None,
    ) -> bool:
        check_topic(topic)
        deadline_s = None if expiry_s is None else asyncio.get_running_loop().time() + expiry_s
        given = properties if extras is None else patches.properties_with(extras)
        item = Outgoing(topic, payload, qos, retain, deadline_s, given, extras)
        if self._too_large(item, expiry_s):
            return False
        dropped = item if not self._open or self._failure is not None else self._outbox.put(item)
        if dropped is not None:
            self._statistics.dropped_out += 1
            self._warn_full()
        self._wakeup.set()
        return dropped is not item

    async def wait_backlog(self, at_most: int) -> None:
        """Return once at most `at_most` messages are waiting or in flight.

        Raises:
            BusError: the broker rejects the connection for good, or the bus is closed.
        """
        while len(self._outbox) > at_most:
            if self._failure is not None:
                raise self._failure
            self._moved.clear()
            await self._moved.wait()

    def _warn_full(self) -> None:
        level, self._warned_full = logging.DEBUG if self._warned_full else logging.WARNING, True
        _log.log(level, "%s: outgoing queue full or closed, %d messages dropped", self, self._statistics.dropped_out)

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        for pattern in filters:
            check_filter(pattern)
        self._filters.update(dict.fromkeys(filters, qos))
        client = self._client
        if client is None or not filters:
            return
        try:
            refused = await self._subscribe(client, list(filters))
        except aiomqtt.MqttError:
            return  # the link broke; the reconnect subscribes again
        for pattern, reason in refused.items():
            self._filters.pop(pattern, None)
            raise BusError(f"broker {self.url} refused the subscription {pattern!r}: {reason}")

    def deliveries(self) -> AsyncIterator[Delivery]:
        return aiter(self._inbox)

    async def wait_connected(self) -> None:
        while self._client is None:
            if self._failure is not None:
                raise self._failure
            await self._settled.wait()

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing:
            client: PatchedClient | None = None
            up_since_s = loop.time()
            try:
                client = await self._dial.connect(self._group)
                up_since_s = loop.time()
                await self._serve(client)
                return
            except BusError as exc:
                self._failure = exc
                self._inbox.close(exc)
                self._settled.set()
                self._moved.set()
                return
            except aiomqtt.MqttError as exc:
                trouble = exc
            finally:
                self._tried.set()
            if client is None:
                wait = self._backoff.failed()
            else:
                taken_over = client.goodbye == reasons.TAKEN_OVER
                abrupt = client.cut_by_broker and client.goodbye is None and not self._broke_under
                wait = self._backoff.broken(loop.time() - up_since_s, taken_over=taken_over, abrupt=abrupt)
            self._note_trouble(trouble, client, wait)
            await asyncio.sleep(wait.seconds)

    def _note_trouble(self, exc: aiomqtt.MqttError, client: PatchedClient | None, wait: Wait) -> None:
        first, self._trouble = self._trouble is None, exc
        if client is not None and client.goodbye is not None:
            why = reasons.described(client.goodbye)
            text = "%s: the broker ended the connection: %s; trying again in %.1f s"
            _log.warning(text, self, why, wait.seconds)
        elif wait.rival != "no":
            text = (
                "%s: the broker has ended the connection several times without a reason: perhaps another client uses "
                "the same client id or certificate (%s); trying again in %.1f s"
            )
            _log.warning(text, self, reasons.REASONS[reasons.TAKEN_OVER].advice, wait.seconds)
        else:
            # Who waits for a limited time is told by the error at its end.
            waited_for = self._connect_timeout_s is not None and not self._ever_connected
            worth = logging.WARNING if first and not waited_for else logging.DEBUG
            _log.log(worth, "%s: no link, trying again: %s", self, exc)

    async def _serve(self, client: PatchedClient) -> None:
        """Use a fresh connection until it breaks (MqttError), or until the bus is closed and everything is sent."""
        try:
            async with asyncio.TaskGroup() as link:
                watcher = link.create_task(patches.watch(client), name=f"bus {self.client_id} watch")
                await self._resubscribe(client)
                if self._birth is not None:
                    await self._transmit(client, Outgoing(*self._birth, 1, True))
                self._set_link(client)
                await self._send_all(client, link)
                if self._will is not None:
                    await self._transmit(client, Outgoing(*self._will, 1, True))
                watcher.cancel()
            with contextlib.suppress(aiomqtt.MqttError):
                await client.__aexit__(None, None, None)
        except ExceptionGroup as group:
            broken, bugs = group.split(aiomqtt.MqttError)
            if bugs is not None or broken is None:
                raise
            raise root_of(broken) from None
        finally:
            # Without a DISCONNECT the broker publishes the will, as it should unless we have published it ourselves.
            patches.drop(client)
            self._set_link(None)
            self._requeue(client)

    async def _resubscribe(self, client: aiomqtt.Client) -> None:
        done: set[str] = set()
        while pending := [pattern for pattern in self._filters if pattern not in done]:
            for pattern, reason in (await self._subscribe(client, pending)).items():
                _log.warning("%s: subscription %r refused: %s", self, pattern, reason)
            done.update(pending)

    async def _subscribe(self, client: aiomqtt.Client, filters: list[str]) -> dict[str, str]:
        """Subscribe (a tap under MQTT 5 at QoS 2) and return the rejected filters with their reasons."""
        limits, refused = self._dial.limits, dict[str, str]()
        if not limits.wildcards:  # asking all the same would be a protocol error, and end the connection
            refused = {pattern: NO_WILDCARDS for pattern in filters if "+" in pattern or "#" in pattern}
            filters = [pattern for pattern in filters if pattern not in refused]
        if not filters:
            return refused
        if self._dial.protocol == "5":
            tapped = self._tap is not None
            asked = [
                (p, SubscribeOptions(qos=2 if tapped else self._filters.get(p, 1), retainAsPublished=tapped))
                for p in filters
            ]
            reply = await client.subscribe(asked)
        else:
            # Some brokers deliver every message of 3.1.1 with the subscription's QoS; 2 costs four packets a message.
            reply = await client.subscribe([(pattern, self._filters.get(pattern, 1)) for pattern in filters])
        codes: list[int | ReasonCode] = [*reply]
        for pattern, code in zip(filters, codes, strict=True):
            if (code if isinstance(code, int) else code.value) >= _FIRST_FAILURE_CODE:
                refused[pattern] = str(code)
        return refused

    async def _send_all(self, client: aiomqtt.Client, link: asyncio.TaskGroup) -> None:
        """Send queued messages in order, several at a time, until the bus closes and the queue is empty."""
        places = min(MAX_IN_FLIGHT, self._dial.limits.receive_maximum)
        window = asyncio.Semaphore(places)
        while True:
            await window.acquire()
            while not self._outbox.waiting and not self._closing:
                self._wakeup.clear()
                await self._wakeup.wait()
            item = self._outbox.next
            if item is None:
                break
            if not item.suspect:
                number, item = self._outbox.begin()
                link.create_task(self._send(client, number, item, window), name=f"bus {self.client_id} publish")
                continue
            for _ in range(places - 1):
                await window.acquire()
            number, item = self._outbox.begin()
            await self._send(client, number, item, window)
            for _ in range(places - 1):
                window.release()
        for _ in range(places - 1):
            await window.acquire()

    async def _send(self, client: aiomqtt.Client, number: int, item: Outgoing, window: asyncio.Semaphore) -> None:
        await self._transmit(client, item)
        self._outbox.done(number)
        self._moved.set()
        window.release()

    async def _transmit(self, client: aiomqtt.Client, item: Outgoing) -> None:
        expiry_s = None
        if item.deadline_s is not None:
            expiry_s = item.deadline_s - asyncio.get_running_loop().time()
            if expiry_s <= 0.0:
                self._statistics.dropped_out += 1
                return
        if self._too_large(item, expiry_s):
            return
        qos = min(item.qos, self._dial.limits.max_qos)
        retain = item.retain and self._dial.limits.retains
        if retain != item.retain or qos != item.qos:
            warn_once(
                _log,
                f"{self.client_id} less",
                "%s: the broker offers QoS %d at most, retained messages: %s; presence may not be seen",
                self,
                self._dial.limits.max_qos,
                "yes" if self._dial.limits.retains else "no",
            )
        properties = None
        if self._dial.protocol == "5":
            whole_s = None if expiry_s is None else expiry_seconds(expiry_s)
            properties = item.properties or patches.publish_properties(self._content_type, whole_s)
            if item.properties is not None and whole_s is not None:
                item.properties.MessageExpiryInterval = whole_s
        self._statistics.messages_out += 1
        self._statistics.bytes_out += self._wire_bytes(item, qos, expiry_s)
        await client.publish(item.topic, item.payload, qos=qos, retain=retain, properties=properties)

    def _too_large(self, item: Outgoing, expiry_s: float | None) -> bool:
        """Whether the packet is larger than the broker accepts. Such a message is counted as dropped and logged."""
        largest = self._dial.limits.max_packet_bytes
        if largest is None or item.size + PACKET_HEAD_BYTES <= largest:
            return False
        size = self._wire_bytes(item, item.qos, expiry_s)
        if size <= largest and (item.properties is None or item.extras is not None):
            return False
        self._statistics.dropped_out += 1
        self._tell_too_large(item, size, largest)
        return True

    def _wire_bytes(self, item: Outgoing, qos: int, expiry_s: float | None) -> int:
        return publish_wire_bytes(
            item.topic,
            len(item.payload),
            qos=qos,
            protocol=self._dial.protocol or "5",
            expiry_s=expiry_s,
            content_type=self._content_type,
            extras=item.extras,
        )

    def _tell_too_large(self, item: Outgoing, size: int, largest: int) -> None:
        text = "%s: dropped a message of %d bytes for %s: too large, the broker accepts at most %d bytes"
        warn_once(_log, f"{self.client_id} {item.topic} size", text, self, size, item.topic, largest)

    def _publish_refused(self, message: RefusedMessage) -> None:
        self._statistics.dropped_out += 1
        if message.code == reasons.TOO_LARGE:
            self._dial.learn_largest(message.size - 1)
        text = "%s: the broker refused a message of %d bytes on %s: %s"
        key = f"{self.client_id} {message.topic} {message.code}"
        warn_once(_log, key, text, self, message.size, message.topic, reasons.described(message.code))

    def _requeue(self, client: PatchedClient) -> None:
        """Put messages in flight back in front, except the one for which the broker ends connections."""
        too_large = client.goodbye == reasons.TOO_LARGE
        self._broke_under = self._outbox.under_way > 0
        given_up, refused = self._outbox.broken(by_broker=client.cut_by_broker, too_large=too_large)
        self._statistics.dropped_out += len(given_up)
        if refused is not None:
            if too_large or refused.size >= TELLING_BYTES:
                self._dial.learn_largest(refused.size - 1)
            text = (
                "%s: dropped a message of %d bytes for %s: whenever it is sent, the broker ends the connection; "
                "it may be too large"
            )
            _log.warning(text, self, refused.size, refused.topic)
        self._moved.set()

    def _set_link(self, client: PatchedClient | None) -> None:
        was_up = self._client is not None
        self._client = client
        if client is not None:
            self._statistics.reconnects += self._ever_connected
            self._ever_connected = True
            self._trouble = None
            self._settled.set()
            self._tried.set()
            _log.info("%s: connected, MQTT %s", self, self._dial.protocol)
        else:
            self._settled.clear()
        up = client is not None
        if self._on_link is not None and was_up != up:
            self._on_link(up)

    def _take(self, message: aiomqtt.Message) -> None:
        if self._tap is not None:
            self._tap(message)
            return
        payload = message.payload
        properties = message.properties
        wire_bytes = publish_wire_bytes(
            message.topic.value,
            len(payload),
            qos=message.qos,
            protocol=self._dial.protocol or "5",
            expiry_s=getattr(properties, "MessageExpiryInterval", None),
            content_type=getattr(properties, "ContentType", None),
            extras=(extras := patches.extras_of(properties)),
        )
        if not self._inbox.put(Delivery(message.topic.value, payload, message.retain, extras), wire_bytes):
            level = logging.WARNING if self._statistics.dropped_in == 1 else logging.DEBUG
            _log.log(level, "%s: incoming queue full, %d messages dropped", self, self._statistics.dropped_in)
