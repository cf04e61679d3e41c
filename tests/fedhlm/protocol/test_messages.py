"""The codec: every message survives it, nothing but a message or a ProtocolError comes out of it."""

from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedhlm.errors import ProtocolError
from fedhlm.protocol import messages
from fedhlm.protocol.codec import comparable_bytes, decode, encode
from fedhlm.protocol.fields import MAX_PAYLOAD_BYTES
from fedhlm.protocol.messages import SCHEMA_VERSION, AnyMessage, Contribution, Learned, Presence, Prompt
from fedhlm.protocol.packing import id_bytes, pack_bits, pack_ids, pack_probs, unpack_bits, unpack_ids, unpack_probs

KINDS: tuple[type[AnyMessage], ...] = get_args(AnyMessage)
SMALL = 12


def integers(kind: msgspec.inspect.IntType) -> st.SearchStrategy[int]:
    assert kind.ge is not None
    assert kind.le is not None or kind.lt is not None
    return st.integers(kind.ge, kind.le if kind.le is not None else (kind.lt or 0) - 1)


def floats(kind: msgspec.inspect.FloatType) -> st.SearchStrategy[float]:
    low, exclusive = (kind.gt, True) if kind.gt is not None else (kind.ge, False)
    return st.floats(low, kind.le, exclude_min=exclusive, allow_nan=False, allow_infinity=False)


def values(kind: Any) -> st.SearchStrategy[Any]:  # noqa: C901 - one case per kind of field
    """Values of a field's type within its limits, read from the type itself so that new fields are covered."""
    match kind:
        case msgspec.inspect.IntType():
            return integers(kind)
        case msgspec.inspect.FloatType():
            return floats(kind)
        case msgspec.inspect.StrType():
            if kind.pattern is not None:
                return st.from_regex(kind.pattern, fullmatch=True)
            return st.text(max_size=SMALL)
        case msgspec.inspect.BytesType():
            return st.binary(max_size=SMALL)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.LiteralType():
            return st.sampled_from(kind.values)
        case msgspec.inspect.UnionType():
            return st.one_of([values(part) for part in kind.types])
        case msgspec.inspect.VarTupleType():
            return st.lists(values(kind.item_type), max_size=4).map(tuple)
        case msgspec.inspect.DictType():
            return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=4)
        case msgspec.inspect.StructType():
            return st.builds(kind.cls, **{field.name: values(field.type) for field in kind.fields})
        case _:
            raise TypeError(f"no values known for {kind!r}")


def instances(kind: type[AnyMessage]) -> st.SearchStrategy[AnyMessage]:
    strategy: st.SearchStrategy[AnyMessage] = values(msgspec.inspect.type_info(kind))
    return strategy.map(lambda message: msgspec.structs.replace(message, version=SCHEMA_VERSION))


any_message = st.sampled_from(KINDS).flatmap(instances)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_codec(kind: type[AnyMessage]) -> None:
    @given(instances(kind))
    def check(message: AnyMessage) -> None:
        again = decode(encode(message))
        assert type(again) is kind
        assert again == message

    check()


def test_tags_are_distinct_and_known_for_good() -> None:
    tags = {kind.__name__: kind.__struct_config__.tag for kind in KINDS}
    expected = ["Presence", "Prompt", "Output", "Escalation", "Verdict", "EscalationBatch", "VerdictBatch"]
    expected += ["UncertainTokens", "VerifiedTokens", "Contribution", "Learned", "Profile", "Assignment", "Journal"]
    expected += ["Cancel", "Forget", "Roster", "MetricsReport"]
    assert tags == {name: tag for tag, name in enumerate(expected, start=1)}


def decodes_or_refuses(payload: bytes) -> None:
    """Whatever the bytes: a message that encodes again, or a ProtocolError."""
    try:
        message = decode(payload)
    except ProtocolError:
        return
    assert isinstance(message, KINDS)
    # Compared as bytes, because a statistic may have become NaN.
    assert encode(decode(encode(message))) == encode(message)


@given(any_message)
def test_a_truncated_message_is_refused(message: AnyMessage) -> None:
    payload = encode(message)
    for end in range(len(payload)):
        with pytest.raises(ProtocolError):
            decode(payload[:end])
    with pytest.raises(ProtocolError):
        decode(payload + b"\xc0")


@given(any_message, st.data())
def test_mutated_bytes_never_raise_anything_else(message: AnyMessage, data: st.DataObject) -> None:
    payload = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_refuses(bytes(payload))


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(payload: bytes) -> None:
    decodes_or_refuses(payload)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x9a" + b"\xc0" * 10, b"\x80"],
    ids=["empty", "deep", "huge array", "huge bytes", "nulls", "map"],
)
def test_hostile_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(payload)


def test_a_payload_beyond_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ProtocolError, match=f"at most {MAX_PAYLOAD_BYTES}"):
        decode(bytes(MAX_PAYLOAD_BYTES + 1))


def make(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"version": SCHEMA_VERSION, "sender": "edge-1", "sequence": 0, "sent_ms": 0}
    return encode(Presence(**(fields | {"role": "edge", "online": True, "software": "x"} | changes)))


