"""What mosquitto_sub wrote comes back byte for byte where it can, and every line that lost bytes is counted and refused."""

import asyncio
import io
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.mqtt import MqttBus
from fedhlm.errors import TraceError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import SCHEMA_VERSION, Presence
from fedhlm_traces.file import Record
from fedhlm_traces.mosquitto import LOSSLESS, MAX_LINE_BYTES, LineTally, guess_root, lines_of, recording, records
from tests.brokers import MOSQUITTO, Mosquitto
from tests.fedhlm_traces.told import told

MOSQUITTO_SUB = shutil.which("mosquitto_sub")
needs_mosquitto_sub = pytest.mark.skipif(
    MOSQUITTO is None or MOSQUITTO_SUB is None, reason="mosquitto_sub is not installed"
)
STAMP = "2026-11-21T06:12:13.956164Z+0000"
STAMP_S = 1_795_241_533.956164

# As mosquitto_sub 2.0.11 printed them. %j keeps bytes that are no UTF-8 as they are, and ends at a zero byte.
PLAIN = [
    (b'{"tst":"2026-11-21T06:12:13.956164Z+0000","topic":"a/json","qos":0,"retain":0,"payloadlen":22,"payload":"{\\"a\\": 1, \\"b\\":[1.50,2]}"}', b'{"a": 1, "b":[1.50,2]}'),
    (b'{"tst":"2026-11-21T06:12:13.971113Z+0000","topic":"a/ctl","qos":0,"retain":0,"payloadlen":15,"payload":"line\\nbreak\\ttab\\u0001"}', b"line\nbreak\ttab\x01"),
    (b'{"tst":"2026-11-21T06:12:13.973465Z+0000","topic":"a/utf8","qos":0,"retain":0,"payloadlen":5,"payload":"\xc3\xa9\xe2\x82\xac"}', "é€".encode()),
    (b'{"tst":"2026-11-21T06:12:13.973465Z+0000","topic":"a/raw","qos":0,"retain":0,"payloadlen":3,"payload":"\x9d\xff\\""}', b'\x9d\xff"'),
    (b'{"tst":"2026-11-21T06:12:13.975449Z+0000","topic":"a/empty","qos":0,"retain":0,"payloadlen":0,"payload":null}', b""),
]  # fmt: skip
CUT = b'{"tst":"2026-11-21T06:12:13.961969Z+0000","topic":"a/bin","qos":0,"retain":0,"payloadlen":11,"payload":"\x9d\\u0004\\u0002"}'
# Of %J: what is no JSON leaves an empty line, and what is JSON is written anew.
JSON = [
    (b'{"tst":"2026-11-21T06:12:13.966540Z+0000","topic":"a/num","qos":0,"retain":0,"payloadlen":3,"payload":123}', b"123"),
    (b'{"tst":"2026-11-21T06:12:13.956096Z+0000","topic":"a/obj","qos":1,"retain":0,"payloadlen":17,"mid":3,"payload":{"payload":[1,2]}}', b'{"payload":[1,2]}'),
    (b'{"tst":"2026-11-21T06:12:13.956096Z+0000","topic":"a/p","qos":0,"retain":0,"payloadlen":2,"properties":{"user-properties":{"payload":"x"}},"payload":[]}', b"[]"),
]  # fmt: skip
REWRITTEN = b'{"tst":"2026-11-21T06:12:13.956096Z+0000","topic":"a/json","qos":0,"retain":0,"payloadlen":22,"payload":{"a":1,"b":[1.5,2]}}'
STRING = (
    b'{"tst":"2026-11-21T06:12:13.968882Z+0000","topic":"a/qstr","qos":0,"retain":0,"payloadlen":5,"payload":"str"}'
)


def parsed(*lines: bytes, lossy: bool = False) -> tuple[list[Record], LineTally]:
    tally = LineTally()
    return list(records(lines, tally, lossy=lossy)), tally


@pytest.mark.parametrize(("line", "payload"), PLAIN + JSON)
def test_whole_lines_give_their_payload(line: bytes, payload: bytes) -> None:
    (record,), tally = parsed(line)
    assert record.payload == payload
    assert tally.lost == 0
    assert record.wall_ms == pytest.approx(STAMP_S * 1000, abs=20)


