"""Comparison of token id sequences."""

import zlib
from collections.abc import Sequence

import numpy as np


def digest_of(ids: Sequence[int]) -> int:
    """CRC-32 of a sequence, with four little-endian bytes per id. Different sequences collide once in 2**32."""
    return zlib.crc32(np.asarray(ids, "<u4").tobytes())


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
