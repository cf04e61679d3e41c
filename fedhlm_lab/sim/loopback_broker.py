"""The broker of the in-memory bus: sessions, routes, retained messages and last wills, on the running loop's time."""

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, Protocol

from fedhlm.bus.interface import Delivery, Extras, Retained, publish_wire_bytes, share_of, topic_matches
from fedhlm_lab.sim.link import Action, Direction, Faults, Pipe

_MAX_ROUTES: Final = 4_096
CONTROL_BYTES: Final = 32  # about what a packet without a message takes


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


class LoopbackClient(Protocol):
    """What the broker asks of a client."""

    @property
    def client_id(self) -> str:
        """The client's name at the broker."""

    @property
    def will(self) -> Retained | None:
        """What the broker publishes if the connection breaks."""

    def accepted(self, session: "ClientSession", /) -> None:
        """Handle the broker's answer to a connection."""

    def lost(self, session: "ClientSession", /) -> None:
        """Handle the loss of a session."""

    def receive(self, delivery: Delivery, size: int, /) -> None:
        """Take a message of `size` bytes."""

    def schedule_connect(self) -> None:
        """Connect after a random delay."""


class ClientSession:
    """One connection of one bus, as the broker sees it."""

    __slots__ = ("bus", "down", "ended", "filters", "up")

    def __init__(self, bus: LoopbackClient, *, up: Pipe, down: Pipe) -> None:
        self.bus = bus
        self.up, self.down = up, down
        self.filters: dict[str, None] = {}
        self.ended = False

    def send(self, packet: Packet, *, retained: bool) -> None:
        size = packet.size_bytes()
        delivery = Delivery(packet.topic, packet.payload, retained, packet.extras)
        arrived = partial(self.arrived, packet.qos, self.up, partial(self.bus.receive, delivery, size))
        self.down.send(arrived, size_bytes=size, reliable=packet.retain)

    def arrived(self, qos: int, back: Pipe, action: Action) -> None:
        """Act on a message that has arrived, and acknowledge it on the way back."""
        if qos:
            back.acknowledge()
        action()


class _Route(NamedTuple):
    sessions: tuple[ClientSession, ...]
    groups: tuple[str, ...]


class LoopbackBroker:
    """The broker: routes messages, keeps retained messages and wills, and can stop and start again.

    A partition of `keepalive_s` breaks a connection. `reconnect_s` bounds a client's random delay before it connects
    again. Without `keeps_retained` a restart loses retained messages; `tap` sees every message that the broker takes.
    It takes `pace_s` seconds over each message, one after the other.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        keeps_retained: bool = True,
        keepalive_s: float = 30.0,
        reconnect_s: float = 1.0,
        pace_s: float = 0.0,
    ) -> None:
        self.rng = rng
        self.keepalive_s = keepalive_s
        self.reconnect_s = reconnect_s
        self.pace_s = pace_s
        self._busy_until_s = 0.0
        self.faults: Final = Faults()
        self.retained: Final[dict[str, Packet]] = {}
        self.tap: Callable[[str, Packet], None] | None = None  # the publisher and the message
        self.stream: Callable[[str, Direction], random.Random] = lambda _client, _direction: rng
        self._cuts: dict[tuple[str, str], dict[str, None]] = {}  # with the retained topics that did not pass
        self._keeps_retained = keeps_retained
        self._sessions: dict[str, ClientSession] = {}
        self._routes: dict[str, _Route] = {}
        self._turns: dict[str, int] = {}
        self._waiting: dict[LoopbackClient, None] = {}
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
            session.bus.lost(session)
        if forget or not self._keeps_retained:
            self.retained.clear()

    def start(self) -> None:
        """Start; clients connect again after their random delays."""
        self._running = True
        waiting, self._waiting = self._waiting, {}
        for bus in waiting:
            bus.schedule_connect()

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

    def _passes(self, source: str, packet: Packet, session: ClientSession) -> bool:
        missed = self._cuts.get((source, session.bus.client_id))
        if missed is None:
            return True
        self.faults.cut += 1
        if packet.retain:
            missed[packet.topic] = None
        return False

    def wait_for_start(self, bus: LoopbackClient) -> None:
        self._waiting[bus] = None

    def connect(self, session: ClientSession) -> None:
        if not self._running:
            session.bus.lost(session)
            return
        old = self._sessions.get(session.bus.client_id)
        if old is not None:
            self.lose(old)
        self._sessions[session.bus.client_id] = session
        session.down.send(partial(session.bus.accepted, session), size_bytes=CONTROL_BYTES, reliable=True)

    def subscribe(self, session: ClientSession, filters: tuple[str, ...], acknowledge: Action) -> None:
        session.filters.update(dict.fromkeys(filters))
        self._routes.clear()
        session.down.send(acknowledge, size_bytes=CONTROL_BYTES, reliable=True)
        plain = [pattern.split("/") for pattern in filters if share_of(pattern)[0] is None]
        for packet in list(self.retained.values()):
            if any(topic_matches(pattern, packet.topic) for pattern in plain):
                session.send(packet, retained=True)

    def hear(self, packet: Packet, source: str) -> None:
        """Take a message that has arrived: publish it when those before it are done."""
        if not self.pace_s:
            self.publish(packet, source)
            return
        loop = asyncio.get_running_loop()
        self._busy_until_s = max(loop.time(), self._busy_until_s) + self.pace_s
        loop.call_at(self._busy_until_s, self.publish, packet, source)

    def publish(self, packet: Packet, source: str) -> None:
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
        sessions: dict[ClientSession, None] = {}
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

    def lose(self, session: ClientSession) -> None:
        """End a session abnormally: publish its will and inform its bus."""
        if session.ended:
            return
        known = self._sessions.get(session.bus.client_id) is session
        self._forget(session)
        self.faults.disconnects += 1
        will = session.bus.will
        if known and will is not None:
            self.faults.wills += 1
            self.publish(Packet(will.topic, will.payload, 1, True, None), session.bus.client_id)
        session.bus.lost(session)

    def disconnect(self, session: ClientSession, done: asyncio.Future[None]) -> None:
        self._forget(session)
        finish(done)

    def _forget(self, session: ClientSession) -> None:
        session.ended = True
        session.up.close()
        session.down.close()
        self._routes.clear()
        if self._sessions.get(session.bus.client_id) is session:
            del self._sessions[session.bus.client_id]


def finish(done: asyncio.Future[None]) -> None:
    """Set the future unless somebody has given it up."""
    if not done.done():
        done.set_result(None)
