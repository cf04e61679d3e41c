"""Replay: messages at their times and in order, whatever the speed; over real brokers the recorded QoS, flags and properties."""

import asyncio
import contextlib
import math
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_broker.embedded import EmbeddedBroker
from fedhlm import settings
from fedhlm.bus.mqtt import MqttBus
from fedhlm.errors import BusError, TraceError
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_traces.file import Header, Record, Writer, direction_of, read
from fedhlm_traces.properties import paho_properties, properties_of
from fedhlm_traces.record import Summary, record
from fedhlm_traces.replay import LOOP_GAP_S, Played, ReplaySelection, play, replay
from tests.brokers import MOSQUITTO, Mosquitto, free_port, take, until

HEADER = Header(created_ms=0, source="test")
BROKERS = [
    pytest.param("mosquitto", marks=pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")),
    "embedded",
]
LIMIT_S = 60.0
gaps = st.lists(st.sampled_from([0.0, 1e-4, 0.01, 0.3, 7.0]), min_size=1, max_size=30)


def at_times(times_s: list[float]) -> list[Record]:
    return [Record(at_s, 0, f"t/{i}", b"x" * i) for i, at_s in enumerate(times_s)]


def run(
    records: list[Record], *, speed: float = 1.0, takes_s: float = 0.0, loop: bool = False, count: int | None = None
) -> tuple[list[tuple[float, Record]], Played]:
    """Play in virtual time: when each message was published, and the figures. A looping one ends after `count`."""
    published: list[tuple[float, Record]] = []
    played = Played()

    async def publish(record: Record) -> None:
        published.append((asyncio.get_running_loop().time(), record))
        if takes_s:
            await asyncio.sleep(takes_s)
        if len(published) == count:
            raise StopAsyncIteration

    async def main() -> None:
        with contextlib.suppress(StopAsyncIteration):
            await play(lambda: iter(records), publish, speed=speed, loop=loop, played=played)

    run_virtual(main(), start=100.0)
    return published, played


@given(gaps=gaps, silence_s=st.floats(0.0, 1e4), speed=st.sampled_from([0.1, 1.0, 3.0, 1e3]))
def test_every_message_is_published_at_its_due_time(gaps: list[float], silence_s: float, speed: float) -> None:
    times_s = list(accumulate(gaps, initial=silence_s))
    published, played = run(at_times(times_s), speed=speed)
    assert [record for _, record in published] == at_times(times_s)
    for (when_s, _), at_s in zip(published, times_s, strict=True):
        assert when_s - 100.0 == pytest.approx((at_s - silence_s) / speed, abs=1e-6)
    assert played.messages == len(times_s)
    assert played.payload_bytes == sum(range(len(times_s)))
    assert played.duration_s == pytest.approx((times_s[-1] - silence_s) / speed, abs=1e-6)
    assert played.jitter().p99_ms == pytest.approx(0.0, abs=1e-3)


@given(gaps=gaps, takes_s=st.sampled_from([0.005, 0.5]))
def test_a_slow_message_delays_none_after_the_backlog(gaps: list[float], takes_s: float) -> None:
    """An absolute schedule: each message is late only while its forerunners are under way, and nothing drifts."""
    times_s = list(accumulate(gaps, initial=0.0))
    published, _ = run(at_times(times_s), takes_s=takes_s)
    free_s = 100.0
    for (when_s, _), at_s in zip(published, times_s, strict=True):
        assert when_s == pytest.approx(max(100.0 + at_s, free_s), abs=1e-6)
        free_s = when_s + takes_s


def test_lateness_is_reported() -> None:
    _, played = run(at_times([0.0] * 100), takes_s=0.01)
    assert played.jitter().p50_ms == pytest.approx(10.0 * 50.5, rel=0.01)
    assert played.jitter().p99_ms == pytest.approx(10.0 * 99.01, rel=0.01)


def test_at_full_speed_no_time_passes_and_no_jitter_is_told() -> None:
    published, played = run(at_times([0.0, 5.0, 1_000.0]), speed=math.inf)
    assert [when_s for when_s, _ in published] == [100.0] * 3
    assert not played.late_ms


@given(gaps=gaps, turns=st.integers(2, 4))
def test_a_loop_keeps_its_period(gaps: list[float], turns: int) -> None:
    times_s = list(accumulate(gaps, initial=3.0))
    published, played = run(at_times(times_s), loop=True, count=turns * len(times_s))
    period_s = times_s[-1] - times_s[0] + LOOP_GAP_S
    for number, (when_s, entry) in enumerate(published):
        turn, i = divmod(number, len(times_s))
        assert entry.topic == f"t/{i}"
        assert when_s - 100.0 == pytest.approx(turn * period_s + times_s[i] - times_s[0], abs=1e-6)
    assert played.turn == turns


@given(st.lists(st.floats(0.0, 10.0), min_size=1))
def test_a_clock_that_went_back_does_not_reorder(times_s: list[float]) -> None:
    published, _ = run(at_times(times_s))
    assert [record for _, record in published] == at_times(times_s)
    assert all(a <= b for (a, _), (b, _) in pairwise(published))


def test_the_loop_lives_while_messages_are_due_at_once() -> None:
    async def main() -> int:
        turns = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick(), name="tick")

        async def publish(_: Record) -> None:
            pass

        await play(lambda: iter(at_times([0.0] * 1_000)), publish, speed=math.inf)
        ticking.cancel()
        return turns

    assert run_virtual(main()) > 5


