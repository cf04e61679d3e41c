"""An in-memory bus on the running loop's time, virtual or real: the network of the simulator and the tests.

It has MQTT's semantics (wildcards, shared subscriptions, retained state, last wills) over one link model per client.
A QoS 1 message is a single attempt: what the link loses is lost. TCP is milder, so the parts above must ask again.
"""

# ruff: noqa: SLF001 - broker, session and client are three sides of one thing and use one another's private methods

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import TracebackType
from typing import Final, NamedTuple, Self

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
    publish_wire_bytes,
    share_of,
    topic_matches,
)
from fedhlm.errors import BusError
from fedhlm_lab.sim.link import Action, Direction, Faults, LinkModel, Pipe

CLOSE_TIMEOUT_S: Final = 2.0
_MAX_ROUTES: Final = 4_096
_CONTROL_BYTES: Final = 32


class Packet(NamedTuple):
    """A message in flight; `deadline_s` is on the loop's clock."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    deadline_s: float | None
    extras: Extras | None = None

    def size_bytes(self) -> int:
        expiry_s = None if self.deadline_s is None else 1.0
        return publish_wire_bytes(self.topic, len(self.payload), qos=self.qos, expiry_s=expiry_s, extras=self.extras)


class _Session:
    """One connection of one bus, as the broker sees it."""

    __slots__ = ("bus", "down", "ended", "filters", "up")

    def __init__(self, bus: "LoopbackBus", *, up: Pipe, down: Pipe) -> None:
        self.bus = bus
        self.up, self.down = up, down
        self.filters: dict[str, None] = {}
        self.ended = False

    def send(self, packet: Packet, *, retained: bool) -> None:
        size = packet.size_bytes()
        delivery = Delivery(packet.topic, packet.payload, retained, packet.extras)
        self.down.send(partial(self.bus._receive, delivery, size), size_bytes=size, reliable=packet.retain)


class _Route(NamedTuple):
    sessions: tuple[_Session, ...]
    groups: tuple[str, ...]


class LoopbackBroker:
    """The broker: routes messages, keeps retained messages and wills, and can stop and start again.

    A partition of `keepalive_s` breaks a connection. `reconnect_s` bounds a client's random delay before it connects
    again. Without `keeps_retained` a restart loses retained messages; `tap` sees every message that the broker takes.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        keeps_retained: bool = True,
        keepalive_s: float = 30.0,
        reconnect_s: float = 1.0,
    ) -> None:
        self.rng = rng
        self.keepalive_s = keepalive_s
        self.reconnect_s = reconnect_s
        self.faults: Final = Faults()
        self.retained: Final[dict[str, Packet]] = {}
        self.tap: Callable[[str, Packet], None] | None = None  # the publisher and the message
        self.stream: Callable[[str, Direction], random.Random] = lambda _client, _direction: rng
        self._cuts: dict[tuple[str, str], dict[str, None]] = {}  # with the retained topics that did not pass
        self._keeps_retained = keeps_retained
        self._sessions: dict[str, _Session] = {}
        self._routes: dict[str, _Route] = {}
        self._turns: dict[str, int] = {}
        self._waiting: dict[LoopbackBus, None] = {}
        self._running = True

    @property
    def running(self) -> bool:
        """Whether clients can connect."""
        return self._running

    def stop(self, *, forget: bool = False) -> None:
        """Stop: every connection breaks and no will is published. With `forget` the disk is lost too."""
        self._running = False
        self.faults.restarts += 1
        for session in list(self._sessions.values()):
            self._forget(session)
            session.bus._lost(session)
        if forget or not self._keeps_retained:
            self.retained.clear()

    def start(self) -> None:
        """Start; clients connect again after their random delays."""
        self._running = True
        waiting, self._waiting = self._waiting, {}
        for bus in waiting:
            bus._schedule_connect()

    async def restart(self, down_s: float) -> None:
        """Stop, wait, start."""
        self.stop()
        await asyncio.sleep(down_s)
        self.start()

    def cut(self, publisher: str, reader: str) -> None:
        """Let nothing pass from one client to another until `mend`, as on a broken bridge between brokers."""
        self._cuts.setdefault((publisher, reader), {})

    def mend(self, publisher: str, reader: str) -> None:
        """End a cut; the reader gets the retained messages that it missed."""
        missed = self._cuts.pop((publisher, reader), {})
        session = self._sessions.get(reader)
        for topic in missed:
            packet = self.retained.get(topic)
            if session is not None and packet is not None and session in self._find_route(topic).sessions:
                session.send(packet, retained=True)

    def _passes(self, source: str, packet: Packet, session: _Session) -> bool:
        missed = self._cuts.get((source, session.bus.client_id))
        if missed is None:
            return True
        self.faults.cut += 1
        if packet.retain:
            missed[packet.topic] = None
        return False

    def _wait_for_start(self, bus: "LoopbackBus") -> None:
        self._waiting[bus] = None

    def _connect(self, session: _Session) -> None:
        if not self._running:
            session.bus._lost(session)
            return
        old = self._sessions.get(session.bus.client_id)
        if old is not None:
            self.lose(old)
        self._sessions[session.bus.client_id] = session
        session.down.send(partial(session.bus._accepted, session), size_bytes=_CONTROL_BYTES, reliable=True)

    def _subscribe(self, session: _Session, filters: tuple[str, ...], acknowledge: Action) -> None:
        session.filters.update(dict.fromkeys(filters))
        self._routes.clear()
        session.down.send(acknowledge, size_bytes=_CONTROL_BYTES, reliable=True)
        plain = [pattern.split("/") for pattern in filters if share_of(pattern)[0] is None]
        for packet in list(self.retained.values()):
            if any(topic_matches(pattern, packet.topic) for pattern in plain):
                session.send(packet, retained=True)

    def _publish(self, packet: Packet, source: str) -> None:
        if self.tap is not None:
            self.tap(source, packet)
        if packet.deadline_s is not None and packet.deadline_s < asyncio.get_running_loop().time():
            self.faults.expired += 1
            return
        if packet.retain:
            if packet.payload:
                self.retained[packet.topic] = packet
            else:
                self.retained.pop(packet.topic, None)
        route = self._routes.get(packet.topic) or self._find_route(packet.topic)
        for session in route.sessions:
            if not self._cuts or self._passes(source, packet, session):
                session.send(packet, retained=False)
        for pattern in route.groups:
            members = [session for session in self._sessions.values() if pattern in session.filters]
            if members:
                turn = self._turns[pattern] = self._turns.get(pattern, -1) + 1
                chosen = members[turn % len(members)]
                if not self._cuts or self._passes(source, packet, chosen):
                    chosen.send(packet, retained=False)

    def _find_route(self, topic: str) -> _Route:
        sessions: dict[_Session, None] = {}
        groups: dict[str, None] = {}
        for session in self._sessions.values():
            for pattern in session.filters:
                group, rest = share_of(pattern)
                if topic_matches(rest.split("/"), topic):
                    if group is None:
                        sessions[session] = None
                    else:
                        groups[pattern] = None
        if len(self._routes) >= _MAX_ROUTES:
            self._routes.clear()
        route = self._routes[topic] = _Route(tuple(sessions), tuple(groups))
        return route

    def lose(self, session: _Session) -> None:
        """End a session abnormally: publish its will and inform its bus."""
        if session.ended:
            return
        known = self._sessions.get(session.bus.client_id) is session
        self._forget(session)
        self.faults.disconnects += 1
        will = session.bus.will
        if known and will is not None:
            self.faults.wills += 1
            self._publish(Packet(will.topic, will.payload, 1, True, None), session.bus.client_id)
        session.bus._lost(session)

    def _disconnect(self, session: _Session, done: asyncio.Future[None]) -> None:
        self._forget(session)
        _finish(done)

    def _forget(self, session: _Session) -> None:
        session.ended = True
        session.up.close()
        session.down.close()
        self._routes.clear()
        if self._sessions.get(session.bus.client_id) is session:
            del self._sessions[session.bus.client_id]


