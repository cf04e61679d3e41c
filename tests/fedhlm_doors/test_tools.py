"""Forms of answers and calls of tools: from requests to grammars, and from texts back to calls."""

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import httpx
import jsonschema
import numpy as np
import ollama
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fedhlm.answering import Slice, ToolCall
from fedhlm.decoding.grammar import COMPILED_MAX, POSSIBLE, Constraint, Grammars
from fedhlm.protocol.messages import Grammar
from fedhlm_doors.formats import ollama_grammar, response_grammar
from fedhlm_doors.refusals import ApiError
from fedhlm_doors.tools import CLOSE, OPEN, CallReader, wanted, with_calls
from fedhlm_zoo.shipped import ARTEFACTS
from tests.fedhlm_doors.house import PROMPT, House, house

ROOM = {
    "type": "object",
    "properties": {"room": {"enum": ["kitchen", "hall"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "light", "description": "Switch a light.", "parameters": ROOM}},
    {"type": "function", "function": {"name": "now"}},
]
ON = '{"name": "light", "arguments": {"room": "hall", "on": true}}'
CALLED = f"{OPEN}{ON}{CLOSE}"
NOW = OPEN + '{"name": "now", "arguments": {}}' + CLOSE
ONE: Any = {"type": "function", "function": {"name": "light"}}
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ARTEFACTS / "llm" / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.get_vocab_size(), {0})


def admits(held: Constraint, tokenizer: Tokenizer, text: str, *, whole: bool = True) -> bool:
    """Whether a text, token by token, is one of the grammar (or the beginning of one)."""
    ids = tokenizer.encode(text).ids
    for i, token in enumerate([*ids, *([0] if whole else [])]):
        if held.masked(np.zeros(4_096, np.float32), ids[:i])[token] != 0.0:
            return False
    return True


@pytest.mark.parametrize(
    ("choice", "parallel", "yes", "no"),
    [
        (None, True, ["Hello <b>", CALLED, f"Sure.\n{CALLED}\n{NOW}\nDone.", ""], [f"{OPEN}{{}}{CLOSE}"]),
        ("auto", False, ["Hello", CALLED, f"Sure: {NOW}"], [f"{CALLED}\n{NOW}"]),
        ("required", True, [CALLED, f"{CALLED}\n{NOW}"], ["Hello", f"Sure: {CALLED}"]),
        ("required", False, [CALLED, NOW], [f"{CALLED}\n{NOW}"]),
        (ONE, True, [CALLED], [NOW, f"{CALLED}\n{CALLED}", "Hello"]),
    ],
)
def test_the_grammar_of_calls(
    grammars: Grammars, tokenizer: Tokenizer, choice: Any, parallel: bool, yes: list[str], no: list[str]
) -> None:
    source = wanted(TOOLS, choice, parallel=parallel).grammar
    assert source is not None
    for text in yes:
        assert admits(grammars.constrain(Grammar(0, source)), tokenizer, text), text
    for text in no:
        assert not admits(grammars.constrain(Grammar(0, source)), tokenizer, text), text


def test_with_a_format_an_answer_is_calls_or_of_that_format(grammars: Grammars, tokenizer: Tokenizer) -> None:
    source = wanted(TOOLS, otherwise=ollama_grammar(ROOM)).grammar
    assert source is not None
    for text, right in ((CALLED, True), ('{"room": "hall", "on": true}', True), ("Hello", False)):
        assert admits(grammars.constrain(Grammar(0, source)), tokenizer, text) is right
    assert wanted(TOOLS, "none") == ([], None)
    assert wanted([], None, otherwise="start: /a/").grammar == "start: /a/"


