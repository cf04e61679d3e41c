"""Measure what hostile members of a federation do to honest ones: toy fleets under the preset `budget`.

Some agents of a cluster lie in every contribution; another cluster is honest. Counted are the share of committed tokens
that the LLM, with the same seed, would have written otherwise, and what was sent upwards.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

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
from fedhlm_lab.workers import across

NEIGHBOURS: Final = 2  # agents of the other cluster
HONEST: Final = "none"
CALIBRATED: Final = "calibrated-fl"
PAPER: Final = "paper-fl"
SHOUTS: Final = ("harmless", "harmful")  # under `paper-fl`: the threshold 1 or 0, with the largest count
MESSAGES_MORE: Final = 1.1


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
    """A fleet under a rule for tau: `members` agents in the cluster, of which `liars` tell the lie `lie`."""

    rule: str
    members: int
    liars: int
    lie: str
    plan: "LiarsPlan"

    def config(self) -> Config:
        """The preset `budget`, or the same gate under the published rule."""
        flags = {"generation.budget": str(self.plan.budget)}
        if self.rule == PAPER:
            flags |= {"generation.threshold": PAPER, "generation.audit": "0", "generation.learning.growth": "0"}
        return load(preset="budget", environ={}, flags=flags).config


async def fleet_of(pair: Pair, setting: LiarsSetting, seed: int) -> list[Life]:
    """Let all agents write at once; return what became of the honest ones."""
    config = setting.config()
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
        for _ in range(setting.plan.texts):
            result = await _generate(agent, config, setting, rng, fleet.pair)
            truth += errors_of(result.prompt, result.sampling, result.made) / len(result.made.ids)
            verified += sum(SOURCES[s].verified for s in result.made.sources)
            written += len(result.made.ids)
            messages += result.made.uplink_messages
            tau = result.made.tau
    return Life(cluster == "c0", truth / setting.plan.texts, verified / written, messages / written, tau)


class _StudyText(NamedTuple):
    prompt: list[int]
    sampling: Sampling
    made: GenerationResult


async def _generate(
    agent: AgentCore, config: Config, setting: LiarsSetting, rng: random.Random, pair: Pair
) -> _StudyText:
    prompt = [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(3)]
    sampling = Sampling(rng.getrandbits(40), setting.plan.temperature, 1.0, config.generation.coupling)
    job = Job(config.generation, sampling, setting.plan.tokens, pair.context, pair.eos_ids)
    return _StudyText(prompt, sampling, await agent.generate(job, prompt, nobody))


class LiarsPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a study runs: clusters of each size, with one liar and with as many as stay below half.

    A cluster of more than `most_below` members has one liar only. Each of `lies` is told under the rule
    `calibrated-fl`; under `paper-fl` a liar claims the largest count, for the threshold 1 or 0. The lives of `seeds`
    fleets count together; their seeds count up from `seed`.
    """

    members: tuple[int, ...] = (2, 3, 4, 8, 16, 32)
    lies: tuple[str, ...] = tuple(LIES)
    most_below: int = 16
    texts: int = 60
    tokens: int = 24
    temperature: float = 0.0
    budget: float = 0.05
    agreement: float = AGREEMENT
    seed: int = 0
    seeds: int = 1

    def settings(self) -> list[LiarsSetting]:
        """All fleets: for each size and rule first the one without liars."""
        found = []
        for members in self.members:
            most = (members - 1) // 2 if members <= self.most_below else 1
            liars = sorted({1, max(1, most)})
            for rule, lies in ((CALIBRATED, self.lies), (PAPER, SHOUTS)):
                told = [(0, HONEST), *((count, lie) for count in liars for lie in lies)]
                found += [LiarsSetting(rule, members, count, lie, self) for count, lie in told]
        return found


class LiarsCell(msgspec.Struct, frozen=True, kw_only=True):
    """What one fleet's honest agents had, as means over them: in the liars' own cluster, or in the other one.

    `error` is per token, `worst` that of the agent with the largest one. `verified` is the share of tokens that the
    cloud settled, `messages` the number sent upwards per token, and `tau` the last threshold. The differences are those
    to the fleet of the same size without liars: a ratio for messages, tau less its tau, and the error less its error.
    """

    rule: str
    members: int
    liars: int
    lie: str
    here: bool
    error: float
    worst: float
    verified: float
    messages: float
    tau: float
    messages_ratio: float
    tau_moved: float
    error_more: float


