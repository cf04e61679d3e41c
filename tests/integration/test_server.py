"""A fleet whose LLM runs on a server of vLLM's schema: over real MQTT and real HTTP, on the shipped pair."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.responses import JSONResponse

from edge_broker.embedded import EmbeddedBroker
from fedhlm.decoding.alone import Alone
from fedhlm.errors import ModelError, RequestRefused
from fedhlm.protocol.messages import Sampling
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder
from tests.integration.live import Live, live
from tests.vllm_server import VllmServer, serving

LLM = model_folder("", "llm")
TOKENS = 10
PRESETS = ("exact", "llm-only", "budget", "hlm", "speculative", "cu-hlm", "u-hlm", "rand-hlm", "fedhlm")
PROMPTS = [item.title + "\n" for item in load_items()[:2]]


@pytest.fixture(scope="module")
def llm() -> Alone:
    return Alone.load(LLM, threads=1)


@asynccontextmanager
async def fleet(server: VllmServer, **flags: object) -> AsyncIterator[Live]:
    keys = {"cloud.model": server.url, "cloud.server.tokenizer": LLM}
    async with EmbeddedBroker() as broker, live(broker.url, flags={**keys, **flags}) as system:
        yield system


async def test_every_preset_runs_and_exact_is_the_llm_alone(llm: Alone) -> None:
    async with serving(VllmServer(LLM)) as server, fleet(server, **{"agent.presets": ",".join(PRESETS)}) as system:
        laws: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 20})
        for preset, law in ((preset, law) for preset in PRESETS for law in laws):
            for seed, prompt in enumerate(PROMPTS if preset == "exact" else PROMPTS[:1]):
                answer = await system.ask(prompt, max_tokens=TOKENS, seed=seed, preset=preset, **law)
                assert len(answer.ids) == TOKENS
                if preset in ("exact", "llm-only"):
                    assert list(answer.ids) == llm.write(llm.encode(prompt), Sampling(seed, **law), TOKENS)
                    assert set(answer.sources) == {"cloud"}
                assert "approximate" not in answer.statistics
        assert system.counters["cloud"]["approximate_tokens"] == 0
        assert any("prompt_logprobs" in body for body in server.asked)
        assert any(len(body["prompt"]) > 1 for body in server.asked)


async def test_a_whole_law_is_approximate_counted_and_has_no_receipt(llm: Alone) -> None:
    async with serving(VllmServer(LLM)) as server, fleet(server) as system:
        promised = await system.ask(PROMPTS[0], max_tokens=TOKENS, seed=1, temperature=0.8, top_k=20, receipt=True)
        assert promised.proof is not None
        told = await system.ask(PROMPTS[0], max_tokens=TOKENS, seed=1, temperature=0.8, receipt=True)
        assert told.statistics["approximate"] >= 1
        assert told.proof is None
        assert 0 < system.counters["cloud"]["approximate_tokens"] <= TOKENS + 8
        # Where a token differs from the LLM's own, it was not certain.
        oracle = llm.write(llm.encode(PROMPTS[0]), Sampling(1, 0.8), TOKENS)
        differing = sum(a != b for a, b in zip(told.ids, oracle, strict=True))
        assert differing <= TOKENS
        with pytest.raises(RequestRefused, match="grammar"):
            await system.ask(PROMPTS[0], max_tokens=TOKENS, grammar='start: "yes" | "no"')


async def test_nothing_is_lost_while_a_server_fails_and_comes_back(llm: Alone) -> None:
    async with serving(VllmServer(LLM)) as server, fleet(server) as system:
        law: dict[str, Any] = {"temperature": 0.0}
        expected = llm.write(llm.encode(PROMPTS[0]), Sampling(0, **law), TOKENS)
        server.faults = [JSONResponse({"error": {"message": "no such key"}}, 401)]
        with pytest.raises(RequestRefused, match="status 401: set cloud.server.key"):
            await system.ask(PROMPTS[0], max_tokens=TOKENS, seed=0, **law)
        server.says = b"nonsense"
        asked = [system.ask(p, max_tokens=TOKENS, seed=i, **law) for i, p in enumerate(PROMPTS * 2)]
        for failed in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(failed, RequestRefused)
            assert "must answer as vLLM does" in failed.reason
        server.says = None
        server.faults = [JSONResponse({}, 503)]  # it passes by itself
        assert list((await system.ask(PROMPTS[0], max_tokens=TOKENS, seed=0, **law)).ids) == expected


async def test_a_cloud_says_at_its_start_what_is_wrong_with_its_server() -> None:
    async with serving(VllmServer(LLM)) as server:
        server.url = server.url.replace("/v1", "/v9")
        async with EmbeddedBroker() as broker:
            keys = {"cloud.model": server.url, "cloud.server.tokenizer": LLM}
            with pytest.raises(ModelError, match="no API of OpenAI is there"):
                async with live(broker.url, parts=("cloud",), flags=keys) as system:
                    await system.tasks["cloud"]
