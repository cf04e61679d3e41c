"""Export a recording as JSON lines (every field by its name) or as CSV (one row a message).

Both formats are streams of lines. In JSON, bytes are base64, token ids are lists if the vocabulary is known, and
non-finite numbers are "nan", "inf" and "-inf". A payload that does not decode is base64 with the reason.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import msgspec

from fedhlm.bus.interface import ProtocolVersion
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Escalation, Prime, Verdict
from fedhlm_traces.decoded import Seen, Vocabularies, gist, look, unpacked_ids, wire_bytes
from fedhlm_traces.file import Header, Record

COLUMNS: Final = (
    "at_s", "wall_ms", "direction", "topic", "qos", "retain", "payload_bytes", "wire_bytes", "kind", "cluster", "agent",
    "sender", "sequence", "sent_ms", "request", "session", "epoch", "base", "accepted", "source", "finish", "gist",
)  # fmt: skip
_OF_MESSAGE: Final = COLUMNS[COLUMNS.index("sender") : COLUMNS.index("gist")]
_PACKED: Final[dict[type[Any], str]] = {Escalation: "ids", Verdict: "ids", Prime: "context"}


def named(value: Any, vocab_size: int | None = None) -> Any:
    """Turn structs into dicts, and `_PACKED` ids into lists where that loses nothing."""
    match value:
        case msgspec.Struct():
            fields = {name: named(getattr(value, name), vocab_size) for name in value.__struct_fields__}
            packed = _PACKED.get(type(value))
            ids = None if packed is None else unpacked_ids(fields[packed], vocab_size)
            return fields if packed is None or ids is None else fields | {packed: ids}
        case dict():
            return {str(key): named(each, vocab_size) for key, each in value.items()}
        case list() | tuple():
            return [named(each, vocab_size) for each in value]
        case float() if not math.isfinite(value):
            return str(value)
    return value


def as_json(seen: Seen, vocab_size: int | None) -> bytes:
    """Return one line without its line end.

    `payload` is omitted where encoding the message gives the same bytes.
    """
    record = seen.record
    line: dict[str, Any] = {
        "at_s": record.at_s,
        "wall_ms": record.wall_ms,
        "topic": record.topic,
        "qos": record.qos,
        "retain": record.retain,
        "direction": record.direction,
        "properties": named(record.properties),
        "kind": seen.kind,
        **seen.levels,
    }
    if seen.message is not None:
        line["message"] = named(seen.message, vocab_size)
        if vocab_size is not None:
            line["vocab_size"] = vocab_size
    if seen.message is None or encode(seen.message) != record.payload:
        line["payload"] = record.payload
    if seen.error:
        line["error"] = seen.error
    return msgspec.json.encode(line)


def as_row(seen: Seen, vocab_size: int | None, protocol: ProtocolVersion = "5") -> list[object]:
    """The values of COLUMNS; "" where a message lacks the field."""
    record = seen.record
    values: dict[str, object] = {name: getattr(seen.message, name, "") for name in _OF_MESSAGE}
    values |= {
        "at_s": f"{record.at_s:.6f}",
        "wall_ms": record.wall_ms,
        "direction": record.direction,
        "topic": record.topic,
        "qos": record.qos,
        "retain": int(record.retain),
        "payload_bytes": len(record.payload),
        "wire_bytes": wire_bytes(seen, protocol),
        "kind": seen.kind,
        "cluster": seen.cluster,
        "agent": seen.agent,
        "gist": gist(seen, vocab_size),
    }
    return ["" if values[name] is None else values[name] for name in COLUMNS]


def json_lines(records: Iterable[Record], header: Header, _protocol: ProtocolVersion = "5") -> Iterator[str]:
    """JSON lines with line ends."""
    for seen, vocab_size in _seen(records, header):
        yield as_json(seen, vocab_size).decode() + "\n"


def csv_lines(records: Iterable[Record], header: Header, protocol: ProtocolVersion = "5") -> Iterator[str]:
    """CSV lines with line ends; the first line names the columns."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    yield buffer.getvalue()
    for seen, vocab_size in _seen(records, header):
        buffer.seek(0)
        buffer.truncate()
        writer.writerow(as_row(seen, vocab_size, protocol))
        yield buffer.getvalue()


def _seen(records: Iterable[Record], header: Header) -> Iterator[tuple[Seen, int | None]]:
    vocabularies = Vocabularies(header)
    for record in records:
        seen = look(record, header.root)
        vocabularies.learn(seen)
        yield seen, vocabularies.of(seen.agent)


Format = Callable[[Iterable[Record], Header, ProtocolVersion], Iterator[str]]
"""Turns records, header and MQTT version (`fedhlm_traces.decoded.protocol_of`) into lines with line ends."""

FORMATS: Final[dict[str, Format]] = {"jsonl": json_lines, "csv": csv_lines}
