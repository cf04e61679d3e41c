"""Hostile input by structure: valid messages of every type, and what becomes of them when they are spoilt.

Everything is a function of a `random.Random`, so that one seed gives one stream. Structures are taken from the message
types themselves: a new message or field is covered from its first day.
"""

import math
import random
import string
import struct
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, Final, NamedTuple, get_args

import msgspec

from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.tree import Branch, pack_branches
from fedhlm.learning.curve import Curve
from fedhlm.peers.context_keys import DIMS
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import MAX_CONTEXT
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    AnyMessage,
    Escalation,
    EscalationBatch,
    Hints,
    Prime,
    RoutedEscalation,
    Sampling,
)
from fedhlm.protocol.packing import pack_ids
from fedhlm.protocol.topics import TABLE, Topic
from fedhlm_lab.sim import toy

Rng = random.Random

AGENTS: Final = ("a0", "a1", "a2")
CLUSTERS: Final = ("c0", "c1")
SESSIONS: Final = 6  # few, so that messages meet
KINDS: Final[tuple[type[AnyMessage], ...]] = get_args(AnyMessage)
ROWS: Final = {kind: [row for row in TABLE if row.payload is kind] for kind in KINDS}

NASTY_TEXT: Final = ("", "\0", "\n", "a" * 65, "..", "+", "#", "é", "\N{PILE OF POO}" * 20, "%s%n", "-", " ", "a/b")
NASTY_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, -1, 0, 1, 255, 256, 2**16, 2**24, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
    *(-(2**63), MAX_CONTEXT, MAX_CONTEXT + 1, 0.0, -0.0, 0.5, 1.0, 1.0000001, 1e308, -1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, b"", b"\0", b"\xff" * 8, b"\x7f" * 1024, [], {}, [[]], {"": 0}),
    *(msgspec.msgpack.Ext(-1, b"\0" * 4), msgspec.msgpack.Ext(5, b""), *NASTY_TEXT),
)
# Headers that announce far more than follows: strings, bytes, arrays and maps of 2**16 - 1 and 2**32 - 1.
BOMBS: Final = tuple(bytes([code]) + b"\xff" * width for code, width in
                     ((0xDA, 2), (0xDB, 4), (0xC5, 2), (0xC6, 4), (0xDC, 2), (0xDD, 4), (0xDE, 2), (0xDF, 4), (0xC9, 4)))  # fmt: skip


class Hostile(NamedTuple):
    """A message on its way: topic name and payload."""

    topic: str
    payload: bytes


def valid(rng: Rng) -> Hostile:
    """A message that its reader must take in, of any type; half of them coherent, half random within the types."""
    made = rng.choice(COHERENT)(rng) if rng.random() < 0.5 else None
    kind = type(made) if made is not None else rng.choice(KINDS)
    row = rng.choice(ROWS[kind])
    levels = {
        "cluster": rng.choice(CLUSTERS),
        "agent": rng.choice(AGENTS),
        "client": "client",
        "member": rng.choice(AGENTS),
    }
    message = made if made is not None else typed(rng, kind)
    sender = levels["agent"] if row.publishers == ("agent",) else rng.choice(("cloud", "edge-c0", "client"))
    message = msgspec.structs.replace(message, version=SCHEMA_VERSION, sender=sender)
    return Hostile(
        row.name(**{key: value for key, value in levels.items() if f"{{{key}}}" in row.pattern}), encode(message)
    )


def hostile(rng: Rng) -> Hostile:
    """A spoilt message: its bytes, its structure, its topic, or two of them; a few are left as they are."""
    message = valid(rng)
    name, payload = message
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        payload = mutate(rng, payload)
    if rng.random() < 0.1:
        name = spoilt_topic(rng, name)
    return Hostile(name, payload)


def mutate(rng: Rng, data: bytes) -> bytes:
    """One mutation of msgpack bytes, by structure where they still have one."""
    if rng.random() < 0.6:
        try:
            tree = msgspec.msgpack.decode(data)
            return msgspec.msgpack.encode(spoilt_tree(rng, tree))
        except (msgspec.DecodeError, RecursionError, TypeError, ValueError, OverflowError):
            pass  # no structure left, or one that was put into itself
    return spoilt_bytes(rng, data)


# Bytes


def _random_bytes(rng: Rng, _data: bytes) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 2, 7, 64, 1_000)))


