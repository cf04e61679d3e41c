"""Find the ends of zstd frames without unpacking them, and unpack them within a size limit.

A frame must state its content size (RFC 8878), as our writer's frames do. Too large a size is refused before memory
is allocated.
"""

import os
from typing import BinaryIO, Final

import zstandard

MAGIC: Final = b"\x28\xb5\x2f\xfd"
_CHECKSUM_BYTES: Final = 4
# Bytes of the frame header's fields after the descriptor (RFC 8878, section 3.1.1.1).
_DICTIONARY_BYTES: Final = (0, 1, 2, 4)
_CONTENT_SIZE_BYTES: Final = (0, 2, 4, 8)
_RLE_BLOCK: Final = 1
_RESERVED_BLOCK: Final = 3


def unpacked(file: BinaryIO, begin: int, end: int, *, limit: int) -> bytes | None:
    """The content of a frame; None if it is damaged, exceeds `limit` bytes, or states no size."""
    file.seek(begin)
    frame = file.read(end - begin)
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size > limit:
            return None
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False) if size else b""
    except zstandard.ZstdError:
        return None


def frame_end(file: BinaryIO, begin: int, *, limit: int) -> int | None:
    """Offset after the zstd frame at `begin` (RFC 8878, section 3.1.1); None without a complete frame.

    A frame far larger than `limit` counts as incomplete.
    """
    file.seek(begin)
    head = file.read(5)
    if len(head) < 5 or not head.startswith(MAGIC):
        return None
    descriptor = head[4]
    single = descriptor >> 5 & 1
    sizes = (1 - single) + _DICTIONARY_BYTES[descriptor & 3]
    at = begin + 5 + sizes + (_CONTENT_SIZE_BYTES[descriptor >> 6] or single)
    last = False
    while not last:
        file.seek(at)
        block = int.from_bytes(head := file.read(3), "little")
        kind, size = block >> 1 & 3, block >> 3
        if len(head) < 3 or kind == _RESERVED_BLOCK or at - begin > 2 * limit:
            return None
        last = bool(block & 1)
        at += 3 + (1 if kind == _RLE_BLOCK else size)
    at += _CHECKSUM_BYTES if descriptor >> 2 & 1 else 0
    return at if at <= file.seek(0, os.SEEK_END) else None
