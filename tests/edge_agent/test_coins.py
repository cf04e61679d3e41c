"""The coins of a text fall as often as their chance says, each by itself, and the audit's one decides on audits."""

import numpy as np
import pytest

from edge_agent.coins import audit_coin, peers_coin
from edge_agent.core import AgentCore
from edge_agent.result import GenerationResult, Job
from fedhlm.config import load
from fedhlm.decoding.sampling import GATE_STREAM, uniform
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.world import Fleet
from tests.edge_agent.test_core import nobody, with_fleet

SEEDS = range(4_000)
TEXTS = 90


@pytest.mark.parametrize("coin", [audit_coin, peers_coin])
def test_a_coin_is_uniform_over_seeds(coin: object) -> None:
    assert callable(coin)
    found = np.sort([coin(seed) for seed in SEEDS])
    even = (np.arange(len(SEEDS)) + 0.5) / len(SEEDS)
    assert np.abs(found - even).max() < 1.95 / len(SEEDS) ** 0.5  # Kolmogorov and Smirnov: exceeded once in 1,000


def test_one_coin_says_nothing_about_another() -> None:
    audit = [audit_coin(seed) for seed in SEEDS]
    for other in (peers_coin, lambda seed: uniform(seed, 0, GATE_STREAM)):
        correlation = np.corrcoef(audit, [other(seed) for seed in SEEDS])[0, 1]
        assert abs(correlation) < 4.0 / len(SEEDS) ** 0.5


def test_texts_are_audited_by_their_coins() -> None:
    """A text of one kept token is audited with the chance of that token, and no other one is."""
    flags = {"generation.gate": "never", "generation.peers": "none", "generation.threshold": "fixed"}
    config = load(preset="budget", environ={}, flags=flags).config.generation
    audited = []

    async def work(_fleet: Fleet, agent: AgentCore) -> GenerationResult:
        for seed in range(TEXTS):
            job = Job(config, Sampling(seed), 1, toy.CONTEXT, frozenset())
            result = await agent.generate(job, [5, 6], nobody)
            session = seed + 1
            if session in agent.auditor.audits:
                audited.append(seed)
        return result

    with_fleet(work)
    assert audited == [seed for seed in range(TEXTS) if audit_coin(seed) < config.audit]
    assert 0.1 < len(audited) / TEXTS < 0.4
