"""Decodes and encodes MQTT 3.1.1 and 5 packets as a broker needs them; no I/O.

The readers take a packet's body, which follows its remaining length. They raise `MqttError` with the reason code that
the standard assigns to the fault. Source: OASIS MQTT 3.1.1 and 5.0; sections are cited as in 5.0.
"""

import struct
from collections.abc import Callable, Collection, Iterable
from typing import Final, NamedTuple

from edge_broker.mqtt.packets import (
    V3,
    V5,
    VERSIONS,
    Asked,
    BrokerMessage,
    Connect,
    MqttError,
    PacketType,
    Property,
    Publish,
    ReasonCode,
)

# Properties that are forwarded unchanged. The expiry is forwarded too, less the time that the message waited (3.3.2.3).
_FORWARDED: Final = frozenset(
    {Property.PAYLOAD_FORMAT, Property.CONTENT_TYPE, Property.RESPONSE_TOPIC, Property.CORRELATION, Property.USER}
)
_REPEATED: Final = frozenset({Property.USER, Property.SUBSCRIPTION_ID})
_OF_PUBLISH: Final = _FORWARDED | {Property.MESSAGE_EXPIRY, Property.SUBSCRIPTION_ID, Property.TOPIC_ALIAS}
_OF_WILL: Final = _FORWARDED | {Property.MESSAGE_EXPIRY, Property.WILL_DELAY}
_OF_CONNECT: Final = frozenset(
    {
        Property.SESSION_EXPIRY,
        Property.RECEIVE_MAXIMUM,
        Property.MAXIMUM_PACKET,
        Property.TOPIC_ALIAS_MAXIMUM,
        Property.REQUEST_RESPONSE,
        Property.REQUEST_PROBLEM,
        Property.USER,
        Property.AUTH_METHOD,
        Property.AUTH_DATA,
    }
)
_OF_SUBSCRIBE: Final = frozenset({Property.SUBSCRIPTION_ID, Property.USER})
_OF_UNSUBSCRIBE: Final = frozenset({Property.USER})
_OF_ANSWER: Final = frozenset({Property.REASON_STRING, Property.USER})
_OF_DISCONNECT: Final = _OF_ANSWER | {Property.SESSION_EXPIRY, Property.SERVER_REFERENCE}
_NOT_ZERO: Final = frozenset({Property.RECEIVE_MAXIMUM, Property.MAXIMUM_PACKET, Property.SUBSCRIPTION_ID})


