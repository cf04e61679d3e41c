"""Read recordings made by `mosquitto_sub`: turn JSON lines into records and count the lines that lost bytes.

`-F %j` and `%J` hold a payload as text. `%j` cuts it at the first zero byte, and `%J` leaves an empty line if it is
not JSON; `payloadlen` shows both. LOSSLESS is the format that keeps every payload, in hexadecimal.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from typing import Any, BinaryIO, Final

from fedhlm.errors import TraceError
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Presence
from fedhlm_traces.decoded import look
from fedhlm_traces.file import MAX_RECORD_BYTES, Header, Record, direction_of

LOSSLESS: Final = '{"tst":%U,"topic":"%t","qos":%q,"retain":%r,"payloadlen":%l,"payload_hex":"%x"}'
MAX_LINE_BYTES: Final = 6 * MAX_RECORD_BYTES  # JSON writes a control character in six bytes
HEAD_RECORDS: Final = 1_024

_BEFORE_PROPERTIES: Final = re.compile(r'"payloadlen":\d+,(?:"mid":\d+,)?')
_PROPERTIES_KEY: Final = '"properties":'
_PAYLOAD_KEY: Final = '"payload":'
_DECODER: Final = json.JSONDecoder()

_PROPERTIES: Final = {
    "message-expiry-interval": "expiry_s",
    "content-type": "content_type",
    "response-topic": "response_topic",
    "correlation-data": "correlation_data",
    "payload-format-indicator": "payload_format",
}


class _Pairs(list[tuple[str, Any]]):
    """A JSON object that may repeat names, as user properties do."""


@dataclass
class LineTally:
    """Counts the lines read, and remembers the first bad one of each kind.

    `lossy` lines lost bytes of their payload. From `unreadable` lines nothing could be recovered.
    """

    lines: int = 0
    lossy: int = 0
    unreadable: int = 0
    first: int = 0

    @property
    def lost(self) -> int:
        """Lines that do not give the message as it was sent."""
        return self.lossy + self.unreadable

    def __str__(self) -> str:
        return (
            f"{self.lost} of {self.lines} lines lost bytes (first: line {self.first}; {self.lossy} cut or rewritten payloads, "
            f"{self.unreadable} without any)"
        )


class _Unreadable(ValueError):
    """A line that is not a message."""


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file without line ends.

    Raises:
        TraceError: a line longer than any recorded message's.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise TraceError(f"line {number} must be output of mosquitto_sub of at most {MAX_LINE_BYTES} bytes")
        yield line.rstrip(b"\r\n")


def records(lines: Iterable[bytes], tally: LineTally, *, lossy: bool = False) -> Iterator[Record]:
    """Yield the lines' records in order, on the clock of their time stamps; `at_s` never decreases.

    With `lossy`, damaged payloads are kept as they are and lines without a payload are skipped.

    Raises:
        TraceError: at the end, when lines lost bytes and `lossy` is not set.
    """
    began_s: float | None = None
    at_s = 0.0
    for line in lines:
        tally.lines += 1
        try:
            record, whole = _parsed(line)
        except (ValueError, RecursionError):  # ours, or an error of the encoding, the JSON or a number
            tally.unreadable += 1
        else:
            tally.lossy += not whole
            wall_s = record.at_s
            began_s = wall_s if began_s is None else began_s
            at_s = max(at_s, wall_s - began_s)
            if whole or lossy:
                yield Record(
                    at_s, record.wall_ms, record.topic, record.payload, record.qos, record.retain, "", record.properties
                )
        if tally.lost == 1 and not tally.first:
            tally.first = tally.lines
    if tally.lost and not lossy:
        raise TraceError(
            f"{tally}: use --lossy to import the rest; to lose nothing, record with mosquitto_sub -F '{LOSSLESS}'"
        )


def _parsed(line: bytes) -> tuple[Record, bool]:
    """Return a record with Unix time as `at_s`, and whether its payload is complete."""
    # %j prints bytes that are not UTF-8 as they are; this decoding restores them.
    text = line.decode("utf-8", "surrogateescape")
    fields = json.loads(text, object_pairs_hook=_Pairs)
    if not isinstance(fields, _Pairs):
        raise _Unreadable
    given = dict(fields)
    topic, qos, retain = given.get("topic"), given.get("qos", 0), given.get("retain", 0)
    if not isinstance(topic, str) or not topic or qos not in (0, 1, 2) or retain not in (0, 1):
        raise _Unreadable
    topic.encode()  # an MQTT topic is UTF-8
    wall_s = _seconds(given.get("tst"))
    payload, whole = _payload(given, text)
    properties = _properties(given.get("properties"))
    return Record(wall_s, round(wall_s * 1000.0), topic, payload, int(qos), bool(retain), "", properties), whole


def _seconds(stamp: object) -> float:
    """Unix time of `%U`, of `%j` (2026-11-21T06:12:13.956164Z+0000) or of `%I` (the same without a fraction)."""
    if isinstance(stamp, int | float) and 0 <= stamp < 2**33:
        return float(stamp)
    if not isinstance(stamp, str):
        raise _Unreadable
    moment = datetime.fromisoformat(stamp.replace("Z+", "+").replace("Z-", "-"))
    if moment.tzinfo is None:
        raise _Unreadable
    return moment.timestamp()


def _payload(given: dict[str, Any], text: str) -> tuple[bytes, bool]:
    expected = given.get("payloadlen")
    if isinstance(given.get("payload_hex"), str):
        payload = bytes.fromhex(given["payload_hex"])
        return payload, expected in (None, len(payload))
    if "payload" not in given or not isinstance(expected, int):
        raise _Unreadable
    value = given["payload"]
    if value is None and expected == 0:
        return b"", True
    if isinstance(value, str):
        payload = value.encode("utf-8", "surrogateescape")
        return payload, len(payload) == expected
    # %J: mosquitto_sub rewrites the payload's JSON. If the length is equal, the payload counts as complete.
    payload = _source_of_payload(text).encode("utf-8", "surrogateescape")
    return payload, len(payload) == expected


def _source_of_payload(text: str) -> str:
    """The payload's own JSON in a line of %J: the last value, after the properties."""
    before = _BEFORE_PROPERTIES.search(text)
    if before is None:
        raise _Unreadable
    begin = before.end()
    if text.startswith(_PROPERTIES_KEY, begin):
        begin = _DECODER.raw_decode(text, begin + len(_PROPERTIES_KEY))[1] + 1
    if not text.startswith(_PAYLOAD_KEY, begin):
        raise _Unreadable
    begin += len(_PAYLOAD_KEY)
    return text[begin : _DECODER.raw_decode(text, begin)[1]]


