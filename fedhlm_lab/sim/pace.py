"""How long models compute: measured on this machine, and spent as virtual time by the parts of a simulated fleet."""

import asyncio
from collections.abc import Callable, Sequence
from itertools import islice
from time import process_time
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cloud_verifier.engine import Engine, EngineFailure, EngineInput, EngineOutput
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.models import LoadedModel

PREFIX: Final = 64  # tokens that are cached before the measured ones
SIZES: Final = (1, 2, 4, 8, 16)
KEPT: Final = 64  # caches of texts


class ModelPace(NamedTuple):
    """The time of one call of a model: `call_s` seconds, and `token_s` for each of its tokens, padding included."""

    call_s: float
    token_s: float = 0.0

    def seconds(self, tokens: int) -> float:
        """The time of a call with so many tokens."""
        return self.call_s + self.token_s * tokens

    def of_call(self, rows: int, width: int, past: int) -> float:
        """The time of a call of `rows` requests of `width` tokens. Cached tokens (`past`) cost nothing."""
        del past
        return self.seconds(rows * width)


class CallPace(Protocol):
    """The time of a call of several requests."""

    def of_call(self, rows: int, width: int, past: int, /) -> float:
        """The seconds of a call of `rows` requests, padded to `width` tokens after `past` cached ones."""


class Paces(NamedTuple):
    """The SLM on a device, the same model beside the LLM at the cloud, and the LLM."""

    device: ModelPace
    beside: ModelPace
    large: ModelPace


class CallTally:
    """Counts the calls of an engine, the tokens that it computed, without padding, and the seconds that they took."""

    def __init__(self) -> None:
        self.calls = 0
        self.tokens = 0
        self.seconds = 0.0

    @property
    def counted(self) -> tuple[int, int, float]:
        """Calls, tokens and seconds so far."""
        return self.calls, self.tokens, self.seconds

    def paced(self, engine: Engine, pace: CallPace) -> Engine:
        """The same engine; each call is counted and takes its pace in virtual time."""

        async def forward(requests: Sequence[EngineInput]) -> Sequence[EngineOutput | EngineFailure]:
            outputs = await engine.forward(requests)
            lengths = [len(request.ids) for request in requests]
            self.calls += 1
            self.tokens += sum(lengths)
            past = max(len(getattr(request.cache, "ids", ())) for request in requests)
            took_s = pace.of_call(len(lengths), max(lengths), past)
            self.seconds += took_s
            await asyncio.sleep(took_s)
            return outputs

        return engine._replace(forward=forward)


class RememberedCache(NamedTuple):
    """A cache of a `remembered` engine: the ids before it."""

    ids: tuple[int, ...] = ()

    def truncated(self, length: int) -> "RememberedCache":
        """The cache of the first `length` tokens."""
        return RememberedCache(self.ids[:length])


def remembered(engine: Engine) -> Engine:
    """The same engine for studies that read the same texts again and again: logits are computed once for each text.

    Logits differ from those of the engine by the rounding of its batches. A text goes on from its own cache while that is
    among the KEPT newest ones, and is read anew otherwise.
    """
    known: dict[tuple[int, ...], NDArray[Any]] = {}
    caches: dict[tuple[int, ...], Any] = {(): engine.empty_cache}

    async def forward(requests: Sequence[EngineInput]) -> Sequence[EngineOutput | EngineFailure]:
        outputs: list[EngineOutput | EngineFailure] = []
        for cache, new, rows in requests:
            ids = (*cache.ids, *new)
            ends = range(len(ids) - rows + 1, len(ids) + 1)
            if any(ids[:end] not in known for end in ends):
                begun = cache.ids if cache.ids in caches else ()
                (output,) = await engine.forward([EngineInput(caches[begun], list(ids[len(begun) :]), rows)])
                if isinstance(output, EngineFailure):
                    outputs.append(output)
                    continue
                known.update({ids[:end]: row for end, row in zip(ends, output.logits, strict=True)})
                caches[ids] = output.cache
                if len(caches) > KEPT:
                    del caches[next(islice(caches, 1, 2))]  # the oldest but for the empty one
            found = [known[ids[:end]] for end in ends]
            outputs.append(EngineOutput(np.stack(found) if found else np.zeros((0, 0)), RememberedCache(ids)))
        return outputs

    return engine._replace(empty_cache=RememberedCache(), forward=forward)


def measured(decoder: LoadedModel, *, repeats: int = 30, clock_s: Callable[[], float] = process_time) -> ModelPace:
    """Measure a model on this machine: the fastest of `repeats` calls for each size, and a line through them.

    The decoder must run on one thread, because the time is the processor's.
    """
    ids = [1 + number % (decoder.vocabulary.size - 1) for number in range(PREFIX)]
    cache = decoder.forward([DecoderInput(decoder.empty_cache(), ids, 1)])[0].cache
    fastest = []
    for size in SIZES:
        times = []
        for _ in range(repeats):
            began_s = clock_s()
            decoder.forward([DecoderInput(cache, ids[:size], size)])
            times.append(clock_s() - began_s)
        fastest.append(min(times))
    token_s, call_s = np.polyfit(SIZES, fastest, 1)
    return ModelPace(max(0.0, float(call_s)), max(0.0, float(token_s)))
