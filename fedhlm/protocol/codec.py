"""Messages as msgpack: one encoder and one decoder for all.

For a payload that breaks a limit or a type, `decode` raises ProtocolError and nothing else.
"""

from typing import Final

import msgspec

from fedhlm.errors import ProtocolError
from fedhlm.protocol.fields import MAX_PAYLOAD_BYTES
from fedhlm.protocol.messages import SCHEMA_VERSION, AnyMessage, Message
from fedhlm.protocol.older import with_thresholds

_encoder: Final = msgspec.msgpack.Encoder()
_USUAL_BYTES: Final = 3 + 9  # msgpack of a running number of 256 to 65,535 and of a time after February 1970
_decoder: Final[msgspec.msgpack.Decoder[AnyMessage]] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Encode a message as msgpack."""
    return _encoder.encode(message)


def comparable_bytes(message: Message, payload_bytes: int) -> int:
    """Size in bytes of an encoded message of `payload_bytes`, with a running number and a time of usual size.

    Messages of equal content have equal sizes, whenever and after however many messages they are sent. The headers of
    messages inside a batch are counted as they are.
    """
    varying = len(_encoder.encode(message.sequence)) + len(_encoder.encode(message.sent_ms))
    return payload_bytes - varying + _USUAL_BYTES


def decode(payload: bytes) -> AnyMessage:
    """Decode a payload into a message.

    Raises:
        ProtocolError: the payload is too large, not msgpack or not a known message, has a field out of range, or has
            another schema version.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"payload must be at most {MAX_PAYLOAD_BYTES} bytes (got {len(payload)})")
    try:
        message = _decoder.decode(with_thresholds(payload))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"payload of {len(payload)} bytes is not a message: {exc}") from exc
    if message.version != SCHEMA_VERSION:
        raise ProtocolError(f"message.version must be {SCHEMA_VERSION} (got {message.version})")
    return message
