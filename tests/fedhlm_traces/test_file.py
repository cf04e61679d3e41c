"""The file of a recording: what is written is read, whatever the end; nothing foreign is taken for a recording."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.errors import TraceError
from fedhlm.protocol import topics
from fedhlm.protocol.messages import SCHEMA_VERSION, Fingerprint
from fedhlm_traces import file as trace_file
from fedhlm_traces.file import FORMAT, Header, Record, Writer, direction_of, part_path, read

HEADER = Header(
    created_ms=1_700_000_000_000,
    source="mqtt://broker:1883",
    filters=("fedhlm/1/#",),
    fingerprints={"porch": Fingerprint("abc", 4_096, "philox-1", "slm")},
    facts={"broker.root": "fedhlm/1", "nested": {"list": [1, 2.5, None]}},
)

properties = st.dictionaries(
    st.sampled_from(["expiry_s", "content_type", "user", "anything"]),
    st.integers(0, 2**32 - 1) | st.text(max_size=5) | st.lists(st.lists(st.text(max_size=3), min_size=2, max_size=2)),
)
records = st.builds(
    Record,
    at_s=st.floats(0.0, 1e9),
    wall_ms=st.integers(0, 2**53),
    topic=st.text(min_size=1, max_size=30),
    payload=st.binary(max_size=200),
    qos=st.integers(0, 2),
    retain=st.booleans(),
    direction=st.sampled_from(["up", "down", "side", ""]),
    properties=properties,
)


def some(count: int, payload: bytes = b"x") -> list[Record]:
    return [Record(0.1 * i, 1_000 + i, f"fedhlm/1/cloud/verify/c{i}", payload * (i % 7)) for i in range(count)]


def write(path: Path, wanted: list[Record], **options: Any) -> Writer:
    with Writer(path, HEADER, **options) as writer:
        for record in wanted:
            writer.write(record)
    return writer


def test_a_recording_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        writer = write(tmp_path / "run.trace", some(20), rotate_bytes=1)
    finally:
        os.umask(before)
    assert writer.parts > 1
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@given(wanted=st.lists(records, max_size=20), flush_bytes=st.integers(1, 1_000))
def test_what_is_written_is_read(
    wanted: list[Record], flush_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("trace") / "run.trace"
    writer = write(path, wanted, flush_bytes=flush_bytes)
    trace = read(path)
    assert trace.header == HEADER
    assert list(trace) == wanted
    assert list(trace) == wanted, "a second time as well"
    assert trace.lost_bytes == 0
    assert (writer.records, writer.payload_bytes) == (len(wanted), sum(len(r.payload) for r in wanted))
    assert writer.file_bytes == path.stat().st_size


def test_a_file_cut_anywhere_gives_every_whole_frame_and_says_what_it_lost(tmp_path: Path) -> None:
    path, cut = tmp_path / "whole.trace", tmp_path / "cut.trace"
    sizes = []  # file size and records after each flush
    with Writer(path, HEADER, flush_s=1e9) as writer:
        sizes.append((writer.file_bytes, 0))
        for i, record in enumerate(wanted := some(40, b"payload")):
            writer.write(record)
            if i % 9 == 0:
                writer.flush()
                sizes.append((writer.file_bytes, i + 1))
    sizes.append((writer.file_bytes, len(wanted)))
    data = path.read_bytes()
    for length in range(len(data) + 1):
        cut.write_bytes(data[:length])
        if length < sizes[0][0]:
            with pytest.raises(TraceError, match=rf"cut\.trace.* at {length} bytes"):
                read(cut)
            continue
        whole, count = max(entry for entry in sizes if entry[0] <= length)
        trace = read(cut)
        assert trace.lost_bytes == length - whole
        assert list(trace) == wanted[:count]


@given(noise=st.binary(min_size=1, max_size=300))
def test_garbage_at_the_end_costs_nothing_before_it(noise: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("trace") / "run.trace"
    write(path, some(5))
    with path.open("ab") as file:
        file.write(noise)
    trace = read(path)
    assert list(trace) == some(5)
    assert trace.lost_bytes == len(noise)


@given(where=st.floats(0.0, 1.0, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_a_wrong_record(
    where: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("trace") / "run.trace"
    with Writer(path, HEADER, flush_s=1e9) as writer:
        header_bytes = writer.file_bytes
        for record in (wanted := some(30, b"abcdef")):
            writer.write(record)
            if record.wall_ms % 10 == 0:
                writer.flush()
    data = bytearray(path.read_bytes())
    at = header_bytes + int(where * (len(data) - header_bytes))
    data[at] ^= 1 << bit
    path.write_bytes(data)
    trace = read(path)
    found = list(trace)
    # A flip in the frame header's unused bits may change nothing; else the frame and what follows it is lost, and said so.
    assert found == wanted[: len(found)]
    assert (len(found) < len(wanted)) == (trace.lost_bytes > 0)


def test_a_recording_goes_on_in_parts_and_each_can_be_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    wanted = [Record(float(i), i, "t", os.urandom(500)) for i in range(40)]
    writer = write(path, wanted, rotate_bytes=4_000, flush_bytes=1)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[-1] == "run.trace"
    assert names[:2] == ["run.0001.trace", "run.0002.trace"]
    assert len(names) == writer.parts
    assert writer.file_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert list(read(path)) == wanted
    assert read(path).header.part == 0
    pieces = [list(read(part_path(path, 0)))[:0]]
    for number in range(1, writer.parts):
        alone = read(part_path(path, number))
        assert alone.header.part == number
        assert alone.header.fingerprints == HEADER.fingerprints
        pieces.append(list(alone))
        assert 4_000 <= part_path(path, number - 1).stat().st_size < 4_000 + 1_000
    tail = [record for piece in pieces for record in piece]
    assert tail == wanted[-len(tail) :]


def test_a_kill_at_the_moment_of_rotation_costs_only_the_new_part(tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    write(path, some(3))
    part_path(path, 1).write_bytes(path.read_bytes()[:17])
    trace = read(path)
    assert list(trace) == some(3)
    assert trace.lost_bytes == 17


def test_a_part_of_another_recording_is_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    write(path, some(3))
    with Writer(part_path(path, 1), msgspec.structs.replace(HEADER, created_ms=1, part=1)):
        pass
    with pytest.raises(TraceError, match=r"run\.0001\.trace must be part 1 of .*belongs to another recording"):
        read(path)


def test_records_are_on_disk_after_half_a_second(tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    now_s = 0.0
    writer = Writer(path, HEADER, clock_s=lambda: now_s)
    for record in some(2):
        writer.write(record)
    assert list(read(path)) == []
    now_s = 0.5
    writer.write(some(3)[2])
    assert list(read(path)) == some(3)
    writer.close()
    writer.close()
    with pytest.raises(TraceError, match="after the end"):
        writer.write(some(1)[0])


def test_an_existing_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    path.write_text("mine")
    with pytest.raises(TraceError, match=r"run\.trace must be a new file"):
        Writer(path, HEADER)
    assert path.read_text() == "mine"
    with pytest.raises(TraceError, match=r"nowhere.* must be a writable file .No such file"):
        Writer(tmp_path / "nowhere" / "run.trace", HEADER)


def packed(content: object) -> bytes:
    return zstandard.ZstdCompressor().compress(msgspec.msgpack.encode(content))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "at 0 bytes"),
        (b"PNG\r\n and so on", r"fedhlm-trace/1 .*begins with b'PNG\\r'"),
        (
            packed({"format": "fedhlm-trace/2", "schema": SCHEMA_VERSION}),
            " must be 'fedhlm-trace/1' .got 'fedhlm-trace/2'",
        ),
        (
            packed({"format": FORMAT, "schema": SCHEMA_VERSION + 1}),
            f"must be {SCHEMA_VERSION} .got {SCHEMA_VERSION + 1}",
        ),
        (packed({"format": FORMAT, "schema": SCHEMA_VERSION}), "header: .*created_ms"),
        (packed({"form": 1}), "without a recording's header"),
        (packed([1]), "without a recording's header"),
        (zstandard.ZstdCompressor().compress(b"\xc1"), "not msgpack"),
        (zstandard.ZstdCompressor().compress(b"\x91" * 5_000 + b"\x01"), "not msgpack"),
        (zstandard.ZstdCompressor().compress(bytes(trace_file.MAX_FRAME_BYTES + 1)), "cannot be unpacked"),
    ],
)
def test_what_is_no_recording_is_refused_with_file_finding_and_expectation(
    data: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "strange.trace"
    path.write_bytes(data)
    with pytest.raises(TraceError, match=rf"strange\.trace.*{words}"):
        read(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.trace", tmp_path):
        with pytest.raises(TraceError, match="must be a readable recording"):
            read(path)


@pytest.mark.parametrize(
    "content", [b"\x93\x01\x02\x03", b"\x98\x01", b"\xdf\xff\xff\xff\xff", b"\xc1", b"\x91" * 3_000 + b"\x01"]
)
def test_a_sound_frame_without_records_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    write(path, some(2))
    with path.open("ab") as file:
        file.write(zstandard.ZstdCompressor().compress(content))
    records = iter(read(path))
    assert [next(records), next(records)] == some(2)
    with pytest.raises(TraceError, match=r"run\.trace, frame at byte \d+ holds no records"):
        next(records)


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    for content in (data, packed(msgspec.to_builtins(HEADER)) + data, packed({"format": FORMAT, "x": data})):
        path = Path(f"/proc/self/fd/{os.memfd_create('noise')}")
        try:
            path.write_bytes(content)
            list(read(path))
        except TraceError:
            pass
        finally:
            os.close(int(path.name))


def test_memory_is_bounded_whatever_a_frame_claims(tmp_path: Path) -> None:
    """131 MB of zeros behind four kilobytes of blocks: the size is refused before anything is unpacked."""
    path = tmp_path / "bomb.trace"
    write(path, some(2))
    blocks = b"".join((131_072 << 3 | 2 | (i == 999)).to_bytes(3, "little") + b"\0" for i in range(1_000))
    bomb = b"\x28\xb5\x2f\xfd" + bytes([0xC0 | 0x20]) + (131_072 * 1_000).to_bytes(8, "little") + blocks
    with path.open("ab") as file:
        file.write(bomb)
    tracemalloc.start()
    try:
        trace = read(path)
        assert list(trace) == some(2)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert trace.lost_bytes == len(bomb)


def test_a_record_too_large_is_refused_and_the_file_goes_on(tmp_path: Path) -> None:
    with Writer(tmp_path / "run.trace", HEADER) as writer:
        with pytest.raises(TraceError, match=rf"at most {trace_file.MAX_RECORD_BYTES} bytes .*on big"):
            writer.write(Record(0.0, 0, "big", bytes(trace_file.MAX_RECORD_BYTES)))
        writer.write(some(1)[0])
    assert list(read(tmp_path / "run.trace")) == some(1)


def test_a_full_disk_is_an_error_and_what_was_written_stays_readable(tmp_path: Path) -> None:
    code = (
        "import os, resource, signal, sys\n"
        "from fedhlm.errors import TraceError\n"
        "from fedhlm_traces.file import Header, Record, Writer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "writer = Writer(sys.argv[1], Header(created_ms=0, source='test'), flush_bytes=1)\n"
        "try:\n"
        "    for i in range(1_000): writer.write(Record(float(i), i, 't', os.urandom(300)))\n"
        "except TraceError as exc: print(exc)\n"
        "try: writer.write(Record(0.0, 0, 't', b''))\n"
        "except TraceError as exc: print(exc)\n"
        "writer.close()\n"
    )
    path = tmp_path / "run.trace"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "run.trace: cannot write after 20000 bytes, which stay readable: File too large" in first
    assert "nothing can be written after" in second
    found = list(read(path))
    assert len(found) > 40
    assert [record.wall_ms for record in found] == list(range(len(found)))


def test_zstdcat_and_msgpack_read_the_file(tmp_path: Path) -> None:
    """The format needs nothing of ours: concatenated frames are one zstd stream, its content one msgpack stream."""
    path = tmp_path / "run.trace"
    write(path, some(5), flush_bytes=1)
    with path.open("rb") as file:
        content = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    unpacker: Any = msgpack.Unpacker()
    unpacker.feed(content)
    header, *rest = unpacker
    assert header["format"] == FORMAT
    assert [(r[2], r[3]) for r in rest] == [(r.topic, r.payload) for r in some(5)]


def test_every_topic_has_a_direction() -> None:
    found = {
        topic.pattern: direction_of(topic.name(cluster="home", agent="porch", client="desk", member="porch"))
        for topic in topics.TABLE
    }
    assert all(found.values())
    expected = {
        topics.PROMPT: "down",
        topics.OUTPUT: "up",
        topics.ESCALATE: "up",
        topics.CLOUD_VERIFY: "up",
        topics.VERDICT: "down",
        topics.CLOUD_VERDICT: "down",
        topics.PEER: "side",
        topics.NEIGHBOUR: "side",
        topics.KNOWN: "down",
        topics.FL_STATE: "down",
        topics.FL_UPDATE: "up",
        topics.ASSIGN: "down",
    }
    assert {topic.pattern: direction for topic, direction in expected.items()}.items() <= found.items()
    assert direction_of("elsewhere/x") == ""
    assert direction_of("lab/2/cloud/verify/home", "lab/2") == "up"