def test_another_schema_version_is_named() -> None:
    with pytest.raises(ProtocolError, match=rf"version must be {SCHEMA_VERSION} \(got {SCHEMA_VERSION + 1}"):
        decode(make(version=SCHEMA_VERSION + 1))


@pytest.mark.parametrize("sender", ["", "a/b", "+", "#", "..", ".hidden", "a\n", "a\0", "é", "a" * 65, "-x"])
def test_a_sender_that_is_no_name_is_refused(sender: str) -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        decode(make(sender=sender))


@pytest.mark.parametrize("sender", ["a", "A.b_c-9", "0" * 64])
def test_a_proper_name_is_taken(sender: str) -> None:
    assert decode(make(sender=sender)).sender == sender


@given(st.data())
def test_ids_survive_packing(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(2, 2**24 - 1) | st.sampled_from([2, 65_536, 65_537]))
    ids = data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=50))
    packed = pack_ids(ids, vocab_size)
    assert len(packed) == len(ids) * id_bytes(vocab_size) == len(ids) * (2 if vocab_size <= 65_536 else 3)
    assert unpack_ids(packed, vocab_size) == ids
    assert pack_ids(tuple(ids), vocab_size) == packed


def test_ids_are_little_endian() -> None:
    assert pack_ids([0x1234], 65_536) == b"\x34\x12"
    assert pack_ids([0x123456], 2**24 - 1) == b"\x56\x34\x12"


@given(st.binary(max_size=40), st.integers(2, 2**24 - 1))
def test_unpacking_hostile_ids_gives_ids_or_a_protocol_error(data: bytes, vocab_size: int) -> None:
    try:
        ids = unpack_ids(data, vocab_size)
    except ProtocolError:
        width = id_bytes(vocab_size)
        numbers = [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]
        assert len(data) % width or max(numbers) >= vocab_size
    else:
        assert pack_ids(ids, vocab_size) == data


def test_packing_an_id_outside_the_vocabulary_is_the_callers_bug() -> None:
    with pytest.raises(ValueError, match="token id must be below 5000 \\(got 70000"):
        pack_ids([1, 70_000], 5_000)
    with pytest.raises(OverflowError):
        pack_ids([-1], 5_000)


@given(st.lists(st.floats(0.0, 1.0), max_size=20))
def test_probabilities_survive_to_half_precision(probs: list[float]) -> None:
    again = unpack_probs(pack_probs(np.array(probs)))
    assert again.shape == (len(probs),)
    assert np.allclose(again, probs, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("values_", [[-0.1], [1.5], [float("nan")], [float("inf")], [0.5, -1.0]])
def test_values_that_are_no_probabilities_are_refused(values_: list[float]) -> None:
    with pytest.raises(ProtocolError, match="outside 0..1"):
        unpack_probs(np.array(values_, "<f2").tobytes())


def test_half_a_probability_is_refused() -> None:
    with pytest.raises(ProtocolError, match="even number"):
        unpack_probs(b"\0\0\0")


def test_all_messages_are_frozen_arrays_without_unknown_fields() -> None:
    for kind in KINDS:
        config = kind.__struct_config__
        assert (config.frozen, config.array_like, config.forbid_unknown_fields) == (True, True, True)
    assert {kind for kind in vars(messages).values() if isinstance(kind, type) and kind in KINDS} == set(KINDS)


@given(sequence=st.integers(0, 2**31 - 1), sent_ms=st.integers(0, 2**53 - 1), request=st.from_regex(r"[a-z]{1,9}\Z"))
def test_comparable_bytes_are_those_of_a_usual_header(sequence: int, sent_ms: int, request: str) -> None:
    def encoded(sequence: int, sent_ms: int) -> tuple[Prompt, int]:
        message = Prompt(
            version=SCHEMA_VERSION, sender="a", sequence=sequence, sent_ms=sent_ms, request=request, text=""
        )
        return message, len(encode(message))

    assert comparable_bytes(*encoded(sequence, sent_ms)) == encoded(1_000, 1_800_000_000_000)[1]


@given(st.lists(st.booleans(), max_size=40))
@example([False] * 9)
def test_bits_survive_their_packing(bits: list[bool]) -> None:
    packed = pack_bits(bits)
    assert unpack_bits(packed, len(bits)) == bits
    assert len(packed) <= (len(bits) + 7) // 8


@pytest.mark.parametrize("kind", [Contribution, Learned])
def test_a_part_without_pairs_of_models_says_nil_and_means_no_thresholds(kind: Any) -> None:
    stamp = {"version": SCHEMA_VERSION, "sender": "porch", "sequence": 1, "sent_ms": 0}
    message = kind(**stamp, round=3, members=1, curves={"closed-form/gumbel/sampled": b"x"})
    values = msgspec.msgpack.decode(encode(message))
    place = 1 + kind.__struct_fields__.index("thresholds")
    assert values[place] == {}
    assert decode(msgspec.msgpack.encode([*values[:place], None, *values[place + 1 :]])) == message
    for wrong in (7, "x", [1]):
        with pytest.raises(ProtocolError):
            decode(msgspec.msgpack.encode([*values[:place], wrong, *values[place + 1 :]]))
    with pytest.raises(ProtocolError):  # nil elsewhere stays an error
        decode(msgspec.msgpack.encode([*values[: place - 1], None, *values[place:]]))
