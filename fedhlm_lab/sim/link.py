"""A model of one client's link to the broker: delay, jitter, bandwidth, loss, duplication, reordering, partition.

A `LinkModel` may change while it is in use; a `Pipe` carries packets in one direction under it. Packets marked
reliable (connecting, subscriptions, retained state) are delayed and held, but never lost, as with TCP.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

# A reordered packet is late by up to this many ordinary delays, and at least by up to the minimum.
REORDER_DELAYS: Final = 4.0
REORDER_MIN_S: Final = 0.01
RESENDS_MAX: Final = 8  # of one packet
SEGMENT_BYTES: Final = 1_348  # of a message in one packet
HEADER_BYTES: Final = 52  # of each packet: IPv4 (20), TCP with timestamps (32)
ACK_BYTES: Final = 4  # PUBACK without a reason (MQTT 5, section 3.4)

Direction = Literal["up", "down"]

Action = Callable[[], object]


@dataclass(slots=True)
class Faults:
    """How often each fault was injected."""

    lost: int = 0
    resent: int = 0
    duplicated: int = 0
    reordered: int = 0
    partition_lost: int = 0
    cut: int = 0
    expired: int = 0
    disconnects: int = 0
    wills: int = 0
    restarts: int = 0


class LinkModel:
    """Both directions of one link. Probabilities are per message; a rate of None is unlimited.

    `bytes_per_s` sets both rates, which headers of packets and acknowledgements use too. `loss` loses a message. `resent` is TCP's reaction to a lost packet: the packet and
    all behind it come `resend_s` later.
    """

    __slots__ = (
        "_partitioned",
        "delay_s",
        "down_bytes_per_s",
        "duplicate",
        "jitter_s",
        "loss",
        "reorder",
        "resend_s",
        "resent",
        "up_bytes_per_s",
        "watchers",
    )

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        bytes_per_s: float | None = None,
        up_bytes_per_s: float | None = None,
        down_bytes_per_s: float | None = None,
        resent: float = 0.0,
        resend_s: float = 0.2,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        partitioned: bool = False,
    ) -> None:
        self.delay_s = delay_s
        self.jitter_s = jitter_s
        self.up_bytes_per_s = bytes_per_s if up_bytes_per_s is None else up_bytes_per_s
        self.down_bytes_per_s = bytes_per_s if down_bytes_per_s is None else down_bytes_per_s
        self.resent = resent
        self.resend_s = resend_s
        self.loss = loss
        self.duplicate = duplicate
        self.reorder = reorder
        self._partitioned = partitioned
        self.watchers: list[Callable[[bool], None]] = []

    @property
    def partitioned(self) -> bool:
        """Whether nothing passes; setting it informs every bus on this link."""
        return self._partitioned

    @partitioned.setter
    def partitioned(self, value: bool) -> None:
        if value != self._partitioned:
            self._partitioned = value
            for watcher in list(self.watchers):
                watcher(value)


class Pipe:
    """One direction of one connection.

    A packet is its size in bytes and an action to run at the other end.
    """

    __slots__ = (
        "_busy_until_s",
        "_departures",
        "_direction",
        "_faults",
        "_held",
        "_last_s",
        "_link",
        "_loop",
        "_queue",
        "_rng",
        "open",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        link: LinkModel,
        *,
        direction: Direction,
        rng: random.Random,
        faults: Faults,
    ) -> None:
        self._loop = loop
        self._link = link
        self._direction = direction
        self._rng = rng
        self._faults = faults
        self._busy_until_s = 0.0
        self._last_s = 0.0
        self._queue: deque[tuple[Action, bool]] = deque()
        self._departures: deque[float] = deque()
        self._held: list[Action] = []
        self.open = True

    def send(self, action: Action, *, size_bytes: int, reliable: bool) -> None:
        """Run `action` at the other end, if and when the link allows it."""
        if not self.open:
            return
        link, rng = self._link, self._rng
        arrival_s = self._depart(size_bytes)
        if link.partitioned:
            self._stop(action, reliable=reliable)
            return
        arrival_s += link.delay_s
        if not reliable:
            if link.loss and rng.random() < link.loss:
                self._faults.lost += 1
                return
            if link.duplicate and rng.random() < link.duplicate:
                self._faults.duplicated += 1
                self._send_late(action, arrival_s)
            if link.reorder and rng.random() < link.reorder:
                self._faults.reordered += 1
                self._send_late(action, arrival_s)
                return
        for _ in range(RESENDS_MAX if link.resent else 0):
            if rng.random() >= link.resent:
                break
            self._faults.resent += 1
            arrival_s += link.resend_s
        if link.jitter_s:
            arrival_s += rng.random() * link.jitter_s
        # Ordered packets share one queue and every timer takes its head, so equal arrival times cannot swap.
        self._last_s = max(self._last_s, arrival_s)
        self._queue.append((action, reliable))
        self._schedule(self._last_s, self._arrive_next)

    def acknowledge(self) -> None:
        """Carry an acknowledgement of QoS 1 for a message that came the other way. What follows does not overtake it."""
        arrival_s = self._occupy(ACK_BYTES) + self._link.delay_s + self._rng.random() * self._link.jitter_s
        self._last_s = max(self._last_s, arrival_s)

    def backlog(self) -> int:
        """Number of messages that wait for bandwidth."""
        now = self._loop.time()
        while self._departures and self._departures[0] <= now:
            self._departures.popleft()
        return len(self._departures)

    def release(self) -> None:
        """After a partition, deliver the held packets at once and in order."""
        held, self._held = self._held, []
        for action in held:
            self.send(action, size_bytes=0, reliable=True)

    def close(self) -> None:
        """Drop everything in flight."""
        self.open = False
        self._queue.clear()
        self._held.clear()

    def _depart(self, size_bytes: int) -> float:
        left_s = self._occupy(size_bytes)
        if self._rate is not None:
            self._departures.append(left_s)
        return left_s

    @property
    def _rate(self) -> float | None:
        return self._link.up_bytes_per_s if self._direction == "up" else self._link.down_bytes_per_s

    def _occupy(self, size_bytes: int) -> float:
        """Use the link for packets with so many bytes, and return when the last one has left."""
        now, rate = self._loop.time(), self._rate
        if rate is None:
            return now
        packets = max(1, -(-size_bytes // SEGMENT_BYTES))
        self._busy_until_s = max(now, self._busy_until_s) + (size_bytes + packets * HEADER_BYTES) / rate
        return self._busy_until_s

    def _send_late(self, action: Action, arrival_s: float) -> None:
        slack_s = max(REORDER_MIN_S, REORDER_DELAYS * (self._link.delay_s + self._link.jitter_s))
        self._schedule(arrival_s + self._rng.random() * slack_s, self._arrive, action, False)

    def _schedule(self, when_s: float, callback: Callable[..., object], *args: Any) -> None:
        if when_s <= self._loop.time():
            self._loop.call_soon(callback, *args)
        else:
            self._loop.call_at(when_s, callback, *args)

    def _arrive_next(self) -> None:
        if self._queue:
            self._arrive(*self._queue.popleft())

    def _arrive(self, action: Action, reliable: bool) -> None:
        if not self.open:
            return
        if self._link.partitioned:
            self._stop(action, reliable=reliable)
        else:
            action()

    def _stop(self, action: Action, *, reliable: bool) -> None:
        if reliable:
            self._held.append(action)
        else:
            self._faults.partition_lost += 1
