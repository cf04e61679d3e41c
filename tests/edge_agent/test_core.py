"""The agent's service on the loopback bus: answers, refusals, mismatches and floods."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from edge_agent.core import AgentCore
from edge_agent.events import Committed
from edge_agent.result import GenerationResult, Job
from fedhlm.bus.party import Stamp
from fedhlm.config import load
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import SCHEMA_VERSION, Fingerprint, Sampling, Verdict
from fedhlm.protocol.packing import pack_ids
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet, Pair, listen


async def nobody(_tokens: list[Committed]) -> FinishReason | None:
    return None


def with_fleet(
    work: Callable[[Fleet, AgentCore], Awaitable[GenerationResult]],
    *,
    fingerprint: Fingerprint = toy.FINGERPRINT,
    pair: Pair | None = None,
) -> tuple[GenerationResult, AgentCore]:
    """Run `work` on one agent of a calm fleet in virtual time."""

    async def main() -> tuple[GenerationResult, AgentCore]:
        fleet = Fleet(pair or toy.pair(0.8), seed=1, clusters=1, delay_s=0.02, sessions_max=3)
        for node in fleet.nodes.values():
            node.start()
        await asyncio.sleep(1.0)
        async with fleet.bus("a") as bus:
            sessions = iter(range(1, 99))
            drafter = toy.ToyDrafter(agreement=0.8)
            agent = fleet.agent(bus, "c0", "a", drafter, sessions.__next__, fingerprint)
            await agent.subscribe()
            listener = asyncio.create_task(listen(agent))
            result = await work(fleet, agent)
            listener.cancel()
        for node in fleet.nodes.values():
            await node.crash()
        return result, agent

    return run_virtual(main())


def toy_plan(**options: Any) -> Any:
    config = load(preset="exact", environ={}, flags={"generation.deadline_ms": "5000"}).config.generation
    options = {"max_tokens": 16, "context_max": toy.CONTEXT, "eos_ids": frozenset({toy.EOS_ID}), **options}
    return Job(config, Sampling(seed=3), **options)


@pytest.mark.parametrize(
    ("fingerprint", "field"),
    [
        (Fingerprint("other", toy.VOCAB_SIZE, toy.FINGERPRINT.noise, "m"), "fingerprint.tokenizer"),
        (Fingerprint("toy", 50, toy.FINGERPRINT.noise, "m"), "fingerprint.vocab_size"),
        (Fingerprint("toy", toy.VOCAB_SIZE, "dice", "m"), "fingerprint.noise"),
    ],
)
def test_a_mismatch_with_the_cloud_ends_with_its_field(fingerprint: Fingerprint, field: str) -> None:
    result, _ = with_fleet(lambda _f, agent: agent.generate(toy_plan(), [5], nobody), fingerprint=fingerprint)
    assert result.finish == "error"
    assert f"{field} differs" in result.error


@pytest.mark.parametrize("preset", ["exact", "budget", "fedhlm"])
def test_what_is_measured_does_not_depend_on_headers(preset: str) -> None:
    """Bytes that decisions count are the same in any year and after any number of messages."""

    def measured(since_s: float, sequence: int) -> tuple[list[float | None], int]:
        config = load(preset=preset, environ={}, flags={}).config.generation

        async def work(_fleet: Fleet, agent: AgentCore) -> GenerationResult:
            agent.party.stamp = Stamp("a", lambda: since_s)
            agent.party.stamp._sequence = sequence
            for seed in range(3):
                job = Job(config, Sampling(seed, 0.8, 1.0, config.coupling), 24, toy.CONTEXT, frozenset())
                result = await agent.generate(job, [5, 6], nobody)
            return result

        result, agent = with_fleet(work)
        known = agent.peers.collaboration[config.peers]
        return [agent.learner.escalation_bytes, known.llm_bytes, known.p2p_bytes], result.uplink_bytes

    (early, few), (late, many) = measured(0.0, 0), measured(9.0e12, 2**30)
    assert early == late
    assert early[0] is not None
    assert early[0] > 0.0
    assert few < many, "what travels is counted as it travels"


def test_hostile_verdicts_are_counted_and_change_nothing() -> None:
    async def work(fleet: Fleet, agent: AgentCore) -> GenerationResult:
        attacker: LoopbackBus = fleet.bus("attacker")
        async with attacker:
            running = asyncio.create_task(agent.generate(toy_plan(), [5], nobody))
            await asyncio.sleep(0.05)
            name = topics.VERDICT.name(cluster="c0", agent="a")
            for session in (1, 77):
                for ids, probs, base, accepted in (
                    (b"\xff\xff", b"", 1, 0),
                    (b"\1", b"", 1, 0),
                    (b"", b"\xff\xff", 1, 0),
                    (pack_ids([5], 48), b"", 1, 100),
                    (pack_ids([5] * 50, 48), b"", 90, 3),
                ):
                    verdict = Verdict(
                        version=SCHEMA_VERSION, sender="x", sequence=1, sent_ms=0, session=session, epoch=0, base=base,
                        status="settled", accepted=accepted, ids=ids, target_probs=probs,
                    )  # fmt: skip
                    await attacker.publish(name, encode(verdict))
            await attacker.publish(name, b"\xc1 no message")
            return await running

    result, agent = with_fleet(work)
    assert result.ids == toy.large_alone([5], Sampling(seed=3), 16)
    counters = agent._counters
    assert counters["refused_messages"] >= 4
    assert counters["late_verdicts"] >= 5
    assert counters["stale_verdicts"] >= 2


def test_texts_shorter_than_a_round_trip_are_verified_again_after_the_link_was_down() -> None:
    async def work(_fleet: Fleet, agent: AgentCore) -> GenerationResult:
        agent._drafter = toy.ToyDrafter(agreement=0.8, step_s=0.001)  # 16 tokens in 16 ms, an answer takes 40
        await asyncio.sleep(1.0)
        agent.link_up = False
        alone = await agent.generate(toy_plan(), [5], nobody)
        assert set(alone.sources) == {"unverified"}
        await asyncio.sleep(1.0)
        return await agent.generate(toy_plan(), [5], nobody)

    result, agent = with_fleet(work)
    assert agent._counters["late_verdicts"] == 1
    assert set(result.sources) == {"cloud"}


def test_a_draft_that_fails_ends_the_generation_with_its_error() -> None:
    class Broken:
        async def draft(self, ids: object, sampling: object, uncertainty: str = "") -> Any:
            raise RuntimeError("no memory")

        async def grow(self, *_arguments: object, **_options: object) -> Any:
            raise RuntimeError("no memory")

    async def work(_fleet: Fleet, agent: AgentCore) -> GenerationResult:
        agent._drafter = Broken()
        with pytest.raises(ExceptionGroup) as caught:
            await agent.generate(toy_plan(), [5], nobody)
        assert caught.group_contains(RuntimeError, match="no memory")
        agent._drafter = toy.ToyDrafter(agreement=0.8)
        return await agent.generate(toy_plan(), [5], nobody)

    result, _ = with_fleet(work)
    assert result.ids == toy.large_alone([5], Sampling(seed=3), 16)


def test_statistics_add_up() -> None:
    result, _ = with_fleet(lambda _f, agent: agent.generate(toy_plan(), [5], nobody))
    statistics = result.statistics()
    assert statistics["tokens_cloud"] == len(result.ids) == 16
    assert 0 < statistics["round_trips"] <= statistics["uplink_messages"]
    assert statistics["uplink_bytes"] > 16 * 2
    assert 0.0 <= statistics["mean_beta"] <= 1.0
