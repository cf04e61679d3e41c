"""The default backend: an ONNX model folder on onnxruntime, run on one worker thread."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from cloud_verifier.batching import Output
from cloud_verifier.service import Engine
from fedhlm.decoding.decoder import Decoder, Request


@asynccontextmanager
async def engine_of(decoder: Decoder) -> AsyncIterator[Engine]:
    """An Engine over a decoder; the worker thread ends with the context."""
    loop = asyncio.get_running_loop()

    def run(requests: Sequence[tuple[Any, list[int]]]) -> list[Output]:
        results = decoder.forward([Request(cache, ids) for cache, ids in requests])
        return [Output(result.logits, result.cache) for result in results]

    with ThreadPoolExecutor(1, thread_name_prefix="llm") as pool:

        async def forward(requests: Sequence[tuple[Any, list[int]]]) -> list[Output]:
            return await loop.run_in_executor(pool, run, requests)

        yield Engine(decoder.empty_cache(), forward)
