"""An in-memory bus on the running loop's time, virtual or real: the network of the simulator and the tests.

It has MQTT's semantics (wildcards, shared subscriptions, retained state, last wills) over one link model per client.
A QoS 1 message is a single attempt: what the link loses is lost. TCP is milder, so the parts above must ask again.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from types import TracebackType
from typing import Final, Self

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
)
from fedhlm.errors import BusError
from fedhlm_lab.sim.link import Action, Direction, LinkModel, Pipe
from fedhlm_lab.sim.loopback_broker import CONTROL_BYTES, ClientSession, LoopbackBroker, Packet, finish

CLOSE_TIMEOUT_S: Final = 2.0


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
        self._session: ClientSession | None = None
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
            leave = partial(self._broker.disconnect, session, done)
            session.up.send(leave, size_bytes=CONTROL_BYTES, reliable=True)
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
            finish(done)
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
            self._send_filters(self._session, filters, partial(finish, done))
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
            self._broker.wait_for_start(self)
            return
        session = self._session = ClientSession(self, up=self._pipe("up"), down=self._pipe("down"))
        session.up.send(partial(self._broker.connect, session), size_bytes=CONTROL_BYTES, reliable=True)

    def _pipe(self, direction: Direction) -> Pipe:
        rng, faults = self._broker.stream(self.client_id, direction), self._broker.faults
        return Pipe(self._loop, self.link, direction=direction, rng=rng, faults=faults)

    def schedule_connect(self) -> None:
        if self._open and self._timer is None:
            delay_s = self._broker.rng.uniform(0.0, self._broker.reconnect_s)
            self._timer = self._loop.call_later(delay_s, self._connect)

    def accepted(self, session: ClientSession) -> None:
        """Handle the connection: subscribe again first, then report it."""
        missing = tuple(pattern for pattern in self._filters if pattern not in session.filters)
        if missing:
            self._send_filters(session, missing, partial(self.accepted, session))
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

    def _send_filters(self, session: ClientSession, filters: tuple[str, ...], acknowledge: Action) -> None:
        request = partial(self._broker.subscribe, session, filters, acknowledge)
        session.up.send(request, size_bytes=CONTROL_BYTES, reliable=True)

    def _transmit(self, session: ClientSession, packet: Packet) -> None:
        size = packet.size_bytes()
        self._statistics.messages_out += 1
        self._statistics.bytes_out += size
        if packet.retain:
            # Retained state must survive the connection, so it is sent again unless the broker has it.
            self._unheard.append(packet)
        arrived = partial(session.arrived, packet.qos, session.down, partial(self._heard, packet))
        session.up.send(arrived, size_bytes=size, reliable=packet.retain)

    def _heard(self, packet: Packet) -> None:
        if packet.retain:
            self._unheard.remove(packet)
        self._broker.hear(packet, self.client_id)

    def receive(self, delivery: Delivery, size: int) -> None:
        if self.sheds is not None and self.sheds(delivery.topic.encode(errors="surrogatepass"), size):
            return
        if self.unread < self.max_incoming:
            self._inbox.put(delivery, size)
        else:
            self._statistics.dropped_in += 1

    def lost(self, session: ClientSession) -> None:
        """Handle the loss of this session, ended by the broker or the keepalive."""
        if self._session is not session:
            return
        self._session = None
        self._set_connected(False)
        for done in list(self._acks):
            finish(done)
        if not self.link.partitioned:
            self.schedule_connect()

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
            self.schedule_connect()
