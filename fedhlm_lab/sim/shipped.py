"""Run a pair of model folders in virtual time.

Computing takes only the given steps of virtual time, so runs do not depend on the machine.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cloud_verifier.backends.onnx import Call, engine_of
from cloud_verifier.engine import EngineOutput
from cloud_verifier.wiring import LargeModel
from edge_agent.model import Drawn, Slm, SlmDrafter, TreeDraft
from fedhlm.decoding.decoder import Decoder
from fedhlm.peers.context_keys import load_projection
from fedhlm_lab.sim.world import Pair

DRAFT_STEP_S: Final = 0.001
TARGET_STEP_S: Final = 0.01


async def drafting(work: Callable[[], Drawn | TreeDraft]) -> Any:
    """An SLM's call: `DRAFT_STEP_S` of virtual time for each drafted token."""
    made = work()
    await asyncio.sleep(DRAFT_STEP_S * (1 if isinstance(made, Drawn) else len(made.chain) + len(made.branches)))
    return made


async def drafting_beside(call: Call) -> list[EngineOutput]:
    """A call of the cloud's own SLM: `DRAFT_STEP_S` of virtual time."""
    outputs = call()
    await asyncio.sleep(DRAFT_STEP_S)
    return outputs


async def verifying(call: Call) -> list[EngineOutput]:
    """An LLM's call: `TARGET_STEP_S` of virtual time."""
    outputs = call()
    await asyncio.sleep(TARGET_STEP_S)
    return outputs


def shipped_pair(slm_folder: Path, llm_folder: Path, *, threads: int = 1) -> Pair:
    """Open both folders; every agent gets its own cache over one SLM.

    Raises:
        ModelError: a folder cannot be used.
    """
    small, large = Decoder.load(slm_folder, threads=threads), Decoder.load(llm_folder, threads=threads)
    projection = load_projection(slm_folder, small.info.hidden_size)

    llm = LargeModel.of(large, engine_of(large, verifying))
    return Pair(
        fingerprint=llm.fingerprint,
        eos_ids=llm.eos_ids,
        context=min(llm.context, small.info.context),
        engine=lambda: llm.engine,
        drafter=lambda: SlmDrafter(Slm(small, projection), drafting),
        space=projection.digest[:8],
        beside=lambda: llm.beside(small, engine_of(small, drafting_beside)).small,
    )