class LoopbackBus:
    """A client of a LoopbackBroker; see `bus.Bus`. Its parameters are those of `mqtt.MqttBus`.

    `max_incoming` and `max_outgoing` may change at run time. Queued messages stay; new ones find the queue full.
    """

    protocol: ProtocolVersion | None = "5"
    max_packet_bytes: int | None = None

    def __init__(
        self,
        broker: LoopbackBroker,
        *,
        client_id: str,
        birth: Retained | None = None,
        will: Retained | None = None,
        link: LinkModel | None = None,
        connect_timeout_s: float | None = None,
        max_outgoing: int = DEFAULT_MAX_OUTGOING,
        max_incoming: int = DEFAULT_MAX_INCOMING,
        on_link: LinkHook | None = None,
    ) -> None:
        self.client_id: Final = client_id
        self.will: Final = will
        self.link: Final = link or LinkModel()
        self._broker = broker
        self._birth = birth
        self._connect_timeout_s = connect_timeout_s
        self.max_incoming = max_incoming
        self.max_outgoing = max_outgoing
        self._on_link = on_link
        self._statistics = BusStatistics()
        self._inbox = Inbox(max_incoming, self._statistics)
        self.sheds: Sheds | None = None
        self._outgoing: deque[Packet] = deque()
        self._unheard: deque[Packet] = deque()
        self._filters: dict[str, None] = {}
        self._acks: dict[asyncio.Future[None], None] = {}
        self._session: _Session | None = None
        self._connected = False
        self._ever_connected = False
        self._open = False
        self._up = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._keepalive: asyncio.TimerHandle | None = None

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def statistics(self) -> BusStatistics:
        return self._statistics

    @property
    def unread(self) -> int:
        """Number of received messages that wait for the consumer."""
        return len(self._inbox)

    @property
    def unsent(self) -> int:
        """Number of messages that wait for the connection or for its bandwidth."""
        return len(self._outgoing) + (0 if self._session is None else self._session.up.backlog())

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._open = True
        self.link.watchers.append(self._partition_changed)
        self._connect()
        try:
            if self._connect_timeout_s is not None:
                async with asyncio.timeout(self._connect_timeout_s):
                    await self.wait_connected()
            elif self._broker.running and not self.link.partitioned:
                await self.wait_connected()
        except TimeoutError:
            self.crash()
            raise BusError(f"loopback broker not reached within {self._connect_timeout_s:g} s") from None
        except BaseException:
            self.crash()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        session = self._session
        if self._open and self._connected and session is not None:
            self._open = False
            if self.will is not None:
                self._transmit(session, Packet(self.will.topic, self.will.payload, 1, True, None))
            done: asyncio.Future[None] = self._loop.create_future()
            leave = partial(self._broker._disconnect, session, done)
            session.up.send(leave, size_bytes=_CONTROL_BYTES, reliable=True)
            await asyncio.wait({done}, timeout=CLOSE_TIMEOUT_S)
        self.crash()

    def crash(self) -> None:
        """Vanish like a killed process: the broker publishes the will, and the bus is closed."""
        session, self._session = self._session, None
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
        if self._partition_changed in self.link.watchers:
            self.link.watchers.remove(self._partition_changed)
        # In a partition the broker notices at the keepalive, whose timer keeps running.
        if session is not None and not session.ended and not self.link.partitioned:
            self._broker.lose(session)
        self._set_connected(False)
        for done in list(self._acks):
            _finish(done)
        self._statistics.dropped_out += len(self._outgoing)
        self._outgoing.clear()
        self._inbox.close()
        self._up.set()

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
        check_topic(topic)
        session = self._session if self._connected else None
        waiting = len(self._outgoing) if session is None else session.up.backlog()
        if not self._open or waiting >= self.max_outgoing:
            self._statistics.dropped_out += 1
            return False
        deadline_s = None if expiry_s is None else self._loop.time() + expiry_s
        packet = Packet(topic, payload, qos, retain, deadline_s, extras)
        if session is None:
            self._outgoing.append(packet)
        else:
            self._transmit(session, packet)
        return True

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        for pattern in filters:
            check_filter(pattern)
        self._filters.update(dict.fromkeys(filters))
        if filters and self._connected and self._session is not None:
            done: asyncio.Future[None] = self._loop.create_future()
            self._acks[done] = None
            done.add_done_callback(self._acks.pop)
            self._send_filters(self._session, filters, partial(_finish, done))
            await done

    def deliveries(self) -> AsyncIterator[Delivery]:
        return aiter(self._inbox)

    async def wait_connected(self) -> None:
        while not self._connected:
            if self._up.is_set():
                raise BusError("the loopback bus is closed")
            await self._up.wait()

    def _connect(self) -> None:
        self._timer = None
        if not self._open or self._session is not None or self.link.partitioned:
            return  # the end of the partition connects
        if not self._broker.running:
            self._broker._wait_for_start(self)
            return
        session = self._session = _Session(self, up=self._pipe("up"), down=self._pipe("down"))
        session.up.send(partial(self._broker._connect, session), size_bytes=_CONTROL_BYTES, reliable=True)

    def _pipe(self, direction: Direction) -> Pipe:
        rng, faults = self._broker.stream(self.client_id, direction), self._broker.faults
        return Pipe(self._loop, self.link, direction=direction, rng=rng, faults=faults)

    def _schedule_connect(self) -> None:
        if self._open and self._timer is None:
            delay_s = self._broker.rng.uniform(0.0, self._broker.reconnect_s)
            self._timer = self._loop.call_later(delay_s, self._connect)

    def _accepted(self, session: _Session) -> None:
        """Handle the connection: subscribe again first, then report it."""
        missing = tuple(pattern for pattern in self._filters if pattern not in session.filters)
        if missing:
            self._send_filters(session, missing, partial(self._accepted, session))
            return
        again, self._unheard = self._unheard, deque()
        if self._birth is not None:
            birth = Packet(*self._birth, 1, True, None)
            self._transmit(session, birth)
            again = deque(packet for packet in again if packet != birth)
        for packet in (*again, *self._outgoing):
            self._transmit(session, packet)
        self._outgoing.clear()
        self._set_connected(True)

    def _send_filters(self, session: _Session, filters: tuple[str, ...], acknowledge: Action) -> None:
        request = partial(self._broker._subscribe, session, filters, acknowledge)
        session.up.send(request, size_bytes=_CONTROL_BYTES, reliable=True)

    def _transmit(self, session: _Session, packet: Packet) -> None:
        size = packet.size_bytes()
        self._statistics.messages_out += 1
        self._statistics.bytes_out += size
        if packet.retain:
            # Retained state must survive the connection, so it is sent again unless the broker has it.
            self._unheard.append(packet)
        session.up.send(partial(self._heard, packet), size_bytes=size, reliable=packet.retain)

    def _heard(self, packet: Packet) -> None:
        if packet.retain:
            self._unheard.remove(packet)
        self._broker._publish(packet, self.client_id)

    def _receive(self, delivery: Delivery, size: int) -> None:
        if self.sheds is not None and self.sheds(delivery.topic.encode(errors="surrogatepass"), size):
            return
        if self.unread < self.max_incoming:
            self._inbox.put(delivery, size)
        else:
            self._statistics.dropped_in += 1

    def _lost(self, session: _Session) -> None:
        """Handle the loss of this session, ended by the broker or the keepalive."""
        if self._session is not session:
            return
        self._session = None
        self._set_connected(False)
        for done in list(self._acks):
            _finish(done)
        if not self.link.partitioned:
            self._schedule_connect()

    def _set_connected(self, value: bool) -> None:
        if value == self._connected:
            return
        self._connected = value
        if value:
            self._statistics.reconnects += self._ever_connected
            self._ever_connected = True
            self._up.set()
            self._up = asyncio.Event()
        if self._on_link is not None:
            self._on_link(value)

    def _partition_changed(self, partitioned: bool) -> None:
        session = self._session
        if partitioned:
            if session is not None:
                self._keepalive = self._loop.call_later(self._broker.keepalive_s, self._broker.lose, session)
            return
        if self._keepalive is not None:
            self._keepalive.cancel()
            self._keepalive = None
        if session is not None:
            session.up.release()
            session.down.release()
        else:
            self._schedule_connect()


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
