"""A bounded queue that is fair to topics: a flood on one of them costs the others neither their turn nor their place."""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

# A topic's messages keep their place among those of others while at most this many of it wait.
AHEAD: Final = 32


class Queued(Protocol):
    """What a queue must know of a message."""

    @property
    def topic(self) -> str:
        """Its topic."""


T = TypeVar("T", bound=Queued)


@dataclass(slots=True)
class _FairPlace(Generic[T]):
    item: T | None


class _FairTurn(NamedTuple, Generic[T]):
    """When a message leaves: by `turn`, and in order of arrival where that is equal."""

    turn: float
    number: int
    place: _FairPlace[T]


@dataclass(slots=True)
class _FairLine(Generic[T]):
    """The waiting messages of one topic and their bytes. `turn` is the one after its newest."""

    turn: float
    places: deque[_FairPlace[T]] = field(default_factory=deque)
    bytes: int = 0


class FairQueue(Generic[T]):
    """Messages in order of arrival, except that a topic of which more than AHEAD wait has its turn with the others.

    It is full at `limit` messages or `limit_bytes` bytes, as `size_of` counts them. An empty queue takes any message.
    When it is full, the topic that takes most of it loses its newest message.
    """

    def __init__(self, limit: int, size_of: Callable[[T], int], *, limit_bytes: float = math.inf) -> None:
        self._limit, self._limit_bytes = limit, limit_bytes
        self._size_of = size_of
        self._turns: list[_FairTurn[T]] = []  # a heap, with empty places of messages that were dropped later
        self._lines: dict[str, _FairLine[T]] = {}
        self._turn = 0.0  # the turn of a new topic's message
        self._number = 0
        self._count = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._count

    @property
    def first(self) -> T | None:
        """The message that leaves next; None when none waits."""
        while self._turns and self._turns[0].place.item is None:
            heapq.heappop(self._turns)
        return self._turns[0].place.item if self._turns else None

    def put(self, item: T, *, elsewhere: int = 0) -> list[T]:
        """Add a message, and return those that found no room: this one, or the newest of topics that take most.

        `elsewhere` messages count towards the limit although they are not in this queue.
        """
        size = self._size_of(item)
        dropped: list[T] = []
        while self._count + elsewhere >= self._limit or (self._count and self._bytes + size > self._limit_bytes):
            heaviest = self._heavier(item.topic, size)
            if heaviest is None:
                return [*dropped, item]
            dropped.append(self._leave(heaviest, self._lines[heaviest].places.pop()))
        line = self._lines.setdefault(item.topic, _FairLine(self._turn))
        line.turn = max(line.turn, self._turn)
        place = _FairPlace(item)
        self._number += 1
        heapq.heappush(self._turns, _FairTurn(max(self._turn, line.turn - AHEAD), self._number, place))
        line.turn += 1.0
        line.places.append(place)
        line.bytes += size
        self._count += 1
        self._bytes += size
        return dropped

    def take(self) -> T:
        """Remove the message that leaves next and return it. One must wait."""
        item = self.first
        if item is None:
            raise AssertionError("a message waits")
        turn = heapq.heappop(self._turns)
        # By a part of a turn for each topic that waits, so that no topic waits for ever behind ever new ones.
        self._turn = max(turn.turn, self._turn + 1.0 / len(self._lines))
        return self._leave(item.topic, self._lines[item.topic].places.popleft())

    def clear(self) -> int:
        """Drop all messages and return their number."""
        count = self._count
        self._turns.clear()
        self._lines.clear()
        self._count = self._bytes = 0
        return count

    def _heavier(self, topic: str, size: int) -> str | None:
        """The topic that takes most of the queue, if that is more than `topic` would with one message more."""

        def share(line: _FairLine[T] | None, count: int = 0, more: int = 0) -> float:
            places, held = (0, 0) if line is None else (len(line.places), line.bytes)
            return max((places + count) / self._limit, (held + more) / self._limit_bytes)

        heaviest = max(self._lines, key=lambda name: share(self._lines[name]), default=topic)
        own = share(self._lines.get(topic), 1, size)
        return None if heaviest == topic or share(self._lines[heaviest]) <= own else heaviest

    def _leave(self, topic: str, place: _FairPlace[T]) -> T:
        """Empty a place that has left its topic's line."""
        line, item = self._lines[topic], place.item
        if item is None:
            raise AssertionError("a place is emptied once")
        place.item = None
        size = self._size_of(item)
        line.bytes -= size
        if not line.places:
            del self._lines[topic]
        self._count -= 1
        self._bytes -= size
        return item
