"""The memory of the process: when the C library keeps what is freed, and when it returns it to the system."""

import ctypes
import sys
from collections.abc import Callable
from typing import Final

# Parameters of glibc's mallopt, and what they are set to.
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
KEPT_BYTES: Final = 2**30  # freed memory at the end of the heap that is kept
MAPPED_BYTES: Final = 32 * 1024 * 1024  # smaller arrays lie in the heap; glibc allows no more


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None if it has no such one, as every library but glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_until_released() -> None:
    """Ask the C library to keep freed memory until `release`, for the whole process.

    Otherwise the caches of each call are new pages, and a call with many long caches spends half of its time on those.
    """
    if (set_option := _of_glibc("mallopt")) is not None:
        set_option(M_MMAP_THRESHOLD, MAPPED_BYTES)
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)


def release() -> None:
    """Ask the C library to return freed memory to the system. Only glibc can; elsewhere this does nothing."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)
