"""The list of a federation's members, as operators see it; no I/O."""

from collections.abc import Mapping
from typing import Any

from fedhlm.learning.curve import Curve
from fedhlm.learning.federation import Members
from fedhlm.protocol.fields import MAX_ROSTER
from fedhlm.protocol.messages import MemberSums, Roster


def roster_of(members: Members, header: dict[str, Any]) -> Roster:
    """Make the retained list of the members. `header` holds the header fields."""
    blamed = {name: dict(counts) for name, counts in members.blamed.items()}
    rows = []
    for name, message, curves in members.known():
        curve = _largest(curves)
        rows.append(
            MemberSums(
                name,
                message.members,
                curve.total_seen,
                curve.total_weight,
                float(curve.harm.sum()),
                round(members.silent_s(name), 3),
                blamed.pop(name, {}),
            )
        )
    rows += [MemberSums(name, 0, 0.0, 0.0, 0.0, 0.0, counts) for name, counts in blamed.items()]
    rows.sort(key=lambda row: (-row.weight, row.name))
    left_out = max(0, len(rows) - MAX_ROSTER)
    return Roster(**header, members=tuple(rows[:MAX_ROSTER]), left_out=left_out, obeyed=members.orders.latest)


def _largest(curves: Mapping[str, Curve]) -> Curve:
    return max(curves.values(), key=lambda curve: curve.total_weight, default=Curve.empty())
