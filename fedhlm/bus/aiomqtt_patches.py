"""aiomqtt's client with what `mqtt.MqttBus` needs besides: early failure, abrupt close, messages without a task each.

The module uses private attributes of aiomqtt and paho. The contract tests fail when an upgrade changes them.
"""

# ruff: noqa: SLF001
import asyncio
import logging
import math
import socket
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fedhlm.bus import reasons
from fedhlm.bus.gate import Gate, Sheds
from fedhlm.bus.interface import Extras

_T = TypeVar("_T")
_log: Final = logging.getLogger(__name__)

# paho's reason code for a connection that the broker closed without a DISCONNECT; brokers may also send it.
_UNSPECIFIED: Final = 0x80
_PUBACK: Final = 0x40
_PUBACK_CODES: Final = {0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99}  # MQTT 5, section 3.4.2.1
_SHED_READS: Final = 16  # reads of which nothing was left, before the event loop has another turn


class ClosedEarlyError(aiomqtt.MqttError):
    """The broker closed the connection instead of answering CONNECT. Some brokers without MQTT 5 do this."""


class RefusedMessage(NamedTuple):
    """A message that the broker rejects: its topic, the bytes of topic and payload, and the reason code."""

    topic: str
    size: int
    code: int


class _Complaints(logging.Logger):
    """Stores paho's last log message, so that our own error can quote it once. paho would log it at every retry."""

    last: str = ""

    def handle(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()
        _log.debug("%s", self.last)


class PatchedClient(aiomqtt.Client):
    """aiomqtt's client, except that a connection closed before its CONNACK fails at once, not after the timeout.

    Attributes:
        connack: properties of the broker's CONNACK (MQTT 5).
        goodbye: reason code of the broker's DISCONNECT (MQTT 5).
        cut_by_broker: whether the broker ended the connection, with a reason or without.
        lost: whether the connection has ended.
        opened: set when paho's thread has ended, which opens the connection and cannot be stopped.

    `on_refused` is called with a message that the broker rejects and the reason code (MQTT 5, QoS 1 and 2).
    """

    def __init__(
        self, hostname: str, port: int, *, on_refused: Callable[[RefusedMessage], None] | None = None, **options: Any
    ) -> None:
        self._on_refused = on_refused
        self._strange: dict[int, int] = {}  # by packet identifier: reason codes that a PUBACK must not have
        self._complaints = _Complaints(__name__, logging.ERROR)
        super().__init__(hostname, port, logger=self._complaints, **options)
        self.opened = asyncio.Event()
        self.connack: Properties | None = None
        self.goodbye: int | None = None
        self.cut_by_broker = False
        self.lost = False

    def _on_connect(
        self,
        client: paho.Client,
        userdata: object,
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if not self._connected.done():
            self.connack = properties
        super()._on_connect(client, userdata, flags, reason_code, properties)

    async def _wait_for(self, fut: Awaitable[_T], timeout: float | None) -> _T:  # noqa: ASYNC109  aiomqtt's signature
        # Before Python 3.12, asyncio.wait_for swallows a cancellation that comes in the same turn as the result.
        limit_s = self.timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(None if limit_s == math.inf else limit_s):
                return await fut
        except TimeoutError:
            raise aiomqtt.MqttError("Operation timed out") from None

    def _client_connect(self) -> None:
        try:
            super()._client_connect()
        finally:
            self._loop.call_soon_threadsafe(self.opened.set)

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: object,
        flags: paho.DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if not self._disconnected.done():
            if flags.is_disconnect_packet_from_server:
                self.goodbye = reason_code.value
            self.cut_by_broker = flags.is_disconnect_packet_from_server or reason_code.value == _UNSPECIFIED
        if not self._connected.done():
            reason = f" ({self._complaints.last})" if self._complaints.last else ""
            self._connected.set_exception(
                ClosedEarlyError(f"the broker closed the connection before answering{reason}")
            )
        if not self._connected.cancelled():
            super()._on_disconnect(client, userdata, flags, reason_code, properties)
        self.lost = True
        if self._disconnected.done() and not self._disconnected.cancelled():
            self._disconnected.exception()  # retrieved: aiomqtt forgets it where it has not returned from connecting yet

    def _on_publish(
        self, client: paho.Client, userdata: object, mid: int, reason_code: ReasonCode, properties: Properties
    ) -> None:
        # paho discards the message after this call.
        if (
            self._on_refused is not None
            and reason_code.is_failure
            and (message := client._out_messages.get(mid)) is not None
        ):
            code = self._strange.pop(mid, reason_code.value)
            self._on_refused(RefusedMessage(message.topic, len(message.topic.encode()) + len(message.payload), code))
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _on_socket_register_write(self, client: paho.Client, userdata: object, sock: Any) -> None:
        def register() -> None:
            # aiomqtt reads the file descriptor now and registers the writer later. By then the socket may be closed and
            # another socket may have the same descriptor: our writer would replace the writer of that socket.
            if sock.fileno() >= 0:
                self._loop.add_writer(sock.fileno(), write)

        def write() -> None:
            try:
                client.loop_write()
            except Exception as exc:  # noqa: BLE001 - any exception means that the link is broken
                if not self._disconnected.done():
                    self._disconnected.set_exception(exc)

        self._loop.call_soon_threadsafe(register)

    def acknowledge_at_once(self) -> None:
        """Acknowledge incoming data without the kernel's delay of 40 ms. Call before connecting, before `read_ahead`.

        A broker with Nagle's algorithm (mosquitto without set_tcp_nodelay) holds each small packet back until the one
        before it is acknowledged. The kernel may clear the option at any time, so every read sets it again. Linux only.
        """
        option = getattr(socket, "TCP_QUICKACK", None)
        paho_client = self._client
        receive: Callable[[int], bytes] = paho_client._sock_recv

        def receive_and_acknowledge(bufsize: int) -> bytes:
            data = receive(bufsize)
            sock: Any = paho_client._sock
            if sock is not None and option is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, 1)
            return data

        paho_client._sock_recv = receive_and_acknowledge  # type: ignore[method-assign]

    def take_strange_reasons(self) -> None:
        """Take a PUBACK with a reason code that the standard does not have for it. Call before connecting.

        mosquitto answers with 0x95 where a message is above its message_size_limit. paho cannot decode that: the link
        would break, and the message would be sent again for ever.
        """
        paho_client = self._client
        handle: Callable[[], MQTTErrorCode] = paho_client._packet_handle

        def handle_any() -> MQTTErrorCode:
            packet = paho_client._in_packet
            body = packet["packet"]
            if packet["command"] & 0xF0 == _PUBACK and len(body) > 2 and body[2] not in _PUBACK_CODES:
                if failed := body[2] >= _UNSPECIFIED:
                    self._strange[int.from_bytes(body[:2])] = body[2]
                body[2] = _UNSPECIFIED if failed else 0
            return handle()

        paho_client._packet_handle = handle_any  # type: ignore[method-assign]

    def read_ahead(self, sheds: Sheds, size_bytes: int = 16_384) -> None:
        """Read up to `size_bytes` with one system call, where paho makes four calls per packet, and drop what is shed.

        Call before connecting. Under a flood of a thousand messages a second an edge answers others eight times faster.
        """
        paho_client, gate = self._client, Gate(sheds)
        receive, read_packet = paho_client._sock_recv, paho_client.loop_read
        buffer = bytearray()

        def fill(bufsize: int) -> bool:
            """Whether there is something to read, or the end of the stream."""
            data = receive(max(bufsize, size_bytes))
            buffer.extend(gate.admit(data))
            return bool(buffer) or not data

        def take(bufsize: int) -> bytes:
            if not buffer and not any(fill(bufsize) for _ in range(_SHED_READS)):
                raise BlockingIOError
            taken = bytes(buffer[:bufsize])
            del buffer[:bufsize]
            return taken

        def read_all(max_packets: int = 1) -> MQTTErrorCode:
            # The event loop does not see the bytes in our buffer, so read until it is empty.
            try:
                code = read_packet(max_packets)
                while buffer and code == MQTTErrorCode.MQTT_ERR_SUCCESS:
                    code = read_packet(max_packets)
            except Exception:
                self.cut_by_broker = True  # it sent what cannot be decoded, perhaps as the answer to a message
                raise
            return code

        paho_client._sock_recv = take  # type: ignore[method-assign]
        paho_client.loop_read = read_all  # type: ignore[method-assign]

    def set_tcp_timeout(self, seconds: float) -> None:
        """Set the longest time in seconds that opening the TCP connection may take. Call before connecting."""
        self._client.connect_timeout = seconds


def funnel(take: Callable[[aiomqtt.Message], None]) -> type[asyncio.Queue[aiomqtt.Message]]:
    """Make a queue type for aiomqtt that passes every message to `take` at once.

    No task is needed per message, and the bus counts the dropped messages itself.
    """

    class Funnel(asyncio.Queue[aiomqtt.Message]):
        def put_nowait(self, item: aiomqtt.Message) -> None:
            take(item)

    return Funnel


async def watch(client: aiomqtt.Client) -> None:
    """Wait until the link ends. The funnel yields no message here; a disconnect raises MqttError."""
    async for _ in client.messages:
        pass


async def enter_quietly(client: PatchedClient) -> aiomqtt.MqttError | None:
    """Connect, and return the error instead of raising it, so that the task never fails."""
    try:
        await client.__aenter__()
    except aiomqtt.MqttError as exc:
        return exc
    if not client.lost:
        return None
    # aiomqtt would take a connection that ended right behind its CONNACK for one that stands.
    why = "" if client.goodbye is None else f": {reasons.described(client.goodbye)}"
    return aiomqtt.MqttError(f"the broker ended the connection behind its CONNACK{why}")


def drop(client: aiomqtt.Client) -> None:
    """Close the socket if it is still open, without a DISCONNECT. aiomqtt offers no way to do this."""
    client._client._sock_close()
    if client._disconnected.done() and not client._disconnected.cancelled():
        client._disconnected.exception()


@lru_cache(maxsize=256)
def publish_properties(content_type: str | None, expiry_s: int | None) -> Properties:
    """Return the MQTT 5 properties of a PUBLISH. The object is cached and shared: do not change it."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if content_type is not None:
        properties.ContentType = content_type
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    return properties


def properties_with(extras: Extras) -> Properties:
    """Return the MQTT 5 properties of a PUBLISH with `extras`."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if extras.response_topic:
        properties.ResponseTopic = extras.response_topic
    if extras.correlation is not None:
        properties.CorrelationData = extras.correlation
    if extras.user:
        properties.UserProperty = list(extras.user)
    return properties


def extras_of(properties: Properties | None) -> Extras | None:
    """The extras among the properties of a received PUBLISH; None where it has none."""
    found = {} if properties is None else vars(properties)
    if not found.keys() & {"ResponseTopic", "CorrelationData", "UserProperty"}:
        return None
    return Extras(
        found.get("ResponseTopic", ""), found.get("CorrelationData"), tuple(map(tuple, found.get("UserProperty", ())))
    )
