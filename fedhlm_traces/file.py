"""The file of a recording: a sequence of complete zstd frames that hold msgpack objects, the header first.

A flush appends one frame in one write and never changes it again. A truncated file therefore loses at most its last
frame. A recording may continue in further parts (`part_path`), each with its own header; MAX_FRAME_BYTES bounds the
memory.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

import msgpack
import msgspec
import zstandard

from fedhlm.errors import TraceError
from fedhlm.protocol import topics
from fedhlm.protocol.messages import SCHEMA_VERSION, Fingerprint
from fedhlm.protocol.roles import Role
from fedhlm.version import __version__
from fedhlm_traces.zstd_frames import MAGIC, frame_end, unpacked

FORMAT: Final = "fedhlm-trace/1"
FLUSH_BYTES: Final = 256 * 1024
FLUSH_S: Final = 0.5
SYNC_S: Final = 1.0
# Twice the largest message of ours. Larger records are refused on writing, larger frames on reading.
_MODE: Final = 0o600  # only the owner may read prompts and outputs
MAX_RECORD_BYTES: Final = 32 * 1024 * 1024
MAX_FRAME_BYTES: Final = MAX_RECORD_BYTES + FLUSH_BYTES

Direction = Literal["up", "down", "side", ""]


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded, where and by what. `part` counts the files of one recording from 0.

    `source` is a broker's URL without password, or a word such as "simulator" or "mosquitto_sub". `fingerprints` are
    keyed by sender and come from the Presence messages seen before the header was written. `facts` hold the
    configuration or scenario.
    """

    format: str = FORMAT
    schema: int = SCHEMA_VERSION
    software: str = f"fedhlm {__version__}"
    created_ms: int
    root: str = topics.DEFAULT_ROOT
    source: str
    filters: tuple[str, ...] = ()
    fingerprints: dict[str, Fingerprint] = {}
    facts: dict[str, Any] = {}
    part: int = 0


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One message. `at_s` is monotonic time since the recording began; see `direction_of` for `direction`.

    `properties` are those of MQTT 5: expiry_s, content_type, response_topic, correlation_data, payload_format and
    user.
    """

    at_s: float
    wall_ms: int
    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    direction: Direction = ""
    properties: dict[str, Any] = {}


_RANKS: Final[dict[Role, int]] = {"agent": 0, "edge": 1, "cloud": 2, "client": 3, "operator": 4}


@lru_cache(maxsize=4_096)
def direction_of(name: str, root: str = topics.DEFAULT_ROOT) -> Direction:
    """Direction of a topic: "up" to cloud or client, "down" to devices, "side" between equals, "" if foreign.

    If the topic's row names several readers, the first one counts: the message is meant for it.
    """
    found = topics.lookup(name, root)
    if found is None:
        return ""
    sender, reader = (_RANKS[roles[0]] for roles in (found[0].publishers, found[0].subscribers))
    return "side" if sender == reader else "up" if sender < reader else "down"


def part_path(path: Path, part: int) -> Path:
    """The file of a part: `run.trace`, then `run.0001.trace`, `run.0002.trace` and so on."""
    return path if part == 0 else path.with_name(f"{path.stem}.{part:04d}{path.suffix}")


def require_new(path: Path) -> None:
    """Check that a recording can be made: neither its file nor the next part exists, and their folder does.

    Raises:
        TraceError: it cannot.
    """
    if not path.parent.is_dir():
        raise TraceError(f"{path} must be in a folder that exists (got {str(path.parent)!r})")
    if path.exists() or (path := part_path(path, 1)).exists():
        raise TraceError(f"{path} must be a new file (it exists already)")


class Writer:
    """Appends records to a new file; leaving the context flushes the buffer.

    A new part begins when the current one has `rotate_bytes`. The file is synced to disk about once a second and at
    the end of each part. After an error nothing more is written.

    Raises:
        TraceError: the file exists or cannot be written; a record is too large.
    """

    def __init__(
        self,
        path: str | Path,
        header: Header,
        *,
        rotate_bytes: int | None = None,
        flush_s: float = FLUSH_S,
        flush_bytes: int = FLUSH_BYTES,
        sync_s: float = SYNC_S,
        level: int = 3,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path: Final = Path(path)
        self.records = 0
        self.payload_bytes = 0
        self.file_bytes = 0  # bytes of all parts
        self.parts = 0
        self._header = header
        self._rotate_bytes = rotate_bytes
        self._flush_s, self._flush_bytes, self._sync_s = flush_s, flush_bytes, sync_s
        self._clock_s = clock_s
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        self._flushed_s = self._synced_s = clock_s()
        self._part_bytes = 0
        self._file: int | None = None
        self._begin_part()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()

    def write(self, record: Record) -> None:
        """Buffer a record, and flush if the buffer is full or old."""
        packed = self._encoder.encode(record)
        if len(packed) > MAX_RECORD_BYTES:
            raise TraceError(f"a record must be at most {MAX_RECORD_BYTES} bytes (got {len(packed)} on {record.topic})")
        if self._file is None:
            raise TraceError(f"{self.path}: nothing can be written after the end or an error")
        if len(self._buffer) + len(packed) > MAX_FRAME_BYTES:
            self.flush()
        self._buffer += packed
        self.records += 1
        self.payload_bytes += len(record.payload)
        if len(self._buffer) >= self._flush_bytes:
            self.flush()
        else:
            self.flush_if_old()

    def flush_if_old(self) -> None:
        """Flush if the last flush was `flush_s` ago.

        Call it now and then if records may stay away for long.
        """
        if self._clock_s() - self._flushed_s >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Write the buffer as one frame, in a new part if this one is full."""
        self._flushed_s = self._clock_s()
        if self._file is None:
            return
        if self._buffer:
            if self._rotate_bytes is not None and self._part_bytes >= self._rotate_bytes:
                self._end_part()
                self._begin_part()
            content = bytes(self._buffer)
            self._buffer.clear()
            self._append(content)
        if self._flushed_s - self._synced_s >= self._sync_s:
            self._sync()

    def close(self) -> None:
        """Write the buffer and close the file. A second call does nothing."""
        try:
            self.flush()
        finally:
            self._end_part()

    def _begin_part(self) -> None:
        path = part_path(self.path, self.parts)
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, _MODE)
        except OSError as exc:
            taken = exc.errno == errno.EEXIST
            why = "must be a new file (it exists already)" if taken else f"must be a writable file ({exc.strerror})"
            raise TraceError(f"{path} {why}") from exc
        self.parts += 1
        self._part_bytes = 0
        self._append(self._encoder.encode(msgspec.structs.replace(self._header, part=self.parts - 1)))
        self._sync()

    def _append(self, content: bytes) -> None:
        """Append one frame in one write.

        If a full disk truncates it, readers skip the rest.
        """
        frame = memoryview(self._compressor.compress(content))
        with self._guarded() as file:
            while frame:
                written = os.write(file, frame)
                frame = frame[written:]
                self.file_bytes += written
                self._part_bytes += written

    def _sync(self) -> None:
        self._synced_s = self._clock_s()
        with self._guarded() as file, _without_sync():
            os.fsync(file)

    def _end_part(self) -> None:
        if self._file is not None:
            self._sync()
            with self._guarded() as file:
                self._file = None
                os.close(file)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[int]:
        """The open file; an error inside the block closes it for good."""
        if self._file is None:
            raise TraceError(f"{self.path}: nothing can be written after the end or an error")
        try:
            yield self._file
        except OSError as exc:
            file, self._file = self._file, None
            self._buffer.clear()
            if file is not None:
                with contextlib.suppress(OSError):
                    os.close(file)
            path = part_path(self.path, self.parts - 1)
            raise TraceError(
                f"{path}: cannot write after {self.file_bytes} bytes, which stay readable: {exc.strerror}"
            ) from exc


