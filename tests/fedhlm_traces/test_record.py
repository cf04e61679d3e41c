"""Recording: state first, everything after it as it was published, drops counted, reconnects survived."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Literal

import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm import settings
from fedhlm.bus.interface import Retained
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Stamp, presence
from fedhlm.errors import BusError, TraceError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Escalation, Fingerprint
from fedhlm_traces.file import MAX_RECORD_BYTES, Header, Record, part_path, read
from fedhlm_traces.record import Recorder, Summary, record
from tests.brokers import MOSQUITTO, Mosquitto, TcpProxy, free_port

Protocol = Literal["auto", "5", "3.1.1"]
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
KINDS = [pytest.param("5", marks=needs_mosquitto), pytest.param("3.1.1", marks=needs_mosquitto), "embedded"]
LIMIT_S = 60.0
CLOUD = Fingerprint("abc", 4_096, "philox-1", "llm")
STATUS = topics.CLOUD_STATUS.name()
ESCALATE = topics.ESCALATE.name(cluster="home", agent="porch")


@contextlib.asynccontextmanager
async def broker_of(kind: str) -> AsyncIterator[Mosquitto | EmbeddedBroker]:
    async with asyncio.timeout(LIMIT_S), EmbeddedBroker() if kind == "embedded" else Mosquitto() as broker:
        yield broker


def section(url: str, kind: str = "auto") -> settings.Broker:
    protocol: Protocol = "5" if kind == "5" else "3.1.1" if kind == "3.1.1" else "auto"
    return settings.Broker(url=url, protocol=protocol, connect_timeout_s=5.0)


class Recording:
    """A recording under way: `until` waits for what it shows, `end` stops it."""

    def __init__(self, broker: settings.Broker, out: Path, **options: object) -> None:
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._last = Summary()
        self._task = asyncio.create_task(
            record(broker, out, stop=self._stop, show=self._show, **options),  # type: ignore[arg-type]
            name="record",
        )

    def _show(self, summary: Summary) -> None:
        self._last = summary
        self._changed.set()

    async def until(self, holds: Callable[[Summary], bool]) -> None:
        while not holds(self._last):
            if self._task.done():
                await self._task
            self._changed.clear()
            await self._changed.wait()

    async def end(self) -> Summary:
        self._stop.set()
        return await self._task


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_recorded_state_first(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "run.trace"
    state = encode(presence(Stamp("cloud"), "cloud", online=True, fingerprint=CLOUD))
    edge = encode(presence(Stamp("edge-home"), "edge", online=True, upstream=CLOUD))
    block = encode(Escalation(**Stamp("porch")(), session=1, epoch=0, base=3, ids=b"ab", patience_ms=500))

    async def main() -> Summary:
        async with broker_of(kind) as broker, MqttBus(broker.url, client_id="cloud", connect_timeout_s=5.0) as bus:
            await bus.publish(STATUS, state, retain=True)
            await bus.publish(topics.EDGE_STATUS.name(cluster="home"), edge, retain=True)
            await bus.wait_backlog(0)
            recording = Recording(section(broker.url, kind), out, filters=("fedhlm/1/#", "other/+"))
            await recording.until(lambda summary: summary.messages == 2)
            await bus.publish(STATUS, state, retain=True)
            await bus.publish(ESCALATE, block, expiry_s=500.0)
            await bus.publish(topics.KNOWN.name(cluster="home"), b"junk", qos=0)
            await bus.publish("other/x", b"", qos=1)
            await bus.publish("other/x/y", b"not covered")
            await recording.until(lambda summary: summary.messages == 6)
            return await recording.end()

    summary = asyncio.run(main())
    assert (summary.messages, summary.dropped, summary.reconnects, summary.files) == (6, 0, 0, 1)
    assert summary.file_bytes == out.stat().st_size
    assert summary.payload_bytes == 2 * len(state) + len(edge) + len(block) + 4
    trace = read(out)
    assert trace.header.fingerprints == {"cloud": CLOUD, "edge-home": CLOUD}
    assert trace.header.filters == ("fedhlm/1/#", "other/+")
    assert trace.lost_bytes == 0
    found = list(trace)
    assert {record.topic for record in found[:2]} == {STATUS, topics.EDGE_STATUS.name(cluster="home")}
    assert all(record.retain for record in found[:3]), "a retained message is recorded retained, live ones as well"
    rest = [(r.topic, r.payload, r.qos, r.retain, r.direction) for r in found[2:]]
    assert rest == [
        (STATUS, state, 1, True, "down"),
        (ESCALATE, block, 1, False, "up"),
        (topics.KNOWN.name(cluster="home"), b"junk", 0, False, "down"),
        ("other/x", b"", 1, False, ""),
    ]
    expiry_s = [record.properties.get("expiry_s") for record in found]
    assert expiry_s == [None, None, None, None if kind == "3.1.1" else 500, None, None]
    times_s = [record.at_s for record in found]
    assert times_s == sorted(times_s)
    assert 0.0 <= times_s[0] <= times_s[-1] <= summary.duration_s
    assert abs((found[-1].wall_ms - found[0].wall_ms) / 1000.0 - (times_s[-1] - times_s[0])) < 0.5


@needs_mosquitto
def test_a_recording_survives_a_lost_link(tmp_path: Path) -> None:
    out = tmp_path / "run.trace"

    async def main() -> Summary:
        async with broker_of("5") as broker, MqttBus(broker.url, client_id="one", connect_timeout_s=5.0) as bus:
            proxy = await TcpProxy(broker.port).__aenter__()
            recording = Recording(section(proxy.url), out)
            await recording.until(lambda summary: summary.files == 1)
            await bus.publish(ESCALATE, b"before")
            await recording.until(lambda summary: summary.messages == 1)
            # The same port again: only the link was lost.
            await proxy.cut()
            proxy._server = await asyncio.start_server(proxy._serve, "127.0.0.1", proxy._port)
            await recording.until(lambda summary: summary.reconnects == 1)
            await bus.publish(ESCALATE, b"after")
            await recording.until(lambda summary: summary.messages == 2)
            summary = await recording.end()
            await proxy.cut()
            return summary

    assert asyncio.run(main()).reconnects == 1
    assert [record.payload for record in read(out)] == [b"before", b"after"]


@needs_mosquitto
def test_a_recording_goes_on_in_parts(tmp_path: Path) -> None:
    out = tmp_path / "run.trace"
    noise = [random.Random(i).randbytes(20_000) for i in range(60)]

    async def main() -> Summary:
        async with broker_of("5") as broker, MqttBus(broker.url, client_id="one", connect_timeout_s=5.0) as bus:
            recording = Recording(section(broker.url), out, rotate_bytes=100_000)
            await recording.until(lambda summary: summary.files == 1)
            for payload in noise:
                await bus.publish(ESCALATE, payload)
            await recording.until(lambda summary: summary.messages == 60)
            return await recording.end()

    summary = asyncio.run(main())
    assert summary.files > 2
    assert part_path(out, summary.files - 1).exists()
    assert not part_path(out, summary.files).exists()
    assert [record.payload for record in read(out)] == noise
    assert summary.file_bytes == sum(path.stat().st_size for path in read(out).paths)


def header() -> Header:
    return Header(created_ms=0, source="test")


def add(recorder: Recorder, payload: bytes) -> None:
    recorder.keep("t", payload, qos=0, retain=False, properties={})


async def ended(recorder: Recorder) -> None:
    stop = asyncio.Event()
    stop.set()
    await recorder.run(stop)


@pytest.mark.parametrize(
    ("options", "sizes", "kept"),
    [
        ({"max_waiting": 3}, [1, 2, 3, 4, 5], [1, 2, 3]),
        ({"max_waiting_bytes": 100}, [60, 50, 40, 1], [60, 40]),
        ({"max_waiting_bytes": 2 * MAX_RECORD_BYTES}, [5, MAX_RECORD_BYTES, 6], [5, 6]),
    ],
)
def test_what_finds_no_room_is_dropped_and_counted(
    options: dict[str, int], sizes: list[int], kept: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "run.trace", header(), **options)  # type: ignore[arg-type]
    for size in sizes:
        add(recorder, bytes(size))
    asyncio.run(ended(recorder))
    assert recorder.summary.dropped == len(sizes) - len(kept)
    assert recorder.summary.messages == len(kept)
    assert [len(record.payload) for record in read(tmp_path / "run.trace")] == kept
    assert len([r for r in caplog.records if "dropped a message on t" in r.getMessage()]) == 1


def test_the_stop_writes_all_that_came_before_it(tmp_path: Path) -> None:
    ticks = iter(range(10_000))
    recorder = Recorder(
        tmp_path / "run.trace", header(), clock_s=lambda: next(ticks) / 10.0, wall_s=lambda: 1_700_000_000.5
    )
    for i in range(200):
        add(recorder, bytes([i]))
    asyncio.run(ended(recorder))
    found = list(read(tmp_path / "run.trace"))
    assert found == [Record(found[i].at_s, 1_700_000_000_500, "t", bytes([i])) for i in range(200)]
    assert [record.at_s for record in found] == pytest.approx([(i + 1) / 10.0 for i in range(200)])


def test_a_forbidden_filter_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    async def forbid(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Welcome everybody and refuse every filter, in MQTT 3.1.1."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                kind, length = await reader.readexactly(2)
                body = await reader.readexactly(length)
                answer = {0x10: b"\x20\x02\x00\x00", 0x82: b"\x90\x03" + body[:2] + b"\x80"}
                writer.write(answer.get(kind, b""))
        writer.close()

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S), await asyncio.start_server(forbid, "127.0.0.1", 0) as server:
            url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            broker = section(url, "3.1.1")
            await record(broker, tmp_path / "run.trace", stop=asyncio.Event(), filters=("secret/#",))

    with pytest.raises(BusError, match="refused the subscription 'secret/#'"):
        asyncio.run(main())
    assert not (tmp_path / "run.trace").exists()


@pytest.mark.parametrize("name", ["run.trace", "run.0001.trace"])
def test_an_existing_file_is_refused_before_anything_happens(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    broker = section(f"mqtt://127.0.0.1:{free_port()}")
    with pytest.raises(TraceError, match=rf"{name} must be a new file"):
        asyncio.run(record(broker, tmp_path / "run.trace", stop=asyncio.Event()))
    assert (tmp_path / name).read_text() == "mine"


def test_a_will_is_recorded_like_any_message(tmp_path: Path) -> None:
    """What a lost party leaves behind is part of the story."""
    out = tmp_path / "run.trace"
    will = Retained(STATUS, encode(presence(Stamp("cloud"), "cloud", online=False)))

    async def main() -> None:
        async with broker_of("embedded") as broker:
            recording = Recording(section(broker.url), out)
            await recording.until(lambda summary: summary.files == 1)
            async with MqttBus(broker.url, client_id="cloud", connect_timeout_s=5.0, will=will):
                pass
            await recording.until(lambda summary: summary.messages == 1)
            await recording.end()

    asyncio.run(main())
    assert [(r.topic, r.payload, r.retain) for r in read(out)] == [(*will, True)]
