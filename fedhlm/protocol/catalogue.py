"""A description of every message, read from its type: fields with place, type, unit, limits, default and meaning.

`python -m fedhlm.protocol.catalogue docs/protocol.md docs/asyncapi.json` writes the generated parts of these files.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import msgspec
from msgspec import inspect

from fedhlm.marks import cell, rewrite
from fedhlm.protocol import asyncapi, fields, messages, open_topics, topics
from fedhlm.protocol.codec import encode

HEADER: Final = messages.Message
KINDS: Final[tuple[type[messages.AnyMessage], ...]] = get_args(messages.AnyMessage)
_NAME: Final = rf"^{fields.NAME_PATTERN}\Z"
_NOTHING: Final = {"": '""', b"": "empty", (): "[]"}
_POWER_FROM: Final = 1 << 17  # larger limits are written as powers of two


class FieldFacts(NamedTuple):
    """A field of a message: its place in the array, name, type, unit, limits, default ("required") and meaning."""

    place: int
    name: str
    type: str
    unit: str
    limits: str
    default: str
    meaning: str


def structs() -> list[type[msgspec.Struct]]:
    """Return the structs that messages hold, each before those that hold it."""
    found: dict[type[msgspec.Struct], None] = {}
    for kind in KINDS:
        _collect(inspect.type_info(kind), found)
    return [struct for struct in found if struct not in KINDS]


def field_facts(struct: type[msgspec.Struct]) -> list[FieldFacts]:
    """Return the fields of a struct. A message's own come without its header; the fields of the header with HEADER."""
    info = inspect.type_info(struct)
    if not isinstance(info, inspect.StructType):
        raise TypeError(f"{struct!r} is not a struct")
    first = 0 if info.tag is None and struct is not HEADER else 1
    inherited = len(HEADER.__struct_fields__) if issubclass(struct, HEADER) and struct is not HEADER else 0
    return [
        FieldFacts(
            first + place, field.name, _type(field.type), unit, limits(field.type), _default(field), meaning
        )
        for place, field in enumerate(info.fields)
        if place >= inherited
        for unit, meaning in [asyncapi.meaning(struct, field.name)]
    ]  # fmt: skip


def limits(kind: inspect.Type) -> str:
    """Return the limits of a value in words; empty where every value of the type is valid."""
    match kind:
        case inspect.IntType() | inspect.FloatType():
            return _range(kind)
        case inspect.StrType(pattern=pattern) if pattern == _NAME:
            return "a name"
        case inspect.StrType(max_length=int(most)):
            return f"at most {most:,} characters"
        case inspect.BytesType(max_length=int(most)):
            return f"at most {most:,} bytes"
        case inspect.LiteralType():
            return " ".join(f"`{value}`" for value in kind.values)
        case inspect.VarTupleType():
            return _joined(_entries(kind.max_length), _each("each", kind.item_type))
        case inspect.DictType():
            keys, values = _each("key", kind.key_type), _each("value", kind.value_type)
            return _joined(_entries(kind.max_length), keys, values)
        case inspect.UnionType():
            return _joined(*map(limits, kind.types))
        case _:
            return ""


def parts() -> dict[str, str]:
    """Return the generated parts of docs/protocol.md, by the name of their marks."""
    return {
        "topics": topics.markdown(),
        "open topics": open_topics.markdown(),
        "constants": "\n".join(_constants()),
        "header": "\n".join(_table(HEADER)),
        "example": "\n".join(_example()),
        "messages": "\n\n".join("\n".join(_section(kind)) for kind in KINDS),
        "structs": "\n\n".join("\n".join(_section(struct)) for struct in structs()),
    }


def document() -> str:
    """Return docs/asyncapi.json."""
    return json.dumps(asyncapi.document(), indent=2) + "\n"


def _collect(kind: Any, found: dict[type[msgspec.Struct], None]) -> None:
    if isinstance(kind, inspect.StructType):
        for field in kind.fields:
            _collect(field.type, found)
        found.setdefault(kind.cls)
    elif isinstance(kind, inspect.UnionType):
        for one in kind.types:
            _collect(one, found)
    elif isinstance(kind, inspect.VarTupleType):
        _collect(kind.item_type, found)
    elif isinstance(kind, inspect.DictType):
        _collect(kind.value_type, found)


