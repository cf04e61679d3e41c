"""A sample of requests again in the simulator, with the real pair, agents, edges and cloud: both must agree."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from edge_agent.learner import Learner
from fedhlm.config import load
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Config
from fedhlm_lab.papers.device import LawDevice, LawTexts
from fedhlm_lab.papers.findings import LabTable
from fedhlm_lab.papers.requests import LabRequest
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Pair
from fedhlm_lab.studies.compare import AGENTS, CLUSTERS, StudyTask, run_fleet

PLACES: Final = CLUSTERS * AGENTS


class RerunRow(NamedTuple):
    """How many requests of a policy were run again, and for how many the token and who settled it are the same."""

    policy: str
    requests: int
    same: int


def frozen(preset: str, flags: Mapping[str, str], tau: float | None = None) -> Config:
    """A preset without learning and peers, as far as it has any: the threshold is `tau`."""
    fixed = {"generation.peers": "none", "generation.audit": "0"}
    if tau is not None:
        fixed |= {"generation.threshold": "fixed", "generation.tau": str(min(1.0, max(0.0, tau)))}
    return load(preset=preset, environ={}, flags={**fixed, **flags}).config


def rerun(
    policies: Mapping[str, Config], pair: Pair, texts: LawTexts, requests: Sequence[LabRequest]
) -> list[RerunRow]:
    """Run requests under each policy on the cached laws, and again in the simulator."""
    rows = []
    for name, config in policies.items():
        device = LawDevice("one", config.generation, Learner(config.federation, np.random.default_rng(0)), texts)
        cached = {r.seed: device.answer(r) for r in requests}
        tasks = [StudyTask(list(texts.laws.prompts[r.article].ids), Sampling(r.seed, 0.0), 1, "") for r in requests]
        parts = [tasks[place::PLACES] for place in range(PLACES)]
        done, _ = run_virtual(partial(run_fleet, pair, config, parts, 0.0, texts.read)())
        live = {d.task.sampling.seed: (d.result.ids, d.result.sources) for d in done}
        same = sum(live.get(seed) == ([made.token], [made.source]) for seed, made in cached.items())
        rows.append(RerunRow(name, len(requests), same))
    return rows


def reruns_table(rows: Iterable[RerunRow]) -> LabTable:
    """The requests of each policy, those of all seeds together."""
    found: dict[str, RerunRow] = {}
    for row in rows:
        known = found.get(row.policy, RerunRow(row.policy, 0, 0))
        found[row.policy] = RerunRow(row.policy, known.requests + row.requests, known.same + row.same)
    columns = ("policy", "requests", "same token and source")
    return LabTable("simulator", "Again in the simulator", columns, list(found.values()))
