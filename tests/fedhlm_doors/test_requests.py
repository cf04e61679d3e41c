"""Requests before any model sees them: parameters, messages, templates, keys, rates."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from tokenizers import AddedToken, Tokenizer

from fedhlm.answering import Offer
from fedhlm.decoding.decoder import CHAT_TEMPLATE_FILE
from fedhlm.decoding.hub import TOKENIZER_CONFIG_FILE
from fedhlm.errors import ConfigError, ModelError
from fedhlm.marks import rewritten
from fedhlm.settings import Api
from fedhlm_doors import ollama, openai, tables
from fedhlm_doors.chat import ChatTemplate, text_ids
from fedhlm_doors.keys import ANYONE, ApiKeys, Rates
from fedhlm_doors.openapi import document
from fedhlm_doors.parameters import Table, checked
from fedhlm_doors.questions import check_grammars
from fedhlm_doors.refusals import ApiError
from fedhlm_doors.serving import address, door_of, listening
from fedhlm_zoo.shipped import ARTEFACTS

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def offer() -> Offer:
    """The shipped SLM, with two control tokens more."""
    tokenizer = Tokenizer.from_file(str(ARTEFACTS / "slm" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    return Offer("fedhlm", ARTEFACTS / "slm", tokenizer, 0, 512, presets=("budget", "exact"))


def body(**given: Any) -> bytes:
    return msgspec.json.encode(given)


def refused(call: Any, *given: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*given)
    return caught.value


# Parameters


@pytest.mark.parametrize(
    ("table", "given"),
    [
        (openai.CHAT, chat_create_params.CompletionCreateParamsBase),
        (openai.COMPLETION, completion_create_params.CompletionCreateParamsBase),
        (ollama.CHAT, "ChatRequest"),
        (ollama.GENERATE, "GenerateRequest"),
        (ollama.OPTIONS, "Options"),
    ],
)
def test_every_parameter_of_an_sdk_is_in_its_table(table: Any, given: Any) -> None:
    if isinstance(given, str):
        import ollama._types as types

        names = set(getattr(types, given).model_fields)
    else:
        names = set(given.__annotations__)
    assert len(names) > 5
    assert names <= set(table)


def test_the_page_has_the_tables_of_the_code() -> None:
    page = PAGE.read_text("utf-8")
    assert rewritten(page, tables.tables()) == page, "python -m fedhlm_doors.tables docs/api.md"
    assert "| `top_k` | used |" in page


def asked_for(given: bytes, offer: Offer) -> None:
    """Read a request and compile its grammar, as the doors do."""
    asked = openai.chat(given, offer, ChatTemplate.of(offer), "a")
    asyncio.run(check_grammars(offer, asked.questions))


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"unheard_of": 1}, "unheard_of", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"structured_outputs": {"regex": "("}}, "response_format", "invalid_grammar"),
        ({"structured_outputs": {"regex": "a" * 20_000}}, "response_format", "invalid_grammar"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "warm"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "7"}, "max_tokens", "invalid_value"),
        ({"seed": "7"}, "seed", "invalid_value"),
        ({"stream": "true"}, "stream", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"model": "gpt-4o"}, "model", "model_not_found"),
        ({"model": "fedhlm:../x"}, "model", "model_not_found"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "unsupported_parameter"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, "messages", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_rejected_by_name(offer: Offer, more: dict[str, Any], param: str, code: str) -> None:
    given = {"model": "fedhlm", "messages": [{"role": "user", "content": "Oil"}], **more}
    error = refused(asked_for, body(**given), offer)
    assert (error.param, error.code) == (param, code)
    assert error.status == (404 if code == "model_not_found" else 400)
    assert error.openai()["error"]["param"] == param


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"7", b'"x"', b"\xff\xfe", b'{"a": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_no_object_is_rejected(offer: Offer, broken: bytes) -> None:
    error = refused(openai.completion, broken, offer, "a")
    assert error.status == 400
    msgspec.json.encode(error.openai())


def test_what_switches_nothing_on_is_accepted(offer: Offer) -> None:
    off = {
        name: parameter.off[0] if parameter.off else None
        for name, parameter in openai.CHAT.items()
        if parameter.use == "must be off"
    }
    idle = {"user": "me", "metadata": {"a": "b"}, "store": False, "prompt_cache_key": "k"}
    given = {"model": "fedhlm:exact", "messages": [{"role": "user", "content": "Oil"}], **off, **idle, "seed": None}
    asked = openai.chat(body(**given), offer, ChatTemplate.of(offer), "a")
    (question,) = asked.questions
    assert (question.preset, question.asker, question.seed, question.max_tokens) == ("exact", "a", None, 65_536)


@pytest.mark.parametrize(
    "table", [openai.CHAT, openai.COMPLETION, ollama.OPTIONS], ids=["chat", "completion", "options"]
)
def test_true_is_not_one_and_false_is_not_zero(table: Table) -> None:
    twins = [(name, {0: False, 1: True}[value] if type(value) is int else int(value))
             for name, parameter in table.items() for value in parameter.off if isinstance(value, int)]  # fmt: skip
    assert twins
    for name, twin in twins:
        with pytest.raises(ApiError, match=name):
            checked({name: twin}, {name: table[name]})


def test_each_choice_has_a_seed_of_its_own(offer: Offer) -> None:
    asked = openai.completion(
        body(model="fedhlm", prompt=["Oil", "Gold"], n=2, seed=2**63 - 1, top_k=-1, stop="x"), offer, "a"
    )
    assert [q.seed for q in asked.questions] == [2**63 - 1, 0, 2**63 - 1, 0]
    assert [q.ids[1] for q in asked.questions][::2] == [text_ids(offer, t, param="")[0] for t in ("Oil", "Gold")]
    assert {(q.top_k, q.stop, q.max_tokens) for q in asked.questions} == {(0, ("x",), openai.COMPLETION_TOKENS)}


def test_prompts_may_be_ids_of_the_vocabulary(offer: Offer) -> None:
    assert [q.ids for q in openai.completion(body(model="fedhlm", prompt=[5, 6]), offer, "a").questions] == [(5, 6)]
    several = openai.completion(body(model="fedhlm", prompt=[[5, 6], [7]]), offer, "a")
    assert [q.ids for q in several.questions] == [(5, 6), (7,)]
    wrong: Any
    for wrong in ([5, 10**6], [], [[]], ["a", 5], {"a": 1}):
        assert refused(openai.completion, body(model="fedhlm", prompt=wrong), offer, "a").param == "prompt"


def test_num_ctx_bounds_prompt_and_answer_together(offer: Offer) -> None:
    template = ChatTemplate.of(offer)

    def tokens(**options: Any) -> int:
        given = body(model="fedhlm", messages=[{"role": "user", "content": "Oil"}], options=options)
        (question,) = ollama.chat(given, offer, template, "a").questions
        return question.max_tokens + len(question.ids)

    assert tokens() == tokens(num_ctx=8_192) == tokens(num_predict=-1) == 512
    assert tokens(num_ctx=20) == 20
    assert tokens(num_ctx=20, num_predict=2) < 20
    small = body(model="fedhlm", messages=[{"role": "user", "content": "Oil prices rise"}], options={"num_ctx": 2})
    assert "context of 2 tokens" in refused(ollama.chat, small, offer, template, "a").message


def test_the_document_describes_every_table(offer: Offer) -> None:
    found = document(offer)
    json.dumps(found)
    schema = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(openai.CHAT)
    assert schema["required"] == ["model", "messages"]
    assert set(schema["properties"]["messages"]["items"]["properties"]) == set(openai.MESSAGE)
    schema = found["paths"]["/api/chat"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    messages, options = schema["properties"]["messages"], schema["properties"]["options"]
    assert (messages["type"], options["type"]) == (["array", "null"], ["object", "null"])
    assert set(messages["items"]["properties"]) == set(ollama.MESSAGE)
    assert set(options["properties"]) == set(ollama.OPTIONS)


# Templates


def template(offer: Offer, folder: Path, source: str, **config: Any) -> ChatTemplate:
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps({"chat_template": source, **config}), "utf-8")
    found = ChatTemplate.of(offer._replace(folder=folder))
    assert found is not None
    return found


def test_turns_joined_by_their_ids_are_the_conversation(offer: Offer, tmp_path: Path) -> None:
    chatml = template(offer, tmp_path, CHATML)
    opening, answer, question = chatml.turns()
    said = [text_ids(offer, text, param="messages") for text in ("Hello there", "Yes", "And then?")]
    talk = [
        {"role": role, "content": c}
        for role, c in zip(("user", "assistant", "user"), ("Hello there", "Yes", "And then?"), strict=True)
    ]
    joined = (*opening, *said[0], *answer, *said[1], *question, *said[2], *answer)
    assert chatml.encode(talk) == joined
    names = offer.tokenizer.decode(list(answer), skip_special_tokens=False)
    assert names == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "source", ["{{ messages[-1].content }}", "{{ messages[0].content | upper }}x", "{{ nothing.here }}"]
)
def test_a_template_that_drops_or_changes_turns_has_none(offer: Offer, tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        template(offer, tmp_path, source).turns()


def test_control_tokens_of_the_template_are_ids(offer: Offer, tmp_path: Path) -> None:
    chat = template(offer, tmp_path, CHATML)
    start, end = (offer.tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    ids = chat.encode([{"role": "user", "content": " Oil "}])
    plain = [text_ids(offer, text, param="") for text in ("user\nOil", "\n", "assistant\n")]
    assert ids == (0, start, *plain[0], end, *plain[1], start, *plain[2])


@pytest.mark.parametrize("name", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_names_of_control_tokens_in_a_message_stay_text(offer: Offer, tmp_path: Path, name: str) -> None:
    chat = template(offer, tmp_path, CHATML)
    told = f"Oil {name}\ue000 rises"
    ids = chat.encode([{"role": "user", "content": told}])
    harmless = chat.encode([{"role": "user", "content": "Oil"}])
    control = set(chat._control.values())
    assert [i for i in ids[1:] if i in control] == [i for i in harmless[1:] if i in control]
    assert told in offer.tokenizer.decode(list(ids), skip_special_tokens=False)


def test_templates_come_from_both_files_and_know_their_tokens(offer: Offer, tmp_path: Path) -> None:
    assert ChatTemplate.of(offer._replace(folder=tmp_path)) is None
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}y"}]
    chat = template(offer, tmp_path, named, bos_token={"content": "<|endoftext|>"})  # type: ignore[arg-type]
    assert chat.render([]) == "<|endoftext|>y"
    assert chat.encode([])[0] == 0  # and not twice
    assert chat.encode([])[1] != 0
    (tmp_path / CHAT_TEMPLATE_FILE).write_text("z", "utf-8")
    assert ChatTemplate.of(offer._replace(folder=tmp_path)).source == "z"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[7]['content'] }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_that_rejects_or_escapes_is_an_error_of_the_request(
    offer: Offer, tmp_path: Path, source: str
) -> None:
    error = refused(template(offer, tmp_path, source).encode, [{"role": "user", "content": "x"}])
    assert (error.status, error.param) == (400, "messages")


@pytest.mark.parametrize("broken", ["{% if %}", "{{"])
def test_a_broken_template_is_an_error_of_the_folder(offer: Offer, tmp_path: Path, broken: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        template(offer, tmp_path, broken)
    (tmp_path / TOKENIZER_CONFIG_FILE).write_text("{", "utf-8")
    with pytest.raises(ModelError, match=TOKENIZER_CONFIG_FILE):
        ChatTemplate.of(offer._replace(folder=tmp_path))


def test_without_a_template_there_is_no_chat(offer: Offer) -> None:
    given = body(model="fedhlm", messages=[{"role": "user", "content": "Oil"}])
    assert "chat template" in refused(openai.chat, given, offer, None, "a").message
    assert "does not support chat" in refused(ollama.chat, given, offer, None, "a").message
    (question,) = ollama.generate(body(model="fedhlm", prompt="Oil"), offer, None, "a").questions
    assert question.ids == (0, *text_ids(offer, "Oil", param=""))


# Keys


def keys_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_text(text, "utf-8")
    path.chmod(mode)
    return str(path)


def test_a_key_names_its_client(tmp_path: Path) -> None:
    keys = ApiKeys.of(keys_file(tmp_path, "# ours\nporch 0123456789abcdef\n\nshed\tfedcba9876543210\n"))
    assert keys.client("Bearer 0123456789abcdef") == "porch"
    assert keys.client("bearer  fedcba9876543210") == "shed"
    for wrong in ("", "Bearer", "Bearer 0123456789abcdeg", "Basic 0123456789abcdef", "0123456789abcdef", "Bearer é"):
        error = refused(keys.client, wrong)
        assert (error.status, error.code) == (401, "invalid_api_key")
    assert ApiKeys.of("").client("Bearer whatever") == ANYONE


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("porch 0123456789abcdef\n", 0o640, "only its owner"),
        ("porch 0123456789abcdef\n", 0o604, "only its owner"),
        ("porch short\n", 0o600, "line 1"),
        ("# x\n/porch 0123456789abcdef\n", 0o600, "line 2"),
        ("# nothing\n", 0o600, "at least one key"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_is_rejected(tmp_path: Path, text: str, mode: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ApiKeys.of(keys_file(tmp_path, text, mode))
    with pytest.raises(ConfigError, match=r"api\.keys"):
        ApiKeys.of(str(tmp_path / "nowhere"))


def test_a_rate_lets_a_burst_through_and_then_its_share() -> None:
    now = [0.0]
    rates = Rates(60.0, lambda: now[0])
    for _ in range(15):
        rates.spend("porch")
    error = refused(rates.spend, "porch")
    assert (error.status, error.retry_s, error.headers) == (429, 1, {"Retry-After": "1"})
    rates.spend("shed")
    now[0] += 1.0
    rates.spend("porch")
    assert refused(rates.spend, "porch").status == 429
    unlimited = Rates(0.0, lambda: now[0])
    for _ in range(1_000):
        unlimited.spend("porch")


@pytest.mark.parametrize(
    ("listen", "found"),
    [("127.0.0.1:11434", ("127.0.0.1", 11_434)), ("[::1]:0", ("::1", 0)), ("localhost:80", ("localhost", 80))],
)
def test_an_address_has_host_and_port(listen: str, found: tuple[str, int]) -> None:
    assert address(listen) == found


@pytest.mark.parametrize("listen", ["", "127.0.0.1", ":80", "a:b", "127.0.0.1:99999", "::1:80", "a b:80"])
def test_what_is_no_address_is_rejected(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"api\.listen must be HOST:PORT"):
        address(listen)


def test_no_chunk_waits_for_the_acknowledgement_of_another() -> None:
    with listening("", "127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        port = listener.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=r"api\.listen must be an address that is free"),
            listening("", "127.0.0.1", port),
        ):
            pass


@pytest.mark.parametrize("listen", ["0.0.0.0:80", "192.168.1.4:80", "porch.example:80", "[::]:80"])
def test_an_address_that_others_reach_needs_keys(listen: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a loopback address unless"):
        door_of(Api(listen=listen))
    door_of(Api(listen=listen, keys=keys_file(tmp_path, "porch 0123456789abcdef")))
