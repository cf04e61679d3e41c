"""The requests of OpenAI's API: tables of parameters, and their translation into questions. No I/O."""

from typing import Annotated, Any, Final, NamedTuple

from msgspec import Meta

from fedhlm.answering import Offer, Question
from fedhlm_doors.chat import ChatTemplate, begun, text_ids
from fedhlm_doors.formats import response_grammar
from fedhlm_doors.parameters import Table, checked, convert, idle, must_be_off, read, used
from fedhlm_doors.questions import (
    CHOICES_MAX,
    Count,
    MinP,
    SeedNumber,
    Stops,
    Temperature,
    TopK,
    TopP,
    known_ids,
    no_probabilities,
    question,
)
from fedhlm_doors.refusals import ApiError, unsupported
from fedhlm_doors.tools import Tools, earlier_calls, wanted

COMPLETION_TOKENS: Final = 16  # OpenAI's default where a completion names no limit
MESSAGES_MAX: Final = 4_096
TOP_MAX: Final = 20
Id = Annotated[int, Meta(ge=0, lt=2**24)]
Choices = Annotated[int, Meta(ge=1, le=CHOICES_MAX)]
_TOOLS: Final = "functions were replaced by tools"
_SCORES: Final = "the noise of both models is drawn for unchanged logits"

STREAM_OPTIONS: Final[Table] = {
    "include_usage": used(bool, "A last chunk with empty `choices` carries the usage."),
    "include_obfuscation": idle(bool, "Chunks are never padded."),
}

COMMON: Final[Table] = {
    "model": used(str, "`fedhlm`, or `fedhlm:PRESET` for a preset that the agent allows.", required=True),
    "stream": used(bool, "Whether the answer comes in chunks, as server-sent events."),
    "stream_options": used(dict[str, Any], "`include_usage`, together with `stream`."),
    "temperature": used(Temperature, "0 to 10; 0 takes the most probable token. Default: the part's own."),
    "top_p": used(TopP, "Above 0 and up to 1. Default: the part's own."),
    "top_k": used(TopK, "Only the k most probable tokens; 0 or -1: all. Default: the part's own."),
    "min_p": used(MinP, "Only tokens of this share of the largest probability; 0: all. Default: the part's own."),
    "n": used(Choices, f"1 to {CHOICES_MAX} choices, each a question of its own in the queue."),
    "stop": used(Stops, "One text or up to 16, which end the answer and are not part of it."),
    "seed": used(SeedNumber, "The same seed gives the same text. Choice i uses the seed plus i."),
    "user": idle(str, "The key names the client."),
    "metadata": idle(dict[str, Any], "Nothing is stored."),
    "presence_penalty": must_be_off(_SCORES, 0),
    "frequency_penalty": must_be_off(_SCORES, 0),
    "logit_bias": must_be_off(_SCORES, {}),
    "structured_outputs": used(dict[str, Any], "One of `json`, `regex`, `choice` and `grammar`, as at vLLM."),
}

CHAT: Final[Table] = COMMON | {
    "messages": used(
        Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MESSAGES_MAX)],
        "The conversation, written with the model's chat template.",
        required=True,
    ),
    "max_tokens": used(Count, "Most tokens of the answer. Default: up to the end of the context."),
    "max_completion_tokens": used(Count, "The same as `max_tokens`."),
    "logprobs": used(bool, "Log-probabilities of the tokens: at a cloud. A device does not know the LLM's."),
    "top_logprobs": used(Annotated[int, Meta(ge=0, le=TOP_MAX)], "With `logprobs`: 0 to 20 alternatives per token."),
    "store": idle(bool, "Nothing is stored."),
    "service_tier": idle(str, "There is one."),
    "safety_identifier": idle(str, "The key names the client."),
    "prompt_cache_key": idle(str, "Prefixes are always reused."),
    "prompt_cache_options": idle(dict[str, Any], "Prefixes are always reused."),
    "prompt_cache_retention": idle(str, "Prefixes are always reused."),
    "response_format": used(dict[str, Any], "text, json_object, or json_schema with a schema that the answer follows."),
    "tools": used(Tools, "Functions that the answer may call. Calls are valid under their schemas."),
    "tool_choice": used(str | dict[str, Any], "none, auto, required, or one function."),
    "parallel_tool_calls": used(bool, "Whether an answer may have several calls. Default: true."),
    "functions": must_be_off(_TOOLS, []),
    "function_call": must_be_off(_TOOLS, "none", "auto"),
    "modalities": must_be_off("the models know text only", ["text"]),
    "audio": must_be_off("the models know text only"),
    "prediction": must_be_off("the device drafts by itself"),
    "reasoning_effort": must_be_off("the models do not reason apart", "none"),
    "verbosity": must_be_off("the models have no such control", "medium"),
    "web_search_options": must_be_off("nothing is searched"),
    "moderation": must_be_off("nothing is moderated"),
}

COMPLETION: Final[Table] = COMMON | {
    "prompt": used(
        str | list[str | Id | list[Id]],
        "One text or token ids, or a list of up to 16 of them. Control tokens in a text stay text.",
        required=True,
    ),
    "max_tokens": used(Count, f"Most tokens of the answer. Default: {COMPLETION_TOKENS}."),
    "logprobs": used(Annotated[int, Meta(ge=0, le=TOP_MAX)], "Log-probabilities, with alternatives: at a cloud."),
    "best_of": must_be_off("every choice is returned", 1),
    "echo": must_be_off("the prompt is not returned", False),
    "suffix": must_be_off("the models do not fill in", ""),
}

