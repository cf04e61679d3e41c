"""The bounded queue of messages for one client, and the messages that it has not acknowledged yet; no I/O."""

from collections import deque
from typing import Final, Literal, NamedTuple

from edge_broker.mqtt.packets import BrokerMessage

MESSAGES_MAX: Final = 8_192
BYTES_MAX: Final = 16 * 1024 * 1024
IN_FLIGHT_MAX: Final = 1_024
_NUMBERS: Final = 65_535


class Due(NamedTuple):
    """A message on its way to one client. `number` is its packet identifier, 0 at QoS 0."""

    message: BrokerMessage
    qos: int
    retain: bool
    tags: tuple[int, ...] = ()
    number: int = 0

    @property
    def size(self) -> int:
        """About how many bytes the message takes in memory."""
        return len(self.message.payload) + len(self.message.topic) + len(self.message.extras) + 64


class SessionQueue:
    """A FIFO queue of messages.

    A new message is dropped if `messages_max` or `bytes_max` would be exceeded. An empty queue accepts any message.
    """

    def __init__(self, receive_maximum: int, *, messages_max: int = MESSAGES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self.dropped = 0
        self._waiting: deque[Due] = deque()
        self._bytes = 0
        self._window = min(receive_maximum, IN_FLIGHT_MAX)
        self._messages_max, self._bytes_max = messages_max, bytes_max
        self._in_flight: dict[int, Literal["sent", "released"]] = {}
        self._last = 0

    def offer(self, due: Due) -> bool:
        """Add a message. Return False if it was dropped."""
        full = len(self._waiting) >= self._messages_max or self._bytes + due.size > self._bytes_max
        if full and self._waiting:
            self.dropped += 1
            return False
        self._waiting.append(due)
        self._bytes += due.size
        return True

    def take(self) -> Due | None:
        """Remove and return the next message; None if there is none or too many are unacknowledged."""
        if not self._waiting or (self._waiting[0].qos and len(self._in_flight) >= self._window):
            return None
        due = self._waiting.popleft()
        self._bytes -= due.size
        if not due.qos:
            return due
        number = self._last % _NUMBERS + 1
        while number in self._in_flight:
            number = number % _NUMBERS + 1
        self._last = number
        self._in_flight[number] = "sent"
        return due._replace(number=number)

    def acknowledged(self, number: int) -> bool:
        """Handle a PUBACK, a PUBCOMP or a PUBREC with an error. Return whether its number belongs to a message."""
        return self._in_flight.pop(number, None) is not None

    def received(self, number: int) -> bool:
        """Handle a PUBREC. Return whether its number belongs to a message, which must then be released."""
        if number not in self._in_flight:
            return False
        self._in_flight[number] = "released"
        return True

    def __len__(self) -> int:
        return len(self._waiting)
