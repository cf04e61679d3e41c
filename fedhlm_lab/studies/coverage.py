"""Measure the certificate's coverage: many devices on toy models learn under the preset `budget`.

The truth is counted. It is the share of committed tokens that the device or its peers settled and that the LLM, with
the same seed, would have written otherwise. It bounds the total variation per token.
"""

import asyncio
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from edge_agent.core import AgentCore
from edge_agent.result import GenerationResult, Job
from edge_broker.service import EdgeService
from fedhlm.config import load
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.errors import ConfigError
from fedhlm.learning.certificate import Certificate
from fedhlm.learning.evidence import FleetEvidence
from fedhlm.protocol.messages import Evidence, Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from fedhlm_lab.studies.compare import nobody
from fedhlm_lab.workers import across

AGREEMENT: Final = 0.85
TOGETHER: Final = 8  # lives whose certificates are added up like a fleet's


class CoveragePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What every life does: texts of so many tokens, with settings of the preset `budget`."""

    texts: int = 60
    tokens: int = 24
    budget: float = 0.05
    audit: float = 0.25
    temperature: float = 0.8


class DeviceLife(msgspec.Struct, frozen=True, kw_only=True):
    """One device, by its seed: its errors and tokens over all texts, its last report, and its costs.

    `above` says that the truth was once above the limit, over the texts accounted for. `different` is the share of
    texts that are not the LLM's. `evidence` is what its edge tells the cloud, by pair of models
    (`fedhlm.protocol.messages.Evidence`).
    """

    seed: int
    tokens: int
    wrong: int
    skipped: int
    different: float
    limit: float
    estimate: float
    above: bool
    audits: int
    lost_audits: int
    audit_messages: int
    messages: int
    evidence: dict[str, bytes]

    @property
    def truth(self) -> float:
        """Errors per token."""
        return self.wrong / self.tokens


class CoverageFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures over all lives.

    `fleet_limit` and `fleet_ratio`, limit / truth, are means over groups of eight lives, or None with fewer lives. The
    limit is the fleet's certificate as edges and cloud make it.
    """

    lives: int
    texts: int
    share_below_budget: float
    share_ever_above: float
    audits_per_text: float
    scored_tails_per_text: float
    lost_audits: int
    messages_per_token: float
    mean_limit: float
    mean_truth: float
    mean_estimate: float
    skipped: float
    different: float
    fleet_limit: float | None
    fleet_ratio: float | None


def errors_of(prompt: list[int], sampling: Sampling, result: GenerationResult) -> int:
    """Count the skipped tokens that the LLM would have written otherwise."""
    settle = COUPLINGS[sampling.coupling].settle
    ids, wrong = list(prompt), 0
    for token, source in zip(result.ids, result.sources, strict=True):
        if not SOURCES[source].verified:
            wrong += settle(toy.large_logits(ids), sampling, len(ids), None, b"") != token
        ids.append(token)
    return wrong


async def _live(plan: CoveragePlan, seed: int) -> DeviceLife:
    flags = {"generation.budget": str(plan.budget), "generation.audit": str(plan.audit)}
    config = load(preset="budget", environ={}, flags=flags).config
    generation = config.generation
    rng = random.Random(seed)
    pair = toy.pair(AGREEMENT)
    fleet = Fleet(pair, seed=seed, clusters=1, delay_s=0.01, sessions_max=64, federation=config.federation)
    for node in fleet.nodes.values():
        node.start()
    wrong, tokens = [0], [0]  # cumulative, by texts
    skipped = different = 0
    above = False
    known = Certificate()
    async with fleet.online("c0", "agent", pair.drafter()) as agent:
        for _ in range(plan.texts):
            prompt = [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(3)]
            sampling = Sampling(rng.getrandbits(40), plan.temperature, 1.0, generation.coupling)
            job = Job(generation, sampling, plan.tokens, pair.context, pair.eos_ids)
            result = await agent.generate(job, prompt, nobody)
            wrong.append(wrong[-1] + errors_of(prompt, sampling, result))
            tokens.append(tokens[-1] + len(result.ids))
            skipped += sum(not SOURCES[s].verified for s in result.sources)
            different += result.ids != toy.large_alone(prompt, sampling, plan.tokens)
            if result.certificate is None:
                raise ValueError("generation.audit must be above 0 (got 0): nothing is estimated without audits")
            known = result.certificate
            done = round(known.texts)
            above |= done > 0 and wrong[done] / tokens[done] > known.limit(generation.confidence)
        await asyncio.sleep(0.0)
    told = _told(fleet, agent)
    for node in fleet.nodes.values():
        await node.crash()
    counted = fleet.counters.snapshot()
    return DeviceLife(
        seed=seed,
        tokens=tokens[-1],
        wrong=wrong[-1],
        skipped=skipped,
        different=different / plan.texts,
        limit=known.limit(generation.confidence),
        estimate=known.estimate,
        above=above,
        audits=round(counted.get("audits", 0)),
        lost_audits=round(counted.get("lost_audits", 0)),
        audit_messages=round(counted.get("audit_messages", 0)),
        messages=round(counted.get("uplink_messages", 0)),
        evidence=told,
    )


