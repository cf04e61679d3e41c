"""The default backend: runs an ONNX model folder on onnxruntime."""

import asyncio
import ctypes
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from cloud_verifier.engine import Engine, EngineInput, EngineOutput
from fedhlm.decoding import decoder as runtime
from fedhlm.decoding.decoder import Decoder

Call = Callable[[], list[EngineOutput]]
Wait = Callable[[Call], Awaitable[list[EngineOutput]]]
"""How to wait for a call that computes."""


async def at_once(call: Call) -> list[EngineOutput]:
    """Compute on the event loop's own thread, which blocks the loop meanwhile."""
    return call()


def release() -> None:
    """Ask the C library to return freed memory to the system. Only glibc can; elsewhere this does nothing."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def engine_of(decoder: Decoder, wait: Wait = at_once) -> Engine:
    """Wrap a decoder as an `Engine`; `wait` decides on which thread it computes."""

    async def forward(requests: Sequence[EngineInput]) -> list[EngineOutput]:
        def call() -> list[EngineOutput]:
            results = decoder.forward([runtime.DecoderInput(*request) for request in requests])
            return [EngineOutput(result.logits, result.cache) for result in results]

        return await wait(call)

    return Engine(decoder.empty_cache(), forward, decoder.token_bytes, release, decoder.constrain)


@asynccontextmanager
async def threaded(decoder: Decoder) -> AsyncIterator[Engine]:
    """Yield an `Engine` that computes on its own worker thread. The thread ends when the context exits."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="llm") as pool:
        yield engine_of(decoder, lambda call: loop.run_in_executor(pool, call))
