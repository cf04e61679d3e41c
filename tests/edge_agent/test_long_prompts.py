"""A long prompt at a slow cloud: the device waits while the cloud reports its work, and for nobody else, nor for ever."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import pytest

from cloud_verifier.engine import Engine, EngineInput, EngineOutput
from cloud_verifier.reports import STILL_S, TELL_S
from cloud_verifier.service import CloudService
from edge_agent.core import AgentCore
from edge_agent.events import Committed
from edge_agent.result import GenerationResult, Job
from fedhlm.bus.party import Stamp
from fedhlm.config import load
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Sampling, Verdict
from fedhlm.telemetry import forget_warnings
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import CLOUD, Fleet
from tests.edge_agent.test_core import nobody, with_fleet

DEADLINE_S = 4.0
CROWD = 64
TOKENS = 8
PROMPT = [1 + n % (toy.VOCAB_SIZE - 2) for n in range(400)]


def job(prompt_s: float = 120.0) -> Job:
    flags = {
        "generation.deadline_ms": str(round(DEADLINE_S * 1000)),
        "generation.prompt_ms": str(round(prompt_s * 1000)),
    }
    config = load(preset="exact", environ={}, flags=flags).config.generation
    return Job(config, Sampling(seed=3), TOKENS, toy.CONTEXT, frozenset())


async def timed(agent: AgentCore, wanted: Job, prompt: Sequence[int] = PROMPT) -> tuple[float, GenerationResult]:
    began_s = asyncio.get_running_loop().time()
    result = await agent.generate(wanted, [*prompt], nobody)
    return asyncio.get_running_loop().time() - began_s, result


def prompt_of(number: int) -> list[int]:
    """A prompt as long as the others, with a beginning of its own."""
    words = toy.VOCAB_SIZE - 2
    return [1 + number % words, 1 + number // words, *PROMPT[2:]]


async def slow(token_s: float, requests: Sequence[EngineInput]) -> list[EngineOutput]:
    await asyncio.sleep(token_s * sum(len(request.ids) for request in requests))
    return toy.large_outputs(requests)


def written(
    work: Callable[[Fleet, AgentCore], Awaitable[tuple[float, GenerationResult]]],
    token_s: float,
    *,
    token_bytes: int = 1,
) -> tuple[float, GenerationResult]:
    """What a device wrote and how long it took, beside a cloud that takes `token_s` seconds for each token."""
    engine = Engine(toy.ToyCache(), partial(slow, token_s), token_bytes)
    seconds: list[float] = []

    async def noted(fleet: Fleet, agent: AgentCore) -> GenerationResult:
        took_s, result = await work(fleet, agent)
        seconds.append(took_s)
        return result

    forget_warnings()
    result, _ = with_fleet(noted, pair=toy.pair(0.8)._replace(engine=lambda: engine))
    return seconds[0], result


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_a_long_prompt_at_a_slow_cloud_stays_exact(caplog: pytest.LogCaptureFixture) -> None:
    """The cloud reads the prompt for five times the deadline."""
    token_s = 5.0 * DEADLINE_S / len(PROMPT)
    took_s, result = written(lambda _, agent: timed(agent, job()), token_s)
    assert set(result.sources) == {"cloud"}
    assert result.ids == toy.large_alone(PROMPT, Sampling(seed=3), TOKENS)[:TOKENS]
    assert 5.0 * DEADLINE_S <= took_s < 6.0 * DEADLINE_S + TOKENS, "the prompt is read once"
    assert "generation.deadline_ms" not in warnings(caplog)


def test_sixty_four_long_prompts_at_once_all_stay_exact(caplog: pytest.LogCaptureFixture) -> None:
    """Together they take five times the deadline of each, and the cloud holds the caches of sixteen only."""
    token_s = 5.0 * DEADLINE_S / (CROWD * len(PROMPT))
    engine = Engine(toy.ToyCache(), partial(slow, token_s), CLOUD.cache_bytes // (16 * len(PROMPT)))
    pair = toy.pair(0.8)._replace(engine=lambda: engine, beside=lambda: None)

    async def main() -> list[tuple[float, GenerationResult]]:
        fleet = Fleet(pair, seed=1, clusters=1, delay_s=0.02, sessions_max=CROWD)
        for node in fleet.nodes.values():
            node.start()
        await asyncio.sleep(1.0)

        async def write(number: int) -> tuple[float, GenerationResult]:
            async with fleet.online("c0", f"agent-{number}", pair.drafter()) as agent:
                return await timed(agent, job(), prompt_of(number))

        results = await asyncio.gather(*map(write, range(CROWD)))
        for node in fleet.nodes.values():
            await node.crash()
        return results

    results = run_virtual(main())
    for number, (_, result) in enumerate(results):
        assert set(result.sources) == {"cloud"}, number
        assert result.ids == toy.large_alone(prompt_of(number), Sampling(seed=3), TOKENS)[:TOKENS]
    assert max(took_s for took_s, _ in results) > DEADLINE_S, "or nobody waited"
    assert "generation.deadline_ms" not in warnings(caplog)


def test_a_text_whose_cache_is_lost_stays_exact_while_it_is_read_again() -> None:
    """As if other texts took the cloud's memory once the prompt has been read."""
    token_s = 1.5 * DEADLINE_S / len(PROMPT)

    async def work(fleet: Fleet, agent: AgentCore) -> tuple[float, GenerationResult]:
        cloud = fleet.nodes["cloud"].service
        assert isinstance(cloud, CloudService)
        began_s, dropped = asyncio.get_running_loop().time(), False

        async def drop(_tokens: list[Committed]) -> FinishReason | None:
            nonlocal dropped
            if not dropped:
                await asyncio.sleep(0.2)  # until the block has ended
                cloud.batcher.drop_caches()
                dropped = True
            return None

        result = await agent.generate(job(), PROMPT, drop)
        return asyncio.get_running_loop().time() - began_s, result

    took_s, result = written(work, token_s)
    assert took_s > 2.0 * token_s * len(PROMPT), "it was read twice"
    assert set(result.sources) == {"cloud"}
    assert result.ids == toy.large_alone(PROMPT, Sampling(seed=3), TOKENS)[:TOKENS]