def _told(fleet: Fleet, agent: AgentCore) -> dict[str, bytes]:
    """What the edge would tell the cloud after another contribution of its only agent."""
    edge, evidence = fleet.nodes["edge-0"].service, agent.learner.evidence()
    if not isinstance(edge, EdgeService) or evidence is None:
        raise ValueError(f"edge-0 must be an edge, and its agent must have evidence (got {edge!r}, {evidence!r})")
    edge.members.evidence.hear(agent.name, evidence, partial(edge.federation.settled.witness, agent.name))
    return {pair: known.to_bytes() for pair, known in edge.members.evidence.totals().items()}


def live(plan: CoveragePlan, seed: int) -> DeviceLife:
    """Run one agent of a fleet without faults for `plan.texts` prompts, in virtual time."""
    return run_virtual(_live(plan, seed))


class SavedLives:
    """Lives that have ended, in a file with one JSON object a line: a study that was ended goes on with the rest.

    What a process wrote of a line when it was killed is not a life, and is taken off the file.
    """

    def __init__(self, path: Path, plan: CoveragePlan) -> None:
        self._path, self._plan = path, plan

    def read(self) -> Iterator[DeviceLife]:
        """The lives of the file.

        Raises:
            ConfigError: the file cannot be read, or has a line that is no life of this plan.
        """
        try:
            data = self._path.read_bytes() if self._path.exists() else b""
            whole, _, rest = data.rpartition(b"\n")
            if rest:
                self._path.write_bytes(whole + b"\n" if whole else b"")
            for line in whole.splitlines():
                kept = msgspec.json.decode(line, type=_SavedLife)
                if kept.plan != self._plan:
                    raise ConfigError("--saved", self._path, "a file of lives with these texts and settings")
                yield kept.life
        except OSError as exc:
            raise ConfigError("--saved", self._path, "a file that can be read", why=exc.strerror or "") from exc
        except msgspec.DecodeError as exc:
            raise ConfigError("--saved", self._path, "a file of lives", why=str(exc)) from exc

    def add(self, life: DeviceLife) -> None:
        """Append a life."""
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(_SavedLife(self._plan, life)) + b"\n")


class _SavedLife(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    plan: CoveragePlan
    life: DeviceLife


def study(
    plan: CoveragePlan,
    *,
    lives: int,
    seed: int = 0,
    jobs: int = 1,
    saved: SavedLives | None = None,
    ended: Callable[[DeviceLife], object] | None = None,
) -> CoverageFigures:
    """Run independent lives, one per seed from `seed` on; `ended` is called with each.

    Lives that `saved` has are not run again, and it receives the others.

    Raises:
        ConfigError: `saved` cannot be used.
    """
    wanted = range(seed, seed + lives)
    found = {life.seed: life for life in (() if saved is None else saved.read()) if life.seed in wanted}
    if ended is not None:
        for life in found.values():
            ended(life)
    for one in across(partial(live, plan), [number for number in wanted if number not in found], jobs):
        found[one.seed] = one
        if saved is not None:
            saved.add(one)
        if ended is not None:
            ended(one)
    return figures(plan, [found[number] for number in wanted])


def _fleet_limit(lives: list[DeviceLife], confidence: float) -> float:
    """The limit that a cloud with these devices, one in each cluster, publishes."""
    cloud = FleetEvidence()
    for number, life in enumerate(lives):
        cloud.hear(f"c{number}", Evidence(number, life.evidence))
    return sum(cloud.totals().values(), Certificate()).limit(confidence)


def figures(plan: CoveragePlan, lives: list[DeviceLife]) -> CoverageFigures:
    """Figures over the lives."""
    confidence = load(preset="budget", environ={}).config.generation.confidence
    texts = plan.texts * len(lives)
    groups = [lives[i : i + TOGETHER] for i in range(0, len(lives) - TOGETHER + 1, TOGETHER)]
    limits = [_fleet_limit(group, confidence) for group in groups]
    truths = [sum(x.wrong for x in group) / sum(x.tokens for x in group) for group in groups]
    tokens = sum(x.tokens for x in lives)
    return CoverageFigures(
        lives=len(lives),
        texts=plan.texts,
        share_below_budget=sum(x.limit < plan.budget for x in lives) / len(lives),
        share_ever_above=sum(x.above for x in lives) / len(lives),
        audits_per_text=sum(x.audit_messages for x in lives) / texts,
        scored_tails_per_text=sum(x.audits for x in lives) / texts,
        lost_audits=sum(x.lost_audits for x in lives),
        messages_per_token=sum(x.messages for x in lives) / tokens,
        mean_limit=float(np.mean([x.limit for x in lives])),
        mean_truth=float(np.mean([x.truth for x in lives])),
        mean_estimate=float(np.mean([x.estimate for x in lives])),
        skipped=sum(x.skipped for x in lives) / tokens,
        different=float(np.mean([x.different for x in lives])),
        fleet_limit=float(np.mean(limits)) if limits else None,
        fleet_ratio=float(np.mean(limits) / np.mean(truths)) if limits and np.mean(truths) else None,
    )
