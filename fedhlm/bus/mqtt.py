"""The bus over a real broker: MQTT 5, or 3.1.1 where the broker lacks 5, on aiomqtt.

Messages wait in one bounded queue while the link is down and go out in order when it is back; what was under way is
sent again, so a message may arrive twice. Before the first connection a refusal is final, later everything is retried.
"""

import asyncio
import contextlib
import logging
import random
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fedhlm.bus.aiomqtt_patches import Client, ClosedEarlyError, drop, enter_quietly, funnel, publish_properties, watch
from fedhlm.bus.broker_url import BrokerUrl, tls_refusal
from fedhlm.bus.interface import (
    DEFAULT_MAX_INCOMING,
    DEFAULT_MAX_OUTGOING,
    BusStatistics,
    Delivery,
    Inbox,
    LinkHook,
    ProtocolVersion,
    Retained,
    check_filter,
    check_topic,
    expiry_seconds,
    publish_wire_bytes,
)
from fedhlm.errors import BusError
from fedhlm.telemetry import warn_once

_log: Final = logging.getLogger(__name__)

# Full jitter: the delay is uniform in 0..min(cap, base * 2^failures), so that a fleet does not come back in step.
BACKOFF_BASE_S: Final = 0.25
BACKOFF_CAP_S: Final = 30.0
# A link that broke sooner than this counts as one more failure, else a broker that accepts and drops is hammered.
STABLE_S: Final = 5.0
REPLY_TIMEOUT_S: Final = 10.0
TCP_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2.0
MAX_IN_FLIGHT: Final = 64

_FIRST_FAILURE_CODE: Final = 128
_UNSUPPORTED_PROTOCOL: Final = 132
_FINAL_REFUSALS: Final = {133: "client id not valid", 134: "bad user name or password", 135: "not authorised",
                          138: "banned", 140: "bad authentication method"}  # fmt: skip


class _Outgoing(NamedTuple):
    topic: str
    payload: bytes
    qos: int
    retain: bool
    deadline_s: float | None  # loop time after which nobody wants it
    properties: Properties | None = None