def _flip(rng: Rng, data: bytes) -> bytes:
    spoilt = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def _replace(rng: Rng, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((*BOMBS, b"\xc0", b"\xff", b"\x00", b"\xed\xa0\x80", b"\xc1")) + data[at + 1 :]


def _truncate(rng: Rng, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _extend(rng: Rng, data: bytes) -> bytes:
    return data + rng.choice((b"\0", b"\xc0", data, rng.randbytes(5)))


def _repeat(rng: Rng, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 4, 16, 64)))
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def _cut(rng: Rng, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 2, 8, 64)) :]


def _nested(rng: Rng, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((b"\x91", b"\x81\xa0", b"\x92\x01")) * rng.choice((5, 100, 20_000)) + data[at:]


def _number(rng: Rng, data: bytes) -> bytes:
    spoilt = bytearray(data or b"\0")
    at = rng.randrange(len(spoilt))
    value = struct.pack(rng.choice(("<H", "<I", "<f", "<d")), rng.choice((0, 1)))
    other = rng.choice(
        (value, b"\xff" * len(value), struct.pack("<f", rng.choice((math.nan, math.inf, -1.0, 1e38, 1e-45))))
    )
    return bytes(spoilt[:at] + other + spoilt[at + len(other) :])


BYTE_MUTATIONS: Final[tuple[Callable[[Rng, bytes], bytes], ...]] = (
    *(_flip, _flip, _replace, _truncate, _extend, _repeat, _cut, _number, _nested, _random_bytes),
)


def spoilt_bytes(rng: Rng, data: bytes) -> bytes:
    """One mutation that knows nothing of the format."""
    return rng.choice(BYTE_MUTATIONS)(rng, data)


# Structures


def spoilt_tree(rng: Rng, tree: Any) -> Any:
    """One mutation somewhere in a structure of lists and dicts; it is changed in place where that is possible."""
    places = _places(tree)
    if not places:
        return rng.choice(NASTY_VALUES)
    holder, key = rng.choice(places)
    old = holder[key]
    match rng.randrange(8):
        case 0 | 1:
            holder[key] = rng.choice(NASTY_VALUES)
        case 2:
            holder[key] = _near(rng, old)
        case 3 if isinstance(holder, list):
            del holder[key]
        case 4 if isinstance(holder, list):
            holder[key:key] = [old] * rng.choice((1, 2, 300))
        case 5:
            other, place = rng.choice(places)
            holder[key], other[place] = other[place], old
        case 6:
            holder[key] = _nest(rng, old)
        case _:
            holder[key] = _near(rng, old)
    return tree


def _near(rng: Rng, old: Any) -> Any:
    """Another value of the same type."""
    match old:
        case bool():
            return not old
        case int():
            value = rng.choice((old + 1, old - 1, -old, old * 2, rng.getrandbits(rng.choice((1, 8, 16, 31, 53, 63)))))
            return max(-(2**63), min(2**64 - 1, value))
        case float():
            return rng.choice((old / 2, -old, old + 1.0, rng.random(), 5e-324))
        case bytes():
            return spoilt_bytes(rng, old)
        case str():
            return rng.choice((old + "\n", old[1:], old * 2, old.upper(), *NASTY_TEXT))
        case _:
            return rng.choice(NASTY_VALUES)


def _nest(rng: Rng, old: Any) -> Any:
    for _ in range(rng.choice((1, 3, 200))):
        old = [old] if rng.random() < 0.7 else {"x": old}
    return old


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < 400:
        node = waiting.pop()
        pairs = (
            list(enumerate(node)) if isinstance(node, list) else list(node.items()) if isinstance(node, dict) else []
        )
        found += [(node, key) for key, _ in pairs]
        waiting += [value for _, value in pairs]
    return found


# Topics

_TOPIC_BOMBS: Final = (
    *("", "/", "$SYS/broker", "fedhlm", "fedhlm/1", "fedhlm/1/", "fedhlm/2/cloud/status", "fedhlm/1/c//a//status"),
    *("fedhlm/1/c/../a/../status", "fedhlm/1/c/+/a/#/status", "fedhlm/1/" + "c/" * 2_000, "x" * 65_535),
    *("fedhlm/1/c/c0/escalate/" + "a" * 65_000, "fedhlm/1/c/c0\n/status", "fedhlm/1/cloud/verify/c0\0", "\ud800"),
)


def spoilt_topic(rng: Rng, name: str) -> str:
    """Another row's topic, a level of it spoilt, or a name that is none."""
    match rng.randrange(4):
        case 0:
            row = rng.choice(TABLE)
            cluster, agent = rng.choice((*CLUSTERS, "x")), rng.choice((*AGENTS, "x"))
            return row.name(cluster=cluster, agent=agent, client="client", member=agent)
        case 1:
            levels = name.split("/")
            levels[rng.randrange(len(levels))] = rng.choice(NASTY_TEXT)
            return "/".join(levels)
        case 2:
            return rng.choice(_TOPIC_BOMBS)
        case _:
            return name + rng.choice(("/", "\n", "/x", "x" * 64))


# Valid messages


def typed(rng: Rng, kind: Any) -> Any:
    """Any value of a struct type, within its limits and often at them."""
    made: Any = _value(rng, _info(kind), "")
    return made


@lru_cache(maxsize=256)
def _info(kind: Hashable) -> msgspec.inspect.Type:
    return msgspec.inspect.type_info(kind)


def _value(rng: Rng, kind: Any, name: str) -> Any:  # noqa: C901 - one case per kind of field
    special = SPECIAL.get(name)
    if special is not None and not isinstance(kind, msgspec.inspect.VarTupleType) and rng.random() < 0.8:
        return special(rng)
    match kind:
        case msgspec.inspect.IntType():
            low = kind.ge if kind.ge is not None else -(2**31)
            high = kind.le if kind.le is not None else (kind.lt or 2**31) - 1
            return rng.choice(
                (low, low + 1, high, high - 1, rng.randint(low, high), rng.randint(low, min(high, low + 40)))
            )
        case msgspec.inspect.FloatType():
            low_f, high_f = kind.ge or kind.gt or 0.0, kind.le if kind.le is not None else 1e308
            inside = (high_f, rng.uniform(low_f, min(high_f, 1.0)))
            return rng.choice(inside if kind.gt is not None or kind.ge is None else (low_f, *inside))
        case msgspec.inspect.StrType():
            if kind.pattern is not None:
                return rng.choice((*AGENTS, *CLUSTERS, "A" * 64, "0", "a.-_"))
            return "".join(rng.choices(string.printable, k=rng.choice((0, 1, 8, kind.max_length or 64)) % 2_000))[
                : kind.max_length
            ]
        case msgspec.inspect.BytesType():
            return rng.randbytes(min(rng.choice((0, 1, 2, 8, 64, 65, 300)), kind.max_length or 300))
        case msgspec.inspect.BoolType():
            return rng.random() < 0.5
        case msgspec.inspect.NoneType():
            return None
        case msgspec.inspect.LiteralType():
            return rng.choice(kind.values)
        case msgspec.inspect.UnionType():
            return _value(rng, rng.choice(kind.types), name)
        case msgspec.inspect.VarTupleType():
            return tuple(_value(rng, kind.item_type, "") for _ in range(rng.choice((0, 1, 1, 2, 4, 12))))
        case msgspec.inspect.DictType():
            return {
                _value(rng, kind.key_type, "measure"): _value(rng, kind.value_type, "")
                for _ in range(rng.choice((0, 1, 3)))
            }
        case msgspec.inspect.StructType():
            return kind.cls(**{field.name: _value(rng, field.type, field.name) for field in kind.fields})
        case _:
            raise TypeError(f"no values known for {kind!r}")


def _ids(rng: Rng, count: int) -> bytes:
    return pack_ids([rng.randrange(toy.VOCAB_SIZE) for _ in range(count)], toy.VOCAB_SIZE)


def curve(rng: Rng) -> bytes:
    """A curve's bytes, sometimes with sums at the limits."""
    made = Curve.empty()
    for _ in range(rng.choice((0, 1, 5, 100))):
        score = rng.random()
        made.see(score)
        made.add(score, rng.random(), rng.choice((1e-30, 1.0, 1e6, 1e29)))
    return made.to_bytes()


SPECIAL: Final[dict[str, Callable[[Rng], Any]]] = {
    "session": lambda rng: rng.randrange(SESSIONS),
    "epoch": lambda rng: rng.choice((0, 0, 1, 2, 2**31 - 1)),
    "base": lambda rng: rng.choice((0, 1, 5, 12, toy.CONTEXT, MAX_CONTEXT)),
    "ids": lambda rng: _ids(rng, rng.choice((0, 1, 8, 40))),
    "context": lambda rng: _ids(rng, rng.choice((0, 1, 5, 12))),
    "fingerprint": lambda _rng: toy.FINGERPRINT,
    "upstream": lambda _rng: toy.FINGERPRINT,
    "coupling": lambda rng: rng.choice(sorted(COUPLINGS)),
    "key": lambda rng: rng.randbytes(DIMS),
    "keys": lambda rng: rng.randbytes(DIMS * 65),
    "uncertainties": lambda rng: rng.randbytes(65),
    "dims": lambda _rng: DIMS,
    "space": lambda _rng: "",
    "curves": lambda rng: {f"closed-form/{name}/sampled": curve(rng) for name in rng.sample(sorted(COUPLINGS), 2)},
    "preset": lambda rng: rng.choice((None, "exact", "budget", "hlm")),
    "text": lambda rng: "".join(rng.choices(string.ascii_lowercase, k=rng.choice((1, 5, 30)))),
    "max_tokens": lambda rng: rng.choice((1, 4, 16)),
    "missed": lambda rng: rng.randbytes(rng.choice((0, 1, 3))),
    "target_probs": lambda rng: struct.pack("<4e", *(rng.random() for _ in range(4))),
    "members": lambda rng: rng.choice((0, 1, 5, 2**31 - 1)),
}  # fmt: skip


@lru_cache(maxsize=512)
def _law(coupling: str, number: int) -> bytes:
    return COUPLINGS[coupling].draft(toy.small_logits((number, number + 1), 0.5), Sampling(number), number).law


def _header(rng: Rng) -> dict[str, Any]:
    return {
        "version": SCHEMA_VERSION,
        "sender": "a0",
        "sequence": rng.getrandbits(31),
        "sent_ms": rng.choice((0, 10**12, 2**53 - 1)),
    }


def escalation(rng: Rng) -> Escalation:
    """A block that the cloud can settle: any coupling with its laws, fixed ids, branches where they are allowed."""
    name = rng.choice(sorted(COUPLINGS))
    sampling = Sampling(rng.getrandbits(40), rng.choice((0.0, 0.8, 10.0)), rng.choice((1.0, 0.5, 1e-6)), name)
    base, count = rng.randint(1, 12), rng.choice((0, 1, 4, 16))
    fixed = rng.randint(0, count)
    drafts = count - fixed
    branches: list[Branch] = []
    if COUPLINGS[name].shared and rng.random() < 0.5:
        branches = [
            Branch(rng.randrange(drafts + 1 + i), rng.randrange(toy.VOCAB_SIZE)) for i in range(rng.randint(0, 6))
        ]
    hints = Hints(rng.choice((None, 0.0, 0.8)), rng.choice((1, 3, 64)), pack_branches(branches, toy.VOCAB_SIZE))
    return Escalation(
        **_header(rng),
        session=rng.randrange(SESSIONS),
        epoch=rng.choice((0, 0, 1, 2)),
        base=base,
        ids=_ids(rng, count),
        patience_ms=rng.choice((0, 100, 10_000, 2**53 - 1)),
        fixed=fixed,
        extend=rng.choice((0, 1, 1, 8)) if count else 1,
        before=Prime(sampling, toy.FINGERPRINT, _ids(rng, base)) if rng.random() < 0.7 else rng.getrandbits(32),
        laws=b"".join(_law(name, rng.randrange(64)) for _ in range(drafts)),
        hints=hints if branches or rng.random() < 0.3 else None,
    )  # fmt: skip


def batch(rng: Rng) -> EscalationBatch:
    """Blocks of a few agents together."""
    items = [RoutedEscalation(rng.choice(AGENTS), escalation(rng)) for _ in range(rng.choice((1, 1, 3)))]
    return EscalationBatch(**_header(rng), items=tuple(items))


COHERENT: Final[tuple[Callable[[Rng], AnyMessage], ...]] = (escalation, batch, batch)


def row_of(name: str) -> Topic | None:
    """The topic row that a name belongs to."""
    found = topics.lookup(name)
    return None if found is None else found[0]
