"""Exports lose nothing: what JSON lines say is the message, and every row of a CSV has its fields."""

import base64
import csv
import io
import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, Output, Prime, Verdict
from fedhlm.protocol.packing import pack_ids
from fedhlm_traces.decoded import gist, look
from fedhlm_traces.export import COLUMNS, FORMATS, named
from fedhlm_traces.file import Header, Record
from tests.fedhlm_traces.told import Told, told

ROOT = topics.DEFAULT_ROOT
_PACKED: dict[Any, str] = {Escalation: "ids", Verdict: "ids", Prime: "context"}


@pytest.fixture(scope="module")
def run() -> Told:
    return told("budget", seed=1, journal=True)


def restored(line: dict[str, Any]) -> bytes:
    """The payload that an exported line describes, made anew from its named fields."""
    if "payload" in line:
        return base64.b64decode(line["payload"])
    kinds = {topic.payload.__name__: topic.payload for topic in topics.TABLE}
    return encode(_struct(line["message"], kinds[line["kind"]], line.get("vocab_size")))


def _struct(fields: dict[str, Any], kind: type[Any], vocab_size: int | None) -> Any:
    made = {}
    for field in msgspec.structs.fields(kind):
        value = fields[field.name]
        if _PACKED.get(kind) == field.name and isinstance(value, list):
            assert vocab_size is not None
            value = pack_ids(value, vocab_size)
        made[field.name] = _value(value, field.type, vocab_size)
    return kind(**made)


def _value(value: Any, kind: Any, vocab_size: int | None) -> Any:
    """Named JSON to the field's type, by the types of the messages themselves."""
    info = msgspec.inspect.type_info(kind)
    options = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    for option in options:
        match option:
            case msgspec.inspect.StructType(cls=cls) if isinstance(value, dict):
                return _struct(value, cls, vocab_size)
            case msgspec.inspect.BytesType() if isinstance(value, str):
                return base64.b64decode(value)
            case msgspec.inspect.VarTupleType(item_type=item) if isinstance(value, list):
                return tuple(_item(each, item, vocab_size) for each in value)
            case msgspec.inspect.DictType(value_type=item) if isinstance(value, dict):
                return {key: _item(each, item, vocab_size) for key, each in value.items()}
            case msgspec.inspect.FloatType() if isinstance(value, str):
                return float(value)
    return value


def _item(value: Any, info: Any, vocab_size: int | None) -> Any:
    match info:
        case msgspec.inspect.StructType(cls=cls):
            return _struct(value, cls, vocab_size)
        case msgspec.inspect.BytesType():
            return base64.b64decode(value) if isinstance(value, str) else value
        case msgspec.inspect.FloatType() if isinstance(value, str):
            return float(value)
    return value


def lines(records: list[Record], header: Header) -> list[dict[str, Any]]:
    return [json.loads(line) for line in FORMATS["jsonl"](records, header, "5")]


def test_json_lines_give_back_every_field_of_every_message(run: Told) -> None:
    found = lines(run.records, run.header)
    assert len(found) == len(run.records)
    kinds = set()
    for line, record in zip(found, run.records, strict=True):
        kinds.add(line["kind"])
        assert "payload" not in line, "our own messages are their named fields"
        assert restored(line) == record.payload
        for name in ("at_s", "wall_ms", "topic", "qos", "retain", "direction"):
            assert line[name] == getattr(record, name)
    assert {"Escalation", "Verdict", "EscalationBatch", "VerdictBatch", "Output", "Journal", "Presence"} <= kinds


def test_packed_ids_are_lists_where_the_vocabulary_is_known(run: Told) -> None:
    blocks = [line for line in lines(run.records, run.header) if line["kind"] == "Escalation"]
    assert blocks
    for line in blocks:
        assert all(isinstance(i, int) for i in line["message"]["ids"])
    first = next(line for line in blocks if isinstance(line["message"]["before"], dict))
    assert first["message"]["before"]["context"][: first["message"]["base"]]


@given(
    st.binary(max_size=200),
    st.sampled_from(["else/where", topics.OUTPUT.name(cluster="c", agent="a", client="client")]),
)
def test_any_payload_comes_back_with_a_reason(payload: bytes, topic: str) -> None:
    (line,) = lines([Record(0.0, 0, topic, payload)], Header(created_ms=0, source="simulator"))
    assert restored(line) == payload
    assert line["error"]
    assert line["kind"] in ("foreign", "refused")


def test_a_message_in_another_encoding_is_kept_as_it_came() -> None:
    output = Output(
        version=SCHEMA_VERSION,
        sender="a",
        sequence=1,
        sent_ms=1,
        request="r",
        position=0,
        ids=(5,),
        sources=("local",),
        text="x",
    )
    plain = encode(output)
    longer = plain.replace(b"\xa1x", b"\xd9\x01x")  # the same text with a longer length
    assert decode(longer) == output
    (line,) = lines(
        [Record(0.0, 0, topics.OUTPUT.name(cluster="c", agent="a", client="client"), longer)],
        Header(created_ms=0, source="s"),
    )
    assert line["message"]["text"] == "x"
    assert restored(line) == longer


@given(st.dictionaries(st.text(max_size=5), st.floats()))
def test_numbers_that_json_lacks_have_names(values: dict[str, float]) -> None:
    found = json.loads(msgspec.json.encode(named(values)))
    for key, value in values.items():
        assert math.isnan(float(found[key])) if math.isnan(value) else float(found[key]) == value


def test_properties_are_exported() -> None:
    record = Record(0.0, 0, "a", b"", 1, True, "", {"expiry_s": 5, "user": [["k", "v"]], "correlation_data": b"\xff"})
    (line,) = lines([record], Header(created_ms=0, source="s"))
    assert line["properties"] == {"expiry_s": 5, "user": [["k", "v"]], "correlation_data": "/w=="}


def test_csv_has_a_row_for_every_message(run: Told) -> None:
    text = "".join(FORMATS["csv"](run.records, run.header, "5"))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(run.records)
    for row, record in zip(rows, run.records, strict=True):
        message = look(record, ROOT).message
        assert row["topic"] == record.topic
        assert row["kind"] == type(message).__name__
        assert float(row["at_s"]) == pytest.approx(record.at_s, abs=1e-6)
        for name in ("sender", "session", "epoch", "base", "accepted", "request", "finish"):
            value = getattr(message, name, None)
            assert row[name] == ("" if value is None else str(value))


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_exports_are_streams(kind: str, run: Told) -> None:
    taken = 0

    def watched() -> Any:
        nonlocal taken
        for record in run.records:
            taken += 1
            yield record

    found = FORMATS[kind](watched(), run.header, "5")
    for _ in range(5):
        next(found)
    assert taken <= 5


def test_a_gist_is_one_printable_line(run: Told) -> None:
    for record in run.records:
        seen = look(record, ROOT)
        text = gist(seen, 48)
        assert text.isprintable()
        assert 0 < len(text) <= 160


@given(st.text(max_size=400))
def test_a_gist_never_lets_control_characters_through(text: str) -> None:
    output = Output(
        version=SCHEMA_VERSION,
        sender="a",
        sequence=1,
        sent_ms=1,
        request="r",
        position=0,
        ids=(),
        sources=(),
        text=text,
        finish="error",
        error=text,
    )
    seen = look(Record(0.0, 0, topics.OUTPUT.name(cluster="c", agent="a", client="client"), encode(output)), ROOT)
    assert gist(seen).isprintable()
