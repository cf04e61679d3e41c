"""GGUF files: their metadata, and a digest that names weights and tokens (the GGUF format, versions 2 and 3)."""

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from fedhlm.errors import ModelError

SUFFIX: Final = ".gguf"
MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
COUNT_MAX: Final = 2**24  # of entries, tensors, items or bytes of a text; no file has more
# Hashing gigabytes at every start would take longer than loading them. Of a larger file a digest covers its size, what
# precedes the weights, and SAMPLES pieces of SAMPLE_BYTES.
HASH_UP_TO_BYTES: Final = 256 * 2**20
SAMPLES: Final = 64
SAMPLE_BYTES: Final = 2**20

_STRING: Final = 8
_ARRAY: Final = 9
# By the number of a type: its code in `struct`.
_CODES: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Gguf(NamedTuple):
    """What precedes the weights of a file: metadata by key, and the number of bytes that they take."""

    path: Path
    metadata: Mapping[str, Any]
    header_bytes: int

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, or `default` where the file has none; `{arch}` in the key is the architecture's name.

        Raises:
            ModelError: the value is of another kind.
        """
        key = key.replace("{arch}", str(self.metadata.get("general.architecture")))
        value = self.metadata.get(key, default)
        if value is not None and not isinstance(value, kind):
            raise ModelError(f"{key} of {self.path} must be a {kind.__name__} (got {str(value)[:64]!r})")
        return value


class _Reader:
    """Reads little-endian values from a file, and fails where they end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def raw(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise EOFError(f"it ends after {self.file.tell()} bytes, in the middle of its metadata")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.raw(struct.calcsize(f"<{code}")))[0]

    def count(self) -> int:
        found = int(self.number("Q"))
        if found > COUNT_MAX:
            raise ValueError(f"a count of {found}")
        return found

    def text(self) -> str:
        return self.raw(self.count()).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_CODES[kind])
        inner, count = int(self.number("I")), self.count()
        if inner in (_STRING, _ARRAY):
            return [self.value(inner) for _ in range(count)]
        code = f"<{count}{_CODES[inner]}"
        return list(struct.unpack(code, self.raw(struct.calcsize(code))))


def read_gguf(path: Path) -> Gguf:
    """Read the metadata of a GGUF file.

    Raises:
        ModelError: it cannot be read, is no GGUF file, or ends in its metadata.
    """
    try:
        with path.open("rb") as file:
            reader = _Reader(file)
            if (magic := file.read(4)) != MAGIC:
                raise ModelError(f"{path} must be a GGUF file, which begins with {MAGIC!r} (got {magic!r})")
            if (version := int(reader.number("I"))) not in VERSIONS:
                raise ModelError(f"{path} must be a GGUF file of version 2 or 3 (got {version})")
            tensors, entries = reader.count(), reader.count()
            metadata = {reader.text(): reader.value(int(reader.number("I"))) for _ in range(entries)}
            for _ in range(tensors):  # name, shape, type and offset of each
                reader.raw(reader.count())
                reader.raw(8 * int(reader.number("I")) + 12)
            return Gguf(path, metadata, file.tell())
    except OSError as exc:
        raise ModelError(f"{path} cannot be read ({exc.strerror})") from exc
    except EOFError as exc:
        raise ModelError(f"{path} must be a whole GGUF file ({exc}): fetch it again") from exc
    except (KeyError, ValueError, struct.error, RecursionError) as exc:
        raise ModelError(f"{path} must be a GGUF file (its metadata has {exc})") from exc


def digest_of(gguf: Gguf) -> str:
    """SHA-256, hex, of a file up to HASH_UP_TO_BYTES, and else of its header, size and samples of its weights.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        size = gguf.path.stat().st_size
        with gguf.path.open("rb") as file:
            if size <= HASH_UP_TO_BYTES:
                return hashlib.file_digest(file, "sha256").hexdigest()
            found = hashlib.sha256(size.to_bytes(8, "little") + file.read(gguf.header_bytes))
            for number in range(SAMPLES):
                file.seek(gguf.header_bytes + (size - gguf.header_bytes - SAMPLE_BYTES) * number // (SAMPLES - 1))
                found.update(file.read(SAMPLE_BYTES))
            return found.hexdigest()
    except OSError as exc:
        raise ModelError(f"{gguf.path} cannot be read ({exc.strerror})") from exc
