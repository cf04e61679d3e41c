"""Operators' orders to forget a member, each of which is obeyed once; no I/O.

An order has a number and a time. Whoever has obeyed it stamps what it publishes with a time not before it
(`stamped`). Learnt state with an earlier time therefore may still hold what the member contributed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from fedhlm.errors import ProtocolError
from fedhlm.protocol.fields import MAX_ROSTER, Milliseconds, Name, Session
from fedhlm.protocol.messages import Forget

ORDERS_MAX: Final = 4_096
FUTURE_MS: Final = 86_400_000


class Obeyed(NamedTuple):
    """An order as it is saved: the member, and the number and the time of the order."""

    member: Name
    order: Session
    sent_ms: Milliseconds


class Orders:
    """The latest order about each of at most ORDERS_MAX members; the oldest one is dropped first."""

    def __init__(self, saved: Sequence[Obeyed] = ()) -> None:
        self._obeyed = {order.member: order for order in saved[-ORDERS_MAX:]}
        self.since_ms = max((order.sent_ms for order in self._obeyed.values()), default=0)

    def __iter__(self) -> Iterator[Obeyed]:
        return iter(self._obeyed.values())

    @property
    def latest(self) -> tuple[int, ...]:
        """The numbers of the orders that were obeyed last."""
        return tuple(order.order for order in self._obeyed.values())[-MAX_ROSTER:]

    def take(self, member: str, forget: Forget, *, wall_ms: int) -> bool:
        """Note an order. Returns whether it must be obeyed: it is new, and the latest one about this member.

        `wall_ms` is the Unix time of this part in milliseconds.

        Raises:
            ProtocolError: the order's time is more than a day ahead of this clock.
        """
        check_time("forget", forget.sent_ms, wall_ms=wall_ms)
        known = self._obeyed.get(member)
        if known is not None and (known.order == forget.order or known.sent_ms > forget.sent_ms):
            return False
        self._obeyed.pop(member, None)
        self._obeyed[member] = Obeyed(member, forget.order, forget.sent_ms)
        if len(self._obeyed) > ORDERS_MAX:
            del self._obeyed[next(iter(self._obeyed))]
        self.since_ms = max(self.since_ms, forget.sent_ms)
        return True

    def stamped(self, header: dict[str, Any]) -> dict[str, Any]:
        """Return message headers whose time is not before any order that was obeyed."""
        return header | {"sent_ms": max(header["sent_ms"], self.since_ms)}


def check_time(what: str, sent_ms: int, *, wall_ms: int) -> None:
    """Check the time of a message against this part's Unix time, both in milliseconds.

    Raises:
        ProtocolError: it is more than a day ahead. `what` names the message.
    """
    if sent_ms > wall_ms + FUTURE_MS:
        days = (sent_ms - wall_ms) / FUTURE_MS
        raise ProtocolError(f"{what}.sent_ms must be at most a day ahead of this clock (got {days:.0f} days)")
