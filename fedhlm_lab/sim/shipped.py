"""Run a pair of model folders in virtual time.

Computing takes only the given steps of virtual time, so runs do not depend on the machine.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from cloud_verifier.backends.in_process import engine_of
from cloud_verifier.wiring import LargeModel
from edge_agent.model import Drawn, Slm, SlmDrafter, TreeDraft
from fedhlm.decoding.models import load_model
from fedhlm.decoding.translated import in_ids_of
from fedhlm.peers.context_keys import load_projection
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim.pace import CallPace, CallTally, ModelPace, Paces, remembered
from fedhlm_lab.sim.world import Pair

DRAFT_STEP_S: Final = 0.001
TARGET_STEP_S: Final = 0.01
STEPS: Final = Paces(ModelPace(DRAFT_STEP_S), ModelPace(DRAFT_STEP_S), ModelPace(TARGET_STEP_S))


async def drafting(pace: ModelPace, work: Callable[[], Drawn | TreeDraft]) -> Any:
    """An SLM's calls: one for each drafted token."""
    made = work()
    count = 1 if isinstance(made, Drawn) else len(made.chain) + len(made.branches)
    await asyncio.sleep(pace.seconds(1) * count)
    return made


class RememberingSlm(Slm):
    """An SLM whose greedy drafts are computed once for each text, whichever agent asks."""

    known: dict[tuple[tuple[int, ...], Sampling, str], Drawn]

    def draft(self, ids: Sequence[int], sampling: Sampling, uncertainty: str = "closed-form") -> Drawn:
        """See `Slm.draft`."""
        if sampling.temperature:
            return super().draft(ids, sampling, uncertainty)
        name = (tuple(ids), sampling, uncertainty)
        if name not in self.known:
            self.known[name] = super().draft(ids, sampling, uncertainty)
        return self.known[name]


def shipped_pair(
    slm_folder: Path,
    llm_folder: Path,
    *,
    threads: int = 1,
    paces: Paces = STEPS,
    tally: CallTally | None = None,
    batches: CallPace | None = None,
    target: str = "",
) -> Pair:
    """Open both folders; every agent gets its own cache over one SLM.

    `batches` is the LLM's pace by batch, tokens and context, in place of that in `paces`. With a `tally`, which counts
    the calls of the LLM, its logits and greedy drafts are remembered from text to text. `target` is
    `agent.target_tokenizer`.

    Raises:
        ConfigError: `target` has no tokenizer that can be used.
        ModelError: a folder cannot be used.
    """
    small = in_ids_of(target, load_model(slm_folder, threads=threads))
    large = load_model(llm_folder, threads=threads)
    projection = load_projection(slm_folder, small.info.hidden_size)

    engine = engine_of(large) if tally is None else remembered(engine_of(large))
    llm = LargeModel.of(large, (tally or CallTally()).paced(engine, batches or paces.large))
    known: dict[tuple[tuple[int, ...], Sampling, str], Drawn] = {}

    def drafter() -> SlmDrafter:
        slm = Slm(small, projection) if tally is None else RememberingSlm(small, projection)
        if isinstance(slm, RememberingSlm):
            slm.known = known
        return SlmDrafter(slm, partial(drafting, paces.device))

    return Pair(
        fingerprint=llm.fingerprint,
        eos_ids=llm.eos_ids,
        context=min(llm.context, small.info.context),
        engine=lambda: llm.engine,
        drafter=drafter,
        space=projection.digest[:8],
        beside=lambda: llm.beside(small, CallTally().paced(engine_of(small), paces.beside)).small,
    )
