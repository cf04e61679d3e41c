"""The queue of outgoing messages: those waiting, those in flight, and both after a broken link; no I/O."""

from collections import deque
from dataclasses import dataclass
from typing import Final

from paho.mqtt.properties import Properties

# A message that was in flight at this many broken links is sent alone. If the link breaks again, it is the cause.
SUSPECT_BREAKS: Final = 2
# A broker that states no limit may reject a message for other reasons than its size. Only a rejected message of at
# least this size lowers the limit.
TELLING_BYTES: Final = 16_384


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


class Outbox:
    """Messages in order, with at most `limit` waiting. Messages in flight are numbered."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Outgoing] = deque()
        self._under_way: dict[int, Outgoing] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._under_way)

    @property
    def waiting(self) -> int:
        """How many messages wait to be sent."""
        return len(self._waiting)

    @property
    def under_way(self) -> int:
        """How many messages are in flight."""
        return len(self._under_way)

    @property
    def next(self) -> Outgoing | None:
        """The message to send next; None when none waits."""
        return self._waiting[0] if self._waiting else None

    def put(self, item: Outgoing) -> bool:
        """Add a message; False when the queue is full."""
        if len(self._waiting) >= self._limit:
            return False
        self._waiting.append(item)
        return True

    def begin(self) -> tuple[int, Outgoing]:
        """Move the next message into flight and return it with its number."""
        self._number += 1
        item = self._under_way[self._number] = self._waiting.popleft()
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
        self._waiting.extendleft(reversed(again))
        return [item for item in items if not item.qos or item is refused], refused

    def clear(self) -> int:
        """Drop all waiting messages and return their number."""
        count = len(self._waiting)
        self._waiting.clear()
        return count
