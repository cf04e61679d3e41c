"""Last outputs of requests that are not served, on their way to their clients: in turn, and not faster than brokers take.

A broker drops what waits for a slow client beyond a limit, a thousand messages with mosquitto's defaults. No I/O.
"""

from collections import deque
from typing import Final, NamedTuple

from fedhlm.protocol.messages import Output

AT_ONCE: Final = 25
PAUSE_S: Final = 0.1  # between so many: 250 in a second
WAITING_MAX: Final = 16_384


class DueRefusal(NamedTuple):
    """An output that refuses a request, with the cluster and the client that it goes to."""

    cluster: str
    client: str
    output: Output


class Refusals:
    """The refusals that wait, by client. Clients take turns, so that one that asks too much delays no other."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[DueRefusal]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, refusal: DueRefusal) -> bool:
        """Add a refusal. Return False if too many wait already."""
        if self._count >= WAITING_MAX:
            return False
        self._waiting.setdefault(refusal.client, deque()).append(refusal)
        self._count += 1
        return True

    def take(self, count: int) -> list[DueRefusal]:
        """Remove and return the next refusals, at most `count`."""
        taken: list[DueRefusal] = []
        while self._waiting and len(taken) < count:
            client, queue = next(iter(self._waiting.items()))
            del self._waiting[client]
            taken.append(queue.popleft())
            if queue:
                self._waiting[client] = queue  # behind the other clients
        self._count -= len(taken)
        return taken
