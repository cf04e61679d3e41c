"""The coins of a text fall as often as their chance says, each by itself, whatever seeds and texts a client chooses."""

import asyncio
import math
import random
from collections.abc import Callable
from typing import Final

import numpy as np
import pytest

from edge_agent.coins import audit_coin, peers_coin
from edge_agent.core import AgentCore
from edge_agent.result import GenerationResult, Job
from fedhlm.config import load
from fedhlm.decoding.sampling import GATE_STREAM, uniform
from fedhlm.learning.certificate import AUDIT_CHANCES
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from tests.edge_agent.test_core import nobody, with_fleet

COUNT: Final = 8_000
ERRORS: Final = 4.5  # standard errors; a fair coin is farther off once in 100,000 times
TEXTS: Final = 90


def numbers(bits: int) -> list[int]:
    rng = random.Random(bits)
    return [rng.getrandbits(bits) for _ in range(COUNT)]


SESSIONS: Final = {"as agents draw them": numbers(32), "of 63 bits": numbers(63), "counted up": list(range(COUNT))}


@pytest.mark.parametrize("kind", SESSIONS)
@pytest.mark.parametrize("coin", [audit_coin, peers_coin])
def test_a_coin_is_uniform_and_no_toss_tells_of_the_next(kind: str, coin: Callable[[int], float]) -> None:
    found = np.array([coin(session) for session in SESSIONS[kind]])  # (COUNT,)
    even = (np.arange(COUNT) + 0.5) / COUNT
    assert np.abs(np.sort(found) - even).max() < 1.95 / COUNT**0.5  # Kolmogorov and Smirnov: exceeded once in 1,000
    for chance in (*AUDIT_CHANCES, 0.25):
        error = math.sqrt(chance * (1.0 - chance) / COUNT)
        assert np.mean(found < chance) == pytest.approx(chance, abs=ERRORS * error)
    for distance in (1, 2, 7):
        assert abs(np.corrcoef(found[:-distance], found[distance:])[0, 1]) < ERRORS / COUNT**0.5


def test_one_coin_says_nothing_about_another() -> None:
    sessions = SESSIONS["counted up"]
    audit = [audit_coin(session) for session in sessions]
    for other in (peers_coin, lambda session: uniform(session, 0, GATE_STREAM)):
        correlation = np.corrcoef(audit, [other(session) for session in sessions])[0, 1]
        assert abs(correlation) < 4.0 / COUNT**0.5


def test_texts_are_audited_by_their_coins() -> None:
    """A text of one kept token is audited with the chance of that token, and no other one is."""
    flags = {"generation.gate": "never", "generation.peers": "none", "generation.threshold": "fixed"}
    config = load(preset="budget", environ={}, flags=flags).config.generation
    audited = []

    async def work(_fleet: Fleet, agent: AgentCore) -> GenerationResult:
        for session in range(1, TEXTS + 1):
            job = Job(config, Sampling(7), 1, toy.CONTEXT, frozenset())
            result = await agent.generate(job, [5, 6], nobody)
            if session in agent.auditor.audits:
                audited.append(session)
        return result

    with_fleet(work)
    assert audited == [session for session in range(1, TEXTS + 1) if audit_coin(session) < config.audit]
    assert 0.1 < len(audited) / TEXTS < 0.4


@pytest.mark.parametrize("seed", [0, 5])
def test_a_client_with_one_seed_for_all_texts_has_as_many_of_them_audited_as_any(seed: int) -> None:
    """Whoever chooses seeds must not choose what is audited; at temperature 0 one seed for all is usual."""
    flags = {"generation.threshold": "fixed", "generation.tau": "1.0", "generation.peers": "none"}
    generation = load(preset="budget", environ={}, flags=flags).config.generation
    texts, rng = 300, random.Random(seed)

    async def main() -> float:
        fleet = Fleet(toy.pair(0.6), seed=seed, clusters=1, delay_s=0.001, sessions_max=64)
        for node in fleet.nodes.values():
            node.start()
        async with fleet.online("c0", "agent", toy.ToyDrafter(agreement=0.6, step_s=0.001)) as agent:
            sampling = Sampling(seed, 0.0, 1.0, generation.coupling)
            job = Job(generation, sampling, 1, toy.CONTEXT, frozenset())
            for _ in range(texts):
                await agent.generate(job, [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(3)], nobody)
            await asyncio.sleep(120.0)  # until the last audits have gone up
        for node in fleet.nodes.values():
            await node.crash()
        return fleet.counters.snapshot().get("audits", 0.0)

    chance = generation.audit  # of every tail: here all doubts are likely to be wrong
    error = math.sqrt(chance * (1.0 - chance) / texts)
    assert run_virtual(main()) / texts == pytest.approx(chance, abs=ERRORS * error)
