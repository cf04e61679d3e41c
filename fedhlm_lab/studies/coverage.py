"""Does the error budget hold? Many fleets of toy models learn under the preset `budget`, and the truth is counted.

The truth is the share of committed tokens that the device or its peers settled and the LLM, with the same seed, would
have written otherwise: it bounds the total variation per token. Run: python -m fedhlm_lab.studies.coverage [--runs 200] [--budget 0.05]
"""

import argparse
import random
import sys
from functools import partial
from typing import Final, NamedTuple

from edge_agent.result import GenerationResult, Job
from fedhlm.config import load
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Config
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet, Pair
from fedhlm_lab.studies.compare import nobody

AGREEMENT: Final = 0.85


class DeviceLife(NamedTuple):
    """One device's life: harm per token, the mean over its generations; R-hat and limit as it reports them at the end;
    the share of tokens that were skipped, and of texts that are not the LLM's."""

    truth: float
    estimate: float
    limit: float
    skipped: float
    different: float


def true_harm(prompt: list[int], sampling: Sampling, result: GenerationResult) -> int:
    """Skipped tokens that the LLM would have written otherwise."""
    settle = COUPLINGS[sampling.coupling].settle
    ids, wrong = list(prompt), 0
    for token, source in zip(result.ids, result.sources, strict=True):
        if not SOURCES[source].verified:
            wrong += settle(toy.large_logits(ids), sampling, len(ids), None, b"") != token
        ids.append(token)
    return wrong


async def life(pair: Pair, config: Config, *, seed: int, generations: int, tokens: int) -> DeviceLife:
    """One agent of a calm fleet, `generations` prompts long."""
    rng = random.Random(seed)
    fleet = Fleet(pair, seed=seed, clusters=1, delay_s=0.01, sessions_max=8, federation=config.federation)
    for node in fleet.nodes.values():
        node.start()
    harms, skipped, written, different = [], 0, 0, 0
    async with fleet.online("c0", "agent", pair.drafter()) as agent:
        for _ in range(generations):
            prompt = [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(3)]
            sampling = Sampling(rng.getrandbits(40), 0.8, 1.0, config.generation.coupling)
            job = Job(config.generation, sampling, tokens, pair.context, pair.eos_ids)
            result = await agent.generate(job, prompt, nobody)
            harms.append(true_harm(prompt, sampling, result) / len(result.ids))
            skipped += sum(not SOURCES[s].verified for s in result.sources)
            written += len(result.ids)
            different += result.ids != toy.large_alone(prompt, sampling, tokens)
    for node in fleet.nodes.values():
        await node.crash()
    risk = result.risk
    if risk is None:
        raise ValueError("generation.audit is 0: nothing is estimated without audits")
    truth = sum(harms) / len(harms)
    return DeviceLife(truth, risk.estimate, risk.limit(), skipped / written, different / generations)


def study(
    *, runs: int, generations: int, tokens: int, budget: float, audit: float, first_seed: int = 0
) -> list[DeviceLife]:
    """Independent lives, one for each seed."""
    flags = {"generation.budget": str(budget), "generation.audit": str(audit)}
    config = load(preset="budget", environ={}, flags=flags).config
    pair = toy.pair(AGREEMENT)
    return [
        run_virtual(partial(life, pair, config, seed=seed, generations=generations, tokens=tokens)())
        for seed in range(first_seed, first_seed + runs)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; exit status 1 when the truth is above the limit more often than stated."""
    parser = argparse.ArgumentParser(
        prog="python -m fedhlm_lab.studies.coverage", description="does the error budget hold?"
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--generations", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--audit", type=float, default=0.0105, help="for each token that is asked for")
    options = parser.parse_args(arguments)
    lives = study(**vars(options))
    above = sum(r.truth > r.limit for r in lives)
    over = sum(r.truth > options.budget for r in lives)

    def mean(name: str) -> float:
        return float(sum(getattr(r, name) for r in lives) / len(lives))

    print(
        f"{len(lives)} runs of {options.generations} generations: truth above its limit {above}, above the budget {over};\n"
        f"means: truth {mean('truth'):.4f}, R-hat {mean('estimate'):.4f}, limit {mean('limit'):.4f}, "
        f"skipped {mean('skipped'):.1%}, texts that differ {mean('different'):.1%} "
        f"(at most {options.tokens} x truth = {options.tokens * mean('truth'):.1%})"
    )
    return int(above > 0.05 * len(lives))


if __name__ == "__main__":
    sys.exit(main())
