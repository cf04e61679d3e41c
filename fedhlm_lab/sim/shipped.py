"""A pair of model folders as a fleet's pair: real models in virtual time.

Computing takes no virtual time but the step that is given, so runs do not depend on the machine.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cloud_verifier.batching import Output
from cloud_verifier.service import Engine
from edge_agent.growth import Budget
from edge_agent.model import Drafter, Drawn, Grown, Slm
from fedhlm.decoding.decoder import Decoder, Request
from fedhlm.decoding.sampling import NOISE
from fedhlm.peers.context_keys import load_projection
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim.world import Pair

DRAFT_STEP_S: Final = 0.001
TARGET_STEP_S: Final = 0.01


class VirtualDrafter:
    """An SLM that computes at once and takes `DRAFT_STEP_S` of virtual time."""

    def __init__(self, slm: Slm) -> None:
        self._slm = slm

    async def draft(self, ids: Sequence[int], sampling: Sampling, uncertainty: str = "closed-form") -> Drawn:
        """See `edge_agent.model.Drafter`."""
        drawn = self._slm.draft(ids, sampling, uncertainty)
        await asyncio.sleep(DRAFT_STEP_S)
        return drawn

    async def grow(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        budget: Budget,
        *,
        uncertainty: str = "closed-form",
        settled: int | None = None,
    ) -> Grown:
        """See `edge_agent.model.Drafter`."""
        grown = self._slm.grow(ids, sampling, budget, uncertainty=uncertainty, settled=settled)
        await asyncio.sleep(DRAFT_STEP_S * (len(grown.chain) + len(grown.branches)))
        return grown


def shipped_pair(slm_folder: Path, llm_folder: Path, *, threads: int = 1) -> Pair:
    """Both folders opened; every agent gets its own cache over one SLM.

    Raises:
        ModelError: a folder cannot be used.
    """
    small, large = Decoder.load(slm_folder, threads=threads), Decoder.load(llm_folder, threads=threads)
    projection = load_projection(slm_folder, small.info.hidden_size)

    async def forward(requests: Sequence[tuple[Any, list[int]]]) -> list[Output]:
        results = large.forward([Request(cache, ids) for cache, ids in requests])
        await asyncio.sleep(TARGET_STEP_S)
        return [Output(result.logits, result.cache) for result in results]

    def drafter() -> Drafter:
        return VirtualDrafter(Slm(small, projection))

    info = large.info
    return Pair(
        fingerprint=fingerprint_of(large.tokenizer_digest, info.vocab_size, noise=NOISE, model=info.name),
        eos_ids=frozenset(info.eos_ids),
        context=min(info.context, small.info.context),
        engine=lambda: Engine(large.empty_cache(), forward),
        drafter=drafter,
        space=projection.digest[:8],
    )