class MqttBus:
    """One connection to one broker, kept alive; see `bus.Bus`.

    `client_id` is stable and unique per party. `birth` is published retained after every connect; `will` by the broker
    when we are lost and by us on a clean exit. With `connect_timeout_s` entering waits that long for the broker and
    raises BusError after it; without, entering returns after the first attempt and the bus keeps trying.
    `content_type` (MQTT 5) is for foreign readers; it adds its length to every message, so ours goes without.
    With a `tap` every message goes there and none to `deliveries`: under MQTT 5 as published (QoS, retain flag, properties).
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
        backoff_cap_s: float = BACKOFF_CAP_S,
    ) -> None:
        self.url: Final = BrokerUrl.parse(url) if isinstance(url, str) else url
        self.client_id: Final = client_id
        self._ssl = self.url.ssl_context()
        self._birth, self._will = birth, will
        self._wanted_protocol = protocol
        self._protocol: ProtocolVersion | None = None if protocol == "auto" else protocol
        self._connect_timeout_s = connect_timeout_s
        self._keepalive_s = keepalive_s
        self._max_outgoing = max_outgoing
        self._content_type = content_type
        self._on_link = on_link
        self._tap = tap
        self._rng = rng or random.Random()
        self._backoff_cap_s = backoff_cap_s
        self._statistics = BusStatistics()
        self._inbox = Inbox(max_incoming, self._statistics)
        self._max_incoming = max_incoming
        self._outgoing: deque[_Outgoing] = deque()
        self._in_flight: dict[int, _Outgoing] = {}
        self._filters: dict[str, None] = {}
        self._client: aiomqtt.Client | None = None
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
        """The protocol in use; None until a broker has answered."""
        return self._protocol

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
            self._statistics.dropped_out += len(self._outgoing)
            self._outgoing.clear()
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
    ) -> bool:
        check_topic(topic)
        if not self._open or self._failure is not None or len(self._outgoing) >= self._max_outgoing:
            self._statistics.dropped_out += 1
            self._warn_full()
            return False
        deadline_s = None if expiry_s is None else asyncio.get_running_loop().time() + expiry_s
        self._outgoing.append(_Outgoing(topic, payload, qos, retain, deadline_s, properties))
        self._wakeup.set()
        return True

    async def wait_backlog(self, at_most: int) -> None:
        """Return once no more than `at_most` messages wait or are under way.

        Raises:
            BusError: the broker refused, or the bus is closed.
        """
        while len(self._outgoing) + len(self._in_flight) > at_most:
            if self._failure is not None:
                raise self._failure
            self._moved.clear()
            await self._moved.wait()

    def _warn_full(self) -> None:
        level = logging.DEBUG if self._warned_full else logging.WARNING
        self._warned_full = True
        _log.log(level, "%s: outgoing queue full or closed, %d messages dropped", self, self._statistics.dropped_out)

    async def subscribe(self, *filters: str) -> None:
        for pattern in filters:
            check_filter(pattern)
        self._filters.update(dict.fromkeys(filters))
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
        failures = 0
        while not self._closing:
            up_since_s = None
            try:
                client = await self._connect()
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
                self._note_trouble(exc)
            finally:
                self._tried.set()
            failures = 0 if up_since_s is not None and loop.time() - up_since_s >= STABLE_S else failures + 1
            await asyncio.sleep(
                self._rng.uniform(0.0, min(self._backoff_cap_s, BACKOFF_BASE_S * 2 ** min(failures, 16)))
            )

    def _note_trouble(self, exc: aiomqtt.MqttError) -> None:
        level = logging.WARNING if self._trouble is None else logging.DEBUG
        self._trouble = exc
        _log.log(level, "%s: no link, trying again: %s", self, exc)

    async def _connect(self) -> aiomqtt.Client:
        """A connected client of the newest protocol that the broker takes."""
        candidates: tuple[ProtocolVersion, ...] = ("5", "3.1.1") if self._protocol is None else (self._protocol,)
        for version in candidates:
            client = self._make_client(version)
            error = await self._enter(client)
            if error is None:
                self._protocol = version
                return client
            if (refusal := tls_refusal(str(error))) is not None:
                if not self._ever_connected:
                    raise BusError(f"broker {self.url} {refusal}") from error
                # The loss of the link was told before it, and this is the reason why it will not come back by itself.
                warn_once(_log, f"{self.client_id} {refusal}", "%s: %s %s", self, self.url, refusal)
                raise error
            code = getattr(getattr(error, "rc", None), "value", None)
            too_new = code == _UNSUPPORTED_PROTOCOL or isinstance(error, ClosedEarlyError)
            if too_new and version != candidates[-1]:
                continue
            if code in _FINAL_REFUSALS and not self._ever_connected:
                raise BusError(f"broker {self.url} refused: {_FINAL_REFUSALS[code]}") from error
            raise error
        raise AssertionError("unreachable: the last candidate returns or raises")

    def _make_client(self, version: ProtocolVersion) -> Client:
        five = version == "5"
        will = self._will and aiomqtt.Will(self._will.topic, self._will.payload, qos=1, retain=True)
        client = Client(
            self.url.host,
            self.url.port,
            on_refused=self._publish_refused,
            username=self.url.username,
            password=self.url.password,
            identifier=self.client_id,
            protocol=aiomqtt.ProtocolVersion.V5 if five else aiomqtt.ProtocolVersion.V311,
            will=will,
            clean_session=None if five else True,
            clean_start=True if five else paho.MQTT_CLEAN_START_FIRST_ONLY,
            timeout=REPLY_TIMEOUT_S,
            keepalive=self._keepalive_s,
            queue_type=funnel(self._take),
            max_queued_incoming_messages=self._max_incoming,
            max_inflight_messages=MAX_IN_FLIGHT,
            tls_context=self._ssl,
            # Our packets are small and wanted now: with Nagle's algorithm each could wait for the peer's delayed ACK.
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        client.pending_calls_threshold = 2 * MAX_IN_FLIGHT
        client.set_tcp_timeout(TCP_TIMEOUT_S)
        if self._tap is not None:
            client.read_ahead()
        return client

    async def _enter(self, client: Client) -> aiomqtt.MqttError | None:
        """Connect; the error, if any, is returned. Cancelling waits while paho's thread opens the connection."""
        attempt = self._group.create_task(enter_quietly(client), name=f"bus {self.client_id} connect")
        try:
            error = await asyncio.shield(attempt)
        except asyncio.CancelledError:
            opened = self._group.create_task(client.opened.wait(), name=f"bus {self.client_id} opened")
            await asyncio.wait({attempt, opened}, return_when=asyncio.FIRST_COMPLETED)
            opened.cancel()
            attempt.cancel()
            await asyncio.wait({attempt, opened})
            drop(client)
            raise
        if error is not None:
            drop(client)
        return error

    async def _serve(self, client: aiomqtt.Client) -> None:
        """Use a fresh connection until it breaks (MqttError) or the bus is closed and everything is sent."""
        try:
            async with asyncio.TaskGroup() as link:
                watcher = link.create_task(watch(client), name=f"bus {self.client_id} watch")
                await self._resubscribe(client)
                if self._birth is not None:
                    await self._transmit(client, _Outgoing(*self._birth, 1, True, None))
                self._set_link(client)
                await self._send_all(client, link)
                if self._will is not None:
                    await self._transmit(client, _Outgoing(*self._will, 1, True, None))
                watcher.cancel()
            with contextlib.suppress(aiomqtt.MqttError):
                await client.__aexit__(None, None, None)
        except ExceptionGroup as group:
            broken, bugs = group.split(aiomqtt.MqttError)
            if bugs is not None or broken is None:
                raise
            error: BaseException = broken
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        finally:
            # Without a DISCONNECT the broker publishes the will, which is right whenever we did not do it ourselves.
            drop(client)
            self._set_link(None)
            self._requeue()

    async def _resubscribe(self, client: aiomqtt.Client) -> None:
        done: set[str] = set()
        while pending := [pattern for pattern in self._filters if pattern not in done]:
            for pattern, reason in (await self._subscribe(client, pending)).items():
                _log.warning("%s: subscription %r refused: %s", self, pattern, reason)
            done.update(pending)

    async def _subscribe(self, client: aiomqtt.Client, filters: list[str]) -> dict[str, str]:
        """Subscribe at QoS 1, a tap under MQTT 5 at 2; the refused filters with their reasons."""
        if self._protocol == "5":
            tapped = self._tap is not None
            options = SubscribeOptions(qos=2 if tapped else 1, retainAsPublished=tapped)
            reply = await client.subscribe([(pattern, options) for pattern in filters])
        else:
            # Some brokers of 3.1.1 deliver everything with the subscription's QoS, and 2 costs them four packets a message.
            reply = await client.subscribe([(pattern, 1) for pattern in filters])
        codes: list[int | ReasonCode] = [*reply]
        refused: dict[str, str] = {}
        for pattern, code in zip(filters, codes, strict=True):
            if (code if isinstance(code, int) else code.value) >= _FIRST_FAILURE_CODE:
                refused[pattern] = str(code)
        return refused

    async def _send_all(self, client: aiomqtt.Client, link: asyncio.TaskGroup) -> None:
        """Send what is queued, several at a time and in order, until the bus closes and the queue is empty."""
        window = asyncio.Semaphore(MAX_IN_FLIGHT)
        number = 0
        while True:
            await window.acquire()
            while not self._outgoing and not self._closing:
                self._wakeup.clear()
                await self._wakeup.wait()
            if not self._outgoing:
                break
            number += 1
            self._in_flight[number] = self._outgoing.popleft()
            link.create_task(self._send(client, number, window), name=f"bus {self.client_id} publish")
        for _ in range(MAX_IN_FLIGHT - 1):
            await window.acquire()

    async def _send(self, client: aiomqtt.Client, number: int, window: asyncio.Semaphore) -> None:
        await self._transmit(client, self._in_flight[number])
        del self._in_flight[number]
        self._moved.set()
        window.release()

    async def _transmit(self, client: aiomqtt.Client, item: _Outgoing) -> None:
        expiry_s = None
        if item.deadline_s is not None:
            expiry_s = item.deadline_s - asyncio.get_running_loop().time()
            if expiry_s <= 0.0:
                self._statistics.dropped_out += 1
                return
        properties = None
        if self._protocol == "5":
            whole_s = None if expiry_s is None else expiry_seconds(expiry_s)
            properties = item.properties or publish_properties(self._content_type, whole_s)
            if item.properties is not None and whole_s is not None:
                item.properties.MessageExpiryInterval = whole_s
        self._statistics.messages_out += 1
        self._statistics.bytes_out += publish_wire_bytes(
            item.topic,
            len(item.payload),
            qos=item.qos,
            protocol=self._protocol or "5",
            expiry_s=expiry_s,
            content_type=self._content_type,
        )
        await client.publish(item.topic, item.payload, qos=item.qos, retain=item.retain, properties=properties)

    def _publish_refused(self, topic: str, reason: str) -> None:
        self._statistics.dropped_out += 1
        warn_once(_log, f"{self.client_id} {topic}", "%s: the broker refused a message on %s: %s", self, topic, reason)

    def _requeue(self) -> None:
        """Put what was under way back in front; QoS 0 is not worth a second attempt."""
        again = [item for item in self._in_flight.values() if item.qos]
        self._statistics.dropped_out += len(self._in_flight) - len(again)
        self._in_flight.clear()
        self._outgoing.extendleft(reversed(again))
        self._moved.set()

    def _set_link(self, client: aiomqtt.Client | None) -> None:
        was_up = self._client is not None
        self._client = client
        if client is not None:
            self._statistics.reconnects += self._ever_connected
            self._ever_connected = True
            self._trouble = None
            self._settled.set()
            self._tried.set()
            _log.info("%s: connected, MQTT %s", self, self._protocol)
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
            protocol=self._protocol or "5",
            expiry_s=getattr(properties, "MessageExpiryInterval", None),
            content_type=getattr(properties, "ContentType", None),
        )
        if not self._inbox.put(Delivery(message.topic.value, payload, message.retain), wire_bytes):
            level = logging.WARNING if self._statistics.dropped_in == 1 else logging.DEBUG
            _log.log(level, "%s: incoming queue full, %d messages dropped", self, self._statistics.dropped_in)
