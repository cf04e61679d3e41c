"""A prompt that nearly fills a context of 32,768 tokens goes through a fleet: read in pieces, in time, and exactly."""

from functools import partial
from typing import NamedTuple

import pytest

from edge_agent.events import Committed
from edge_agent.result import GenerationResult, Job
from fedhlm import settings
from fedhlm.config import load
from fedhlm.decoding.alone import write
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Config
from fedhlm_lab.sim import links, toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet

CONTEXT = 32_768
LENGTH = 30_000
TOKENS = 24
PROMPT = [1 + (7 * number + number // 11) % (toy.VOCAB_SIZE - 1) for number in range(LENGTH)]
SAMPLING = Sampling(seed=3, temperature=0.8)


FITTING = settings.Cloud(cache_bytes=2**34)
SMALL = settings.Cloud()  # the keys and values of this text take 29 times the cache_bytes


class Written(NamedTuple):
    """A text, and the tokens that were committed while it was written."""

    result: GenerationResult
    committed: list[int]


async def written(preset: str, link: str, cloud: settings.Cloud, step_s: float, flags: dict[str, str]) -> Written:
    """Write a text after the prompt in a fleet whose LLM takes `step_s` seconds for a call."""
    pair = toy.pair(0.8)._replace(context=CONTEXT, engine=partial(toy.engine, step_s=step_s))
    fleet = Fleet(pair, seed=1, clusters=1, delay_s=0.0, sessions_max=8, services=Config(cloud=cloud))
    for node in fleet.nodes.values():
        node.start()
    links.load(link).apply(fleet.link("agent-0"))
    generation = load(preset=preset, environ={}, flags=flags).config.generation
    job = Job(generation, SAMPLING, TOKENS, CONTEXT, pair.eos_ids)
    committed = list[int]()

    async def saw(tokens: list[Committed]) -> None:
        committed.extend(token.token for token in tokens)

    async with fleet.online("c0", "agent-0", pair.drafter()) as agent:
        result = await agent.generate(job, PROMPT, saw)
    for node in fleet.nodes.values():
        await node.crash()
    return Written(result, committed)


def alone() -> list[int]:
    return write(toy.large_logits, PROMPT, SAMPLING, TOKENS, eos_ids={toy.EOS_ID}, context_max=CONTEXT)


@pytest.mark.parametrize(
    ("preset", "link", "cloud", "step_s", "flags"),
    [
        ("exact", "lte", SMALL, 0.02, {}),
        ("llm-only", "lan", FITTING, 0.02, {}),
        ("exact", "lan", FITTING, 0.4, {"generation.prompt_ms": "600000"}),  # it reads for more than three minutes
    ],
)
def test_a_prompt_of_thirty_thousand_tokens_is_continued_exactly(
    preset: str, link: str, cloud: settings.Cloud, step_s: float, flags: dict[str, str]
) -> None:
    found = run_virtual(written(preset, link, cloud, step_s, flags))
    assert found.result.ids == found.committed == alone()
    assert set(found.result.sources) == {"cloud"}


def test_a_cloud_that_reads_for_too_long_is_reported_with_the_setting(caplog: pytest.LogCaptureFixture) -> None:
    found = run_virtual(written("exact", "lan", FITTING, 0.4, {}))
    assert set(found.result.sources) == {"unverified"}
    assert "the cloud was still at work on a prompt of 30000 tokens" in caplog.text
    assert "Raise generation.prompt_ms" in caplog.text