@pytest.mark.parametrize("line", [CUT, REWRITTEN, STRING])
def test_lines_that_lost_bytes_are_refused_and_taken_only_if_asked(line: bytes) -> None:
    with pytest.raises(TraceError, match=r"1 of 2 lines lost bytes \(first: line 2"):
        parsed(PLAIN[0][0], line)
    found, tally = parsed(PLAIN[0][0], line, lossy=True)
    assert len(found) == 2
    assert (tally.lossy, tally.unreadable, tally.first) == (1, 0, 2)


@pytest.mark.parametrize(
    "line",
    [b"", b"Error: Message payload is not valid JSON on topic a/bin.", b"[]", b"1", b'{"topic":"a"}', b"\xff", b"[" * 100_000,
     b'{"tst":"2026-11-21T06:12:13.956164","topic":"a","qos":0,"retain":0,"payloadlen":1,"payload":"x"}',
     b'{"tst":1,"topic":"a","qos":[],"retain":{},"payloadlen":1,"payload":"x"}',
     b'{"tst":1,"topic":"a","qos":0,"retain":0,"payload_hex":"xy"}'],
)  # fmt: skip
def test_lines_without_a_message_are_counted(line: bytes) -> None:
    found, tally = parsed(PLAIN[0][0], line, lossy=True)
    assert len(found) == 1
    assert (tally.lines, tally.unreadable) == (2, 1)
    with pytest.raises(TraceError, match="1 of 2 lines lost bytes"):
        parsed(PLAIN[0][0], line)


@given(st.binary(max_size=300))
def test_no_line_breaks_the_import(line: bytes) -> None:
    _, tally = parsed(line, lossy=True)
    assert tally.lines == 1


def printed(topic: str, payload: bytes) -> bytes:
    """A line of %j, as cJSON writes it: control characters escaped, all other bytes as they are, cut at the first zero."""
    kept = payload.split(b"\0")[0]
    escaped = b"".join(
        b"\\u%04x" % byte if byte < 32 else b"\\" + bytes([byte]) if byte in b'"\\' else bytes([byte]) for byte in kept
    )
    body = b'"%b"' % escaped if payload else b"null"
    head = json.dumps({"tst": STAMP, "topic": topic, "qos": 1, "retain": 1, "payloadlen": len(payload), "mid": 7})
    return head.replace(": ", ":").replace(", ", ",")[:-1].encode() + b',"payload":%b}' % body


TOPIC_NAMES = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="+#:, "), min_size=1, max_size=20
)


@given(TOPIC_NAMES, st.binary(max_size=60))
def test_payloads_come_back_unless_they_hold_a_zero_byte(topic: str, payload: bytes) -> None:
    found, tally = parsed(printed(topic, payload), lossy=True)
    assert tally.lossy == (b"\0" in payload)
    assert (found[0].topic, found[0].qos, found[0].retain) == (topic, 1, True)
    assert found[0].payload == payload.split(b"\0")[0]


@given(st.lists(st.tuples(TOPIC_NAMES, st.binary(max_size=60), st.floats(0, 2**32)), max_size=5))
def test_the_lossless_format_keeps_every_byte(given_: list[tuple[str, bytes, float]]) -> None:
    quoted = [(topic.replace('"', "").replace("\\", "") or "t", payload, moment) for topic, payload, moment in given_]
    form = LOSSLESS.replace("%U", "{:.9f}").replace("%t", "{}").replace("%q", "1").replace("%r", "0")
    form = form.replace("%l", "{}").replace("%x", "{}")
    form = "{" + form.replace('{"tst"', '{{"tst"', 1)[1:-1] + "}}"
    lines = [form.format(moment, topic, len(payload), payload.hex()).encode() for topic, payload, moment in quoted]
    found, tally = parsed(*lines)
    assert tally.lost == 0
    assert [(r.topic, r.payload) for r in found] == [(topic, payload) for topic, payload, _ in quoted]
    assert [r.at_s for r in found] == sorted(r.at_s for r in found)


