"""Every client that people use, at every kind of door: all are answered, and all get the same text."""

import asyncio
import gc
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import llm
import ollama
import openai
import pytest
from langchain_openai import ChatOpenAI
from llm.default_plugins.openai_models import Chat

from tests.fedhlm_doors.house import PROMPT, SEED, TOKENS, House, house

KEY = "no-key-is-needed"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
CELLS = ("exact", "budget", "no link", "LLM alone")
DOORS = {
    "exact": ("agent", "fedhlm:exact"),
    "budget": ("agent", "fedhlm:budget"),
    "no link": ("lonely", "fedhlm:exact"),
    "LLM alone": ("cloud", "fedhlm-news-llm"),
}
pytestmark = [
    pytest.mark.slow,
    # Of the clients' own libraries.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def doors() -> Iterator[House]:
    with house("edge", "cloud", "agent", "lonely") as built:
        yield built
        gc.collect()  # some clients never close their sockets, which would warn later


def openai_sync(url: str, model: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=TOKENS, seed=SEED)
        assert answer.object == "chat.completion"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == TOKENS
        return answer.choices[0].message.content or ""


def openai_async(url: str, model: str) -> str:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            answer = await client.chat.completions.create(
                model=model, messages=MESSAGES, max_completion_tokens=TOKENS, seed=SEED
            )
            return answer.choices[0].message.content or ""

    return asyncio.run(ask())


def openai_stream(url: str, model: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        stream = client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=TOKENS,
            seed=SEED,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == TOKENS
    finishes = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert finishes == [None] * (len(finishes) - 1) + ["length"]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])


def openai_async_stream(url: str, model: str) -> str:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            stream = await client.chat.completions.create(
                model=model, messages=MESSAGES, max_tokens=TOKENS, seed=SEED, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    return asyncio.run(ask())


def openai_completion(url: str, model: str) -> str:
    """The shipped template ends each message with a line break."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        answer = client.completions.create(model=model, prompt=f"{PROMPT}\n", max_tokens=TOKENS, seed=SEED)
        assert answer.object == "text_completion"
        return answer.choices[0].text


def ollama_chat(url: str, model: str) -> str:
    options = {"num_predict": TOKENS, "seed": SEED, "num_ctx": 8_192}
    answer = ollama.Client(url).chat(model=model, messages=MESSAGES, options=options)
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "length", TOKENS)
    return answer.message.content or ""


def ollama_stream(url: str, model: str) -> str:
    stream = ollama.Client(url).generate(
        model=model, prompt=PROMPT, stream=True, options={"num_predict": TOKENS, "seed": SEED}
    )
    parts = list(stream)
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    return "".join(part.response or "" for part in parts)


def httpx_raw(url: str, model: str) -> str:
    body = {"model": model, "messages": MESSAGES, "max_tokens": TOKENS, "seed": SEED}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def langchain(url: str, model: str) -> str:
    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key=lambda: KEY, max_completion_tokens=TOKENS, seed=SEED)
    return str(chat.invoke(PROMPT).content)


def langchain_stream(url: str, model: str) -> str:
    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key=lambda: KEY, max_completion_tokens=TOKENS, seed=SEED)
    return "".join(str(chunk.content) for chunk in chat.stream(PROMPT))


def simonw_llm(url: str, model: str) -> str:
    make: Any = Chat  # its types are not told
    chat = make(model_id=model, model_name=model, api_base=f"{url}/v1", key=KEY)
    answer = chat.prompt(PROMPT, max_tokens=TOKENS, seed=SEED, stream=True)
    assert isinstance(answer, llm.Response)
    return answer.text()


def curl(url: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": MESSAGES, "max_tokens": TOKENS, "seed": SEED})
    done = subprocess.run(
        ["curl", "-s", "--fail", f"{url}/v1/chat/completions", "-d", body], capture_output=True, text=True, check=True
    )
    text: str = json.loads(done.stdout)["choices"][0]["message"]["content"]
    return text


CLIENTS: dict[str, Callable[[str, str], str]] = {
    "openai": openai_sync,
    "openai async": openai_async,
    "openai stream": openai_stream,
    "openai async stream": openai_async_stream,
    "openai completions": openai_completion,
    "ollama chat": ollama_chat,
    "ollama generate stream": ollama_stream,
    "httpx": httpx_raw,
    "langchain-openai": langchain,
    "langchain-openai stream": langchain_stream,
    "llm": simonw_llm,
    "curl": curl,
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_is_answered_at_a_door(doors: House, client: str, cell: str) -> None:
    if client == "curl" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    part, model = DOORS[cell]
    text = CLIENTS[client](doors.urls[part], model)
    assert text.strip()
    if cell == "exact":  # what `exact` promises, whatever client asks
        assert text == httpx_raw(doors.urls["cloud"], "fedhlm-news-llm")
    elif cell != "budget":  # whose texts depend on what has been learnt meanwhile
        assert text == httpx_raw(doors.urls[part], model)