def test_the_wait_has_an_end_and_the_log_names_the_setting(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        took_s, result = written(lambda _, agent: timed(agent, job(2.0 * DEADLINE_S)), token_s=1.0)
    assert set(result.sources) == {"unverified"}
    assert DEADLINE_S <= took_s <= 3.0 * DEADLINE_S + 1.0
    said = warnings(caplog)
    assert f"at work on a prompt of {len(PROMPT)} tokens" in said
    assert "Raise generation.prompt_ms" in said


def test_a_dead_cloud_is_waited_for_no_longer_than_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    async def work(fleet: Fleet, agent: AgentCore) -> tuple[float, GenerationResult]:
        fleet.link("cloud").loss = 1.0
        return await timed(agent, job())

    with caplog.at_level(logging.WARNING):
        took_s, result = written(work, token_s=0.0)
    assert set(result.sources) == {"unverified"}
    assert DEADLINE_S <= took_s < DEADLINE_S + 1.0
    assert "no answer came within generation.deadline_ms (4000)" in warnings(caplog)


def test_a_cloud_whose_model_stands_still_is_given_up() -> None:
    took_s, result = written(lambda _, agent: timed(agent, job()), token_s=1e6)
    assert set(result.sources) == {"unverified"}
    assert DEADLINE_S < took_s <= STILL_S + DEADLINE_S + 2.0 * TELL_S


def test_who_pretends_to_be_at_work_holds_a_device_no_longer_than_the_setting_says() -> None:
    """Reports for ever, and of more tokens each time; the cloud itself is away."""
    allowed_s = 20.0

    async def work(fleet: Fleet, agent: AgentCore) -> tuple[float, GenerationResult]:
        fleet.link("cloud").loss = 1.0
        stamp = Stamp("edge-c0")

        async def pretend() -> None:
            async with fleet.bus("liar") as bus:
                for fed in range(10_000):
                    verdict = Verdict(**stamp(), session=1, epoch=fed % 3, base=len(PROMPT), status="working", fed=fed)
                    name = topics.VERDICT.name(cluster="c0", agent="a")
                    await bus.publish(name, encode(verdict))
                    await asyncio.sleep(0.1)

        lying = asyncio.create_task(pretend())
        try:
            return await timed(agent, job(allowed_s))
        finally:
            lying.cancel()

    took_s, result = written(work, token_s=0.0)
    assert set(result.sources) == {"unverified"}
    assert allowed_s <= took_s <= allowed_s + 2.0 * DEADLINE_S
