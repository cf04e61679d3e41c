"""What is shed is dropped while it is bytes, wherever the stream is cut; everything else passes unchanged."""

from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.gate import Gate


def packet(first: int, body: bytes) -> bytes:
    """A packet of MQTT with its length in front."""
    length, left = b"", len(body)
    while True:
        length += bytes([left % 128 | (128 if left >= 128 else 0)])
        left //= 128
        if not left:
            return bytes([first]) + length + body


def message(topic: bytes, payload: bytes, *, qos: int = 0, retain: bool = False) -> bytes:
    number = b"\0\7" if qos else b""
    return packet(0x30 | qos << 1 | retain, len(topic).to_bytes(2, "big") + topic + number + payload)


PACKETS = st.one_of(
    st.builds(message, st.sampled_from([b"flood", b"honest", b""]), st.binary(max_size=300), retain=st.booleans()),
    st.builds(message, st.sampled_from([b"flood", b"honest"]), st.binary(max_size=300), qos=st.just(1)),
    st.builds(packet, st.sampled_from([0x20, 0x40, 0x90, 0xD0]), st.binary(max_size=5)),
)


def is_flood(topic: bytes, _size: int) -> bool:
    return topic == b"flood"


def passed(gate: Gate, stream: bytes, cuts: list[int]) -> bytes:
    ends = sorted({cut % (len(stream) + 1) for cut in cuts} | {len(stream)})
    return b"".join(gate.admit(stream[a:b]) for a, b in zip([0, *ends], ends, strict=False))


@given(st.lists(PACKETS, max_size=12), st.lists(st.integers(0, 5_000), max_size=40))
def test_exactly_what_is_shed_is_missing_wherever_the_stream_is_cut(packets: list[bytes], cuts: list[int]) -> None:
    kept = [p for p in packets if not (p[0] & 0xFE == 0x30 and b"flood" in p[:9])]
    assert passed(Gate(is_flood), b"".join(packets), cuts) == b"".join(kept)


def test_the_size_is_that_of_the_whole_packet() -> None:
    told: list[tuple[bytes, int]] = []

    def note(topic: bytes, size: int) -> bool:
        told.append((topic, size))
        return True

    gate = Gate(note)
    sent = [message(b"t", bytes(n)) for n in (0, 200, 70_000)]
    assert gate.admit(b"".join(sent)) == b""
    assert told == [(b"t", len(p)) for p in sent]


def test_a_long_message_passes_as_it_comes() -> None:
    """Nobody waits here for the end of a large message."""
    gate, whole = Gate(is_flood), message(b"honest", bytes(1_000_000))
    assert gate.admit(whole[:100]) == whole[:100]
    assert gate.admit(whole[100:500]) == whole[100:500]
    dropped = message(b"flood", bytes(1_000_000))
    assert gate.admit(whole[500:] + dropped[:10]) == whole[500:]
    assert gate.admit(dropped[10:] + b"\xd0\0") == b"\xd0\0"


def test_what_breaks_the_protocol_passes_to_whoever_refuses_it() -> None:
    for broken in (b"\x30\xff\xff\xff\xff\xff", b"\x30\x01\0", b"\x30\x03\0\x09a", b"\x30\0"):
        gate = Gate(lambda _topic, _size: True)
        assert gate.admit(b"\xd0\0" + broken + b"more") == b"\xd0\0" + broken + b"more"
        assert gate.admit(b"and more") == b"and more"


@given(st.lists(st.binary(max_size=30), max_size=20))
def test_no_bytes_break_it_and_what_it_sheds_nothing_of_passes_whole(pieces: list[bytes]) -> None:
    gate = Gate(lambda _topic, _size: False)
    passed_on = b"".join(gate.admit(piece) for piece in pieces)
    stream = b"".join(pieces)
    assert stream.startswith(passed_on)
    assert len(stream) - len(passed_on) <= 65_535 + 7, "at most the beginning of one packet is held"
