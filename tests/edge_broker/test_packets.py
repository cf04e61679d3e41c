"""The packets of the embedded broker: no bytes surprise the readers, and an independent client reads what is written."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_broker.mqtt import wire
from edge_broker.mqtt.packets import MAX_LENGTH, V3, V5, BrokerMessage, MqttError, PacketType, ReasonCode

VERSIONS = st.sampled_from([V3, V5])
CONNECT_5 = bytes.fromhex("00044d5154540502001e") + bytes([5, 0x11, 0, 0, 0, 9]) + b"\0\2me"


@given(data=st.binary(max_size=64), flags=st.integers(0, 15), version=VERSIONS)
def test_arbitrary_bytes_are_a_packet_or_an_error_with_a_reason(data: bytes, flags: int, version: int) -> None:
    readers = (
        lambda: wire.read_connect(data),
        lambda: wire.read_connect(b"\0\4MQTT" + bytes([version]) + data),
        lambda: wire.read_publish(flags, data, version, 0.0),
        lambda: wire.read_publish(flags, b"\0\1t\0\7" + data, version, 0.0),
        lambda: wire.read_answer(data, version),
        lambda: wire.read_subscribe(data, version),
        lambda: wire.read_unsubscribe(data, version),
        lambda: wire.read_disconnect(data, version),
    )
    for read in readers:
        with contextlib.suppress(MqttError):
            read()


@given(
    topic=st.text(st.characters(exclude_characters="+#\0", exclude_categories=["Cs"]), min_size=1, max_size=200),
    payload=st.binary(max_size=300),
    qos=st.integers(0, 2),
    retain=st.booleans(),
    version=VERSIONS,
    lasts_s=st.none() | st.integers(1, 2**32 - 1),
)
def test_a_publish_comes_back_from_its_bytes(
    topic: str, payload: bytes, qos: int, retain: bool, version: int, lasts_s: int | None
) -> None:
    extras = b"\x03\0\3a/b\x08\0\1r\x26\0\1k\0\1v" if version == V5 else b""
    expires_s = float(lasts_s) if lasts_s is not None and version == V5 else None
    message = BrokerMessage(topic, payload, qos, retain, extras, expires_s)
    data = wire.publish(message, version, qos=qos, retain=retain, number=7)
    head = data[0]
    assert head >> 4 == PacketType.PUBLISH
    length = wire.varint(len(data))
    body = data[1 + len(wire.varint(len(data) - 1 - len(length))) :]
    found = wire.read_publish(head & 15, body, version, 0.0)
    assert found.message == message
    assert found.number == (7 if qos else 0)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, MAX_LENGTH])
def test_lengths_take_one_to_four_bytes(value: int) -> None:
    data = wire.varint(value)
    assert sum((byte & 0x7F) << 7 * place for place, byte in enumerate(data)) == value
    assert all(byte & 0x80 for byte in data[:-1])
    assert not data[-1] & 0x80


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0\4MQTT\x06\2\0\0\0\0", ReasonCode.UNSUPPORTED_VERSION),
        (b"\0\4HTTP\x04\2\0\0\0\0", ReasonCode.MALFORMED),
        (b"\0\4MQTT\x04\3\0\0\0\0", ReasonCode.MALFORMED),  # a reserved flag
        (b"\0\4MQTT\x04\x0a\0\0\0\0", ReasonCode.MALFORMED),  # a will's QoS without a will
        (b"\0\4MQTT\x05\2\0\0\3\x21\0\0\0\0", ReasonCode.PROTOCOL_ERROR),  # receive maximum 0
        (b"\0\4MQTT\x05\2\0\0\5\x15\0\2ab\0\0", ReasonCode.BAD_AUTHENTICATION),
        (b"\0\4MQTT\x05\2\0\0\2\x7f\0\0\0", ReasonCode.MALFORMED),  # an unknown property
        (b"\0\4MQTT\x05\2\0\0\0\0\2me!", ReasonCode.MALFORMED),  # something behind the end
    ],
)
def test_what_is_wrong_with_a_connect_has_its_reason(data: bytes, reason: ReasonCode) -> None:
    with pytest.raises(MqttError) as caught:
        wire.read_connect(data)
    assert caught.value.reason is reason


def test_a_connect_of_mqtt_5_is_read_with_its_properties() -> None:
    found = wire.read_connect(CONNECT_5)
    assert (found.version, found.client_id, found.keep_alive_s, found.receive_maximum) == (5, "me", 30, 65_535)
    for end in range(len(CONNECT_5)):
        with pytest.raises(MqttError):
            wire.read_connect(CONNECT_5[:end])
