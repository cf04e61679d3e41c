"""Compare two decisions.

Headers are ignored, and floats may differ by what another order of summation changes.
"""

import math
from typing import Any, Final

import msgspec
import numpy as np
from msgspec.structs import replace

from edge_agent import journal
from edge_agent.events import Committed, Judged
from fedhlm.errors import ProtocolError
from fedhlm.learning.curve import Curve
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import Contribution, Learned, Note

RELATIVE: Final = 1e-6  # the curves of a federation travel as float32
HEADER: Final = frozenset({"version", "sender", "sequence", "sent_ms"})

_KINDS: Final[dict[str, Any]] = {
    "plan": journal.Planned,
    "judged": Judged,
    "committed": list[Committed],
    "ended": journal.Ended,
}


def facts_of(note: Note) -> Any:
    """A note's content with its type: a message for what was sent or received.

    Raises:
        ProtocolError: the note does not hold what its kind says.
    """
    return (
        decode(note.data) if note.kind in ("sent", "dropped", "heard") else journal.unpack(note.data, _KINDS[note.kind])
    )


def same(a: Any, b: Any) -> bool:
    """Whether two facts are equal up to rounding.

    Messages are compared without headers, curves as numbers.
    """
    if isinstance(a, msgspec.Struct) and isinstance(b, msgspec.Struct):
        if (
            isinstance(a, Contribution | Learned)
            and isinstance(b, Contribution | Learned)
            and (a.evidence is None or b.evidence is None)
        ):  # a recording from before it travelled
            a, b = replace(a, evidence=None), replace(b, evidence=None)
        return type(a) is type(b) and all(same(x, y) for x, y in zip(_fields(a), _fields(b), strict=True))
    if isinstance(a, float) or isinstance(b, float):
        return a is not None and b is not None and math.isclose(a, b, rel_tol=RELATIVE, abs_tol=RELATIVE)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def _fields(fact: msgspec.Struct) -> list[Any]:
    values = {name: getattr(fact, name) for name in fact.__struct_fields__ if name not in HEADER}
    if isinstance(fact, Contribution | Learned):
        values["curves"] = {name: _numbers(data) for name, data in fact.curves.items()}
    return list(values.values())


def _numbers(data: bytes) -> Any:
    try:
        curve = Curve.from_bytes(data)
    except ProtocolError:
        return data
    return np.concatenate([curve.seen, curve.weight, curve.harm, curve.square]).tolist()
