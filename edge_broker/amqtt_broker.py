"""amqtt as we need it: users with passwords, a proper refusal of MQTT 5, and no connection left open.

amqtt reads a CONNECT before it looks at its version, waits for ever for the rest of an MQTT 5 will and never closes;
so the CONNECT is read here first. Imported only by `embedded`, when a broker is started.
"""

import asyncio
import hmac
import logging
from dataclasses import dataclass, field
from typing import Any, Final

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session

_log: Final = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 1.0
CONNECT_TIMEOUT_S: Final = 10.0
MAX_CONNECT_BYTES: Final = 262_144
CONNECT_HEADER: Final = 0x10
MQTT_3_1_1: Final = 4
CONNACK_BAD_VERSION: Final = bytes([0x20, 2, 0, 1])


class UserAuth(BaseAuthPlugin):  # type: ignore[misc]
    """Without users everybody passes; with users the password must match. amqtt loads it by its dotted path."""

    @dataclass
    class Config:
        """`users` maps names to passwords."""

        users: dict[str, str] = field(default_factory=dict)

    async def authenticate(self, *, session: Session) -> bool:
        """Whether the connecting session may stay."""
        users: dict[str, str] = self.config.users
        if not users:
            # amqtt then keeps nothing for it after a disconnect, which is what a clean session asks for.
            session.is_anonymous = True
            return True
        expected = users.get(session.username or "")
        given = (session.password or "").encode()
        return expected is not None and hmac.compare_digest(given, expected.encode())


class TrackedBroker(Broker):  # type: ignore[misc]
    """amqtt's broker with connections that end for sure and packets that wait for nobody but the network."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Telling plugins about a packet yields to the loop between sending it and waiting for its PUBACK: an early
        # PUBACK is then not recognised and the client's next messages stand still for five seconds.
        self.plugins_manager.fire_event = _no_event
        self._connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    @property
    def port(self) -> int:
        """The TCP port in use."""
        port: int = self._servers["default"].instance.sockets[0].getsockname()[1]
        return port

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        # amqtt shows a new client the retained messages of every filter that any client has subscribed to.
        pattern, _ = subscription
        if any(owner.client_id == session.client_id for owner, _ in self._subscriptions.get(pattern, ())):
            await super()._publish_retained_messages_for_subscription(subscription, session)

    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        """Serve one client until it leaves."""
        task = asyncio.ensure_future(self._serve(reader, writer, listener_name))
        self._connections[task] = writer
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            writer.close()
            del self._connections[task]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                packet, level = await _read_connect(reader)
            if level == MQTT_3_1_1:
                replay = _ReplayReader(reader, packet)
                await self._client_connected(listener_name, replay, StreamWriterAdapter(writer))
            else:
                writer.write(CONNACK_BAD_VERSION)
        except (OSError, TimeoutError, EOFError, ValueError) as exc:
            _log.debug("connection given up: %r", exc)

    async def shutdown(self) -> None:
        """Take no new clients, cut off the old ones, then stop; amqtt alone lets clients come back while it stops."""
        for server in self._servers.values():
            server.instance.close()
        for writer in self._connections.values():
            writer.transport.abort()
        if self._connections:
            await asyncio.wait(list(self._connections), timeout=STOP_TIMEOUT_S)
        await super().shutdown()
        # Closing a transport takes one more turn of the loop.
        await asyncio.sleep(0)


async def _no_event(*_: object, **__: object) -> None:
    """Nobody listens to amqtt's events."""


class _ReplayReader(StreamReaderAdapter):  # type: ignore[misc]
    """Reads a packet that was read already, then goes on with the stream."""

    def __init__(self, reader: asyncio.StreamReader, packet: bytes) -> None:
        super().__init__(reader)
        self._packet = packet

    async def read(self, n: int = -1) -> bytes:
        taken, self._packet = self._packet[:n], self._packet[n:]
        if len(taken) < n:
            taken += bytes(await super().read(n - len(taken)))
        return taken


async def _read_connect(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    """The first packet and its protocol level; ValueError when it is not an MQTT CONNECT of sane size."""
    packet = await reader.readexactly(1)
    length = 0
    for shift in (0, 7, 14):
        byte = await reader.readexactly(1)
        packet += byte
        length |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            break
    if packet[0] != CONNECT_HEADER or not 10 <= length <= MAX_CONNECT_BYTES:
        raise ValueError(f"first packet must be a CONNECT (got header {packet[0]:#x} and {length} bytes)")
    body = await reader.readexactly(length)
    if not body.startswith(b"\x00\x04MQTT"):
        raise ValueError("first packet is not an MQTT CONNECT")
    return packet + body, body[6]