def _type(kind: inspect.Type) -> str:
    match kind:
        case inspect.IntType():
            return "int"
        case inspect.FloatType():
            return "float"
        case inspect.StrType() | inspect.LiteralType():
            return "str"
        case inspect.BytesType():
            return "bin"
        case inspect.BoolType():
            return "bool"
        case inspect.NoneType():
            return "nil"
        case inspect.VarTupleType():
            return f"array of {_type(kind.item_type)}"
        case inspect.DictType():
            return f"map of str to {_type(kind.value_type)}"
        case inspect.StructType():
            return f"[{kind.cls.__name__}](#{kind.cls.__name__.lower()})"
        case inspect.UnionType():
            named = [_type(one) for one in kind.types if not isinstance(one, inspect.NoneType)]
            return " or ".join([*named, *(["nil"] if len(named) < len(kind.types) else [])])
        case _:
            raise TypeError(f"{kind!r} has no name in docs/protocol.md")


def _joined(*told: str) -> str:
    return ", ".join(part for part in told if part)


def _entries(most: int | None) -> str:
    return "" if most is None else f"at most {most:,} entries"


def _each(word: str, kind: inspect.Type) -> str:
    told = limits(kind)
    return told and f"{word} {told}"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    low = kind.ge if kind.ge is not None else kind.gt
    high = kind.le if kind.le is not None else kind.lt
    if low is None or high is None:
        return ""
    above = "above " if kind.gt is not None else ""
    if kind.lt is not None:
        if not isinstance(kind, inspect.IntType):
            return f"{above}{_number(low)} to below {_number(high)}"
        high = int(high) - 1
    return f"{above}{_number(low)}{', up' if above else ''} to {_number(high)}"


def _number(value: float) -> str:
    whole = int(value)
    for power, shown in ((whole, ""), (whole + 1, " - 1")):
        if whole >= _POWER_FROM and power & (power - 1) == 0:
            return f"2^{power.bit_length() - 1}{shown}"
    return f"{whole:,}" if whole == value else f"{value:g}"


def _default(field: inspect.Field) -> str:
    if field.required:
        return "required"
    if field.default_factory is not msgspec.NODEFAULT:
        made = field.default_factory()
        return "{}" if isinstance(made, dict) else "[]"
    if field.default is None:
        return "nil"
    if isinstance(field.default, str | bytes | tuple) and not field.default:
        return _NOTHING[field.default]
    return f"`{field.default}`"


def _constants() -> Iterator[str]:
    yield "| constant | value |"
    yield "|---|---|"
    yield f"| schema version | {messages.SCHEMA_VERSION} |"
    yield f"| root of all topics, by default | `{topics.DEFAULT_ROOT}` |"
    yield f"| a name | `{cell(fields.NAME_PATTERN)}`, whole and in ASCII |"
    yield f"| largest payload | {fields.MAX_PAYLOAD_BYTES:,} bytes |"


def _example() -> Iterator[str]:
    prompt = messages.Prompt(
        version=messages.SCHEMA_VERSION, sender="me", sequence=1, sent_ms=1_800_000_000_000, request="me-1",
        text="Oil prices rise", max_tokens=32, seed=7,
    )  # fmt: skip
    payload = encode(prompt)
    array = json.dumps(msgspec.msgpack.decode(payload))
    yield f"As JSON, and as {len(payload)} bytes of msgpack:"
    yield ""
    yield f"    {array}"
    yield ""
    yield from (f"    {payload[at : at + 24].hex(' ')}" for at in range(0, len(payload), 24))


def _table(struct: type[msgspec.Struct]) -> Iterator[str]:
    yield "| place | field | type | unit | limits | default | meaning |"
    yield "|" + "---|" * 7
    for row in field_facts(struct):
        cells = (str(row.place), f"`{row.name}`", row.type, row.unit, row.limits, row.default, row.meaning)
        yield f"| {' | '.join(map(cell, cells))} |"


def _section(struct: type[msgspec.Struct]) -> Iterator[str]:
    tag = struct.__struct_config__.tag
    yield f"### {struct.__name__}"
    yield ""
    yield asyncapi.summary(struct) + ("" if tag is None else f" Tag {tag}.")
    yield ""
    yield from _table(struct)


def main(paths: list[str]) -> int:
    """Write the generated parts of pages (.md), and the document for AsyncAPI (.json)."""
    pages = [path for path in paths if path.endswith(".md")]
    rewrite(pages, parts())
    for path in set(paths) - set(pages):
        Path(path).write_text(document(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
