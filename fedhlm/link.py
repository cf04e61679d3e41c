"""A model of one client's link to the broker: delay, jitter, bandwidth, loss, duplication, reordering, partition.

`LinkModel` may be changed while it is in use. `Pipe` carries packets in one direction under it. Packets marked
reliable (connecting, subscriptions, retained state) are delayed and held but never lost, as TCP would do.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

# A reordered packet is late by up to this many times the ordinary delay, and at least by up to the minimum.
REORDER_DELAYS: Final = 4.0
REORDER_MIN_S: Final = 0.01

Action = Callable[[], object]


@dataclass(slots=True)
class Faults:
    """How often each fault was injected."""

    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    partition_lost: int = 0
    expired: int = 0
    disconnects: int = 0
    wills: int = 0
    restarts: int = 0


class LinkModel:
    """Both directions of one link. Probabilities are per message; `bytes_per_s` None is an unlimited rate."""

    __slots__ = ("_partitioned", "bytes_per_s", "delay_s", "duplicate", "jitter_s", "loss", "reorder", "watchers")

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        bytes_per_s: float | None = None,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        partitioned: bool = False,
    ) -> None:
        self.delay_s = delay_s
        self.jitter_s = jitter_s
        self.bytes_per_s = bytes_per_s
        self.loss = loss
        self.duplicate = duplicate
        self.reorder = reorder
        self._partitioned = partitioned
        self.watchers: list[Callable[[bool], None]] = []

    @property
    def partitioned(self) -> bool:
        """While true nothing passes; setting it tells every bus on this link."""
        return self._partitioned

    @partitioned.setter
    def partitioned(self, value: bool) -> None:
        if value != self._partitioned:
            self._partitioned = value
            for watcher in list(self.watchers):
                watcher(value)


class Pipe:
    """One direction of one connection. A packet is an action to run at the other end, and its size in bytes."""

    __slots__ = (
        "_busy_until_s",
        "_departures",
        "_faults",
        "_held",
        "_last_s",
        "_link",
        "_loop",
        "_queue",
        "_rng",
        "open",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, link: LinkModel, *, rng: random.Random, faults: Faults) -> None:
        self._loop = loop
        self._link = link
        self._rng = rng
        self._faults = faults
        self._busy_until_s = 0.0
        self._last_s = 0.0
        self._queue: deque[tuple[Action, bool]] = deque()
        self._departures: deque[float] = deque()
        self._held: list[Action] = []
        self.open = True

    def send(self, action: Action, *, size_bytes: int, reliable: bool) -> None:
        """Let `action` happen at the other end, if and when the link allows."""
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
        if link.jitter_s:
            arrival_s += rng.random() * link.jitter_s
        # Packets in order share one queue and every timer takes its head, so equal arrival times cannot swap.
        self._last_s = max(self._last_s, arrival_s)
        self._queue.append((action, reliable))
        self._schedule(self._last_s, self._arrive_next)

    def backlog(self) -> int:
        """Messages that wait for bandwidth."""
        now = self._loop.time()
        while self._departures and self._departures[0] <= now:
            self._departures.popleft()
        return len(self._departures)

    def release(self) -> None:
        """After a partition: deliver what was held, at once and in order."""
        held, self._held = self._held, []
        for action in held:
            self.send(action, size_bytes=0, reliable=True)

    def close(self) -> None:
        """Drop everything under way."""
        self.open = False
        self._queue.clear()
        self._held.clear()

    def _depart(self, size_bytes: int) -> float:
        now = self._loop.time()
        rate = self._link.bytes_per_s
        if rate is None:
            return now
        self._busy_until_s = max(now, self._busy_until_s) + size_bytes / rate
        self._departures.append(self._busy_until_s)
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
