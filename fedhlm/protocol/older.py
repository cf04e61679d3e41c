"""Payloads of parts that know one pair of models only, as today's messages."""

from typing import Final

import msgspec

# The tags of a Contribution and a Learned, and where their thresholds are among the values.
_PLACES: Final = {0x0A: 7, 0x0B: 8}
_SHORT_ARRAY: Final = 0x90  # the upper half of the first byte of an array of up to 15 values
_NIL: Final = 0xC0
_NOTHING: Final = 0x80  # an empty map


def with_thresholds(payload: bytes) -> bytes:
    """Return the payload with no thresholds where it has nil in their place, as older parts do; else as it is."""
    begin = payload[:2]
    place = _PLACES.get(begin[1]) if len(begin) == 2 and begin[0] & 0xF0 == _SHORT_ARRAY else None
    if place is None or _NIL not in payload:
        return payload
    try:
        values = msgspec.msgpack.decode(payload, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return payload
    if len(values) <= place or bytes(values[place]) != bytes([_NIL]):
        return payload
    at = 1 + sum(len(bytes(value)) for value in values[:place])
    return payload[:at] + bytes([_NOTHING]) + payload[at + 1 :]