def test_properties_come_over() -> None:
    line = (
        b'{"tst":"2026-11-21T08:12:13.959500Z+0200","topic":"a/text","qos":0,"retain":0,"payloadlen":11,"properties":'
        b'{"user-properties":{"k":"v","k":"w"},"content-type":"text/plain","response-topic":"r/t","correlation-data":"abc",'
        b'"payload-format-indicator":1,"message-expiry-interval":60},"payload":"hello \\"you\\""}'
    )
    (record,), _ = parsed(line)
    assert record.properties == {
        "user": [["k", "v"], ["k", "w"]],
        "content_type": "text/plain",
        "response_topic": "r/t",
        "correlation_data": b"abc",
        "payload_format": 1,
        "expiry_s": 60,
    }
    assert record.wall_ms == 1_795_241_533_960


def test_a_root_is_found_out_from_the_messages() -> None:
    run = told("exact", seed=1, prompts=1)
    moved = [
        Record(r.at_s, r.wall_ms, r.topic.replace("fedhlm/1", "barn/demo/1"), r.payload, r.qos, r.retain)
        for r in run.records
    ]
    assert guess_root([Record(0.0, 0, "a/c/x/status", b"no"), *moved]) == "barn/demo/1"
    assert guess_root([Record(0.0, 0, "a/b", b"")]) == topics.DEFAULT_ROOT
    header, found = recording(iter(moved), None)
    assert header.root == "barn/demo/1"
    assert "cloud" in header.fingerprints
    assert {r.direction for r in found} == {"up", "down"}


def test_nothing_at_all_is_no_recording() -> None:
    with pytest.raises(TraceError, match="got no message"):
        recording(records([], LineTally()), None)


def test_an_endless_line_is_refused() -> None:
    class Endless(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            assert size == MAX_LINE_BYTES + 1
            return b"x" * size

    with pytest.raises(TraceError, match="line 1 must be output of mosquitto_sub"):
        next(lines_of(Endless()))


PAYLOADS = [b"\x9d\x04\xff", b"a\0b", b"", b'"x"', b"line\nbreak", bytes(range(256)), "é".encode()]


async def recorded(form: str) -> list[bytes]:
    """What the real mosquitto_sub prints of a first message, of PAYLOADS, and of a message of ours."""
    assert MOSQUITTO_SUB is not None
    presence = Presence(
        version=SCHEMA_VERSION, sender="cloud", sequence=1, sent_ms=1, role="cloud", online=True, software="fedhlm 0"
    )
    sent = [("a/b", payload) for payload in PAYLOADS] + [(topics.CLOUD_STATUS.name(), encode(presence))]
    async with Mosquitto() as broker, MqttBus(broker.url, client_id="sender") as bus, asyncio.timeout(30.0):
        await bus.wait_connected()
        # A retained message reaches the listener whenever it has subscribed, and says that it has.
        await bus.publish("a/ready", b"ready", qos=1, retain=True)
        arguments = ["-V", "5", "-h", "127.0.0.1", "-p", str(broker.port), "-q", "1", "-t", "#", "-F", form]
        listener = await asyncio.create_subprocess_exec(
            MOSQUITTO_SUB, *arguments, "-C", str(len(sent) + 1), stdout=asyncio.subprocess.PIPE
        )
        assert listener.stdout is not None
        first = await listener.stdout.readline()
        for topic, payload in sent:
            await bus.publish(topic, payload, qos=1, expiry_s=60.0)
        rest, _ = await listener.communicate()
    return list(lines_of(io.BytesIO(first + rest)))


@needs_mosquitto_sub
async def test_the_lossless_format_of_the_real_mosquitto_sub_keeps_everything() -> None:
    found, tally = parsed(*await recorded(LOSSLESS))
    assert tally.lost == 0
    assert [r.payload for r in found[1 : 1 + len(PAYLOADS)]] == PAYLOADS
    assert all(r.qos == 1 for r in found)
    header, again = recording(iter(found), None)
    assert header.root == topics.DEFAULT_ROOT
    assert list(again)[-1].direction == "down"


@needs_mosquitto_sub
async def test_what_the_real_mosquitto_sub_loses_in_j_is_known() -> None:
    lines = await recorded("%j")
    found, tally = parsed(*lines, lossy=True)
    whole = {payload: record.payload == payload for payload, record in zip(PAYLOADS, found[1:], strict=False)}
    assert whole == {payload: b"\0" not in payload for payload in PAYLOADS}
    assert tally.lossy == sum(b"\0" in payload for payload in PAYLOADS) + (b"\0" in found[-1].payload)
    assert tally.unreadable == 0
    assert found[1].properties["expiry_s"] in (59, 60)
