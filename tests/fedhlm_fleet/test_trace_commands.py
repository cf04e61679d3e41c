"""`fedhlm record` and `fedhlm replay` as users run them: processes, signals, kills, full disks, and one line per mistake."""

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Stamp, presence
from fedhlm.errors import TraceError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.messages import Escalation, Fingerprint, Presence
from fedhlm_fleet import cli
from fedhlm_fleet.commands import traces as commands
from fedhlm_traces.file import Header, Record, Trace, Writer, read
from fedhlm_traces.record import Summary
from tests.brokers import MOSQUITTO, free_port
from tests.processes import obey_interrupts

PROGRAM = Path(sys.executable).with_name("fedhlm")
LIMIT_S = 60.0
ESCALATE = topics.ESCALATE.name(cluster="home", agent="porch")
STATUS = topics.AGENT_STATUS.name(cluster="home", agent="porch")
FINGERPRINT = Fingerprint("abc", 4_096, "philox-1", "slm")
KINDS = [
    pytest.param("mosquitto", marks=pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")),
    "embedded",
]


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A broker as a process of its own."""
    port = free_port()
    command: Sequence[str | Path] = (
        [MOSQUITTO or "", "-p", str(port)]
        if request.param == "mosquitto"
        else [sys.executable, "-m", "edge_broker.embedded", "--port", str(port)]
    )
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def publish(url: str, messages: Sequence[tuple[str, bytes, bool]]) -> None:
    async def main() -> None:
        async with MqttBus(url, client_id="publisher", connect_timeout_s=20.0) as bus:
            for topic, payload, retain in messages:
                await bus.wait_backlog(500)
                await bus.publish(topic, payload, retain=retain)
            await bus.wait_backlog(0)

    asyncio.run(main())


def block(base: int) -> bytes:
    return encode(Escalation(**Stamp("porch")(), session=1, epoch=0, base=base, ids=b"ab", patience_ms=500))


def until(holds: Callable[[], bool], why: str) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end_s, why
        time.sleep(0.01)


def recorded(path: Path) -> list[Record]:
    try:
        return list(read(path))
    except TraceError:
        return []


class Process:
    """A `fedhlm` command that runs on; killed at the end whatever happens."""

    def __init__(self, *arguments: str | Path, file_limit: int | None = None) -> None:
        def prepare() -> None:
            obey_interrupts()
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        self.process = subprocess.Popen(
            [PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,  # noqa: PLW1509 - nothing else runs in this process yet
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out, err


def fedhlm(*arguments: str | Path) -> tuple[int, str, str]:
    with Process(*arguments) as process:
        return process.end()


def refused(*arguments: str | Path) -> str:
    code, out, err = fedhlm(*arguments)
    assert code == 2, (out, err)
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("fedhlm: ")
    return line


def written(path: Path, records: Sequence[Record]) -> Path:
    with Writer(path, Header(created_ms=0, source="test")) as writer:
        for record in records:
            writer.write(record)
    return path


def essence(records: Sequence[Record] | Trace) -> list[tuple[str, bytes, int, bool]]:
    return [(r.topic, r.payload, r.qos, r.retain) for r in records]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_recording_ends_cleanly_on_a_signal_and_replays_to_the_same_recording(
    number: int, url: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.trace", tmp_path / "second.trace"
    birth = encode(presence(Stamp("porch"), "agent", online=True, fingerprint=FINGERPRINT))
    publish(url, [(STATUS, birth, True)])
    with Process("record", "--broker", url, "--out", first) as process:
        until(first.exists, "no file yet")
        publish(url, [(ESCALATE, block(i), False) for i in range(300)])
        until(lambda: len(recorded(first)) == 301, "not all is recorded")
        code, out, err = process.end(number)
    assert (code, err) == (0, "")
    assert re.search(r"^file +\S+first\.trace, \d+\.\d kB$", out, re.MULTILINE)
    assert re.search(r"^messages +301 with \d+\.\d kB of payload$", out, re.MULTILINE)
    assert re.search(r"^lost +none$", out, re.MULTILINE)
    trace = read(first)
    assert trace.lost_bytes == 0
    assert trace.header.fingerprints == {"porch": FINGERPRINT}
    assert trace.header.source == url
    assert essence(trace) == [(STATUS, birth, 1, True)] + [(ESCALATE, r.payload, 1, False) for r in list(trace)[1:]]

    with Process("record", "--broker", url, "--out", second, "--topics", "fedhlm/1/c/+/escalate/#") as process:
        until(second.exists, "no file yet")
        code, out, err = fedhlm("replay", first, "--broker", url, "--speed", "10")
        assert (code, err) == (0, "")
        assert re.search(r"^messages +301 of 301$", out, re.MULTILINE)
        assert re.search(r"^jitter +p50 \d+\.\d\d ms, p99 \d+\.\d\d ms$", out, re.MULTILINE)
        assert re.search(r"^retained +1, which stay on the broker$", out, re.MULTILINE)
        until(lambda: len(recorded(second)) >= 300, "not all is recorded again")
        assert process.end(number)[0] == 0
    assert essence(read(second)) == essence(list(trace)[1:])


def test_a_killed_recorder_leaves_a_readable_file(url: str, tmp_path: Path) -> None:
    out = tmp_path / "run.trace"
    payloads = [block(i) for i in range(200)]
    with Process("record", "--broker", url, "--out", out) as process:
        until(out.exists, "no file yet")
        publish(url, [(ESCALATE, payload, False) for payload in payloads])
        until(lambda: len(recorded(out)) >= 50, "nothing is recorded")
        code, _, _ = process.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    found = list(read(out))
    assert len(found) >= 50
    assert [record.payload for record in found] == payloads[: len(found)]


def test_a_full_disk_ends_the_recording_and_keeps_what_it_has(url: str, tmp_path: Path) -> None:
    out = tmp_path / "run.trace"
    with Process("record", "--broker", url, "--out", out, file_limit=50_000) as process:
        until(out.exists, "no file yet")
        publish(url, [(f"fedhlm/1/{i}", os.urandom(500), False) for i in range(400)])
        code, _, err = process.end()
    assert code == 2
    assert re.search(r"fedhlm: \S+run\.trace: cannot write after \d+ bytes, which stay readable: File too large", err)
    found = list(read(out))
    assert [record.topic for record in found] == [f"fedhlm/1/{i}" for i in range(len(found))]


def test_a_duration_ends_the_recording(url: str, tmp_path: Path) -> None:
    out = tmp_path / "run.trace"
    publish(url, [(STATUS, b"", False)])
    code, text, _ = fedhlm("record", "--broker", url, "--out", out, "--duration", "0.5", "--root", "lab/2")
    assert code == 0
    assert "0 with 0 B of payload" in text
    header = read(out).header
    assert (header.root, header.filters) == ("lab/2", ("lab/2/#",))
    assert header.facts == {"config": {"broker.url": f'"{url}"', "broker.root": '"lab/2"'}}


def test_a_replay_renames_restamps_and_selects(url: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.trace", tmp_path / "second.trace"
    birth = encode(presence(Stamp("porch", lambda: 5.0), "agent", online=True))
    written(
        first,
        [
            Record(0.0, 0, ESCALATE, block(0), 1),
            Record(1.0, 0, STATUS, birth, 1),
            Record(1.1, 0, "other/x", b"", 1),
            Record(9.0, 0, STATUS, birth, 1),
        ],
    )
    with Process("record", "--broker", url, "--out", second, "--topics", "#") as process:
        until(second.exists, "no file yet")
        begun_ms = int(time.time() * 1_000.0)
        code, out, err = fedhlm(
            *("replay", first, "--broker", url, "--rebase-time", "--rename", "cluster=home:barn", "agent=porch:attic"),
            *("--from", "0.5", "--until", "5", "--topics", "fedhlm/#", "nothing"),
        )
        assert (code, err) == (0, "")
        assert re.search(r"^messages +1 of 1$", out, re.MULTILINE)
        until(lambda: len(recorded(second)) == 1, "nothing came")
        process.end(signal.SIGTERM)
    (record,) = read(second)
    assert record.topic == topics.AGENT_STATUS.name(cluster="barn", agent="attic")
    message = decode(record.payload)
    assert isinstance(message, Presence)
    assert message.sender == "attic"
    assert begun_ms <= message.sent_ms <= record.wall_ms


def test_a_looping_replay_ends_cleanly_on_a_signal(url: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.trace", tmp_path / "second.trace"
    written(first, [Record(0.1 * i, 0, ESCALATE, block(i), 1) for i in range(3)])
    with Process("record", "--broker", url, "--out", second) as recording:
        until(second.exists, "no file yet")
        with Process("replay", first, "--broker", url, "--loop", "--speed", "20") as process:
            until(lambda: len(recorded(second)) >= 7, "the loop does not go on")
            code, out, err = process.end(signal.SIGINT)
        recording.end(signal.SIGTERM)
    assert (code, err) == (0, "")
    assert re.search(r"^messages +\d+ in \d+ turns$", out, re.MULTILINE)
    bases = [getattr(decode(record.payload), "base", None) for record in read(second)]
    assert bases == [i % 3 for i in range(len(bases))]


def test_a_dead_broker_is_told_after_the_timeout(tmp_path: Path) -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    brief = ("--broker.connect-timeout-s", "0.5")
    path = written(tmp_path / "some.trace", [Record(0.0, 0, "t", b"")])
    for command in (("record", "--out", tmp_path / "new.trace"), ("replay", path)):
        assert f"broker {url} not reached within 0.5 s" in refused(*command, "--broker", url, *brief)
    assert not (tmp_path / "new.trace").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("record", "--out", "{old}"), "old.trace must be a new file"),
        (("record", "--out", "{old}/x"), "must be in a folder that exists"),
        (("record", "--out", "new", "--topics", "a/#/b"), "(got 'a/#/b')"),
        (("record", "--out", "new", "--topics", "a/+", "+/b"), "filters 'a/+' and '+/b' overlap"),
        (("record", "--out", "new", "--rotate", "10 miles"), "--rotate must be a size such as"),
        (("record", "--out", "new", "--rotate", "0"), "a size such as"),
        (("record", "--out", "new", "--broker", "http://x"), "mqtt://"),
        (("record", "--out", "new", "--broker", "mqtt://me:secret@x"), "FEDHLM_BROKER__URL"),
        (("record", "--out", "new", "--broker.urll", "x"), "did you mean"),
        (("record",), "--out"),
        (("replay", "{old}"), "--broker must be the URL"),
        (("replay", "{none}", "--broker", "mqtt://x"), "none.trace must be a readable recording"),
        (("replay", "{text}", "--broker", "mqtt://x"), "must be a recording of format fedhlm-trace/1"),
        (
            ("replay", "{old}", "--broker", "mqtt://x", "--speed", "fast"),
            "--speed must be 1, another number above 0, or max (got 'fast')",
        ),
        (("replay", "{old}", "--broker", "mqtt://x", "--speed", "0"), "(got '0')"),
        (("replay", "{old}", "--broker", "mqtt://x", "--speed", "nan"), "(got 'nan')"),
        (("replay", "{old}", "--broker", "mqtt://x", "--rename", "porch=attic"), "cluster=OLD:NEW or agent=OLD:NEW"),
        (
            ("replay", "{old}", "--broker", "mqtt://x", "--from", "5", "--until", "4"),
            "--from and --until must be 0 <= from < until (got 5 s and 4 s)",
        ),
        (("replay", "{old}", "--update", "x"), "--check"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = written(tmp_path / "old.trace", [Record(0.0, 0, "t", b"")])
    text = tmp_path / "text.txt"
    text.write_text("not a recording")
    named = [part.format(old=old, text=text, none=tmp_path / "none.trace") for part in arguments]
    assert cli.main([*named]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert words in line
    assert "secret" not in line


def test_dropped_messages_are_shown_and_make_the_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def record(*_: object, **__: object) -> Summary:
        return Summary(messages=10, payload_bytes=2_500_000, dropped=3, reconnects=2, duration_s=4.0, files=2)

    monkeypatch.setattr("fedhlm_traces.record.record", record)
    assert cli.main(["record", "--out", str(tmp_path / "run.trace")]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^lost +3 dropped", shown, re.MULTILINE)
    assert re.search(r"^reconnects +2;", shown, re.MULTILINE)
    assert "2.5 MB" in shown
    assert "2.5 messages/s for 4.0 s" in shown
    assert "in 2 files" in shown


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4_096), ("100MB", 10**8), ("1.5 gb", 1_500_000_000), ("2k", 2_000), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert commands.parse_size(text) == size