@pytest.mark.parametrize(
    ("form", "yes", "no"),
    [
        ({"response_format": {"type": "json_object"}}, ['{"a": [1, "b"]}', "{}"], ["[]", "a"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ROOM, "strict": True}}}, ['{"room": "hall", "on": false}'], ["{}"]),
        ({"structured_outputs": {"regex": r"\d+/\d+\n"}}, ["12/5\n"], ["12", "/"]),
        ({"structured_outputs": {"choice": ["yes", "no", 'a "b" / c\n']}}, ["yes", 'a "b" / c\n'], ["maybe", "y"]),
        ({"structured_outputs": {"json": ROOM}}, ['{"room": "kitchen", "on": true}'], ['{"room": "shed", "on": true}']),
        ({"structured_outputs": {"grammar": 'start: "a"+ "b"'}}, ["aab"], ["b"]),
    ],
)  # fmt: skip
def test_the_grammar_of_a_format(
    grammars: Grammars, tokenizer: Tokenizer, form: dict[str, Any], yes: list[str], no: list[str]
) -> None:
    source = response_grammar(form)
    assert source is not None
    for text in yes:
        assert admits(grammars.constrain(Grammar(0, source)), tokenizer, text), text
    for text in no:
        assert not admits(grammars.constrain(Grammar(0, source)), tokenizer, text), text


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)  # fmt: skip
def test_a_wrong_format_is_rejected_by_name(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        response_grammar(given)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([{"type": "function"}], None, "tools[0].function"),
        ([{"type": "web", "function": {"name": "a"}}], None, "tools[0].type"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "tools[0].function.name"),
        ([*TOOLS, TOOLS[0]], None, "tools"),
        (TOOLS, "sometimes", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "door"}}, "tool_choice"),
        ([], "required", "tool_choice"),
    ],
)
def test_a_wrong_tool_is_rejected_by_name(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        wanted(tools, choice)
    assert caught.value.param == param


PARTS = st.lists(st.sampled_from(["Hi ", "<", "<tool", "<tool_call>", "\n", CALLED, NOW, "a < b"]), max_size=8)


@given(parts=PARTS, cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_calls_are_found_however_the_text_was_cut(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    whole = CallReader().push(text, last=True)
    calls: list[ToolCall] = []
    reader, shown, at, turn = CallReader(), "", 0, 0
    while at < len(text):
        size = cuts[turn % len(cuts)]
        new, found = reader.push(text[at : at + size])
        shown, calls, at, turn = shown + new, calls + found, at + size, turn + 1
    new, found = reader.push("", last=True)
    assert calls + found == whole[1]
    assert (shown + new).replace("\n", "") == whole[0].replace("\n", "")
    assert len(whole[1]) == sum(part in (CALLED, NOW) for part in parts)
    assert CLOSE not in whole[0]


def test_a_text_without_calls_is_shown_as_it_is() -> None:
    assert CallReader().push("a <tool b\n", last=True) == ("a <tool b\n", [])
    assert CallReader().push(f"Sure.\n{CALLED}", last=True) == (
        "Sure.",
        [ToolCall("light", '{"room": "hall", "on": true}')],
    )


async def test_closing_early_closes_the_answer() -> None:
    closed = []

    async def answer() -> Any:
        try:
            while True:
                yield Slice(CALLED)
        finally:
            closed.append(True)

    async with aclosing(with_calls(answer())) as pieces:
        assert (await anext(pieces)).calls
    assert closed


# On running parts


@pytest.fixture(scope="module")
def doors() -> Iterator[House]:
    with house("edge", "cloud", "agent") as built:
        yield built
        gc.collect()


@pytest.mark.slow
def test_answers_have_their_form_and_calls_are_the_llm_s_own(doors: House) -> None:
    """At a cloud and through an agent, with the OpenAI SDK, streaming and not, and with Ollama's."""
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": ROOM}}
    texts, calls = set(), set()
    for part, model in (("cloud", "fedhlm-news-llm"), ("agent", "fedhlm:exact"), ("agent", "fedhlm:budget")):
        with openai.OpenAI(base_url=f"{doors.urls[part]}/v1", api_key="none") as client:
            asked: Any = {"model": model, "messages": MESSAGES, "seed": 5, "temperature": 0.8, "max_tokens": 100}
            told = client.chat.completions.create(**asked, response_format=schema)
            text = told.choices[0].message.content or ""
            jsonschema.validate(json.loads(text), ROOM)
            choice = client.chat.completions.create(**asked, tools=TOOLS, tool_choice=ONE).choices[0]
            (call,) = choice.message.tool_calls or []
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            jsonschema.validate(json.loads(call.function.arguments), ROOM)
            stream = client.chat.completions.create(**asked, tools=TOOLS, tool_choice=ONE, stream=True)
            chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
            (streamed,) = [c for chunk in chunks for c in chunk.delta.tool_calls or []]
            assert streamed.function is not None
            assert streamed.function.arguments == call.function.arguments
            assert not any(chunk.delta.content for chunk in chunks)
            assert chunks[-1].finish_reason == "tool_calls"
            if model != "fedhlm:budget":
                texts.add(text)
                calls.add(call.function.arguments)
            tokens = choice.model_extra["fedhlm"]["tokens"] if choice.model_extra else []
            assert all(token["verified"] for token in tokens), "calls are verified before they are shown"
            with pytest.raises(openai.BadRequestError, match="grammar must be one that llguidance reads"):
                client.chat.completions.create(**asked, extra_body={"structured_outputs": {"regex": "("}})
    assert (len(texts), len(calls)) == (1, 1)
    home = ollama.Client(doors.urls["agent"])
    said = home.chat("fedhlm", MESSAGES, tools=TOOLS, format=ROOM, options={"num_predict": 100, "seed": 1})
    if said.message.tool_calls:
        assert said.message.tool_calls[0].function.name in ("light", "now")
    else:
        jsonschema.validate(json.loads(said.message.content or ""), ROOM)
    talk = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]},
        {"role": "tool", "tool_name": "now", "content": "noon"},
    ]
    assert home.chat("fedhlm", talk, tools=TOOLS, options={"num_predict": 4}).message.content is not None


