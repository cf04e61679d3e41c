"""A whole fleet in virtual time: real agents, edges and cloud on toy models and a faulty loopback network.

`simulate` is a function of its scenario: the same seed gives the same run. It raises Violation when a committed token
is not the one that the LLM, or the SLM where the token is marked unverified, gives after the committed prefix.
"""

import argparse
import asyncio
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from edge_agent.agent import Agent
from edge_agent.events import Committed
from edge_agent.result import Job, Result
from fedhlm.config import load
from fedhlm.couplings import COUPLINGS
from fedhlm.link import LinkModel
from fedhlm.messages import FinishReason, Sampling
from fedhlm.settings import Generation
from fedhlm.virtual import run_virtual
from lab import toy
from lab.fleet import Fleet

TIME_LIMIT_S: Final = 3_600.0


class Violation(AssertionError):
    """An invariant does not hold; the message carries the command that replays the run."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What to run. Faults happen before `calm_s`; after it every link is good and every part is up."""

    seed: int
    preset: str = "exact"
    clusters: int = 2
    agents: int = 2
    prompts: int = 2
    tokens: int = 24
    temperature: float = 0.8
    agreement: float = 0.7
    faults: bool = True
    calm_s: float = 20.0
    deadline_s: float = 600.0
    delay_s: float = 0.02
    settings: tuple[str, ...] = ()  # KEY=VALUE

    @property
    def replay(self) -> str:
        """The shell command that runs this scenario again."""
        return (
            f"python -m lab.simulator --preset {self.preset} --temperature {self.temperature} "
            f"--deadline {self.deadline_s:g} --seeds {self.seed}" + "".join(f" --set {s}" for s in self.settings)
        )


@dataclass
class Outcome:
    """Totals of one run."""

    tokens: Counter[str] = field(default_factory=Counter)
    rollbacks: int = 0
    reprimes: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0
    texts: list[list[int]] = field(default_factory=list)


class Trial(Fleet):
    """A fleet of toy models under the faults of one scenario, each text checked against the oracle."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(
            toy.pair(scenario.agreement),
            seed=scenario.seed,
            clusters=scenario.clusters,
            delay_s=scenario.delay_s,
            sessions_max=3,  # fewer than the agents, so that re-priming happens all the time
        )
        self.scenario = scenario
        flags = {
            "generation.deadline_ms": str(round(scenario.deadline_s * 1000)),
            "generation.retry_ms": "500",
            # Drafting never pauses here: the more blocks are in flight, the more there is to go wrong.
            "generation.pipeline.survival_floor": "0",
            **dict(setting.split("=", 1) for setting in scenario.settings),
        }
        self.config: Generation = load(preset=scenario.preset, environ={}, flags=flags).config.generation

    async def run_agent(self, cluster: str, name: str, outcome: Outcome) -> None:
        """One agent's life: its prompts one after the other, each checked against the oracle."""
        rng = random.Random(f"{self.scenario.seed}/{name}")
        drafter = toy.ToyDrafter(agreement=self.scenario.agreement)
        async with self.online(cluster, name, drafter) as agent:
            for _ in range(self.scenario.prompts):
                prompt = [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(rng.randrange(1, 6))]
                await self._generate(agent, drafter, prompt, rng.getrandbits(40), outcome)

    async def _generate(
        self, agent: Agent, drafter: toy.ToyDrafter, prompt: list[int], seed: int, outcome: Outcome
    ) -> None:
        scenario = self.scenario
        sampling = Sampling(seed, scenario.temperature, 1.0, self.config.coupling)
        job = Job(
            self.config,
            sampling,
            max_tokens=scenario.tokens,
            context_max=toy.CONTEXT,
            eos_ids=frozenset({toy.EOS_ID}),
        )
        heard: list[int] = []

        async def hear(tokens: list[Committed]) -> FinishReason | None:
            heard.extend(t.token for t in tokens)
            return None

        result = await agent.generate(job, prompt, hear)
        if heard != result.ids:
            raise Violation(f"committed {heard}, reported {result.ids}\n{scenario.replay}")
        self._check(prompt, sampling, drafter, result)
        outcome.tokens.update(result.sources)
        outcome.rollbacks += result.rollbacks
        outcome.texts.append(result.ids)

    def _check(self, prompt: list[int], sampling: Sampling, drafter: toy.ToyDrafter, result: Result) -> None:
        scenario = self.scenario
        if result.finish not in ("length", "stop"):
            raise Violation(f"finished with {result.finish}: {result.error}\n{scenario.replay}")
        if len(result.ids) != scenario.tokens and result.ids[-1] != toy.EOS_ID:
            raise Violation(f"{len(result.ids)} tokens of {scenario.tokens}\n{scenario.replay}")
        coupling = COUPLINGS[sampling.coupling]
        ids = list(prompt)
        for token, source, drafted in zip(result.ids, result.sources, result.drafted, strict=True):
            draft = drafter.draft_now(ids, sampling)
            logits = toy.large_logits(ids)
            if source in ("peer", "neighbour"):  # whatever was settled in a context like this one
                expected = {token}
            elif source in ("unverified", "local"):
                expected = {draft.token}
            else:
                expected = {coupling.settle(logits, sampling, len(ids), draft.token, draft.law)}
                if not drafted:  # also where nothing was drafted: a bonus token, or one the cloud decoded
                    expected.add(coupling.settle(logits, sampling, len(ids), None, b""))
            if token not in expected:
                raise Violation(
                    f"token {len(ids) - len(prompt)} of {prompt} is {token} from {source}, "
                    f"{sorted(expected)} expected after {ids}\n{scenario.replay}"
                )
            ids.append(token)

    def spoil(self, link: LinkModel) -> None:
        """Give a link faults of its own."""
        rng = self.rng
        link.delay_s = rng.choice((0.0, 0.02, 0.1, 0.4))
        link.jitter_s = rng.choice((0.0, 0.05, 0.3))
        link.loss = rng.choice((0.0, 0.05, 0.3))
        link.duplicate = rng.choice((0.0, 0.1, 0.5))
        link.reorder = rng.choice((0.0, 0.1, 0.5))

    def heal(self) -> None:
        """Make every link good."""
        for link in self.links.values():
            link.partitioned = False
            link.delay_s, link.jitter_s = self.scenario.delay_s, 0.0
            link.loss = link.duplicate = link.reorder = 0.0

    async def trouble(self, outcome: Outcome) -> None:
        """Inject faults until the calm; whatever is broken then is mended."""
        loop = asyncio.get_running_loop()
        for link in self.links.values():
            self.spoil(link)
        while loop.time() < self.scenario.calm_s:
            await asyncio.sleep(self.rng.expovariate(1.0))
            kind = self.rng.choice(("partition", "crash", "broker", "weather"))
            outcome.faults[kind] += 1
            match kind:
                case "partition":
                    link = self.links[self.rng.choice(sorted(self.links))]
                    link.partitioned = True
                    await asyncio.sleep(self.rng.choice((0.2, 2.0, 5.0)))
                    link.partitioned = False
                case "crash":
                    node = self.nodes[self.rng.choice(sorted(self.nodes))]
                    await node.crash()
                    await asyncio.sleep(self.rng.choice((0.0, 1.0, 4.0)))
                    node.start()
                case "broker":
                    await self.broker.restart(self.rng.choice((0.1, 2.0)))
                case "weather":
                    self.spoil(self.links[self.rng.choice(sorted(self.links))])
        self.heal()


