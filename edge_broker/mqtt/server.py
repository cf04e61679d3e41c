"""The MQTT server: connections, logins, takeovers, last wills and keep-alive, over asyncio's TCP.

A session ends with its connection. A client that connects with a name in use takes over. The former connection's last
will is published first, so that it never replaces the new connection's birth message. Messages that a slow client
cannot take are dropped and counted.
"""

import asyncio
import hmac
import logging
import secrets
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, cast

from edge_broker.mqtt import wire
from edge_broker.mqtt.outbox import BYTES_MAX, MESSAGES_MAX, Due, SessionQueue
from edge_broker.mqtt.packets import (
    V5,
    VERSIONS,
    Asked,
    BrokerMessage,
    Connect,
    MqttError,
    PacketType,
    Property,
    Publish,
    ReasonCode,
)
from edge_broker.mqtt.routes import RetainedMessages, Routes
from fedhlm.bus.interface import MAX_PACKET_BYTES, share_of
from fedhlm.process.descriptors import ACCEPTED_AT_ONCE, BACKLOG, room_for
from fedhlm.telemetry import warn_once

_log: Final = logging.getLogger(__name__)

MAX_CONNECT_BYTES: Final = 262_144
CONNECT_TIMEOUT_S: Final = 10.0
CLIENTS_MAX: Final = 4_096
LINKS_MAX: Final = 2 * CLIENTS_MAX  # connections, those before their CONNECT included
RECEIVE_MAXIMUM: Final = 1_024
TICK_S: Final = 0.25
PATIENCE: Final = 1.5  # keep-alives, section 3.1.2.10
CLOSE_S: Final = 1.0
_WRITE_BYTES: Final = 262_144


@dataclass(slots=True)
class Counts:
    """Running counts of a server."""

    connected: int = 0
    taken_over: int = 0
    silent: int = 0
    refused: int = 0
    received: int = 0
    sent: int = 0
    dropped: int = 0