async def test_a_slow_grammar_holds_up_no_other_request(doors: House, monkeypatch: pytest.MonkeyPatch) -> None:
    release, begun, compile_now = threading.Event(), threading.Event(), Grammars._compile

    def slow(self: Grammars, source: str) -> Any:
        if "slow" in source:
            begun.set()
            assert release.wait(60)
        return compile_now(self, source)

    monkeypatch.setattr(Grammars, "_compile", slow)
    asked = {"model": "fedhlm:slm-only", "prompt": PROMPT, "max_tokens": 4}
    held = asked | {"structured_outputs": {"choice": [" slow"]}}
    async with httpx.AsyncClient(base_url=doors.urls["agent"], timeout=60) as client:
        waiting = asyncio.create_task(client.post("/v1/completions", json=held))
        await asyncio.to_thread(begun.wait, 60)
        try:
            assert (await client.post("/v1/completions", json=asked)).status_code == 200
            assert not waiting.done()
        finally:
            release.set()
        assert (await waiting).json()["choices"][0]["text"] == " slow"


def test_a_grammar_is_compiled_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = list[str]()
    compile_now = grammars._compile

    def noted(source: str) -> Any:
        sources.append(source)
        return compile_now(source)

    monkeypatch.setattr(grammars, "_compile", noted)
    first, second = (grammars.constrain(Grammar(0, 'start: "ab" | "ac"')) for _ in range(2))
    assert sources == ['start: "ab" | "ac"']
    blank = np.zeros(4_096, np.float32)
    for held in (first, second):  # each begins anew
        assert (held.masked(blank, []) > POSSIBLE).any()
    for number in range(COMPILED_MAX):
        grammars.constrain(Grammar(0, f'start: "x{number}"'))
    grammars.constrain(Grammar(0, 'start: "ab" | "ac"'))
    assert sources.count('start: "ab" | "ac"') == 2
