"""The queue of outgoing messages: those waiting, those in flight, and both after a broken link; no I/O."""

from collections import deque
from dataclasses import dataclass
from typing import Final

from paho.mqtt.properties import Properties

from fedhlm.bus.fair import FairQueue
from fedhlm.bus.interface import Extras

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
    extras: Extras | None = None
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
    """Messages with at most `limit` waiting, fair to topics. Messages in flight are numbered.

    Many answers to one party do not hold up the answers to others.
    """

    def __init__(self, limit: int) -> None:
        self._again: deque[Outgoing] = deque()  # sent before the link broke, and to be sent first
        self._queue: FairQueue[Outgoing] = FairQueue(limit, _bytes_of)
        self._under_way: dict[int, Outgoing] = {}
        self._number = 0

    def __len__(self) -> int:
        return self.waiting + len(self._under_way)

    @property
    def waiting(self) -> int:
        """How many messages wait to be sent."""
        return len(self._again) + len(self._queue)

    @property
    def under_way(self) -> int:
        """How many messages are in flight."""
        return len(self._under_way)

    @property
    def next(self) -> Outgoing | None:
        """The message to send next; None when none waits."""
        return self._again[0] if self._again else self._queue.first

    def put(self, item: Outgoing) -> Outgoing | None:
        """Add a message. Return the one that found no room: this one, or the newest of the topic that takes most."""
        return next(iter(self._queue.put(item, elsewhere=len(self._again))), None)

    def begin(self) -> tuple[int, Outgoing]:
        """Move the next message into flight and return it with its number."""
        item = self._again.popleft() if self._again else self._queue.take()
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
        count = len(self._again) + self._queue.clear()
        self._again.clear()
        return count


def _bytes_of(item: Outgoing) -> int:
    return item.size
