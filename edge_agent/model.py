"""The device's SLM: drafts the token after a list of ids, on one worker thread, reusing the cached common prefix."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from fedhlm.decoder import Cache, Decoder, Request
from fedhlm.ids import common_prefix
from fedhlm.messages import Sampling
from fedhlm.sampling import COUPLINGS
from fedhlm.uncertainty import closed_form


class Drawn(NamedTuple):
    """A drafted token, its probability, its uncertainty in [0, 1], and the bytes of the draft law if they travel."""

    token: int
    prob: float
    uncertainty: float
    law: bytes


class Drafter(Protocol):
    """What the agent needs of a model."""

    async def draft(self, ids: Sequence[int], sampling: Sampling) -> Drawn:
        """Draw the token after `ids` (at least one) from the draft side of the sampling's coupling."""


class Slm:
    """A decoder and the prefix it holds. Not for two threads at once."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._ids: list[int] = []
        self._cache: Cache = decoder.empty_cache()

    def draft(self, ids: Sequence[int], sampling: Sampling) -> Drawn:
        """See `Drafter.draft`; blocks while the model computes."""
        wanted = list(ids)
        # The last id is always fed: its logits are the ones that are needed.
        keep = min(common_prefix(self._ids, wanted), len(wanted) - 1)
        result = self.decoder.forward([Request(self._cache.truncated(keep), wanted[keep:])])[0]
        self._ids, self._cache = wanted, result.cache
        logits = result.logits[-1]
        token, prob, law = COUPLINGS[sampling.coupling].draft(logits, sampling, len(wanted))
        return Drawn(token, prob, closed_form(logits, token), law)


class ThreadedDrafter:
    """Runs an Slm on a worker thread, so that the event loop owns sockets only."""

    def __init__(self, slm: Slm) -> None:
        self._slm = slm
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="slm")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def draft(self, ids: Sequence[int], sampling: Sampling) -> Drawn:
        """See `Drafter.draft`."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._slm.draft, ids, sampling)
