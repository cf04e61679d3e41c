"""The device's SLM: drafts the token after a list of ids on a worker thread, and reuses the cached common prefix."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.growth import TreeRequest, Trees, grow
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import DecoderInput, DecoderOutput
from fedhlm.decoding.grammar import Constraint
from fedhlm.decoding.ids import common_prefix
from fedhlm.decoding.models import LoadedModel
from fedhlm.decoding.tree import Branch
from fedhlm.decoding.uncertainty import UNCERTAINTIES
from fedhlm.peers.context_keys import Projection
from fedhlm.protocol.messages import Grammar, Sampling

PRIOR_NODE_S: Final = 0.002  # seconds per node until one is measured
NODE_WEIGHT: Final = 0.1  # weight of the newest tree in the running mean of the seconds per node


class Drawn(NamedTuple):
    """A drafted token with its probability and its doubt (0 to 1).

    `law` is the encoded draft law if the coupling sends it. `key` is the context key (`fedhlm.peers.context_keys`);
    empty if the model has no projection.
    """

    token: int
    prob: float
    uncertainty: float
    law: bytes
    key: bytes = b""


class TreeDraft(NamedTuple):
    """A tree draft: main chain, branches (`fedhlm.decoding.tree`), and the expected tokens of its round trip."""

    chain: list[Drawn]
    branches: tuple[Branch, ...]
    expected: float


class Drafter(Protocol):
    """The interface between the agent and a model."""

    async def draft(self, ids: Sequence[int], sampling: Sampling, uncertainty: str = "closed-form") -> Drawn:
        """Draw the token after `ids` (at least one) from the draft side of the sampling's coupling.

        `uncertainty` is a key of `fedhlm.decoding.uncertainty.UNCERTAINTIES`.
        """

    async def grow(self, request: TreeRequest) -> TreeDraft:
        """Draft a tree."""


class Slm:
    """A model and its cached prefix. Not thread-safe. With a `projection` drafts carry context keys."""

    def __init__(
        self,
        decoder: LoadedModel,
        projection: Projection | None = None,
        *,
        clock_s: Callable[[], float] = perf_counter,
    ) -> None:
        self.decoder = decoder
        self.trees = Trees(frozenset(decoder.info.eos_ids))
        self.node_s = PRIOR_NODE_S
        self._projection = projection
        self._clock_s = clock_s
        self._ids: list[int] = []
        self._cache = decoder.empty_cache()
        self._grammar: Grammar | None = None
        self._held: Constraint | None = None  # the text under that grammar

    def draft(self, ids: Sequence[int], sampling: Sampling, uncertainty: str = "closed-form") -> Drawn:
        """See `Drafter.draft`. Blocks while the model computes."""
        wanted = list(ids)
        result = self.decoder.forward([self._request(wanted)])[0]
        self._ids, self._cache = wanted, result.cache
        return self._drawn(result, sampling, wanted, uncertainty)

    def grow(self, request: TreeRequest) -> TreeDraft:
        """See `Drafter.grow`. Blocks while the model computes."""
        wanted, sampling, limits = list(request.ids), request.sampling, request.limits
        room = max(1, self.decoder.info.context - len(wanted))
        growth = self.trees.begin(request._replace(limits=limits._replace(levels=min(limits.levels, room))))
        held: dict[int, DecoderOutput] = {}
        ready_s = self._clock_s()

        def evaluate(nodes: list[int]) -> list[NDArray[np.float32]]:
            nonlocal ready_s
            requests = [
                DecoderInput(held[growth.parents[node]].cache, growth.paths[node][-1:], 1)
                if node
                else self._request(wanted)
                for node in nodes
            ]
            held.update(zip(nodes, self.decoder.forward(requests), strict=True))
            if nodes == [0]:
                ready_s = self._clock_s()  # the root's time is spent on the settled text before it
            return [self._possible(held[node].logits[-1], [*wanted, *growth.paths[node]], sampling) for node in nodes]

        grow(growth, evaluate, sampling=sampling, position=len(wanted), node_s=self.node_s, clock_s=self._clock_s)
        if len(held) > 1:
            node_s = (self._clock_s() - ready_s) / (len(held) - 1)
            self.node_s += NODE_WEIGHT * (node_s - self.node_s)
        chain, branches = growth.tree()
        known = max((node for node in [0, *chain] if node in held), key=lambda node: len(growth.paths[node]))
        self._ids, self._cache = [*wanted, *growth.paths[known]], held[known].cache
        drawn = [
            self._drawn(held[parent], sampling, [*wanted, *growth.paths[parent]], request.uncertainty)
            for parent in (growth.parents[node] for node in chain)
        ]
        return TreeDraft(drawn, tuple(branches), growth.expected)

    def _request(self, wanted: list[int]) -> DecoderInput:
        # The last id is always fed, because its logits are needed, and no others are.
        keep = min(common_prefix(self._ids, wanted), len(wanted) - 1)
        return DecoderInput(self._cache.truncated(keep), wanted[keep:], 1)

    def _possible(self, logits: NDArray[Any], ids: list[int], sampling: Sampling) -> NDArray[Any]:
        """The logits after `ids`, shape (V,), as the grammar of the sampling allows them."""
        if sampling.grammar is None:
            return logits
        if self._held is None or sampling.grammar != self._grammar:
            self._grammar, self._held = sampling.grammar, self.decoder.constrain(sampling.grammar)
        return self._held.masked(logits, ids)

    def _drawn(self, result: DecoderOutput, sampling: Sampling, ids: list[int], uncertainty: str) -> Drawn:
        logits, position = self._possible(result.logits[-1], ids, sampling), len(ids)
        token, prob, law = COUPLINGS[sampling.coupling].draft(logits, sampling, position)
        doubt = UNCERTAINTIES[uncertainty](logits, token, sampling, position)
        return Drawn(token, prob, doubt, law, self._key(result.hidden))

    def _key(self, hidden: NDArray[np.float32] | None) -> bytes:
        if self._projection is None or hidden is None:
            return b""
        return self._projection.key(hidden[-1]).tobytes()


Wait = Callable[[Callable[[], Any]], Awaitable[Any]]
"""How to wait for a call that computes; returns what the call returns."""


class SlmDrafter:
    """Makes a `Drafter` of an `Slm`. `wait` decides on which thread it computes."""

    def __init__(self, slm: Slm, wait: Wait) -> None:
        self._slm = slm
        self._wait = wait

    async def draft(self, ids: Sequence[int], sampling: Sampling, uncertainty: str = "closed-form") -> Drawn:
        """See `Drafter.draft`."""
        drawn: Drawn = await self._wait(partial(self._slm.draft, ids, sampling, uncertainty))
        return drawn

    async def grow(self, request: TreeRequest) -> TreeDraft:
        """See `Drafter.grow`."""
        grown: TreeDraft = await self._wait(partial(self._slm.grow, request))
        return grown


@asynccontextmanager
async def threaded(slm: Slm) -> AsyncIterator[Drafter]:
    """Yield a `Drafter` that computes on its own worker thread, so that the event loop is free for I/O."""
    loop = asyncio.get_running_loop()
    pool = ThreadPoolExecutor(1, thread_name_prefix="slm")
    try:
        yield SlmDrafter(slm, lambda call: loop.run_in_executor(pool, call))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