class _Body:
    """A cursor over a packet's body."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise MqttError(ReasonCode.MALFORMED, "the packet ends too early")
        taken, self.at = self.data[self.at : end], end
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def short(self) -> int:
        return int.from_bytes(self.take(2))

    def long(self) -> int:
        return int.from_bytes(self.take(4))

    def binary(self) -> bytes:
        return self.take(self.short())

    def text(self) -> str:
        try:
            found = self.binary().decode()
        except UnicodeDecodeError as exc:
            raise MqttError(ReasonCode.MALFORMED, "a string must be UTF-8") from exc
        if "\0" in found:
            raise MqttError(ReasonCode.MALFORMED, "a string must not contain U+0000")
        return found

    def varint(self) -> int:
        value = 0
        for shift in (0, 7, 14, 21):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise MqttError(ReasonCode.MALFORMED, "a length must have at most four bytes")

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def pair(self) -> tuple[str, str]:
        return self.text(), self.text()

    @property
    def done(self) -> bool:
        return self.at == len(self.data)


_READERS: Final[dict[Property, Callable[[_Body], object]]] = {
    **dict.fromkeys(
        (
            Property.PAYLOAD_FORMAT,
            Property.REQUEST_PROBLEM,
            Property.REQUEST_RESPONSE,
            Property.MAXIMUM_QOS,
            Property.RETAIN_AVAILABLE,
            Property.WILDCARDS,
            Property.SUBSCRIPTION_IDS,
            Property.SHARED,
        ),
        _Body.byte,
    ),
    **dict.fromkeys(
        (
            Property.SERVER_KEEP_ALIVE,
            Property.RECEIVE_MAXIMUM,
            Property.TOPIC_ALIAS_MAXIMUM,
            Property.TOPIC_ALIAS,
        ),
        _Body.short,
    ),
    **dict.fromkeys(
        (Property.MESSAGE_EXPIRY, Property.SESSION_EXPIRY, Property.WILL_DELAY, Property.MAXIMUM_PACKET), _Body.long
    ),
    **dict.fromkeys(
        (
            Property.CONTENT_TYPE,
            Property.RESPONSE_TOPIC,
            Property.ASSIGNED_ID,
            Property.AUTH_METHOD,
            Property.RESPONSE_INFORMATION,
            Property.SERVER_REFERENCE,
            Property.REASON_STRING,
        ),
        _Body.text,
    ),
    **dict.fromkeys((Property.CORRELATION, Property.AUTH_DATA), _Body.binary),
    Property.SUBSCRIPTION_ID: _Body.varint,
    Property.USER: _Body.pair,
}


class _Found(NamedTuple):
    values: dict[Property, object]
    extras: bytes

    def number(self, key: Property, default: int) -> int:
        value = self.values.get(key)
        return value if isinstance(value, int) else default


_NONE: Final = _Found({}, b"")


def _properties(body: _Body, allowed: frozenset[Property]) -> _Found:
    length = body.varint()
    if not length:
        return _NONE
    inner = _Body(body.take(length))
    values: dict[Property, object] = {}
    extras = bytearray()
    while not inner.done:
        start = inner.at
        number = inner.varint()
        try:
            key = Property(number)
        except ValueError as exc:
            raise MqttError(ReasonCode.MALFORMED, f"property {number} is unknown") from exc
        if key not in allowed or (key in values and key not in _REPEATED):
            raise MqttError(ReasonCode.PROTOCOL_ERROR, f"property {key.name} is not allowed here")
        values[key] = _READERS[key](inner)
        if key in _NOT_ZERO and values[key] == 0:
            raise MqttError(ReasonCode.PROTOCOL_ERROR, f"property {key.name} must not be 0")
        if key in _FORWARDED:
            extras += inner.data[start : inner.at]
    return _Found(values, bytes(extras))


def read_connect(data: bytes, versions: Collection[int] = VERSIONS) -> Connect:
    """Decode a CONNECT (3.1).

    An unknown version raises UNSUPPORTED_VERSION before anything else is checked.
    """
    body = _Body(data)
    if body.binary() not in (b"MQTT", b"MQIsdp"):
        raise MqttError(ReasonCode.MALFORMED, "protocol name must be MQTT or MQIsdp")
    version = body.byte()
    if version not in versions:
        known = " or ".join(map(str, versions))
        raise MqttError(ReasonCode.UNSUPPORTED_VERSION, f"protocol level must be {known} (got {version})")
    flags = body.byte()
    will_qos = flags >> 3 & 3
    if flags & 1 or will_qos > 2 or (not flags & 4 and flags & 0x38) or (version == V3 and flags & 0xC0 == 0x40):
        raise MqttError(ReasonCode.MALFORMED, f"flags of CONNECT are invalid (got {flags:#04x})")
    keep_alive_s = body.short()
    found = _properties(body, _OF_CONNECT) if version == V5 else _NONE
    if Property.AUTH_METHOD in found.values:
        raise MqttError(ReasonCode.BAD_AUTHENTICATION, "authentication methods are not supported")
    client_id = body.text()
    will = None
    if flags & 4:
        of_will = _properties(body, _OF_WILL) if version == V5 else _NONE
        topic, payload = body.text(), body.binary()
        check_topic(topic)
        expiry = of_will.values.get(Property.MESSAGE_EXPIRY)
        # A will expires after its publication, so this is a time span until then.
        lasts_s = float(expiry) if isinstance(expiry, int) else None
        will = BrokerMessage(topic, payload, will_qos, bool(flags & 0x20), of_will.extras, lasts_s)
    username = body.text() if flags & 0x80 else None
    password = body.binary() if flags & 0x40 else None
    if not body.done:
        raise MqttError(ReasonCode.MALFORMED, "CONNECT has bytes after its last field")
    largest = found.values.get(Property.MAXIMUM_PACKET)
    return Connect(
        version,
        client_id,
        bool(flags & 2),
        keep_alive_s,
        username,
        password,
        will,
        found.number(Property.RECEIVE_MAXIMUM, 65_535),
        largest if isinstance(largest, int) else None,
    )


def read_publish(flags: int, data: bytes, version: int, now_s: float) -> Publish:
    """Decode a PUBLISH (3.3).

    `flags` are the low four bits of its first byte; `now_s` is the broker's clock in seconds.
    """
    qos = flags >> 1 & 3
    if qos == 3 or (not qos and flags & 8):
        raise MqttError(ReasonCode.MALFORMED, f"flags of PUBLISH are invalid (got {flags:#03x})")
    body = _Body(data)
    topic = body.text()
    number = body.short() if qos else 0
    if qos and not number:
        raise MqttError(ReasonCode.MALFORMED, "packet identifier must be at least 1 (got 0)")
    found = _properties(body, _OF_PUBLISH) if version == V5 else _NONE
    if Property.TOPIC_ALIAS in found.values:
        raise MqttError(ReasonCode.TOPIC_ALIAS, "topic aliases were not offered")
    if Property.SUBSCRIPTION_ID in found.values:
        raise MqttError(ReasonCode.PROTOCOL_ERROR, "a client's PUBLISH must not have a subscription identifier")
    check_topic(topic)
    expiry = found.values.get(Property.MESSAGE_EXPIRY)
    expires_s = now_s + expiry if isinstance(expiry, int) else None
    message = BrokerMessage(topic, body.rest(), qos, bool(flags & 1), found.extras, expires_s)
    return Publish(message, number, bool(flags & 8))


def read_answer(data: bytes, version: int) -> tuple[int, int]:
    """Decode a PUBACK, PUBREC, PUBREL or PUBCOMP (3.4 to 3.7) into packet identifier and reason code."""
    body = _Body(data)
    number = body.short()
    if version == V3 or body.done:
        return number, 0
    reason = body.byte()
    if not body.done:
        _properties(body, _OF_ANSWER)
    return number, reason


def read_subscribe(data: bytes, version: int) -> tuple[int, list[Asked]]:
    """Decode a SUBSCRIBE (3.8) into packet identifier and filters. The caller must check the filters."""
    body = _Body(data)
    number = body.short()
    found = _properties(body, _OF_SUBSCRIBE) if version == V5 else _NONE
    tag = found.values.get(Property.SUBSCRIPTION_ID)
    asked: list[Asked] = []
    while not body.done:
        pattern, options = body.text(), body.byte()
        qos, handling = options & 3, options >> 4 & 3
        if qos == 3 or handling == 3 or options & (0xC0 if version == V5 else 0xFC):
            raise MqttError(ReasonCode.MALFORMED, f"options of a subscription are invalid (got {options:#04x})")
        shared = pattern.startswith("$share/")
        if shared and options & 4:
            raise MqttError(ReasonCode.PROTOCOL_ERROR, "a shared subscription must not set No Local")
        asked.append(
            Asked(pattern, qos, bool(options & 4), bool(options & 8), handling, tag if isinstance(tag, int) else None)
        )
    if not number or not asked:
        raise MqttError(ReasonCode.PROTOCOL_ERROR, "SUBSCRIBE must have a packet identifier and a filter")
    return number, asked


def read_unsubscribe(data: bytes, version: int) -> tuple[int, list[str]]:
    """Decode an UNSUBSCRIBE (3.10) into packet identifier and filters."""
    body = _Body(data)
    number = body.short()
    if version == V5:
        _properties(body, _OF_UNSUBSCRIBE)
    patterns: list[str] = []
    while not body.done:
        patterns.append(body.text())
    if not number or not patterns:
        raise MqttError(ReasonCode.PROTOCOL_ERROR, "UNSUBSCRIBE must have a packet identifier and a filter")
    return number, patterns


def read_disconnect(data: bytes, version: int) -> int:
    """Decode a DISCONNECT (3.14) into its reason code."""
    body = _Body(data)
    if version == V3 or body.done:
        return 0
    reason = body.byte()
    if not body.done:
        _properties(body, _OF_DISCONNECT)
    return reason


def check_topic(topic: str) -> None:
    """Check a topic name (4.7.1), which must not be empty and has no wildcards.

    Raises:
        MqttError: the name is invalid.
    """
    if not topic or "+" in topic or "#" in topic:
        raise MqttError(ReasonCode.BAD_TOPIC, "a topic name must not be empty or have wildcards")


# Encoding


def packet(kind: PacketType, body: bytes, flags: int = 0) -> bytes:
    """Encode a whole packet."""
    return bytes([kind << 4 | flags]) + varint(len(body)) + body


def varint(value: int) -> bytes:
    """Encode a variable byte integer (1.5.5)."""
    if value < 0x80:
        return bytes([value])
    found = bytearray()
    while True:
        value, byte = value >> 7, value & 0x7F
        found.append(byte | 0x80 if value else byte)
        if not value:
            return bytes(found)


def text(value: str) -> bytes:
    """Encode a string with its length."""
    data = value.encode()
    return struct.pack(">H", len(data)) + data


_SHORTS: Final = frozenset({Property.RECEIVE_MAXIMUM, Property.TOPIC_ALIAS_MAXIMUM, Property.SERVER_KEEP_ALIVE})
_LONGS: Final = frozenset({Property.MAXIMUM_PACKET, Property.SESSION_EXPIRY, Property.MESSAGE_EXPIRY})


def properties(values: Iterable[tuple[Property, int | str]], extras: bytes = b"") -> bytes:
    """Encode a property section with its length."""
    found = bytearray()
    for key, value in values:
        found += varint(key)
        if isinstance(value, str):
            found += text(value)
        elif key is Property.SUBSCRIPTION_ID:
            found += varint(value)
        else:
            found += value.to_bytes(2 if key in _SHORTS else 4 if key in _LONGS else 1)
    return varint(len(found) + len(extras)) + bytes(found) + extras


# The return codes of CONNACK in 3.1.1 (its table 3.1), by the reason codes of 5.
_OLD_CODES: Final = {
    ReasonCode.SUCCESS: 0,
    ReasonCode.UNSUPPORTED_VERSION: 1,
    ReasonCode.BAD_CLIENT_ID: 2,
    ReasonCode.SERVER_BUSY: 3,
    ReasonCode.BAD_LOGIN: 4,
    ReasonCode.NOT_AUTHORISED: 5,
}


def connack(version: int, reason: ReasonCode, values: Iterable[tuple[Property, int | str]] = ()) -> bytes:
    """Encode a CONNACK (3.2). A session is never present."""
    if version == V5:
        return packet(PacketType.CONNACK, bytes([0, reason]) + properties(values))
    return packet(PacketType.CONNACK, bytes([0, _OLD_CODES.get(reason, 3)]))


def publish(
    message: BrokerMessage,
    version: int,
    *,
    qos: int,
    retain: bool,
    number: int = 0,
    tags: Iterable[int] = (),
    now_s: float = 0.0,
    duplicate: bool = False,
) -> bytes:
    """Encode a PUBLISH for a subscriber.

    `tags` are its subscription identifiers; `now_s` is the broker's clock in seconds.
    """
    head = text(message.topic)
    if qos:
        head += struct.pack(">H", number)
    if version == V5:
        values: list[tuple[Property, int | str]] = [(Property.SUBSCRIPTION_ID, tag) for tag in tags]
        if message.expires_s is not None:
            values.append((Property.MESSAGE_EXPIRY, max(1, round(message.expires_s - now_s))))
        head += properties(values, message.extras)
    flags = duplicate << 3 | qos << 1 | retain
    return bytes([PacketType.PUBLISH << 4 | flags]) + varint(len(head) + len(message.payload)) + head + message.payload


def answer(kind: PacketType, number: int, version: int, reason: ReasonCode = ReasonCode.SUCCESS) -> bytes:
    """Encode a PUBACK, PUBREC, PUBREL or PUBCOMP."""
    body = struct.pack(">H", number)
    if version == V5 and reason:
        body += bytes([reason])
    return packet(kind, body, 2 if kind is PacketType.PUBREL else 0)


def suback(number: int, version: int, codes: list[int]) -> bytes:
    """Encode a SUBACK: the granted QoS, or a failure code, for each filter."""
    none = b"\0" if version == V5 else b""
    known = codes if version == V5 else [min(code, 0x80) for code in codes]
    return packet(PacketType.SUBACK, struct.pack(">H", number) + none + bytes(known))


def unsuback(number: int, version: int, codes: list[int]) -> bytes:
    """Encode an UNSUBACK: a reason code for each filter in MQTT 5."""
    return packet(PacketType.UNSUBACK, struct.pack(">H", number) + (b"\0" + bytes(codes) if version == V5 else b""))


def disconnect(reason: ReasonCode, why: str = "") -> bytes:
    """Encode a DISCONNECT from the broker, which exists in MQTT 5 only."""
    return packet(PacketType.DISCONNECT, bytes([reason]) + properties([(Property.REASON_STRING, why)] if why else []))


PINGRESP: Final = packet(PacketType.PINGRESP, b"")
