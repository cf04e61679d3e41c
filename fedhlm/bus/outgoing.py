"""The queue of outgoing messages: those waiting, those in flight, and both after a broken link; no I/O."""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from paho.mqtt.properties import Properties

# A message that was in flight at this many broken links is sent alone. If the link breaks again, it is the cause.
SUSPECT_BREAKS: Final = 2
# A broker that states no limit may reject a message for other reasons than its size. Only a rejected message of at
# least this size lowers the limit.
TELLING_BYTES: Final = 16_384
# A topic's messages keep their place among those of others while at most this many of it wait.
AHEAD: Final = 32


@dataclass(slots=True)
class Outgoing:
    """One outgoing message.

    It is dropped after `deadline_s`, in seconds of the event loop's clock. `breaks` counts the links that the broker
    ended while the message was in flight.
    """

    topic: str
    payload: bytes
    qos: int
    retain: bool
    deadline_s: float | None = None
    properties: Properties | None = None
    breaks: int = 0

    @property
    def suspect(self) -> bool:
        """Whether this message may be why the broker ends connections."""
        return self.breaks >= SUSPECT_BREAKS

    @property
    def size(self) -> int:
        """Bytes of topic and payload."""
        return len(self.topic.encode()) + len(self.payload)


@dataclass(slots=True)
class _OutPlace:
    item: Outgoing | None


class _Turn(NamedTuple):
    """When a message is sent: by `turn`, and in order of arrival where that is equal."""

    turn: float
    number: int
    place: _OutPlace


@dataclass(slots=True)
class _Line:
    """The waiting messages of one topic; `turn` is the one after its newest."""

    turn: float
    places: deque[_OutPlace] = field(default_factory=deque)


class Outbox:
    """Messages in order, with at most `limit` waiting. Messages in flight are numbered.

    A topic of which more than AHEAD messages wait has its turn with the others: many answers to one party do not hold
    up the answers to others. When the queue is full, the topic that takes most of it loses its newest message.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._again: deque[Outgoing] = deque()  # sent before the link broke, and to be sent first
        self._turns: list[_Turn] = []  # a heap, with empty places of messages that were dropped later
        self._lines: dict[str, _Line] = {}
        self._turn = 0.0  # the turn of a new topic's message
        self._count = 0
        self._under_way: dict[int, Outgoing] = {}
        self._number = 0

    def __len__(self) -> int:
        return self.waiting + len(self._under_way)

    @property
    def waiting(self) -> int:
        """How many messages wait to be sent."""
        return len(self._again) + self._count

    @property
    def under_way(self) -> int:
        """How many messages are in flight."""
        return len(self._under_way)

    @property
    def next(self) -> Outgoing | None:
        """The message to send next; None when none waits."""
        if self._again:
            return self._again[0]
        while self._turns and self._turns[0].place.item is None:
            heapq.heappop(self._turns)
        return self._turns[0].place.item if self._turns else None

    def put(self, item: Outgoing) -> Outgoing | None:
        """Add a message. Return the one that found no room: this one, or the newest of the topic that takes most."""
        dropped = None
        if self.waiting >= self._limit and (dropped := self._push_out(item)) is item:
            return item
        line = self._lines.setdefault(item.topic, _Line(self._turn))
        line.turn = max(line.turn, self._turn)
        place = _OutPlace(item)
        self._number += 1
        heapq.heappush(self._turns, _Turn(max(self._turn, line.turn - AHEAD), self._number, place))
        line.turn += 1.0
        line.places.append(place)
        self._count += 1
        return dropped

    def _push_out(self, item: Outgoing) -> Outgoing:
        heaviest = max(self._lines, key=lambda topic: len(self._lines[topic].places), default=item.topic)
        own = self._lines.get(item.topic)
        if heaviest == item.topic or len(self._lines[heaviest].places) <= (len(own.places) if own else 0) + 1:
            return item
        return self._leave(heaviest, self._lines[heaviest].places[-1])

    def _leave(self, topic: str, place: _OutPlace) -> Outgoing:
        """Empty a place at either end of its topic's line."""
        line, item = self._lines[topic], place.item
        if item is None:
            raise AssertionError("a place is emptied once")
        place.item = None
        if line.places[0] is place:
            line.places.popleft()
        else:
            line.places.pop()
        if not line.places:
            del self._lines[topic]
        self._count -= 1
        return item

    def begin(self) -> tuple[int, Outgoing]:
        """Move the next message into flight and return it with its number."""
        item = self.next
        if item is None:
            raise AssertionError("a message waits")
        if self._again:
            self._again.popleft()
        else:
            turn = heapq.heappop(self._turns)
            # By a part of a turn for each topic that waits, so that no topic waits for ever behind ever new ones.
            self._turn = max(turn.turn, self._turn + 1.0 / len(self._lines))
            self._leave(item.topic, turn.place)
        self._number += 1
        self._under_way[self._number] = item
        return self._number, item

    def done(self, number: int) -> None:
        """Forget a message in flight: it was acknowledged or dropped."""
        self._under_way.pop(number, None)

    def broken(self, *, by_broker: bool, too_large: bool = False) -> tuple[list[Outgoing], Outgoing | None]:
        """Put messages in flight back at the front after the link broke. Messages of QoS 0 are dropped.

        `by_broker`: the broker ended the link. `too_large`: it said that a packet was too large. Returns the dropped
        messages, and among them the one that the broker rejects: the largest at `too_large`, or a suspect sent alone.
        """
        items = list(self._under_way.values())
        self._under_way.clear()
        refused = None
        if by_broker and items:
            alone = len(items) == 1 and items[0].suspect
            if too_large or alone:
                refused = max(items, key=lambda item: item.size)
            for item in items:
                item.breaks += 1
        again = [item for item in items if item.qos and item is not refused]
        self._again.extendleft(reversed(again))
        return [item for item in items if not item.qos or item is refused], refused

    def clear(self) -> int:
        """Drop all waiting messages and return their number."""
        count = self.waiting
        self._again.clear()
        self._turns.clear()
        self._lines.clear()
        self._count = 0
        return count
