"""The LLM on a server of vLLM's schema: over real HTTP, on top of the shipped LLM."""

import logging
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.responses import JSONResponse

from cloud_verifier.backends.openai import ATTEMPTS, Prefix, ServedModel, ServerClient, served
from cloud_verifier.engine import EngineFailure, EngineInput, EngineOutput
from cloud_verifier.wiring import LargeModel
from fedhlm.decoding.alone import Alone
from fedhlm.decoding.chat import chat_of
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.errors import FedhlmError
from fedhlm.settings import ModelServer
from fedhlm_zoo.shipped import model_folder
from tests.fedhlm.decoding.ggufs import TEMPLATE, metadata_of_shipped, tiny_gguf
from tests.vllm_server import NAME, VllmServer, serving

LLM = model_folder("", "llm")
IDS = [5, 170, 9, 33, 700, 12, 4, 81]


@pytest.fixture(scope="module")
def llm() -> Alone:
    return Alone.load(LLM, threads=1)


def logits_of(llm: Alone, ids: list[int], rows: int | None = None) -> NDArray[np.float32]:
    return llm.decoder.forward([DecoderInput(llm.decoder.empty_cache(), ids, rows)])[0].logits


@asynccontextmanager
async def connected(server: VllmServer, **settings: Any) -> AsyncIterator[ServedModel]:
    async with served(server.url, ModelServer(**({"tokenizer": str(LLM)} | settings))) as found:
        yield found


async def output_of(found: ServedModel, ids: list[int], rows: int, cache: Any = None) -> EngineOutput:
    (output,) = await found.engine.forward([EngineInput(cache or found.engine.empty_cache, ids, rows)])
    assert isinstance(output, EngineOutput), output
    return output


def told_equal(row: NDArray[np.float32], whole: NDArray[np.float32], least: int) -> None:
    """The ids above the row's lowest value have the model's own log-probabilities, and the others share what is left."""
    wide = whole.astype(np.float64)
    logs = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    known = row > row.min()
    assert least <= known.sum() <= least + 1
    assert np.abs(row - logs)[known].max() < 1e-5
    assert set(np.argsort(-logs)[:least].tolist()) <= set(np.flatnonzero(known).tolist())
    assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)


async def test_rows_are_the_models_own_however_they_are_asked_for(llm: Alone) -> None:
    whole = logits_of(llm, IDS)
    async with serving(VllmServer(LLM)) as server, connected(server) as found:
        assert found.name == NAME
        assert found.context == llm.decoder.info.context - 1
        assert found.engine.told == 20
        server.asked.clear()
        once = await output_of(found, IDS, len(IDS))
        assert "prompt_logprobs" in server.asked.pop()
        before = await output_of(found, IDS * 20, 0)
        assert not server.asked  # nothing is wanted of these, so nothing is asked
        assert before.logits.shape == (0, llm.decoder.vocabulary.size)
        after = await output_of(found, IDS, 3, before.cache)
        (asked,) = server.asked
        assert "prompt_logprobs" not in asked
        assert [len(prompt) for prompt in asked["prompt"]] == [166, 167, 168]
        cut = await output_of(found, IDS[4:], 4, once.cache.truncated(4))
        assert cut.cache == once.cache
        for row, expected in zip(once.logits, whole, strict=True):
            told_equal(row, expected, 20)
        assert np.abs(cut.logits - once.logits[4:]).max() < 0.2
        long = logits_of(llm, IDS * 21, 3)
        for row, expected in zip(after.logits, long, strict=True):
            told_equal(row, expected, 20)


async def test_requests_run_at_the_same_time_and_fail_one_by_one() -> None:
    async with serving(VllmServer(LLM)) as server, connected(server) as found:
        server.slow_s = 0.1
        empty = found.engine.empty_cache
        outputs = await found.engine.forward([EngineInput(empty, IDS[: i + 1], 1) for i in range(6)])
        assert server.most_open == 6
        assert all(isinstance(output, EngineOutput) for output in outputs)
        too_long = [1] * server.max_model_len
        good, bad = await found.engine.forward([EngineInput(empty, IDS, 1), EngineInput(empty, too_long, 1)])
        assert isinstance(good, EngineOutput)
        assert isinstance(bad, EngineFailure)
        assert "status 400" in bad.reason
        assert "maximum context length" in bad.reason


async def test_what_passes_is_tried_again_and_what_does_not_is_told() -> None:
    async with serving(VllmServer(LLM)) as server, connected(server) as found:
        request = EngineInput(found.engine.empty_cache, IDS, 1)
        server.faults = [JSONResponse({}, 503)] * (ATTEMPTS - 1)
        (output,) = await found.engine.forward([request])
        assert isinstance(output, EngineOutput)
        server.faults = [JSONResponse({}, 500)] * ATTEMPTS
        (failed,) = await found.engine.forward([request])
        assert isinstance(failed, EngineFailure)
        assert "status 500" in failed.reason
        server.faults = [JSONResponse({"error": {"message": "gone"}}, 404)]
        (missing,) = await found.engine.forward([request])
        assert isinstance(missing, EngineFailure)
        assert "cloud.server.name" in missing.reason
        padding = {"index": 0, "logprobs": {"top_logprobs": [{f"token_id:{9_000 + i}": -1.0 for i in range(20)}]}}
        for nonsense in (
            msgspec.json.encode({"choices": [padding]}),
            b"<html>",
            b'{"choices": []}',
            b'{"choices": [{"index": 0}]}',
            b"\xff",
            b"[]",
        ):
            server.says = nonsense
            (odd,) = await found.engine.forward([request])
            assert isinstance(odd, EngineFailure), nonsense
        server.says = None
        assert isinstance((await found.engine.forward([request]))[0], EngineOutput)


