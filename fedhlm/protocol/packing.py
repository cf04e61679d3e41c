"""Token ids, bits and probabilities as the raw bytes inside messages.

Decoding checks lengths and ranges. What does not fit raises ProtocolError.
"""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedhlm.errors import ProtocolError


def id_bytes(vocab_size: int) -> int:
    """Bytes per token id on the wire: 2 for a vocabulary of at most 65,536 tokens, else 3."""
    return 2 if vocab_size <= 1 << 16 else 3


def pack_ids(ids: "list[int] | tuple[int, ...]", vocab_size: int) -> bytes:
    """Encode token ids as little-endian integers of `id_bytes(vocab_size)` bytes each.

    Raises:
        ValueError: an id is at or above `vocab_size`. This is a bug of the caller.
        OverflowError: an id is negative, which is a bug of the caller too.
    """
    wide = np.asarray(ids, dtype="<u4")  # (n,)
    if wide.size and int(wide.max()) >= vocab_size:
        raise ValueError(f"token id must be below {vocab_size} (got {int(wide.max())})")
    return wide.view(np.uint8).reshape(-1, 4)[:, : id_bytes(vocab_size)].tobytes()


def unpack_ids(data: bytes, vocab_size: int) -> list[int]:
    """Decode the bytes of `pack_ids`.

    Raises:
        ProtocolError: the length is not a whole number of ids, or an id is outside the vocabulary.
    """
    width = id_bytes(vocab_size)
    if len(data) % width:
        raise ProtocolError(f"ids must be a multiple of {width} bytes (got {len(data)})")
    wide = np.zeros((len(data) // width, 4), np.uint8)
    wide[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
    ids = wide.view("<u4").ravel()  # (n,)
    if ids.size and int(ids.max()) >= vocab_size:
        raise ProtocolError(f"token id must be below {vocab_size} (got {int(ids.max())})")
    found: list[int] = ids.tolist()
    return found


def pack_bits(bits: "list[bool]") -> bytes:
    """Encode one bit per value. The first is the lowest bit of the first byte; trailing zero bytes are left out."""
    return np.packbits(np.asarray(bits, bool), bitorder="little").tobytes().rstrip(b"\0")


def unpack_bits(data: bytes, count: int) -> list[bool]:
    """Decode the first `count` bits of `pack_bits`. Bits that were left out are False."""
    # Pad here, because unpackbits leaves its result uninitialised when the input is empty.
    padded = np.frombuffer(data.ljust((count + 7) // 8, b"\0"), np.uint8)
    return [bool(bit) for bit in np.unpackbits(padded, bitorder="little")[:count]]


def pack_probs(probs: NDArray[Any]) -> bytes:
    """Encode probabilities in [0, 1], shape (n,), as little-endian float16."""
    return np.asarray(probs, dtype="<f2").tobytes()


def unpack_probs(data: bytes) -> NDArray[np.float64]:
    """Decode the bytes of `pack_probs`; shape (n,).

    Raises:
        ProtocolError: an odd number of bytes, or a value that is not a probability.
    """
    if len(data) % 2:
        raise ProtocolError(f"target_probs must be an even number of bytes (got {len(data)})")
    probs = np.frombuffer(data, "<f2").astype(np.float64)
    if not bool(np.all((probs >= 0.0) & (probs <= 1.0))):
        raise ProtocolError("target_probs holds a value outside 0..1")
    return probs


def check_saved_version(data: bytes, expected: int | str, *, what: str) -> None:
    """Check the version at the beginning of saved state, before its fields are decoded.

    Raises:
        ProtocolError: it is another one, or `data` is no msgpack array. `what` names the state.
    """
    try:
        saved = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"{what} cannot be decoded: {exc}") from exc
    version = saved[0] if isinstance(saved, list) and saved else None
    if version != expected:
        raise ProtocolError(f"version of {what} must be {expected!r} (got {version!r:.40})")