MESSAGE: Final[Table] = {
    "role": used(str, "system, developer, user, assistant or tool.", required=True),
    "content": used(str | list[dict[str, Any]], "A text, or parts of the type text."),
    "name": idle(str, "Templates are given the role only."),
    "annotations": idle(list[Any], "What earlier answers carry."),
    "refusal": must_be_off("the models refuse nothing apart"),
    "audio": must_be_off("the models know text only"),
    "tool_calls": used(Tools, "The calls of an earlier answer."),
    "tool_call_id": idle(str, "The results of calls are in the order of the calls."),
    "function_call": must_be_off(_TOOLS),
}
ROLES: Final = ("system", "developer", "user", "assistant", "tool")


class ApiRequest(NamedTuple):
    """A request as questions, one for each choice.

    `model` is as the client named it. `chat` tells chat completions from completions. `logprobs` is how many
    alternatives of each token are wanted (None: no probabilities). `calls` says that the answers may call tools.
    """

    model: str
    chat: bool
    questions: list[Question]
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    calls: bool = False


def chat(body: bytes, offer: Offer, template: ChatTemplate | None, asker: str) -> ApiRequest:
    """Translate a chat completion.

    Raises:
        ApiError: the request cannot be obeyed.
    """
    given = read(body, CHAT)
    if template is None:
        raise ApiError(f"the model {offer.name} has no chat template: use /v1/completions", code="unsupported_value")
    limits = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(set(limits)) > 1:
        raise ApiError(
            "max_tokens must be left out where max_completion_tokens is given", param="max_tokens", code="invalid_value"
        )
    top = given.get("top_logprobs")
    if top is not None and not given.get("logprobs"):
        raise ApiError("top_logprobs needs logprobs", param="top_logprobs", code="invalid_value")
    logprobs = (top or 0) if given.get("logprobs") else None
    messages = [message(m, f"messages[{i}]") for i, m in enumerate(given["messages"])]
    tools = wanted(
        given.get("tools", ()),
        given.get("tool_choice"),
        parallel=given.get("parallel_tool_calls", True),
        otherwise=response_grammar(given),
    )
    ids = template.encode(messages, tools.for_template)
    limit = limits[0] if limits else None
    asked = _asked(given, offer, asker, [ids], logprobs, chat=True, max_tokens=limit, grammar=tools.grammar)
    return asked._replace(calls=bool(tools.for_template))


def completion(body: bytes, offer: Offer, asker: str) -> ApiRequest:
    """Translate a completion.

    Raises:
        ApiError: the request cannot be obeyed.
    """
    given = read(body, COMPLETION)
    prompt = given["prompt"]
    kinds = {type(one) for one in prompt} if isinstance(prompt, list) else {str}
    if len(kinds) > 1:
        raise ApiError("prompt must hold texts or token ids, not both", param="prompt", code="invalid_value")
    alone = isinstance(prompt, str) or kinds == {int}
    prompts = [_prompt_ids(offer, one) for one in ([prompt] if alone else prompt)]
    limit = given.get("max_tokens", COMPLETION_TOKENS)
    form = response_grammar(given)
    return _asked(given, offer, asker, prompts, given.get("logprobs"), chat=False, max_tokens=limit, grammar=form)


def message(given: dict[str, Any], param: str) -> dict[str, Any]:
    """Check one message of a conversation, and join its parts.

    Raises:
        ApiError: the message cannot be obeyed.
    """
    found = checked(given, MESSAGE, f"{param}.")
    if found["role"] not in ROLES:
        raise ApiError(
            f"{param}.role must be one of {', '.join(ROLES)} (got {found['role'][:64]!r})",
            param=f"{param}.role",
            code="invalid_value",
        )
    content = found.get("content", "")
    if isinstance(content, list):
        content = "".join(_part(part, f"{param}.content[{i}]") for i, part in enumerate(content))
    calls = earlier_calls(found.get("tool_calls", ()), f"{param}.tool_calls")
    return {"role": found["role"], "content": content} | ({"tool_calls": calls} if calls else {})


def _part(part: dict[str, Any], param: str) -> str:
    if part.get("type") != "text" or set(part) != {"type", "text"}:
        raise unsupported(param, "the models know parts of the type text only")
    text: str = convert(part["text"], str, f"{param}.text")
    return text


def _prompt_ids(offer: Offer, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return begun(offer, text_ids(offer, prompt, param="prompt"))
    return known_ids(prompt, offer, "prompt")


def _asked(
    given: dict[str, Any],
    offer: Offer,
    asker: str,
    prompts: list[tuple[int, ...]],
    logprobs: int | None,
    *,
    chat: bool,
    max_tokens: int | None,
    grammar: str | None = None,
) -> ApiRequest:
    if logprobs is not None and not offer.probabilities:
        raise no_probabilities("logprobs")
    stream, options = (
        given.get("stream", False),
        checked(given.get("stream_options", {}), STREAM_OPTIONS, "stream_options."),
    )
    if options and not stream:
        raise ApiError("stream_options needs stream", param="stream_options", code="invalid_value")
    count = given.get("n", 1)
    if not 1 <= len(prompts) * count <= CHOICES_MAX:
        raise ApiError(
            f"prompts times n must be from 1 to {CHOICES_MAX} (got {len(prompts)} times {count})",
            param="prompt" if len(prompts) != 1 else "n",
            code="invalid_value",
        )
    param = "messages" if chat else "prompt"
    questions = [
        question(
            offer, asker, ids, given, max_tokens=max_tokens, param=param, number=number, logprobs=logprobs, grammar=grammar
        )
        for ids in prompts
        for number in range(count)
    ]  # fmt: skip
    return ApiRequest(given["model"], chat, questions, stream, options.get("include_usage", False), logprobs)
