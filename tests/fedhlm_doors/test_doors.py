"""The doors of running parts: what Home Assistant calls, closed connections, queues, keys, and where tokens come from."""

import asyncio
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest

from tests.fedhlm_doors.house import PROMPT, SEED, House, house

KEY = "0123456789abcdef"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
CHAT = "/v1/chat/completions"
PATIENCE_S = 60.0
CLIENTS = 200
RISE_KB = 16 * 1024
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def doors() -> Iterator[House]:
    with house("edge", "cloud", "agent") as built:
        yield built
        gc.collect()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """An agent by itself with keys and a rate."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(0o600)
    keys.write_text(f"porch {KEY}\nshed {KEY[::-1]}\n", "utf-8")
    with house("lonely", preset="slm-only", **{"api.keys": keys, "api.rate": 8}) as built:
        yield built
        gc.collect()


def post(url: str, path: str = CHAT, **body: Any) -> httpx.Response:
    given = {"model": "fedhlm", **({"messages": MESSAGES} if "chat" in path else {"prompt": PROMPT}), **body}
    return httpx.post(url + path, json=given, timeout=PATIENCE_S)


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.02)


# Home Assistant


def test_home_assistant_lists_pulls_and_chats(doors: House) -> None:
    async def talk() -> tuple[str, Any]:
        client = ollama.AsyncClient(host=doors.urls["agent"], timeout=PATIENCE_S)
        names = [model.model for model in (await client.list()).models]
        assert names[:2] == ["fedhlm:latest", "fedhlm:budget"]
        assert (await client.pull("fedhlm:latest")).status == "success"
        stream = await client.chat(
            model="fedhlm:latest",
            messages=[ollama.Message(role="system", content="News."), ollama.Message(role="user", content=PROMPT)],
            tools=None,
            stream=True,
            keep_alive="-1s",
            options={"num_ctx": 64},
            think=False,
            format=None,
        )
        parts = [part async for part in stream]
        return "".join(part.message.content or "" for part in parts), parts[-1]

    text, last = asyncio.run(talk())
    assert text
    assert last.done
    assert 0 < last.prompt_eval_count + last.eval_count <= 64


@pytest.mark.parametrize(
    "more",
    [
        {"keep_alive": 5, "options": {"mirostat": 1}},
        {"think": True},
        {"options": {"repeat_penalty": 1.1}},
    ],
)
def test_home_assistant_is_told_what_is_missing(doors: House, more: dict[str, Any]) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        ollama.Client(doors.urls["agent"]).chat(model="fedhlm", messages=MESSAGES, **more)
    assert caught.value.status_code == 400
    assert "is not supported" in caught.value.error


def test_ollama_says_what_is_there(doors: House) -> None:
    client = ollama.Client(doors.urls["agent"])
    shown = client.show("fedhlm:exact")
    assert shown.template is not None
    assert "message" in shown.template
    assert shown.modelinfo is not None
    assert shown.modelinfo["LlamaForCausalLM.context_length"] == 512
    assert [model.model for model in client.ps().models] == ["fedhlm:latest"]
    assert httpx.get(doors.urls["agent"] + "/api/version").json()["version"]
    assert client.generate(model="fedhlm").done_reason == "load"
    with pytest.raises(ollama.ResponseError) as caught:
        client.pull("llama3")
    assert caught.value.status_code == 404


# Choices, ends, probabilities


def test_choices_differ_and_come_interleaved(doors: House) -> None:
    with openai.OpenAI(base_url=doors.urls["agent"] + "/v1", api_key=KEY) as client:
        whole = client.chat.completions.create(model="fedhlm:exact", messages=MESSAGES, n=3, seed=SEED, max_tokens=8)
        again = client.chat.completions.create(
            model="fedhlm:exact", messages=MESSAGES, n=3, seed=SEED, max_tokens=8, stream=True
        )
        texts = ["", "", ""]
        roles = []
        for chunk in again:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                roles += [choice.index] if choice.delta.role else []
    assert roles == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in whole.choices]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    alone = post(doors.urls["agent"], model="fedhlm:exact", seed=SEED + 2, max_tokens=8).json()
    assert texts[2] == alone["choices"][0]["message"]["content"]


def test_a_stop_string_ends_the_text(doors: House) -> None:
    text = post(doors.urls["agent"], model="fedhlm:exact", seed=SEED, max_tokens=12).json()["choices"][0]["message"][
        "content"
    ]
    word = text.split()[2]
    for url, model in ((doors.urls["agent"], "fedhlm:exact"), (doors.urls["cloud"], "fedhlm-news-llm")):
        choice = post(url, model=model, seed=SEED, max_tokens=12, stop=[word]).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == text[: text.index(word)]


def test_probabilities_are_the_cloud_s(doors: House) -> None:
    url, model = doors.urls["cloud"], "fedhlm-news-llm"
    greedy: dict[str, Any] = {"model": model, "max_tokens": 5, "temperature": 1.0, "top_k": 1}
    chat = post(url, logprobs=True, top_logprobs=2, **greedy).json()["choices"][0]
    content = chat["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == chat["message"]["content"]
    assert all(entry["logprob"] == 0.0 and len(entry["top_logprobs"]) == 2 for entry in content)
    assert [bytes(entry["bytes"]).decode() for entry in content] == [entry["token"] for entry in content]
    drawn = post(url, "/v1/completions", model=model, max_tokens=5, seed=SEED, logprobs=3).json()["choices"][0]
    found = drawn["logprobs"]
    assert "".join(found["tokens"]) == drawn["text"]
    assert found["text_offset"][1] == len(found["tokens"][0])
    assert all(
        -20 < logprob <= max(top.values()) + 1e-9
        for logprob, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True)
    )
    assert post(doors.urls["agent"], logprobs=True).json()["error"]["param"] == "logprobs"


# Where tokens come from


def test_every_chunk_tells_who_decided_its_tokens(doors: House) -> None:
    answer = post(doors.urls["agent"], model="fedhlm:exact", seed=SEED, max_tokens=40).json()
    tokens = answer["choices"][0]["fedhlm"]["tokens"]
    assert len(tokens) == answer["usage"]["completion_tokens"] == 40
    assert {(token["source"], token["verified"]) for token in tokens} == {("cloud", True)}
    replaced = [token for token in tokens if token["draft"] is not None]
    assert replaced
    assert all(token["draft"] != token["id"] and 0.0 <= token["doubt"] <= 1.0 for token in replaced)
    found = answer["metrics"]["speculative_decoding"]
    histogram = found["acceptance_histogram"]
    assert sum(histogram) == found["num_spec_steps"] > 0
    assert sum(j * count for j, count in enumerate(histogram)) == found["num_accepted_draft_tokens"]
    assert found["num_accepted_draft_tokens"] <= found["num_draft_tokens"]
    assert found["draft_acceptance_rate"] == found["num_accepted_draft_tokens"] / found["num_draft_tokens"]
    ours = answer["metrics"]["fedhlm"]
    assert ours["tokens"] == {"cloud": 40}
    assert ours["rollbacks"] >= len(replaced)
    assert ours["uplink_bytes"] > 0
    assert ours["round_trips"] >= found["num_spec_steps"]
    kept = post(doors.urls["agent"], model="fedhlm:slm-only", max_tokens=4).json()["choices"][0]["fedhlm"]["tokens"]
    assert {(token["source"], token["verified"], token["draft"]) for token in kept} == {("local", False, None)}


def test_budget_tells_its_certificate(doors: House) -> None:
    ours = post(doors.urls["agent"], model="fedhlm:budget", max_tokens=8).json()["metrics"]["fedhlm"]
    assert 0.0 <= ours["r_hat"] <= ours["r_hat_limit"] <= 1.0
    assert ours["certificate"]["texts"] >= 1


# Closed connections


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_cancels_the_text_and_its_session(doors: House, stream: bool) -> None:
    agent, cloud = doors.counters["agent"], doors.counters["cloud"]
    before = agent.by_label("generations").get("cancelled", 0)
    body = {"model": "fedhlm:exact", "messages": MESSAGES, "seed": SEED, "stream": stream}
    close_midway(doors.urls["agent"] + CHAT, body, began=lambda: cloud["escalations"])
    until(lambda: agent.by_label("generations").get("cancelled", 0) == before + 1)
    time.sleep(0.3)  # what was under way comes to its end
    heard, batches = cloud["escalations"], cloud["batches"]
    time.sleep(0.5)
    assert (cloud["escalations"], cloud["batches"]) == (heard, batches)
    assert post(doors.urls["agent"], model="fedhlm:exact", max_tokens=2).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_ends_the_cloud_s_own_text(doors: House, stream: bool) -> None:
    cloud = doors.counters["cloud"]
    body = {"model": "fedhlm-news-llm", "messages": MESSAGES, "seed": SEED, "stream": stream}
    close_midway(doors.urls["cloud"] + CHAT, body, began=lambda: cloud["batches"])
    time.sleep(0.3)
    batches = cloud["batches"]
    time.sleep(0.5)
    assert cloud["batches"] == batches


def close_midway(url: str, body: dict[str, Any], *, began: Callable[[], int]) -> None:
    """Ask, and close the connection when the answer has begun."""
    before = began()

    async def ask() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            asking = asyncio.create_task(read(client))
            while began() <= before + 1:
                await asyncio.sleep(0.005)
                assert not asking.done()
            asking.cancel()
            await asyncio.wait([asking])

    async def read(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", url, json=body) as response:
            async for _ in response.aiter_bytes():
                pass

    asyncio.run(ask())


# Who is let in


def test_a_key_is_needed_and_names_a_client(guarded: House) -> None:
    url = guarded.urls["lonely"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    for path in ("/v1/models", "/api/tags", "/api/version", "/api/ps"):
        assert httpx.get(url + path).status_code == 401
        assert httpx.get(url + path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert httpx.post(url + CHAT, json={}).headers["WWW-Authenticate"] == "Bearer"


def test_a_client_above_its_rate_is_told_when_to_come_again(guarded: House) -> None:
    url = guarded.urls["lonely"]

    def ask(key: str) -> httpx.Response:
        body = {"model": "fedhlm", "prompt": PROMPT, "max_tokens": 1}
        return httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})

    assert [ask(KEY).status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(KEY)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["Retry-After"]) <= 8
    assert ask(KEY[::-1]).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}, {"Host": "1.2.3"}]
)
def test_pages_of_other_sites_are_not_let_in(doors: House, headers: dict[str, str]) -> None:
    url = doors.urls["agent"]
    assert httpx.post(url + CHAT, json={"model": "fedhlm"}, headers=headers).status_code == 403
    assert httpx.get(url + "/v1/models", headers={"Origin": url}).status_code == 200


# Errors


def test_errors_have_the_form_of_their_api(doors: House) -> None:
    url = doors.urls["agent"]
    for path, inner in (("/v1/nothing", dict), ("/api/nothing", str), (CHAT, dict), ("/api/chat", str)):
        answer = httpx.get(url + path)
        assert answer.status_code == (405 if "chat" in path else 404)
        assert isinstance(answer.json()["error"], inner)
    large = httpx.post(url + CHAT, content=b" " * (5 * 1024 * 1024))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4o")
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="fedhlm", messages=MESSAGES, presence_penalty=0.5)
        assert (caught.value.param, caught.value.code) == ("presence_penalty", "unsupported_parameter")


# Many


def resident_kb() -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def test_two_hundred_clients_are_answered_or_refused(doors: House) -> None:
    url = doors.urls["agent"]

    async def one(client: httpx.AsyncClient, number: int) -> int:
        body = {"model": "fedhlm:slm-only", "prompt": f"{PROMPT} {number}", "max_tokens": 2, "stream": number % 2 == 0}
        answer = await client.post(f"{url}/v1/completions", json=body)
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        elif number % 2 == 0:
            assert answer.text.endswith("data: [DONE]\n\n")
        else:
            assert json.loads(answer.text)["usage"]["completion_tokens"] == 2
        return answer.status_code

    async def all_of_them() -> list[int]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits) as client:
            return await asyncio.gather(*(one(client, number) for number in range(CLIENTS)))

    held = []
    for _ in range(3):
        statuses = asyncio.run(all_of_them())
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 192  # the places of one client in the queue
        gc.collect()
        held.append(resident_kb())
    assert held[-1] - held[0] < RISE_KB, held
