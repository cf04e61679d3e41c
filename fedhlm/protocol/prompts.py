"""The limits of each field of a prompt, in words, and the error for a prompt that cannot be decoded."""

import re
from typing import Any, Final, NamedTuple

import msgspec

from fedhlm.errors import ConfigError, ProtocolError
from fedhlm.protocol.codec import decode
from fedhlm.protocol.fields import MAX_GRAMMAR, MAX_STOPS, MAX_TEXT, MAX_TOKENS, NAME_PATTERN, Name
from fedhlm.protocol.messages import Prompt

_NAME: Final = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
EXPECTED: Final = {
    "agent": _NAME,
    "cluster": _NAME,
    "request": _NAME,
    "text": f"at most {MAX_TEXT} Unicode characters",
    "max_tokens": f"an integer from 1 to {MAX_TOKENS}",
    "seed": "an integer from 0 to 2**63 - 1",
    "temperature": "a number from 0 to 10",
    "top_p": "a number above 0 and up to 1",
    "top_k": "an integer from 0 (off) to 2**24 - 1",
    "min_p": "a number from 0 (off) to 1",
    "stop": f"at most {MAX_STOPS} texts",
    "preset": "the name of a shipped preset",
    "patience_ms": "a number of milliseconds, 0 or more",
    "connection": _NAME,
    "receipt": "true or false",
    "grammar": f"at most {MAX_GRAMMAR} characters of a grammar in llguidance's Lark dialect",
}
_FIELDS: Final = Prompt.__struct_fields__
_TYPES: Final = {field.name: field.type for field in msgspec.structs.fields(Prompt)} | {"agent": Name, "cluster": Name}
_TAG: Final = Prompt.__struct_config__.tag
_SHOWN: Final = 64  # characters of a value that an error shows
_HEAD: Final = 1 + _FIELDS.index("text")  # the tag, the header and the request's name
# The msgpack format: bytes before the first value of an array, of a text's length, and of a scalar with its first byte.
_ARRAYS: Final = {0xDC: 3, 0xDD: 5}
_TEXTS: Final = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_SCALARS: Final = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCC: 2, 0xD0: 2, 0xCD: 3, 0xD1: 3} | {
    **dict.fromkeys((0xCA, 0xCE, 0xD2), 5),
    **dict.fromkeys((0xCB, 0xCF, 0xD3), 9),
}


def check(key: str, value: object) -> None:
    """Check a field of a prompt before it is sent, or a level of its topic. `key` is a key of EXPECTED.

    Raises:
        ConfigError: the value is out of range, has another type, or is no valid Unicode text.
    """
    try:
        msgspec.convert(value, _TYPES[key])
        str(value).encode()
    except (msgspec.ValidationError, ValueError) as exc:
        shown = _shown(value)
        raise ConfigError(key, value if len(shown) <= _SHOWN else shown, EXPECTED[key]) from exc


class Unusable(NamedTuple):
    """An invalid prompt: the name of the request, its sender (None: unreadable), and what is wrong.

    `reason` is empty for a valid prompt, which came on a topic that is not its sender's.
    """

    request: str
    client: str | None
    reason: str


def unusable(payload: bytes) -> Unusable | None:
    """Find out what is wrong with a payload that is no valid Prompt; None where its request name cannot be read."""
    try:
        values = msgspec.msgpack.decode(payload, type=list[msgspec.Raw])
        whole = True
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        values = leading_scalars(payload, _HEAD)
        whole = False
    tag, *rest = values or (msgspec.Raw(b"\xc0"),)
    fields = dict(zip(_FIELDS, rest, strict=False))
    request, client = _name(fields.get("request")), _name(fields.get("sender"))
    if _plain(tag) != _TAG or request is None:
        return None
    for key, value in fields.items():
        if key in EXPECTED:
            try:
                msgspec.msgpack.decode(value, type=_TYPES[key])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return Unusable(request, client, f"{key} of the prompt must be {EXPECTED[key]}{_got(value)}")
    if not whole:
        return Unusable(request, client, "the prompt must be one whole msgpack array (docs/protocol.md)")
    if _valid(payload):
        return Unusable(request, client, "")
    return Unusable(request, client, "the prompt is not one of this version of the protocol (docs/protocol.md)")


def leading_scalars(payload: bytes, count: int) -> list[msgspec.Raw]:
    """The first values of a msgpack array, `count` at most, whatever comes after them.

    It ends before a value that is neither nil, bool, number nor text, and before one that is cut off.
    """
    first = payload[0] if payload else 0
    short = first & 0xF0 == 0x90
    at = 1 if short else _ARRAYS.get(first, len(payload))
    count = min(count, first & 0x0F if short else int.from_bytes(payload[1:at]))
    found: list[msgspec.Raw] = []
    while at < len(payload) and len(found) < count:
        end = at + _length(payload[at : at + 5])
        if end == at or end > len(payload):
            break
        found.append(msgspec.Raw(payload[at:end]))
        at = end
    return found


def _length(head: bytes) -> int:
    """Bytes of the scalar at the start; 0 where there is another value."""
    first = head[0]
    if first < 0x80 or first >= 0xE0:  # a small integer
        return 1
    if first & 0xE0 == 0xA0:  # a short text
        return 1 + (first & 0x1F)
    if (size := _TEXTS.get(first)) is not None:
        return 1 + size + int.from_bytes(head[1 : 1 + size])
    return _SCALARS.get(first, 0)


def _got(raw: msgspec.Raw) -> str:
    try:
        return f" (got {_shown(msgspec.msgpack.decode(raw))})"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def _shown(value: object) -> str:
    """The value in ASCII, cut where it is long."""
    shown = repr(value).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _valid(payload: bytes) -> bool:
    try:
        return isinstance(decode(payload), Prompt)
    except ProtocolError:
        return False


def _name(raw: msgspec.Raw | None) -> str | None:
    value = None if raw is None else _plain(raw)
    return value if isinstance(value, str) and re.fullmatch(NAME_PATTERN, value) else None


def _plain(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