def _properties(given: object) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given if isinstance(given, _Pairs) else ():
        if name == "user-properties" and isinstance(value, _Pairs):
            found["user"] = [[key, str(each)] for key, each in value]
        elif name == "correlation-data":
            found["correlation_data"] = str(value).encode("utf-8", "surrogateescape")
        elif name in _PROPERTIES and isinstance(value, str | int):
            found[_PROPERTIES[name]] = value
    return found


def recording(found: Iterator[Record], root: str | None) -> tuple[Header, Iterator[Record]]:
    """Return a header and the records with their directions.

    Without `root` the root is guessed from the messages.

    Raises:
        TraceError: there is no record at all, or what the records raise.
    """
    head = list(islice(found, HEAD_RECORDS))
    if not head:
        raise TraceError("the file must be lines of mosquitto_sub -F '%j' (got no message)")
    root = root if root is not None else guess_root(head)
    seen = [look(record, root).message for record in head]
    fingerprints = {m.sender: m.fingerprint for m in seen if isinstance(m, Presence) and m.fingerprint is not None}
    header = Header(created_ms=head[0].wall_ms, root=root, source="mosquitto_sub", fingerprints=fingerprints)
    return header, (
        Record(r.at_s, r.wall_ms, r.topic, r.payload, r.qos, r.retain, direction_of(r.topic, root), r.properties)
        for r in chain(head, found)
    )


def guess_root(head: Iterable[Record]) -> str:
    """The root under which some record is a message of ours, or the default root."""
    for record in head:
        levels = record.topic.split("/")
        for count in range(1, len(levels)):
            root = "/".join(levels[:count])
            if look(record, root).message is not None:
                return root
    return topics.DEFAULT_ROOT
