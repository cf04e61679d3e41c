"""Payloads of parts that know one pair of models only, as today's messages."""

from typing import Final

import msgspec

# How a Contribution and a Learned begin (an array of 9 or 10 values, then the tag), and where their thresholds are.
_PLACES: Final = {b"\x99\x0a": 7, b"\x9a\x0b": 8}
_NIL: Final = 0xC0
_NOTHING: Final = 0x80  # an empty map


def with_thresholds(payload: bytes) -> bytes:
    """Return the payload with no thresholds where it has nil in their place, as older parts do; else as it is."""
    place = _PLACES.get(payload[:2])
    if place is None or _NIL not in payload:
        return payload
    try:
        values = msgspec.msgpack.decode(payload, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return payload
    if bytes(values[place]) != bytes([_NIL]):
        return payload
    at = 1 + sum(len(bytes(value)) for value in values[:place])
    return payload[:at] + bytes([_NOTHING]) + payload[at + 1 :]