class Server:
    """An MQTT server on an IPv4 address.

    If `users` are given, clients must log in with a name and its password. `versions` are the accepted levels.
    """

    def __init__(
        self,
        *,
        users: Mapping[str, str] | None = None,
        max_packet_bytes: int = MAX_PACKET_BYTES,
        queue_messages: int = MESSAGES_MAX,
        queue_bytes: int = BYTES_MAX,
        versions: Collection[int] = VERSIONS,
    ) -> None:
        self.versions = versions
        self.counts = Counts()
        self.max_packet_bytes = max_packet_bytes
        self._queue_messages, self._queue_bytes = queue_messages, queue_bytes
        self._users = dict(users or {})
        self._routes = Routes()
        self._retained = RetainedMessages()
        self._links: dict[Link, None] = {}  # in order of arrival
        self._links_max = 0
        self._clients: dict[str, Link] = {}
        self._server: asyncio.Server
        self._ticker: asyncio.Task[None]
        self.now_s = 0.0

    @property
    def port(self) -> int:
        """The TCP port in use."""
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self, address: str, port: int) -> None:
        """Start to listen. Port 0 picks a free port.

        Raises:
            OSError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        self.now_s = loop.time()
        self._links_max = room_for(LINKS_MAX)
        self._server = await loop.create_server(lambda: Link(self), address, port, backlog=ACCEPTED_AT_ONCE)
        with self._server.sockets[0].dup() as sock:
            sock.listen(BACKLOG)
        self._ticker = loop.create_task(self._tick(), name="broker")

    async def stop(self) -> None:
        """Accept no new clients, disconnect the connected ones, and close."""
        self._server.close()
        self._ticker.cancel()
        links = list(self._links)
        for link in links:
            link.end(ReasonCode.SHUTTING_DOWN, "the broker is stopped", will=False)
        if links:
            await asyncio.wait([link.closed for link in links], timeout=CLOSE_S)
        for link in list(self._links):
            link.abort()
        await asyncio.sleep(0)
        await self._server.wait_closed()
        with suppress(asyncio.CancelledError):
            await self._ticker

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(TICK_S)
            former_s, self.now_s = self.now_s, loop.time()
            # If this process was stalled, messages that clients sent meanwhile are still unread.
            late_s = self.now_s - former_s - TICK_S
            for link in list(self._links):
                link.look(self.now_s, late_s if late_s > TICK_S else 0.0)

    # Called by links

    def add(self, link: "Link") -> None:
        """Register a new TCP connection. Beyond the limit the oldest one that has not logged in is closed."""
        self._links[link] = None
        if len(self._links) > self._links_max:
            del self._links[idle := next((one for one in self._links if not one.known), link)]
            self.counts.refused += 1
            warn_once(_log, "links", "%d connections are open: no others fit before they log in", self._links_max)
            idle.abort()

    def remove(self, link: "Link") -> None:
        """Remove a closed TCP connection."""
        self._links.pop(link, None)

    def admits(self, asked: Connect) -> bool:
        """Whether the login is valid: name and password match a user, or there are no users."""
        if not self._users:
            return True
        expected = self._users.get(asked.username or "")
        return expected is not None and hmac.compare_digest(asked.password or b"", expected.encode())

    def enter(self, link: "Link", asked: Connect) -> SessionQueue:
        """Register a client that has logged in. A former client of the same name is disconnected first."""
        former = self._clients.get(link.name)
        if former is not None:
            self.counts.taken_over += 1
            _log.warning("client %s: another connection of the same id takes its place", link.name)
            former.end(ReasonCode.TAKEN_OVER, "another connection has the same client id", will=True)
        elif len(self._clients) >= CLIENTS_MAX:
            raise MqttError(ReasonCode.SERVER_BUSY, f"{CLIENTS_MAX} clients are connected")
        self._clients[link.name] = link
        self.counts.connected += 1
        return SessionQueue(asked.receive_maximum, messages_max=self._queue_messages, bytes_max=self._queue_bytes)

    def leave(self, link: "Link") -> None:
        """Remove a client whose session has ended."""
        if self._clients.get(link.name) is link:
            del self._clients[link.name]
            self._routes.forget(link.name)

    def subscribe(self, link: "Link", asked: Asked) -> int:
        """Subscribe a client and send it the retained messages.

        Return the granted QoS, or the reason code of a refusal.
        """
        try:
            new = self._routes.subscribe(link.name, asked)
            group, pattern = share_of(asked.pattern)
        except ValueError:
            return ReasonCode.BAD_FILTER
        if group is None and (asked.handling == 0 or (asked.handling == 1 and new)):
            tags = () if asked.number is None else (asked.number,)
            for message in self._retained.of(pattern, self.now_s):
                link.offer(Due(message, min(message.qos, asked.qos), True, tags))
        return asked.qos

    def unsubscribe(self, link: "Link", pattern: str) -> int:
        """End a subscription. Return SUCCESS, or NO_SUBSCRIPTION if there was none."""
        return ReasonCode.SUCCESS if self._routes.unsubscribe(link.name, pattern) else ReasonCode.NO_SUBSCRIPTION

    def publish(self, message: BrokerMessage, publisher: str) -> None:
        """Send a message to all its subscribers, and retain it if it asks for that."""
        self.counts.received += 1
        if message.retain and not self._retained.keep(message):
            self.counts.dropped += 1
            warn_once(_log, "retained", "no room to retain a message on %s: it is not kept", message.topic)
        for receiver in self._routes.receivers(message.topic, publisher):
            link = self._clients.get(receiver.client)
            if link is not None:
                retain = message.retain and receiver.as_published
                link.offer(Due(message, min(message.qos, receiver.qos), retain, receiver.tags))


class Link(asyncio.Protocol):
    """One TCP connection and, after its CONNECT, the client's session."""

    def __init__(self, server: Server) -> None:
        self.name = ""
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server = server
        self._asked: Connect | None = None
        self._outbox = SessionQueue(0)
        self._will: BrokerMessage | None = None
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._flushing = False
        self._paused = False
        self._ended = False
        self._heard_s = server.now_s
        self._received: set[int] = set()  # received QoS 2 messages that are not released yet

    @property
    def known(self) -> bool:
        """Whether its CONNECT has come."""
        return self._asked is not None

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set up a new TCP connection."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BYTES)
        sock: socket.socket = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._server.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after the connection is lost. Publishes the last will unless a DISCONNECT came first."""
        self._leave(will=True)
        self._server.remove(self)
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        """Stop sending, because the client reads too slowly."""
        self._paused = True

    def resume_writing(self) -> None:
        """Resume sending."""
        self._paused = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        """Handle all complete packets in the buffer."""
        self._buffer += data
        try:
            while not self._ended and (found := self._next()) is not None:
                self._handle(*found)
        except MqttError as exc:
            self._server.counts.refused += self._asked is None
            _log.info("client %s: connection ended: %s", self.name or "?", exc)
            self.end(exc.reason, str(exc), will=True)
        if self.known:  # until then CONNECT_TIMEOUT_S counts from the beginning, however slowly bytes come
            self._heard_s = self._server.now_s

    def _next(self) -> tuple[int, bytes] | None:
        """Remove the next packet from the buffer and return its first byte and body; None if it is incomplete."""
        buffer = self._buffer
        length, at = 0, 1
        while True:
            if at >= len(buffer):
                return None
            byte = buffer[at]
            length |= (byte & 0x7F) << 7 * (at - 1)
            at += 1
            if byte < 0x80:
                break
            if at > 4:
                raise MqttError(ReasonCode.MALFORMED, "a length must have at most four bytes")
        if self._asked is None and (buffer[0] != PacketType.CONNECT << 4 or length > MAX_CONNECT_BYTES):
            raise MqttError(
                ReasonCode.PROTOCOL_ERROR, f"the first packet must be a CONNECT of at most {MAX_CONNECT_BYTES} bytes"
            )
        if at + length > self._server.max_packet_bytes:
            largest = self._server.max_packet_bytes
            raise MqttError(ReasonCode.TOO_LARGE, f"a packet must be at most {largest} bytes (got {at + length})")
        if len(buffer) < at + length:
            return None
        first = buffer[0]
        with memoryview(buffer) as view:
            body = bytes(view[at : at + length])
        del buffer[: at + length]
        return first, body

    # The session

    def look(self, now_s: float, late_s: float) -> None:
        """Disconnect a client that has been silent for too long.

        For `late_s` seconds the server itself did not listen.
        """
        self._heard_s += late_s
        limit_s = CONNECT_TIMEOUT_S if self._asked is None else self._asked.keep_alive_s * PATIENCE
        if self._ended:
            if now_s - self._heard_s > CLOSE_S:
                self.abort()
        elif limit_s and now_s - self._heard_s > limit_s:
            self._server.counts.silent += 1
            self.end(ReasonCode.KEEP_ALIVE, f"nothing was heard for {limit_s:g} s", will=True)

    def offer(self, due: Due) -> None:
        """Queue a message for this client, or drop and count it if the queue is full."""
        counts = self._server.counts
        if not self._outbox.offer(due):
            counts.dropped += 1
            if self._outbox.dropped == 1:
                _log.warning("client %s reads too slowly: messages for it are dropped", self.name)
            return
        self._pump()

    def end(self, reason: ReasonCode, why: str, *, will: bool) -> None:
        """Close the connection from the server's side. A client of MQTT 5 is told the reason."""
        if self._ended:
            return
        if self._asked is not None and self._asked.version == V5:
            self._write(wire.disconnect(reason, why))
        self._leave(will=will)
        self._flush()
        self._heard_s = self._server.now_s  # from here on CLOSE_S counts
        self._transport.close()

    def abort(self) -> None:
        """Close at once, without sending what is still queued."""
        self._transport.abort()

    def _leave(self, *, will: bool) -> None:
        if self._ended:
            return
        self._ended = True
        self._server.leave(self)
        left, self._will = self._will, None
        if will and left is not None:
            if left.expires_s is not None:
                left = left._replace(expires_s=self._server.now_s + left.expires_s)
            self._server.publish(left, self.name)

    def _handle(self, first: int, body: bytes) -> None:
        flags = first & 0x0F
        try:
            kind = PacketType(first >> 4)
        except ValueError as exc:
            raise MqttError(ReasonCode.MALFORMED, "packet type 0") from exc
        asked = self._asked
        if asked is None:
            self._connect(body)
            return
        version = asked.version
        if kind is not PacketType.PUBLISH and flags != (2 if kind in _FLAGGED else 0):
            raise MqttError(ReasonCode.MALFORMED, f"flags of {kind.name} are invalid (got {flags:#x})")
        match kind:
            case PacketType.PUBLISH:
                self._take(wire.read_publish(flags, body, version, self._server.now_s), version)
            case PacketType.PUBACK | PacketType.PUBREC | PacketType.PUBCOMP | PacketType.PUBREL:
                self._answered(kind, *wire.read_answer(body, version), version)
            case PacketType.SUBSCRIBE:
                number, wanted = wire.read_subscribe(body, version)
                # SUBACK goes first: the subscriber waits for it, and there may be many retained messages.
                place = len(self._out)
                codes = [self._server.subscribe(self, one) for one in wanted]
                self._write(wire.suback(number, version, codes), place)
            case PacketType.UNSUBSCRIBE:
                number, patterns = wire.read_unsubscribe(body, version)
                codes = [self._server.unsubscribe(self, pattern) for pattern in patterns]
                self._write(wire.unsuback(number, version, codes))
            case PacketType.PINGREQ:
                self._write(wire.PINGRESP)
            case PacketType.DISCONNECT:
                self._leave(will=wire.read_disconnect(body, version) == ReasonCode.WITH_WILL)
                self._flush()
                self._transport.close()
            case _:
                raise MqttError(ReasonCode.PROTOCOL_ERROR, f"{kind.name} is not allowed here")

    def _connect(self, body: bytes) -> None:
        try:
            asked = wire.read_connect(body, self._server.versions)
        except MqttError as exc:
            if exc.reason in (ReasonCode.UNSUPPORTED_VERSION, ReasonCode.BAD_AUTHENTICATION):
                # A client with an unknown version is most likely to understand the CONNACK of 3.1.1.
                self._write(wire.connack(V5 if exc.reason is ReasonCode.BAD_AUTHENTICATION else 4, exc.reason))
            raise
        refusal = ReasonCode.SUCCESS
        if not self._server.admits(asked):
            refusal = ReasonCode.BAD_LOGIN
        elif not asked.client_id and asked.version != V5 and not asked.clean:
            refusal = ReasonCode.BAD_CLIENT_ID
        if refusal:
            self._write(wire.connack(asked.version, refusal))
            raise MqttError(refusal, f"login refused: {refusal.name.lower()}")
        self.name = asked.client_id or f"auto-{secrets.token_hex(8)}"
        try:
            self._outbox = self._server.enter(self, asked)
        except MqttError as exc:
            self._write(wire.connack(asked.version, exc.reason))
            raise
        self._asked, self._will = asked, asked.will
        values: list[tuple[Property, int | str]] = [
            (Property.SESSION_EXPIRY, 0),
            (Property.RECEIVE_MAXIMUM, RECEIVE_MAXIMUM),
            (Property.MAXIMUM_PACKET, self._server.max_packet_bytes),
        ]
        if not asked.client_id:
            values.append((Property.ASSIGNED_ID, self.name))
        self._write(wire.connack(asked.version, ReasonCode.SUCCESS, values))

    def _take(self, came: Publish, version: int) -> None:
        message, number, _ = came
        if message.qos < 2:
            self._server.publish(message, self.name)
            if message.qos:
                self._write(wire.answer(PacketType.PUBACK, number, version))
            return
        if number not in self._received:
            if len(self._received) >= RECEIVE_MAXIMUM:
                raise MqttError(ReasonCode.RECEIVE_MAXIMUM, f"at most {RECEIVE_MAXIMUM} messages may be unreleased")
            self._received.add(number)
            self._server.publish(message, self.name)
        self._write(wire.answer(PacketType.PUBREC, number, version))

    def _answered(self, kind: PacketType, number: int, reason: int, version: int) -> None:
        match kind:
            case PacketType.PUBREL:
                known = number in self._received
                self._received.discard(number)
                self._write(wire.answer(PacketType.PUBCOMP, number, version, _of(known)))
            case PacketType.PUBREC if reason < ReasonCode.MALFORMED - 1:
                known = self._outbox.received(number)
                self._write(wire.answer(PacketType.PUBREL, number, version, _of(known)))
            case _:
                self._outbox.acknowledged(number)
                self._pump()

    # Sending

    def _pump(self) -> None:
        """Send the messages that the client can take now."""
        asked = self._asked
        if asked is None or self._ended:
            return
        now_s = self._server.now_s
        while not self._paused and self._out_bytes < _WRITE_BYTES and (due := self._outbox.take()) is not None:
            expires_s = due.message.expires_s
            data = wire.publish(
                due.message,
                asked.version,
                qos=due.qos,
                retain=due.retain,
                number=due.number,
                tags=due.tags,
                now_s=now_s,
            )
            too_large = asked.max_packet_bytes is not None and len(data) > asked.max_packet_bytes
            if too_large or (expires_s is not None and expires_s <= now_s):
                # For this client the message counts as sent (section 3.1.2.11.4).
                self._outbox.acknowledged(due.number)
                self._server.counts.dropped += too_large
                continue
            self._server.counts.sent += 1
            self._write(data)

    def _write(self, data: bytes, place: int | None = None) -> None:
        self._out.insert(len(self._out) if place is None else place, data)
        self._out_bytes += len(data)
        if not self._flushing:
            # All packets of one turn of the event loop go out with one system call.
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        out, self._out, self._out_bytes = self._out, [], 0
        if out and not self._transport.is_closing():
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
        if not self._paused:
            self._pump()


_FLAGGED: Final = (PacketType.PUBREL, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE)


def _of(known: bool) -> ReasonCode:
    return ReasonCode.SUCCESS if known else ReasonCode.UNKNOWN_ID
