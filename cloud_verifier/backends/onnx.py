"""The `Engine` of a model that this process has loaded."""

import asyncio
import ctypes
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final

from cloud_verifier.engine import Engine, EngineInput, EngineOutput
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.models import LoadedModel

# Parameters of glibc's mallopt, and what they are set to.
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
KEPT_BYTES: Final = 2**30  # freed memory at the end of the heap that is kept
MAPPED_BYTES: Final = 32 * 1024 * 1024  # smaller arrays lie in the heap; glibc allows no more

Call = Callable[[], list[EngineOutput]]
Wait = Callable[[Call], Awaitable[list[EngineOutput]]]
"""How to wait for a call that computes."""


async def at_once(call: Call) -> list[EngineOutput]:
    """Compute on the event loop's own thread, which blocks the loop meanwhile."""
    return call()


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


def engine_of(model: LoadedModel, wait: Wait = at_once) -> Engine:
    """Wrap a model as an `Engine`; `wait` decides on which thread it computes."""

    async def forward(requests: Sequence[EngineInput]) -> list[EngineOutput]:
        def call() -> list[EngineOutput]:
            results = model.forward([DecoderInput(*request) for request in requests])
            return [EngineOutput(result.logits, result.cache) for result in results]

        return await wait(call)

    return Engine(model.empty_cache(), forward, model.token_bytes, release, model.constrain)


@asynccontextmanager
async def threaded(model: LoadedModel) -> AsyncIterator[Engine]:
    """Yield an `Engine` that computes on its own worker thread. The thread ends when the context exits."""
    keep_until_released()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="llm") as pool:
        yield engine_of(model, lambda call: loop.run_in_executor(pool, call))