async def test_a_server_that_goes_away_is_told() -> None:
    async with AsyncExitStack() as machine:
        server = await machine.enter_async_context(serving(VllmServer(LLM)))
        async with connected(server) as found:
            await machine.aclose()
            (down,) = await found.engine.forward([EngineInput(found.engine.empty_cache, IDS, 1)])
    assert isinstance(down, EngineFailure)
    assert "cannot be reached" in down.reason


async def test_a_server_that_does_not_answer_in_time_is_told() -> None:
    async with serving(VllmServer(LLM)) as server, httpx.AsyncClient(timeout=0.2) as http:
        server.slow_s = 1_000.0
        client = ServerClient(http, server.url, model=NAME, told=20, size=4096)
        (late,) = await client.forward([EngineInput(Prefix(()), IDS, 1)])
        assert late == EngineFailure(f"{server.url}/completions did not answer within cloud.server.timeout_s")


async def refusal(server: VllmServer, **settings: Any) -> FedhlmError:
    with pytest.raises(FedhlmError) as caught:
        async with connected(server, **settings):
            pass
    return caught.value


async def test_what_is_wrong_with_a_server_is_told_at_the_start(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-secret\n")
    key.chmod(stat.S_IRUSR | stat.S_IWUSR)
    async with serving(VllmServer(LLM, key="sk-secret")) as server:
        assert "status 401: set cloud.server.key" in str(await refusal(server))
        async with connected(server, key=str(key)) as found:
            assert found.name == NAME
        key.chmod(0o644)
        assert "only its owner can read" in str(await refusal(server, key=str(key)))
    async with serving(VllmServer(LLM)) as server:
        assert f"one of the server's models: {NAME}" in str(await refusal(server, name="other"))
        assert "cloud.server.tokenizer" in str(await refusal(server, tokenizer=""))
        said = str(await refusal(server, tokenizer=str(tmp_path)))
        assert "cloud.server.tokenizer must be a folder or GGUF file with the tokenizer of the server's model" in said
        assert "tokenizer.json" in said
        server.max_logprobs = 5
        assert "max allowed: 5" in str(await refusal(server))
        async with connected(server, logprobs=5) as found:
            assert found.engine.told == 5
        server.max_logprobs = 20
        server.names_ids = False
        assert "name tokens by their ids" in str(await refusal(server))
        server.names_ids = True
        server.shift = 1
        assert "must be that of" in str(await refusal(server))
        server.shift = 0
        server.says = b"nothing"
        assert "must answer as vLLM does" in str(await refusal(server))
        server.says = None
        server.url = server.url.replace("/v1", "/v2")
        assert "status 404: no API of OpenAI is there" in str(await refusal(server))
    assert "cannot be reached" in str(await refusal(server))
    for url in ("http://localhost:port/v1", "http://"):
        server.url = url
        assert url in str(await refusal(server))


async def test_the_tokenizer_may_be_that_of_a_gguf_file(llm: Alone, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: reads which ids end a text")
    file = tiny_gguf(tmp_path / "tokenizer.gguf", tokenizer__ggml__add_bos_token=True)
    async with serving(VllmServer(LLM)) as server, connected(server) as folder:
        async with connected(server, tokenizer=str(file)) as found:
            assert (found.vocabulary, found.eos_ids, found.bos_id) == (folder.vocabulary, (0,), folder.bos_id)
            assert LargeModel.of_server(found).fingerprint == LargeModel.of_server(folder).fingerprint
            output = await output_of(found, IDS, 1)
            told_equal(output.logits[0], logits_of(llm, IDS, 1)[0], 20)
            assert (chat := chat_of(found.folder)) is not None
            assert chat.template == TEMPLATE
        first, second, *others = metadata_of_shipped()["tokenizer.ggml.tokens"]
        shifted = tiny_gguf(tmp_path / "shifted.gguf", tokenizer__ggml__tokens=[first, *others, second])
        assert "cloud.server.tokenizer" in str(await refusal(server, tokenizer=str(shifted)))


async def test_a_server_without_tokenize_and_prompt_logprobs_is_enough(llm: Alone) -> None:
    whole = logits_of(llm, IDS)
    async with serving(VllmServer(LLM, scores_prompts=False, tokenizes=False)) as server, connected(server) as found:
        output = await output_of(found, IDS, len(IDS))
        assert len(server.asked[-1]["prompt"]) == len(IDS)
        for row, expected in zip(output.logits, whole, strict=True):
            told_equal(row, expected, 20)
        server.shift = 1
        assert "must be that of" in str(await refusal(server))


async def test_a_server_whose_scores_depend_on_the_block_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(VllmServer(LLM)) as server:
        with caplog.at_level(logging.WARNING):
            async with connected(server):
                assert caplog.text == ""
            server.jitter = 0.1
            async with connected(server):
                assert "VLLM_BATCH_INVARIANT" in caplog.text
