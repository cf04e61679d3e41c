"""What was learnt about one pair of models rules no other pair, and comes back with its own."""

import asyncio
import logging
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from edge_agent.core import AgentCore
from edge_agent.events import Observation, Token
from edge_agent.learner import PAIRS_KEPT, Learner
from edge_agent.measures import measures_of
from edge_agent.result import GenerationResult, Job
from fedhlm.config import load
from fedhlm.errors import ProtocolError
from fedhlm.learning.curve import Curve
from fedhlm.learning.thresholds import KEEP_NONE
from fedhlm.peers.context_keys import unpack_key
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.fingerprint import fingerprint_of, half_of, large_of, pair_in, pair_of
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    Fingerprint,
    Learned,
    PaperThreshold,
    Sampling,
    Verified,
    VerifiedTokens,
)
from fedhlm.settings import Federation, Generation
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from fedhlm_lab.studies.compare import nobody
from tests.edge_agent.devices import tau_of

SAMPLING = Sampling(1, 0.0)


def model(name: str) -> Fingerprint:
    return fingerprint_of("t", 64, noise="n", model=name)


SMALL, OTHER_SMALL, OLD, NEW = model("slm"), model("slm-2"), model("llm"), model("llm-2")


def settings(preset: str = "budget") -> Generation:
    return load(preset=preset, environ={}, flags={"generation.peers": "none"}).config.generation


def learner(*met: Fingerprint) -> Learner:
    made = Learner(Federation(), np.random.default_rng(1))
    for large in met:
        made.meet(SMALL, large)
    return made


def teach(device: Learner, config: Generation, count: int = 2_000) -> None:
    """Drafts that are always right."""
    seen = Observation(0.2, 0.0, 0.0, None, 0.0, "local", False, False)
    device.observe(measures_of(config, SAMPLING, device.pair), config, [seen] * count)
    device.finished(
        measures_of(config, SAMPLING, device.pair),
        config,
        [],
        [],
        tokens=count,
        tau=0.5,
        escalation_bytes=0,
        escalated=0,
        coin=1.0,
    )


def tau(device: Learner, config: Generation) -> float:
    return tau_of(device, measures_of(config, SAMPLING, device.pair), config)


def tokens(device: Learner, config: Generation) -> float:
    known = device.certificate(measures_of(config, SAMPLING, device.pair), config)
    assert known is not None
    return known.tokens


def learned(thresholds: dict[str, PaperThreshold], curves: dict[str, bytes] | None = None) -> Learned:
    return Learned(
        version=SCHEMA_VERSION, sender="edge", sequence=1, sent_ms=0, round=1, members=2, thresholds=thresholds,
        curves=curves or {},
    )  # fmt: skip


def test_pairs_have_names_that_tell_both_models() -> None:
    names = {pair_of(small, large) for small in (SMALL, OTHER_SMALL) for large in (OLD, NEW, None)}
    assert len(names) == 6
    assert pair_of(SMALL, OLD) == f"{half_of(SMALL)}.{half_of(OLD)}"
    assert pair_of(SMALL, None, otherwise=half_of(OLD)) == pair_of(SMALL, OLD)
    assert large_of(pair_of(SMALL, OLD)) == half_of(OLD)
    assert pair_in(f"closed-form/gumbel/greedy/{pair_of(SMALL, OLD)}") == pair_of(SMALL, OLD)
    assert pair_in("closed-form/gumbel/greedy") == ""


def test_another_large_model_starts_with_nothing_and_the_old_one_finds_what_it_left() -> None:
    config = settings()
    device = learner(OLD)
    teach(device, config)
    before, limit = tau(device, config), device.certificate(measures_of(config, SAMPLING, device.pair), config)
    assert before > 0.1
    assert limit is not None
    assert device.meet(SMALL, NEW) == pair_of(SMALL, OLD)
    assert (tau(device, config), tokens(device, config)) == (KEEP_NONE, 0.0)
    assert device.meet(SMALL, NEW) is None
    assert device.meet(SMALL, None) is None, "a cloud that is away is not another one"
    assert device.meet(SMALL, OLD) == pair_of(SMALL, NEW)
    assert (tau(device, config), tokens(device, config)) == (before, 2_000)


def test_another_small_model_starts_with_nothing() -> None:
    config = settings()
    device = learner(OLD)
    teach(device, config)
    kept = device.snapshot()
    again = learner()
    again.restore(kept)
    assert again.meet(OTHER_SMALL, None) == pair_of(SMALL, OLD)
    assert again.pair == pair_of(OTHER_SMALL, OLD), "the cloud is taken for the last one until it is heard"
    assert tau(again, config) == KEEP_NONE
    same = learner()
    same.restore(kept)
    assert same.meet(SMALL, None) is None
    assert tau(same, config) == tau(device, config)


def test_a_device_contributes_what_it_knows_of_the_present_pair_only() -> None:
    config = settings("fedhlm")
    device = learner(OLD)
    teach(device, config)
    device.meet(SMALL, NEW)
    teach(device, config, 100)
    sent = device.contribution(config, 1.0)
    assert sent is not None
    thresholds, curves = sent
    assert list(thresholds) == [pair_of(SMALL, NEW)]
    assert {pair_in(name) for name in curves} == {pair_of(SMALL, NEW)}
    assert [Curve.from_bytes(data).total_weight for data in curves.values()] == [100.0]


