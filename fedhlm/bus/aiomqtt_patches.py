"""What aiomqtt's client lacks for `mqtt.MqttBus`: early failure, an abrupt close, messages without a task each.

It reaches into aiomqtt's private side; the contract tests notice when an upgrade changes that side.
"""

# ruff: noqa: SLF001
import asyncio
import logging
import socket
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

_log: Final = logging.getLogger(__name__)

# Besides a reason of the broker's, what paho says when a connection was closed without one.
_UNSPECIFIED: Final = 0x80


class ClosedEarlyError(aiomqtt.MqttError):
    """The broker closed the connection instead of answering CONNECT, as some do that do not know MQTT 5."""


class _Complaints(logging.Logger):
    """Keeps paho's last complaint for our own message, which says each thing once; paho would log every retry."""

    last: str = ""

    def handle(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()
        _log.debug("%s", self.last)


class PatchedClient(aiomqtt.Client):
    """aiomqtt's client, except that a connection closed before its CONNACK fails at once, not after the timeout.

    `connack` holds the properties of the broker's answer, `goodbye` the reason code of its DISCONNECT (both MQTT 5), and
    `cut_by_broker` is true where it ended the connection, with a reason or without.
    `on_refused` is told the topic and the reason of a message that the broker does not take (MQTT 5, from QoS 1 on).
    `opened` is set when paho's thread, which opens the connection and cannot be stopped, has ended.
    """

    def __init__(
        self, hostname: str, port: int, *, on_refused: Callable[[str, str], None] | None = None, **options: Any
    ) -> None:
        self._on_refused = on_refused
        self._complaints = _Complaints(__name__, logging.ERROR)
        super().__init__(hostname, port, logger=self._complaints, **options)
        self.opened = asyncio.Event()
        self.connack: Properties | None = None
        self.goodbye: int | None = None
        self.cut_by_broker = False

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

    def _on_publish(
        self, client: paho.Client, userdata: object, mid: int, reason_code: ReasonCode, properties: Properties
    ) -> None:
        # paho forgets the message after this call.
        if (
            self._on_refused is not None
            and reason_code.is_failure
            and (message := client._out_messages.get(mid)) is not None
        ):
            self._on_refused(message.topic, str(reason_code))
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _on_socket_register_write(self, client: paho.Client, userdata: object, sock: Any) -> None:
        def register() -> None:
            # aiomqtt takes the socket's number now and asks for the loop's attention later. By then the socket may be
            # closed and its number another's, who would be left with our writer in place of its own.
            if sock.fileno() >= 0:
                self._loop.add_writer(sock.fileno(), write)

        def write() -> None:
            try:
                client.loop_write()
            except Exception as exc:  # noqa: BLE001 - whatever it is, the link is broken
                if not self._disconnected.done():
                    self._disconnected.set_exception(exc)

        self._loop.call_soon_threadsafe(register)

    def acknowledge_at_once(self) -> None:
        """Acknowledge what comes without the kernel's delay of 40 ms; before connecting, and before `read_ahead`.

        A broker with Nagle's algorithm (mosquitto without set_tcp_nodelay) sends a small packet, and keeps the next one until
        the first is acknowledged. The option holds until the kernel thinks better of it, hence after every read. Linux only.
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

    def read_ahead(self, size_bytes: int = 16_384) -> None:
        """Read many packets with one system call; paho makes four for each. Before connecting, for who receives thousands a second."""
        paho_client = self._client
        receive, read_packet = paho_client._sock_recv, paho_client.loop_read
        buffer = bytearray()

        def take(bufsize: int) -> bytes:
            if not buffer:
                buffer.extend(receive(max(bufsize, size_bytes)))
            taken = bytes(buffer[:bufsize])
            del buffer[:bufsize]
            return taken

        def read_all(max_packets: int = 1) -> MQTTErrorCode:
            # What is in our buffer makes the socket readable no more.
            code = read_packet(max_packets)
            while buffer and code == MQTTErrorCode.MQTT_ERR_SUCCESS:
                code = read_packet(max_packets)
            return code

        paho_client._sock_recv = take  # type: ignore[method-assign]
        paho_client.loop_read = read_all  # type: ignore[method-assign]

    def set_tcp_timeout(self, seconds: float) -> None:
        """How long opening the connection may take; before connecting."""
        self._client.connect_timeout = seconds


def funnel(take: Callable[[aiomqtt.Message], None]) -> type[asyncio.Queue[aiomqtt.Message]]:
    """A queue type for aiomqtt that hands every message on at once: no task per message, and drops are ours to count."""

    class Funnel(asyncio.Queue[aiomqtt.Message]):
        def put_nowait(self, item: aiomqtt.Message) -> None:
            take(item)

    return Funnel


async def watch(client: aiomqtt.Client) -> None:
    """Wait for the end of the link: the funnel never yields a message, only MqttError at a disconnect."""
    async for _ in client.messages:
        pass


async def enter_quietly(client: aiomqtt.Client) -> aiomqtt.MqttError | None:
    """Connect; the error is returned, so that the task never fails."""
    try:
        await client.__aenter__()
    except aiomqtt.MqttError as exc:
        return exc
    return None


def drop(client: aiomqtt.Client) -> None:
    """Close the socket if it is still open, without a DISCONNECT; aiomqtt has no way to do this."""
    client._client._sock_close()
    if client._disconnected.done() and not client._disconnected.cancelled():
        client._disconnected.exception()


@lru_cache(maxsize=256)
def publish_properties(content_type: str | None, expiry_s: int | None) -> Properties:
    """MQTT 5 properties of a PUBLISH; never change what is returned, it is shared."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if content_type is not None:
        properties.ContentType = content_type
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    return properties
