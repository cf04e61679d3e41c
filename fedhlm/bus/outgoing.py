"""What waits to be sent, what is under way, and what a broken link leaves of both; no I/O."""

from collections import deque
from dataclasses import dataclass
from typing import Final

from paho.mqtt.properties import Properties

# After so many breaks a message that was under way in each of them is sent alone; if the link breaks again, it is the cause.
SUSPECT_BREAKS: Final = 2
# What a broker without a stated limit refuses may be refused for other reasons; below this it says nothing about sizes.
TELLING_BYTES: Final = 16_384


@dataclass(slots=True)
class Outgoing:
    """One message. Nobody wants it after `deadline_s` (loop time); `breaks` counts the links that broke under it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    deadline_s: float | None = None
    properties: Properties | None = None
    breaks: int = 0

    @property
    def suspect(self) -> bool:
        """Whether it may be what the broker ends connections for."""
        return self.breaks >= SUSPECT_BREAKS

    @property
    def size(self) -> int:
        """Bytes of topic and payload."""
        return len(self.topic.encode()) + len(self.payload)


class Outbox:
    """Messages in order, at most `limit` waiting; those under way are numbered."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Outgoing] = deque()
        self._under_way: dict[int, Outgoing] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._under_way)

    @property
    def waiting(self) -> int:
        """How many have not been begun."""
        return len(self._waiting)

    @property
    def under_way(self) -> int:
        """How many are being sent."""
        return len(self._under_way)

    @property
    def next(self) -> Outgoing | None:
        """The one to be sent next."""
        return self._waiting[0] if self._waiting else None

    def put(self, item: Outgoing) -> bool:
        """Add a message; False when there is no room."""
        if len(self._waiting) >= self._limit:
            return False
        self._waiting.append(item)
        return True

    def begin(self) -> tuple[int, Outgoing]:
        """Take the next one under way."""
        self._number += 1
        item = self._under_way[self._number] = self._waiting.popleft()
        return self._number, item

    def done(self, number: int) -> None:
        """It has arrived, or is given up."""
        self._under_way.pop(number, None)

    def broken(self, *, by_broker: bool, too_large: bool = False) -> tuple[list[Outgoing], Outgoing | None]:
        """The link broke: what was under way goes back in front, except what is given up. QoS 0 is not worth a second attempt.

        Returns the messages that are given up, and among them the one that the broker does not take: the largest when it
        said `too_large`, or a suspect that was sent alone.
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
        """Give up all that waits; how many those were."""
        count = len(self._waiting)
        self._waiting.clear()
        return count
