"""Where a text ends does not depend on how its tokens came: `exact` writes what the LLM alone writes, in every pipeline."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedhlm
from edge_agent.service import ModelFacts
from fedhlm.config import load
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.parts import Part
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet

LENGTH = 24
# Half characters that together are an emoji or no character at all, words of several characters, leading hyphens, and
# text that looks like a control token.
WORDS = ("😀".encode()[:2], "😀".encode()[2:], "é".encode()[:1], b"\x80", b"ab", b"-- ", b"<|endoftext|>", b"a", b" ")
PIPELINES: dict[str, dict[str, str]] = {
    "blocking": {"generation.pipeline.kind": "blocking", "generation.pipeline.block": "3"},
    "single": {"generation.pipeline.kind": "blocking", "generation.pipeline.block": "1"},
    "async": {"generation.pipeline.kind": "async", "generation.pipeline.block": "2"},
    "tree": {"generation.pipeline.kind": "tree"},
}


class Bytes(toy.ToyTokenizer):
    """Each token is one of WORDS, by its number."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if i != toy.EOS_ID or not skip_special_tokens]
        return b"".join(WORDS[i % len(WORDS)] for i in kept).decode("utf-8", errors="replace")


@cache
def ids_of(seed: int) -> list[int]:
    return toy.large_alone([5, 6], Sampling(seed, 0.8), LENGTH)


def expected(seed: int, stop: tuple[str, ...]) -> tuple[str, list[int], str]:
    """Text, ids and finish of the LLM alone, by looking through the whole text for the end that comes first."""
    ids = ids_of(seed)
    whole = [Bytes().decode(ids[:n]) for n in range(len(ids) + 1)]
    known = whole[-1].rstrip("�")  # what is broken at the end could still become a character
    for end in range(1, len(known) + 1):
        if starts := [end - len(s) for s in stop if known[:end].endswith(s)]:
            count = next(n for n, text in enumerate(whole) if len(text.rstrip("�")) >= end)
            return known[: min(starts)], ids[:count], "stop"
    return whole[-1], ids, "stop" if toy.EOS_ID in ids else "length"


@st.composite
def asked(draw: st.DrawFn) -> tuple[int, tuple[str, ...]]:
    """A seed, and stops that overlap one another and the text."""
    seed = draw(st.integers(0, 12))
    text = Bytes().decode(ids_of(seed))
    stops = []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(text) - 1)))
        stops.append(
            text[start : start + draw(st.integers(1, 6))] + draw(st.sampled_from(["", "", "😀", "-", "�", "x"]))
        )
    return seed, tuple(s for s in stops if s)


@asynccontextmanager
async def serving(preset: str, flags: dict[str, str]) -> AsyncIterator[fedhlm.Client]:
    fleet = Fleet(toy.pair(0.6), seed=1, clusters=1, delay_s=0.02, sessions_max=3)
    for node in fleet.nodes.values():
        node.start()
    loaded = load(preset=preset, environ={}, flags={"generation.temperature": "0.8", **flags})
    numbers = iter(range(1, 10_000))
    facts = ModelFacts(Bytes(), None, frozenset({toy.EOS_ID}), toy.CONTEXT)
    _, service = fleet.agent_service(
        Part("a"), loaded, "c0", toy.ToyDrafter(agreement=0.6), facts, lambda: next(numbers)
    )

    async def serve() -> None:
        await service.subscribe()
        async with service.connection:
            await service.run()

    task = asyncio.create_task(serve())
    await asyncio.sleep(1.0)
    async with fedhlm.Client(fleet.bus("client"), name="client") as client:
        yield client
    task.cancel()
    await asyncio.wait([task])


def answers(preset: str, flags: dict[str, str], requests: list[tuple[int, tuple[str, ...]]]) -> list[fedhlm.Result]:
    found: list[fedhlm.Result] = []

    async def main() -> None:
        async with serving(preset, flags) as client:
            options: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0.8}
            prompt = toy.ToyTokenizer().decode([5, 6])
            for seed, stop in requests:
                found.append(await client.write("a", prompt, seed=seed, stop=stop, **options))

    run_virtual(main())
    return found


@pytest.mark.parametrize("pipeline", PIPELINES)
@settings(max_examples=8)
@given(requests=st.lists(asked(), min_size=1, max_size=8))
def test_exact_is_the_llm_alone_in_every_pipeline(pipeline: str, requests: list[tuple[int, tuple[str, ...]]]) -> None:
    for (seed, stop), result in zip(requests, answers("exact", PIPELINES[pipeline], requests), strict=True):
        assert (result.text, list(result.ids), result.finish) == expected(seed, stop), (seed, stop)


@settings(max_examples=8)
@given(requests=st.lists(asked(), min_size=1, max_size=8), block=st.integers(1, 16))
def test_the_llm_alone_ends_where_it_ends_however_many_tokens_come_at_once(
    requests: list[tuple[int, tuple[str, ...]]], block: int
) -> None:
    flags = {"generation.pipeline.block": str(block)}
    for (seed, stop), result in zip(requests, answers("llm-only", flags, requests), strict=True):
        assert (result.text, list(result.ids), result.finish) == expected(seed, stop), (seed, stop)