class LiarsFigures(msgspec.Struct, frozen=True, kw_only=True):
    """All cells, and how many of them miss the target: an error above the budget, or a tenth more messages.

    Under `paper-fl`, which promises no budget, the error may be that of the fleet without liars.
    """

    plan: LiarsPlan
    cells: list[LiarsCell]
    missed: int


def lives_of(setting: LiarsSetting) -> tuple[LiarsSetting, list[Life]]:
    """Run the fleets of a setting in virtual time. Returns the setting, and the lives of the honest agents."""
    plan, pair = setting.plan, toy.pair(setting.plan.agreement)
    seeds = range(plan.seed, plan.seed + plan.seeds)
    return setting, [life for seed in seeds for life in run_virtual(fleet_of(pair, setting, seed))]


def study(plan: LiarsPlan, *, jobs: int = 1, ended: Callable[[LiarsCell], object] | None = None) -> LiarsFigures:
    """Run all fleets of a plan; `ended` is called with each cell."""
    calm: dict[tuple[str, int, bool], LiarsCell] = {}
    waiting: list[tuple[LiarsSetting, list[Life]]] = []
    cells: list[LiarsCell] = []
    for done in across(lives_of, plan.settings(), jobs):
        waiting.append(done)
        for setting, lives in [*waiting]:
            for here in (True, False):
                key = (setting.rule, setting.members, here)
                if setting.liars == 0:
                    calm[key] = cell_of(setting, lives, here)
                elif key not in calm:
                    break
                cells.append(cell_of(setting, lives, here, calm[key]))
                if ended is not None:
                    ended(cells[-1])
            else:
                waiting.remove((setting, lives))
    cells.sort(key=lambda cell: (cell.rule, cell.members, cell.liars, cell.lie, not cell.here))
    return LiarsFigures(plan=plan, cells=cells, missed=sum(misses(plan, cell) for cell in cells))


def misses(plan: LiarsPlan, cell: LiarsCell) -> bool:
    """Whether the honest of a fleet lost more than the target allows.

    `paper-fl` promises no budget: where it exceeds that without liars, liars must not add to it.
    """
    allowed = plan.budget if cell.rule == CALIBRATED else max(plan.budget, cell.error - cell.error_more)
    return cell.error > allowed or cell.messages_ratio > MESSAGES_MORE


def cell_of(setting: LiarsSetting, lives: Sequence[Life], here: bool, calm: LiarsCell | None = None) -> LiarsCell:
    """Sum up the honest agents of one cluster; `calm` is the cell of the fleet without liars."""
    group = [life for life in lives if life.here is here]
    mean = {name: sum(getattr(life, name) for life in group) / len(group) for name in Life._fields}
    return LiarsCell(
        rule=setting.rule,
        members=setting.members,
        liars=setting.liars,
        lie=setting.lie,
        here=here,
        error=mean["truth"],
        worst=max(life.truth for life in group),
        verified=mean["verified"],
        messages=mean["messages"],
        tau=mean["tau"],
        messages_ratio=1.0 if calm is None else mean["messages"] / calm.messages,
        tau_moved=0.0 if calm is None else mean["tau"] - calm.tau,
        error_more=0.0 if calm is None else mean["truth"] - calm.error,
    )


def table(figures: LiarsFigures) -> str:
    """Return the worst cell of each lie and number of liars as Markdown, and whether it keeps to the target."""
    lines = [
        "| rule | liars | lie | error, its cluster (worst agent) | error, the other | messages | tau moved |",
        "|" + "---|" * 7,
    ]
    pairs: dict[tuple[str, int, int, str], dict[bool, LiarsCell]] = {}
    for cell in figures.cells:
        pairs.setdefault((cell.rule, cell.members, cell.liars, cell.lie), {})[cell.here] = cell
    for (rule, members, liars, lie), both in pairs.items():
        here, there = both[True], both[False]
        missed = " **missed**" if any(misses(figures.plan, cell) for cell in both.values()) else ""
        lines.append(
            f"| {rule} | {liars} of {members} | {lie} | {here.error:.3f} ({here.worst:.3f}) | {there.error:.3f} "
            f"| {max(here.messages_ratio, there.messages_ratio):.2f} | {here.tau_moved:+.3f}{missed} |"
        )
    return "\n".join(lines)