@contextlib.contextmanager
def _without_sync() -> Iterator[None]:
    """Some network disks and pipes do not support fsync; continue without it."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


class _Part(NamedTuple):
    path: Path
    header: Header
    begin: int  # offset of the first byte after the header's frame
    lost: int  # bytes after the last complete frame


class Trace:
    """A recording opened for reading. Every iteration yields the records of all parts in order.

    `lost_bytes` counts the bytes that an unclean end made unreadable, 0 for a clean file. It grows when an iteration
    meets a frame with a wrong checksum; the rest of that part is skipped.
    """

    def __init__(self, parts: tuple[_Part, ...], lost_bytes: int) -> None:
        self._parts = parts
        self._lost = {part.path: part.lost for part in parts}
        self._lost_elsewhere = lost_bytes

    @property
    def header(self) -> Header:
        """The header of the first part."""
        return self._parts[0].header

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of all parts."""
        return tuple(part.path for part in self._parts)

    @property
    def lost_bytes(self) -> int:
        """Bytes of all files that belong to no complete frame."""
        return sum(self._lost.values()) + self._lost_elsewhere

    def __iter__(self) -> Iterator[Record]:
        for part in self._parts:
            yield from self._records(part)

    def _records(self, part: _Part) -> Iterator[Record]:
        with part.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - part.lost
            begin = part.begin
            while begin < size:
                end = frame_end(file, begin, limit=MAX_FRAME_BYTES)
                content = None if end is None or end > size else unpacked(file, begin, end, limit=MAX_FRAME_BYTES)
                if end is None or content is None:
                    self._lost[part.path] = max(part.lost, size + part.lost - begin)
                    return
                yield from _unpack(content, f"{part.path}, frame at byte {begin}")
                begin = end


