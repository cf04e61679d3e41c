"""Agents that change clusters while they write: no token is lost, repeated or wrong, and alike end up together."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from edge_agent.core import AgentCore
from edge_agent.events import Committed
from edge_agent.model import Drawn
from edge_agent.result import Job
from fedhlm.bus.party import Party
from fedhlm.config import load, presets
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Assignment, Escalation, Presence, Sampling, Verdict
from fedhlm.settings import Federation, Generation
from fedhlm_lab.sim import links, toy
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.scenario import Scenario
from fedhlm_lab.sim.simulator import Simulation
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet

TOKENS = 24


def config(preset: str) -> Generation:
    flags = {"generation.retry_ms": "500", "generation.deadline_ms": "600000"}
    return load(preset=preset, environ={}, flags=flags).config.generation


async def write(
    agent: AgentCore, settings: Generation, prompt: list[int], seed: int, tokens: int = TOKENS
) -> list[int]:
    """One generation; what was committed piece by piece is what is reported."""
    sampling = Sampling(seed, 0.8, 1.0, settings.coupling)
    job = Job(settings, sampling, tokens, toy.CONTEXT, frozenset({toy.EOS_ID}))
    heard: list[int] = []

    async def hear(committed: list[Committed]) -> FinishReason | None:
        heard.extend(t.token for t in committed)
        return None

    result = await agent.generate(job, prompt, hear)
    assert heard == result.ids
    return heard


async def assign(party: Party, agent: str, cluster: str) -> None:
    await party.send(topics.ASSIGN, Assignment(**party.stamp(), cluster=cluster), agent=agent)


async def wander(
    fleet: Fleet, party: Party, names: Sequence[str], pause_s: float, *, until_s: float = float("inf")
) -> None:
    """Assign the agents to and fro until cancelled, or for a while."""
    while asyncio.get_running_loop().time() < until_s:
        await asyncio.sleep(fleet.rng.expovariate(1.0 / pause_s))
        await assign(party, fleet.rng.choice(names), fleet.rng.choice(("c0", "c1")))


async def started(fleet: Fleet) -> None:
    for node in fleet.nodes.values():
        node.start()
    await asyncio.sleep(1.0)


def status(fleet: Fleet, cluster: str, agent: str) -> bool:
    """Whether the broker holds that this agent is online in this cluster."""
    packet = fleet.broker.retained[topics.AGENT_STATUS.name(cluster=cluster, agent=agent)]
    state = decode(packet.payload)
    assert isinstance(state, Presence)
    return state.online


async def wandering(seed: int) -> Counter[str]:
    fleet = Fleet(toy.pair(0.7), seed=seed, clusters=2, delay_s=0.05, sessions_max=3)
    settings = config("exact")
    names = ("a", "b", "c")
    await started(fleet)
    for name in names:
        link = fleet.link(name)
        link.delay_s, link.jitter_s, link.duplicate, link.reorder = 0.05, 0.1, 0.3, 0.2
        link.loss = 0.1 if seed % 2 else 0.0
    agents: dict[str, AgentCore] = {}

    async def life(name: str) -> None:
        rng = random.Random(f"{seed}/{name}")
        async with fleet.online("c0", name, toy.ToyDrafter(agreement=0.7)) as agent:
            agents[name] = agent
            for number in range(3):
                prompt = [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(3)]
                text = await write(agent, settings, prompt, number)
                assert text == toy.large_alone(prompt, Sampling(number, 0.8), TOKENS)
            done.release()
            await finished.wait()
            prompt = [rng.randrange(1, toy.VOCAB_SIZE)]
            assert await write(agent, settings, prompt, 9) == toy.large_alone(prompt, Sampling(9, 0.8), TOKENS)
            assert agent.cluster == "c1"

    done, finished = asyncio.Semaphore(0), asyncio.Event()
    async with LoopbackBus(fleet.broker, client_id="master") as bus:
        party = fleet.party(bus, "master")
        lives = [asyncio.create_task(life(name)) for name in names]
        orders = asyncio.create_task(wander(fleet, party, names, 0.2))
        for _ in names:
            await asyncio.wait([*lives, waiting := asyncio.create_task(done.acquire())], return_when="FIRST_COMPLETED")
            if any(life.done() for life in lives):
                break
            await waiting
        orders.cancel()
        await asyncio.wait([orders])
        for name in names:
            await assign(party, name, "c1")
        await asyncio.sleep(5.0)
        await bus.subscribe(topics.ESCALATE.name(cluster="+", agent="+"))
        finished.set()
        await asyncio.gather(*lives)
        await bus.__aexit__(None, None, None)
        escalated = Counter([r.levels["cluster"] async for r in party.received() if isinstance(r.message, Escalation)])
    for name in names:
        assert status(fleet, "c1", name)
        assert not status(fleet, "c0", name)
    for node in fleet.nodes.values():
        await node.crash()
    assert set(escalated) == {"c1"}
    return Counter(moves=sum(a.membership.moves for a in agents.values()), reprimes=fleet.counters["reprimes"])


def test_exact_text_survives_moves_to_and_fro_under_faults() -> None:
    total: Counter[str] = Counter()
    for seed in range(12):
        total += run_virtual(wandering(seed))
    assert total["moves"] > 12 * 3 * 2
    assert total["reprimes"] > total["moves"] / 2


@pytest.mark.parametrize("preset", sorted(presets()))
def test_every_preset_keeps_its_word_while_agents_move_and_parts_fail(preset: str) -> None:
    """Each token is checked by the simulator against the model that it is said to come from."""

    async def trial(seed: int) -> int:
        scenario = Scenario(
            seed=seed, preset=preset, agents=3, tokens=12, link=links.load("lte"), upstream=links.load("lan")
        )
        simulation = Simulation(scenario.with_faults("all"))
        fleet = simulation.fleet
        async with LoopbackBus(fleet.broker, client_id="master") as bus:
            orders = asyncio.create_task(
                wander(fleet, fleet.party(bus, "master"), scenario.agent_names(), 0.3, until_s=scenario.calm_s)
            )
            outcome = await simulation.run()
            orders.cancel()
            await asyncio.wait([orders])
        return outcome.counters["assignments"]

    assert sum(run_virtual(trial(seed)) for seed in range(2_000, 2_006)) > 0


def test_a_wrong_assignment_strands_nobody_and_counts_once_its_edge_comes() -> None:
    async def scenario() -> None:
        fleet = Fleet(toy.pair(0.7), seed=1, clusters=2, delay_s=0.02, sessions_max=3)
        edge = fleet.nodes.pop("edge-1")
        settings = config("exact")
        await started(fleet)
        async with (
            LoopbackBus(fleet.broker, client_id="master") as bus,
            fleet.online("c0", "a", toy.ToyDrafter(agreement=0.7)) as agent,
        ):
            party = fleet.party(bus, "master")
            for cluster in ("nowhere", "c1"):
                await assign(party, "a", cluster)
                await asyncio.sleep(5.0)
                assert await write(agent, settings, [5], 3) == toy.large_alone([5], Sampling(3, 0.8), TOKENS)
                assert agent.cluster == "c0"
            edge.start()
            await asyncio.sleep(2.0)
            assert agent.cluster == "c1"
            assert await write(agent, settings, [5], 3) == toy.large_alone([5], Sampling(3, 0.8), TOKENS)
            await assign(party, "a", "c1")
            await asyncio.sleep(1.0)
            assert agent.membership.moves == 1
        for node in (edge, *fleet.nodes.values()):
            await node.crash()

    run_virtual(scenario())


def test_the_first_block_in_a_cluster_brings_its_context_even_on_a_second_visit() -> None:
    """Nobody has to ask for it, and no cloud goes on from what it held of an earlier stay."""

    async def scenario() -> None:
        fleet = Fleet(toy.pair(0.7), seed=1, clusters=2, delay_s=0.02, sessions_max=16)
        settings = config("exact")
        await started(fleet)
        async with (
            LoopbackBus(fleet.broker, client_id="master") as bus,
            fleet.online("c0", "a", toy.ToyDrafter(agreement=0.7)) as agent,
        ):
            party = fleet.party(bus, "master")
            await bus.subscribe(*(topic.name(cluster="+", agent="+") for topic in (topics.ESCALATE, topics.VERDICT)))
            writing = asyncio.create_task(write(agent, settings, [5], 3, 96))
            for cluster in ("c1", "c0", "c1", "c0"):
                await asyncio.sleep(0.5)
                assert not writing.done()
                await assign(party, "a", cluster)
            assert await writing == toy.large_alone([5], Sampling(3, 0.8), 96)
            assert agent.membership.moves == 4
            await bus.__aexit__(None, None, None)
            stays: list[tuple[str, bool]] = []
            async for received in party.received():
                match received.message:
                    case Escalation() as block:
                        cluster = received.levels["cluster"]
                        if not stays or stays[-1][0] != cluster:
                            stays.append((cluster, block.prime is not None))
                    case Verdict() as verdict:
                        assert verdict.status == "settled"
            assert stays == [(cluster, True) for cluster in ("c0", "c1", "c0", "c1", "c0")]
        for node in fleet.nodes.values():
            await node.crash()

    run_virtual(scenario())


class Subject(toy.ToyDrafter):
    """A device that writes of one subject: its keys lean to one side of the first axis."""

    def __init__(self, side: int) -> None:
        super().__init__(agreement=0.7)
        self._side = side

    def draft_now(self, ids: Sequence[int], sampling: Sampling, uncertainty: str = "closed-form") -> Drawn:
        drawn = super().draft_now(ids, sampling, uncertainty)
        key = np.frombuffer(drawn.key, np.int8).copy()  # (DIMS,) int8
        key[0] = np.int8(np.clip(int(key[0]) + 60 * self._side, -127, 127))
        return drawn._replace(key=key.tobytes())


def test_profiles_sort_two_populations_that_were_mixed() -> None:
    """Profiles over the bus, the cloud's clustering, assignments back: alike agents end in one cluster."""
    born = {"a1": ("c0", 1), "a2": ("c0", 1), "a3": ("c1", 1), "b1": ("c1", -1), "b2": ("c1", -1), "b3": ("c0", -1)}

    async def scenario() -> None:
        rules = Federation(assign_s=5.0, round_s=1.0)
        fleet = Fleet(toy.pair(0.7), seed=1, clusters=2, delay_s=0.01, sessions_max=16, federation=rules)
        settings = config("budget")
        await started(fleet)
        homes: dict[str, str] = {}
        sent = Counter[str]()

        async def life(name: str, cluster: str, side: int) -> None:
            rng = random.Random(name)
            async with fleet.online(cluster, name, Subject(side)) as agent:
                for seed in range(14):
                    await write(agent, settings, [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(3)], seed)
                await asyncio.sleep(15.0)
                homes[name] = agent.cluster
                sent[name] = agent.membership.moves
                prompt = [rng.randrange(1, toy.VOCAB_SIZE)]
                text = await write(agent, config("exact"), prompt, 1)
                assert text == toy.large_alone(prompt, Sampling(1, 0.8), TOKENS)

        await asyncio.gather(*(life(name, cluster, side) for name, (cluster, side) in born.items()))
        for node in fleet.nodes.values():
            await node.crash()
        assert homes == {"a1": "c0", "a2": "c0", "a3": "c0", "b1": "c1", "b2": "c1", "b3": "c1"}
        assert +sent == {"a3": 1, "b3": 1}

    run_virtual(scenario())