def test_the_next_round_is_due_by_what_the_present_pair_has_seen() -> None:
    config = settings()
    device = learner(OLD)
    teach(device, config, 100_000)
    device.contribution(config, 0.0)
    teach(device, config, config.learning.round_tokens)
    assert not device.due(config, 1.0), "the growth of much evidence is awaited"
    device.meet(SMALL, NEW)
    assert device.due(config, 1.0)


def test_published_thresholds_are_those_of_their_pair() -> None:
    config = settings("fedhlm")
    device = learner(OLD)
    device.learned(
        learned({pair_of(SMALL, OLD): PaperThreshold(0.9, 5, 0.25), pair_of(SMALL, NEW): PaperThreshold(0.3, 5)})
    )
    assert tau(device, config) == 0.9
    device.meet(SMALL, NEW)
    assert tau(device, config) == 0.3, "told before the model came"
    device.meet(OTHER_SMALL, NEW)
    assert tau(device, config) == config.tau
    device.learned(learned({pair_of(SMALL, OLD): PaperThreshold(0.8, 5)}))
    assert tau(device, config) == config.tau
    device.meet(SMALL, OLD)
    assert tau(device, config) == 0.8


def test_the_curve_of_a_cluster_with_another_model_moves_no_threshold() -> None:
    config = settings()
    config = replace(config, learning=replace(config.learning, shrinkage=500.0))
    device = learner(NEW)
    teach(device, config, 75)
    own = tau(device, config)
    wrong = Curve.empty()
    wrong.add(0.2, 1.0, 1e6)
    measure = measures_of(config, SAMPLING, pair_of(OTHER_SMALL, NEW)).draft
    device.learned(learned({}, {measure: wrong.to_bytes()}))
    assert tau(device, config) == own
    mine = measures_of(config, SAMPLING, device.pair).draft
    device.learned(learned({}, {mine: wrong.to_bytes()}))
    assert tau(device, config) < own


def test_what_came_before_any_cloud_belongs_to_the_first_one() -> None:
    """Tokens that were written alone are audited when the link is there, by the model that is there."""
    config = settings()
    device = learner()
    device.meet(SMALL, None)
    teach(device, config, 500)
    lost = Token(1, 0.5, 0.1, b"", False, 0.0, b"", 1, source="unverified")
    alone = measures_of(config, SAMPLING, device.pair)
    text = device.finished(alone, config, [], [lost], tokens=3, tau=0.5, escalation_bytes=0, escalated=0, coin=0.5)
    assert text is not None
    assert device.meet(SMALL, OLD) is None
    device.audited(text, [0.0])
    assert tokens(device, config) == 503
    assert tau(device, config) > 0.0
    assert {pair_in(name) for name in device.curves} == {pair_of(SMALL, OLD)}
    assert device.meet(SMALL, NEW) == pair_of(SMALL, OLD)
    assert tokens(device, config) == 0


def test_old_pairs_are_dropped_beyond_a_few() -> None:
    config = settings()
    larges = [model(f"llm-{i}") for i in range(PAIRS_KEPT + 3)]
    device = learner()
    for large in larges:
        device.meet(SMALL, large)
        teach(device, config, 10)
        device.learned(learned({device.pair: PaperThreshold(0.5, 1)}))
    kept = {pair_of(SMALL, large) for large in larges[-PAIRS_KEPT:]}
    assert {pair_in(name) for name in device.curves} == kept
    state = msgspec.msgpack.decode(device.snapshot())
    assert set(state[3]) == kept
    assert set(state[4]) == kept


def test_a_file_of_an_earlier_version_is_refused() -> None:
    kept = msgspec.msgpack.decode(learner(OLD).snapshot())
    kept[0] = "learner/2"
    with pytest.raises(ProtocolError, match="learner/3"):
        learner().restore(msgspec.msgpack.encode(kept))


# A fleet of real parts


class World(Fleet):
    """A fleet whose cloud can be given another model."""

    def __init__(self, agents: int = 1) -> None:
        federation = load(preset="budget", environ={}, flags={"federation.round_s": "1.0"}).config.federation
        super().__init__(
            toy.pair(0.95), seed=3, clusters=1, delay_s=0.01, sessions_max=64, federation=federation, keeps=True
        )
        self.rng = random.Random(5)

    def open(self) -> None:
        for node in self.nodes.values():
            node.start()

    async def close(self) -> None:
        for node in self.nodes.values():
            await node.crash()

    async def replace_cloud(self, name: str) -> None:
        await self.nodes["cloud"].crash()
        self.pair = self.pair._replace(fingerprint=replace(toy.FINGERPRINT, model=name))
        self.nodes["cloud"].start()
        await asyncio.sleep(10.0)

    async def write(self, agent: AgentCore, texts: int, config: Generation | None = None) -> GenerationResult:
        generation = config or load(preset="budget", environ={}).config.generation
        for _ in range(texts):
            prompt = [self.rng.randrange(1, toy.VOCAB_SIZE) for _ in range(3)]
            job = Job(generation, Sampling(self.rng.getrandbits(40), 0.0), 24, self.pair.context, self.pair.eos_ids)
            result = await agent.generate(job, prompt, nobody)
        return result