@given(
    times_s=st.lists(st.floats(0.0, 10.0)).map(sorted),
    span=st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 12.0)).filter(lambda span: span[0] < span[1]),
)
def test_a_selection_by_time_takes_a_half_open_span(times_s: list[float], span: tuple[float, float]) -> None:
    chosen = ReplaySelection(from_s=span[0], until_s=span[1])
    assert [r.at_s for r in chosen.of(at_times(times_s))] == [t for t in times_s if span[0] <= t < span[1]]


def test_a_selection_by_filters_takes_what_any_covers() -> None:
    records = [Record(0.0, 0, topic, b"") for topic in ("a/b", "a/c/d", "e", "$SYS/e")]
    for filters, wanted in [((), records), (("a/#",), records[:2]), (("e", "+/b"), [records[0], records[2]])]:
        assert list(ReplaySelection(filters=filters).of(records)) == wanted


def test_an_impossible_selection_is_refused() -> None:
    with pytest.raises(TraceError, match="got 3 s and 2 s"):
        ReplaySelection(from_s=3.0, until_s=2.0)
    with pytest.raises(TraceError, match="got 'a#'"):
        ReplaySelection(filters=("a#",))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "content_type": st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=9),
            "response_topic": st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=9),
            "correlation_data": st.binary(max_size=9),
            "payload_format": st.integers(0, 1),
            "user": st.lists(
                st.lists(st.text(st.characters(categories=["L", "N"]), max_size=5), min_size=2, max_size=2), min_size=1
            ),
        },
    )
)
def test_properties_survive(properties: dict[str, object]) -> None:
    made = paho_properties({**properties, "expiry_s": 7, "unknown": 1})
    assert properties_of(made) == properties


@pytest.mark.parametrize("properties", [{"payload_format": "x"}, {"user": [1]}, {"content_type": 5}])
def test_properties_that_mqtt_cannot_carry_are_refused(properties: dict[str, object]) -> None:
    with pytest.raises(TraceError, match="cannot carry"):
        paho_properties(properties)


def section(url: str) -> settings.Broker:
    return settings.Broker(url=url, connect_timeout_s=5.0)


def written(path: Path, records: list[Record]) -> Path:
    with Writer(path, HEADER) as writer:
        for entry in records:
            writer.write(entry)
    return path


def essence(record: Record) -> tuple[object, ...]:
    return record.topic, record.payload, record.qos, record.retain, record.properties