async def _run(scenario: Scenario) -> Outcome:
    fleet = Trial(scenario)
    outcome = Outcome()
    for node in fleet.nodes.values():
        node.start()
    await asyncio.sleep(1.0)
    agents = [(f"c{c}", f"agent-{c}-{a}") for c in range(scenario.clusters) for a in range(scenario.agents)]
    for _, name in agents:
        fleet.link(name)
    troubles = asyncio.create_task(fleet.trouble(outcome), name="trouble") if scenario.faults else None
    try:
        async with asyncio.timeout(TIME_LIMIT_S):
            await asyncio.gather(*(fleet.run_agent(cluster, name, outcome) for cluster, name in agents))
    except TimeoutError:
        raise Violation(f"not finished after {TIME_LIMIT_S:g} virtual seconds\n{scenario.replay}") from None
    if troubles is not None:
        troubles.cancel()
        await asyncio.wait([troubles])
    outcome.virtual_s = asyncio.get_running_loop().time()
    outcome.reprimes = fleet.counters["reprimes"]
    for node in fleet.nodes.values():
        await node.crash()
    return outcome


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario.

    Raises:
        Violation: an invariant does not hold; the message ends with the command that replays the run.
    """
    return run_virtual(_run(scenario))


def main(arguments: list[str] | None = None) -> int:
    """Run seeds from the command line; exit status 1 when one fails."""
    parser = argparse.ArgumentParser(prog="python -m lab.simulator", description="simulate fleets under faults")
    parser.add_argument("--preset", default="exact")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds before tokens are committed unverified")
    parser.add_argument("--seeds", default="0..9", help="one seed, or A..B inclusive")
    parser.add_argument("--calm", action="store_true", help="no faults")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting over the preset's")
    options = parser.parse_args(arguments)
    first, _, last = options.seeds.partition("..")
    total: Counter[str] = Counter()
    failed = 0
    for seed in range(int(first), int(last or first) + 1):
        scenario = Scenario(
            seed=seed,
            preset=options.preset,
            temperature=options.temperature,
            deadline_s=options.deadline,
            faults=not options.calm,
            settings=tuple(options.set),
        )
        try:
            outcome = simulate(scenario)
        except Violation as violation:
            failed += 1
            print(f"seed {seed}: {violation}", file=sys.stderr)
            continue
        total.update(outcome.tokens)
        total.update({"rollbacks": outcome.rollbacks, "reprimes": outcome.reprimes})
        total.update(outcome.faults)
    print(", ".join(f"{name} {count}" for name, count in sorted(total.items())), f"failed {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
