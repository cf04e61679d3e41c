"""Measure what hostile members of a federation do to honest ones: toy fleets under the preset `budget`.

Some of the `n` agents of a cluster lie in every contribution; another cluster is honest. Counted are the share of
committed tokens that the LLM, with the same seed, would have written otherwise, and the share of tokens that the
cloud settled. Run: python -m fedhlm_lab.studies.liars [--members 2 4 8] [--lies bin-0 drift] [--generations 60]
"""

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple

from edge_agent.core import AgentCore
from edge_agent.result import GenerationResult, Job
from fedhlm.config import load
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Config
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.liars import LIES, tempt
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet, Pair
from fedhlm_lab.studies.compare import nobody
from fedhlm_lab.studies.coverage import AGREEMENT, errors_of

NEIGHBOURS: Final = 2  # agents of the other cluster
HONEST: Final = "none"


class Life(NamedTuple):
    """One honest agent: its true error per token, verified share, messages per token, and last threshold.

    The error is the mean over its texts. `here` says whether the liars were in its own cluster.
    """

    here: bool
    truth: float
    verified: float
    messages: float
    tau: float


class LiarsSetting(NamedTuple):
    """A fleet: `members` agents in the cluster, of which `liars` send the lie `lie`."""

    members: int
    liars: int
    lie: str
    temperature: float
    generations: int
    tokens: int


async def fleet_of(pair: Pair, config: Config, setting: LiarsSetting, seed: int) -> list[Life]:
    """Let all agents write at once; return what became of the honest ones."""
    fleet = Fleet(pair, seed=seed, clusters=2, delay_s=0.01, sessions_max=64, federation=config.federation)
    for node in fleet.nodes.values():
        node.start()
    places = [("c0", i < setting.liars) for i in range(setting.members)] + [("c1", False)] * NEIGHBOURS
    lives = await asyncio.gather(
        *(_write(fleet, config, setting, cluster, i, lies=lies) for i, (cluster, lies) in enumerate(places))
    )
    for node in fleet.nodes.values():
        await node.crash()
    return [life for life, (_, lies) in zip(lives, places, strict=True) if not lies]


async def _write(fleet: Fleet, config: Config, setting: LiarsSetting, cluster: str, number: int, *, lies: bool) -> Life:
    rng = random.Random(f"{fleet.seed}/{number}")
    truth, verified, written, messages, tau = 0.0, 0, 0, 0, 0.0
    async with fleet.online(cluster, f"agent-{number}", fleet.pair.drafter()) as agent:
        if lies:
            tempt(agent.learner, lambda: setting.lie)
        for _ in range(setting.generations):
            result = await _generate(agent, config, setting, rng, fleet.pair)
            truth += errors_of(result.prompt, result.sampling, result.made) / len(result.made.ids)
            verified += sum(SOURCES[s].verified for s in result.made.sources)
            written += len(result.made.ids)
            messages += result.made.uplink_messages
            tau = result.made.tau
    return Life(cluster == "c0", truth / setting.generations, verified / written, messages / written, tau)


class _StudyText(NamedTuple):
    prompt: list[int]
    sampling: Sampling
    made: GenerationResult


async def _generate(
    agent: AgentCore, config: Config, setting: LiarsSetting, rng: random.Random, pair: Pair
) -> _StudyText:
    prompt = [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(3)]
    sampling = Sampling(rng.getrandbits(40), setting.temperature, 1.0, config.generation.coupling)
    job = Job(config.generation, sampling, setting.tokens, pair.context, pair.eos_ids)
    return _StudyText(prompt, sampling, await agent.generate(job, prompt, nobody))


def study(config: Config, setting: LiarsSetting, seeds: Sequence[int], agreement: float = AGREEMENT) -> list[Life]:
    """The honest agents of independent fleets."""
    pair = toy.pair(agreement)
    return [life for seed in seeds for life in run_virtual(partial(fleet_of, pair, config, setting, seed)())]


def describe(lives: Sequence[Life]) -> str:
    """Describe means over agents."""
    if not lives:
        return "-"
    mean = {name: sum(getattr(life, name) for life in lives) / len(lives) for name in Life._fields}
    worst = max(life.truth for life in lives)
    return (
        f"{mean['truth']:.4f} (worst {worst:.4f}) | {mean['verified']:.1%} | {mean['messages']:.3f} | {mean['tau']:.3f}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if the honest agents of some fleet exceed the budget."""
    parser = argparse.ArgumentParser(
        prog="python -m fedhlm_lab.studies.liars", description="what liars can do to the honest"
    )
    parser.add_argument("--members", type=int, nargs="+", default=[2, 3, 4, 8, 16, 32])
    parser.add_argument("--liars", choices=("one", "most"), default="one", help="most: f < n/2, at least one")
    parser.add_argument("--lies", nargs="+", choices=LIES, default=list(LIES))
    parser.add_argument("--generations", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--agreement", type=float, default=AGREEMENT)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args(arguments)
    config = load(preset="budget", environ={}, flags={"generation.budget": str(options.budget)}).config
    print("| members | liars | lie | cluster | error | verified | messages a token | tau |\n" + "|---" * 8 + "|")
    above = 0
    for members in options.members:
        most = max(1, (members - 1) // 2) if options.liars == "most" else 1
        for lie in (HONEST, *options.lies):
            liars = 0 if lie == HONEST else most
            setting = LiarsSetting(members, liars, lie, options.temperature, options.generations, options.tokens)
            lives = study(config, setting, range(options.runs), options.agreement)
            for here in (True, False):
                group = [life for life in lives if life.here is here]
                where = "same" if here else "other"
                print(f"| {members} | {liars} | {lie} | {where} | {describe(group)} |", flush=True)
                above += sum(life.truth for life in group) > options.budget * len(group)
    return int(above > 0)


if __name__ == "__main__":
    sys.exit(main())