@pytest.mark.parametrize("kind", BROKERS)
def test_what_is_replayed_is_recorded_again(kind: str, tmp_path: Path) -> None:
    """The round trip: a recording, replayed to a fresh broker and recorded there, is the same recording."""
    path = written(
        tmp_path / "first.trace",
        [
            Record(0.002 * i, i, name, f"{i}".encode(), i % 2, False, direction_of(name), properties)
            for i in range(60)
            for name in [f"fedhlm/1/{'cloud/verify' if i % 2 else 'neighbour'}/c{i % 3}"]
            for properties in [{"expiry_s": 600} if i % 4 == 0 and kind == "mosquitto" else {}]
        ]
        + [
            Record(0.2, 0, "fedhlm/1/cloud/status", b"state", 1, True, "down"),
            Record(
                0.3,
                0,
                "elsewhere/x",
                b"",
                2 if kind == "mosquitto" else 1,
                False,
                "",
                {"content_type": "a/b", "user": [["k", "v"], ["k", "w"]], "correlation_data": b"\0"}
                if kind == "mosquitto"
                else {},
            ),
        ],
    )
    again = tmp_path / "second.trace"

    async def main() -> tuple[Summary, Played]:
        async with asyncio.timeout(LIMIT_S), Mosquitto() if kind == "mosquitto" else EmbeddedBroker() as broker:
            stop, started, all_there = asyncio.Event(), asyncio.Event(), asyncio.Event()

            def show(summary: Summary) -> None:
                started.set()
                if summary.messages == 62:
                    all_there.set()

            recording = asyncio.create_task(
                record(section(broker.url), again, stop=stop, filters=("#",), show=show), name="record"
            )
            await started.wait()
            played = await replay(read(path), section(broker.url), stop=asyncio.Event())
            await all_there.wait()
            stop.set()
            return await recording, played

    summary, played = asyncio.run(main())
    assert (summary.messages, summary.dropped) == (62, 0)
    assert (played.messages, played.retained, played.dropped) == (62, 1, 0)
    before, after = list(read(path)), list(read(again))
    assert [essence(r) for r in after] == [essence(r) for r in before]
    assert [r.direction for r in after] == [r.direction for r in before]


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_at_full_speed_the_queue_holds_the_replay_back_and_nothing_is_lost(tmp_path: Path) -> None:
    path = written(tmp_path / "many.trace", [Record(0.0, 0, "t", str(i).encode(), 1) for i in range(5_000)])

    async def main() -> list[bytes]:
        # By default mosquitto drops what a subscriber has not fetched beyond a thousand messages.
        async with (
            asyncio.timeout(LIMIT_S),
            Mosquitto(extra="max_queued_messages 0") as broker,
            MqttBus(broker.url, client_id="sink", connect_timeout_s=5.0, max_incoming=10_000) as sink,
        ):
            await sink.subscribe("t")
            played = await replay(read(path), section(broker.url), stop=asyncio.Event(), speed=math.inf)
            assert (played.messages, played.dropped) == (5_000, 0)
            return [delivery.payload for delivery in await take(sink, 5_000)]

    assert asyncio.run(main()) == [str(i).encode() for i in range(5_000)]


@pytest.mark.parametrize("kind", BROKERS)
def test_a_looping_replay_stops_when_told_and_delivers_what_it_published(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "few.trace", [Record(0.01 * i, 0, f"t/{i}", b"x", 1) for i in range(10)])

    async def main() -> tuple[Played, int]:
        async with (
            asyncio.timeout(LIMIT_S),
            Mosquitto() if kind == "mosquitto" else EmbeddedBroker() as broker,
            MqttBus(broker.url, client_id="sink", connect_timeout_s=5.0) as sink,
        ):
            await sink.subscribe("t/#")
            stop = asyncio.Event()

            def show(played: Played) -> None:
                if played.messages == 25:
                    stop.set()

            played = await replay(read(path), section(broker.url), stop=stop, speed=100.0, loop=True, show=show)
            await until(lambda: sink.statistics.messages_in == played.messages)
            return played, sink.statistics.messages_in

    played, received = asyncio.run(main())
    assert played.turn >= 3
    assert received == played.messages >= 25


def test_a_dead_broker_is_an_error_in_time(tmp_path: Path) -> None:
    path = written(tmp_path / "few.trace", at_times([0.0]))
    broker = settings.Broker(url=f"mqtt://127.0.0.1:{free_port()}", connect_timeout_s=0.3)
    with pytest.raises(BusError, match="not reached within"):
        asyncio.run(replay(read(path), broker, stop=asyncio.Event()))


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
@pytest.mark.parametrize(
    ("entry", "words"),
    [(Record(0.0, 0, "a/+", b""), "that no broker accepts"), (Record(5.0, 0, "a", b""), "no message .* was selected")],
)
def test_what_cannot_be_published_is_an_error(entry: Record, words: str, tmp_path: Path) -> None:
    path = written(tmp_path / "odd.trace", [entry])

    async def main() -> None:
        async with Mosquitto() as broker:
            await replay(
                read(path), section(broker.url), stop=asyncio.Event(), selection=ReplaySelection(until_s=1.0), speed=1.0
            )

    with pytest.raises(TraceError, match=words):
        asyncio.run(main())


def test_the_iterator_of_a_turn_is_asked_for_anew() -> None:
    asked = 0

    def turn() -> Iterator[Record]:
        nonlocal asked
        asked += 1
        return iter(at_times([0.0]) if asked < 3 else [])

    async def publish(_: Record) -> None:
        pass

    assert run_virtual(play(turn, publish, loop=True)).messages == 2
    assert asked == 3
