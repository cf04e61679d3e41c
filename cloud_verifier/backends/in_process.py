"""The `Engine` of a model that this process has loaded."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from cloud_verifier.engine import Engine, EngineInput, EngineOutput
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.models import LoadedModel
from fedhlm.process.memory import keep_until_released, release

Call = Callable[[], list[EngineOutput]]
Wait = Callable[[Call], Awaitable[list[EngineOutput]]]
"""How to wait for a call that computes."""


async def at_once(call: Call) -> list[EngineOutput]:
    """Compute on the event loop's own thread, which blocks the loop meanwhile."""
    return call()


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
