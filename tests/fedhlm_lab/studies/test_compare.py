"""Presets side by side: what a run says about a fleet covers every text, whether or not its audit had ended in time."""

import asyncio

import pytest

from fedhlm.config import load
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.studies.compare import AGENTS, CLUSTERS, FinishedTask, StudyTask, certificate_of, run_fleet

KEEPS_MOST = {"generation.audit": "1.0", "generation.threshold": "fixed", "generation.tau": "0.95"}


@pytest.mark.parametrize("pause_s", [0.0, 2.0])
def test_the_certificate_of_a_run_counts_every_text_and_pauses_take_virtual_time(pause_s: float) -> None:
    """All answers of one token are audited, and with the last one most audits are open still."""
    config = load(preset="budget", environ={}, flags=KEEPS_MOST).config
    each = 12
    tasks = [StudyTask([1 + i % 9, 2, 3], Sampling(i, 0.0), 1, "") for i in range(each * CLUSTERS * AGENTS)]
    parts = [tasks[place :: CLUSTERS * AGENTS] for place in range(CLUSTERS * AGENTS)]
    ended: list[float] = []

    async def life() -> list[FinishedTask]:
        clock = asyncio.get_running_loop()
        done, _ = await run_fleet(
            toy.pair(0.85), config, parts, 0.02, ended=lambda: ended.append(clock.time()), pause_s=pause_s
        )
        return done

    done = run_virtual(life())
    known = certificate_of(done)
    assert known is not None
    assert known.tokens == sum(len(one.result.ids) for one in done) == len(tasks)
    assert max(ended) - min(ended) >= (each - 1) * pause_s
    assert pause_s > 0.0 or max(ended) - min(ended) < each