def test_a_cloud_with_another_model_is_asked_about_everything_and_the_old_one_is_known_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        fleet = World()
        fleet.open()
        caplog.set_level(logging.INFO)
        async with fleet.online("c0", "porch", fleet.pair.drafter()) as agent:
            await asyncio.sleep(1.0)
            old = await fleet.write(agent, 60)
            assert old.tau > 0.0
            await fleet.replace_cloud("another")
            new = await fleet.write(agent, 1)
            assert (new.tau, new.similarity) == (KEEP_NONE, None)
            assert set(new.sources) <= {"cloud"}
            assert "what was learnt about pair" in caplog.text
            await fleet.replace_cloud(toy.FINGERPRINT.model)
            back = await fleet.write(agent, 1)
            assert back.tau >= 0.9 * old.tau
            assert back.certificate is not None
            assert old.certificate is not None
            assert back.certificate.tokens >= old.certificate.tokens
        await fleet.close()

    run_virtual(scenario())


def test_a_text_during_which_the_model_changed_counts_as_wrong_and_teaches_nothing() -> None:
    async def scenario() -> None:
        fleet = World()
        fleet.open()
        async with fleet.online("c0", "porch", fleet.pair.drafter()) as agent:
            await asyncio.sleep(1.0)
            await fleet.write(agent, 60)
            generation = load(preset="budget", environ={}).config.generation
            old = measures_of(generation, Sampling(1, 0.0), agent.learner.pair)
            curves = {name: curve.total_weight for name, curve in agent.learner.curves.items()}
            before = agent.learner.certificate(old, generation)
            changed = False

            async def swap(_tokens: Any) -> None:
                nonlocal changed
                if not changed:
                    changed = True
                    agent._meet(replace(toy.FINGERPRINT, model="another"))

            job = Job(generation, Sampling(7, 0.0), 24, fleet.pair.context, fleet.pair.eos_ids)
            result = await agent.generate(job, [5, 6, 7], swap)
            kept = sum(source != "cloud" for source in result.sources)
            assert kept > 0
            assert {name: curve.total_weight for name, curve in agent.learner.curves.items()} == curves
            after = agent.learner.certificate(old, generation)
            assert before is not None
            assert after is not None
            assert after.tokens == before.tokens + len(result.ids)
            assert after.figures()["harm"] == pytest.approx(before.figures()["harm"] + kept)
        await fleet.close()

    run_virtual(scenario())


def test_two_agents_with_other_small_models_share_no_curve() -> None:
    async def scenario() -> None:
        fleet = World()
        fleet.open()
        async with fleet.online("c0", "a", fleet.pair.drafter()) as first:
            await asyncio.sleep(1.0)
            await fleet.write(first, 60)
            first_pair = first.learner.pair
            other = replace(toy.FINGERPRINT, model="other-slm")
            async with fleet.bus("b") as bus:
                made = fleet.agent(
                    bus, "c0", "b", toy.ToyDrafter(agreement=0.2), lambda: fleet.rng.getrandbits(60), other
                )
                await made.subscribe()

                async def hear() -> None:
                    async for received in made.party.received():
                        await made.handle(received)

                listening = asyncio.create_task(hear())
                await asyncio.sleep(5.0)
                assert made.learner.pair != first_pair
                assert made.learner.cluster, "the cluster's state is there"
                new = await fleet.write(made, 1)
                assert new.tau == KEEP_NONE
                await fleet.write(made, 30)
                await asyncio.sleep(5.0)
                state = decode(fleet.broker.retained[topics.FL_STATE.name(cluster="c0")].payload)
                assert isinstance(state, Learned)
                assert {pair_in(name) for name in state.curves} == {first_pair, made.learner.pair}
                own = first.learner.curves
                for name, data in state.curves.items():
                    if pair_in(name) == first_pair:
                        assert Curve.from_bytes(data).total_weight <= own[name].total_weight + 1.0
                listening.cancel()
        await fleet.close()

    run_virtual(scenario())


def test_verified_tokens_of_the_former_model_are_dropped() -> None:
    """Otherwise peers would settle with them what the new model has never seen."""

    async def scenario() -> None:
        fleet = World()
        fleet.open()
        async with fleet.online("c0", "porch", fleet.pair.drafter()) as agent:
            await asyncio.sleep(1.0)
            key = toy.key_of([1, 2, 3])
            agent.peers.hear_verified(
                VerifiedTokens(**agent.party.stamp(), space=agent.peers.space, items=(Verified(key, 7),))
            )
            assert agent.peers.memory.nearest(unpack_key(key), 1, theta=0.9) is not None
            await fleet.replace_cloud("another")
            assert agent.peers.memory.nearest(unpack_key(key), 1, theta=0.9) is None
        await fleet.close()

    run_virtual(scenario())