def read(path: str | Path) -> Trace:
    """Open a recording: the first part with all later ones, or one later part alone.

    Raises:
        TraceError: no readable file, not a recording, of another format or schema, or a part of another recording.
    """
    first = _open_part(Path(path))
    parts = [first]
    lost = 0
    while first.header.part == 0:
        following = part_path(first.path, len(parts))
        if not following.exists():
            break
        try:
            part = _open_part(following)
        except _CutHeader:
            lost += following.stat().st_size  # the recorder was killed while it began this part
            break
        if part.header != msgspec.structs.replace(first.header, part=len(parts)):
            raise TraceError(f"{following} must be part {len(parts)} of {path} (it belongs to another recording)")
        parts.append(part)
    return Trace(tuple(parts), lost)


class _CutHeader(TraceError):
    """A file that ends inside its header."""


def _open_part(path: Path) -> _Part:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            found = file.read(len(MAGIC))
            end = frame_end(file, 0, limit=MAX_FRAME_BYTES)
            if found != MAGIC[: len(found)]:
                raise TraceError(f"{path} must be a recording of format {FORMAT} (it begins with {found!r})")
            if end is None:
                raise _CutHeader(
                    f"{path} must be a whole recording (cut before the end of its header, at {size} bytes)"
                )
            header = _header(unpacked(file, 0, end, limit=MAX_FRAME_BYTES), path)
            begin = whole = end
            while (end := frame_end(file, whole, limit=MAX_FRAME_BYTES)) is not None:
                whole = end
    except OSError as exc:
        raise TraceError(f"{path} must be a readable recording ({exc.strerror})") from exc
    return _Part(path, header, begin, size - whole)


def _header(content: bytes | None, path: Path) -> Header:
    wanted = f"{path} must be a recording of format {FORMAT}"
    if content is None:
        raise TraceError(f"{wanted} (its first zstd frame cannot be unpacked)")
    try:
        objects = list(_unpacker(content))
    except (ValueError, RecursionError, msgpack.UnpackException) as exc:
        raise TraceError(f"{wanted} (its first zstd frame is not msgpack)") from exc
    (fields,) = objects if len(objects) == 1 else (None,)
    if not isinstance(fields, dict) or "format" not in fields:
        raise TraceError(f"{wanted} (it is zstd without a recording's header)")
    if fields["format"] != FORMAT:
        raise TraceError(f"format of {path} must be {FORMAT!r} (got {str(fields['format'])[:64]!r})")
    if fields.get("schema") != SCHEMA_VERSION:
        raise TraceError(
            f"schema of the messages in {path} must be {SCHEMA_VERSION} (got {str(fields.get('schema'))[:64]})"
        )
    try:
        return msgspec.convert(fields, Header)
    except msgspec.ValidationError as exc:
        raise TraceError(f"{path}: header: {exc}") from exc


def _unpacker(content: bytes) -> Iterator[Any]:
    limit = len(content) + 1  # 0 would mean the library's own larger default
    unpacker: Any = msgpack.Unpacker(max_buffer_size=limit, raw=False, strict_map_key=True)
    unpacker.feed(content)
    yield from unpacker
    if unpacker.tell() != len(content):
        raise ValueError("an object is cut")


def _unpack(content: bytes, place: str) -> Iterator[Record]:
    """Unpack the records of a frame whose checksum is right.

    An error here means that another program wrote the frame.
    """
    try:
        for fields in _unpacker(content):
            yield msgspec.convert(fields, Record)
    except (ValueError, RecursionError, msgpack.UnpackException) as exc:
        raise TraceError(f"{place} holds no records: {' '.join(str(exc).split())}") from exc
