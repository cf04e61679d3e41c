"""The requests of Ollama's API: tables of parameters, and their translation into questions. No I/O."""

from typing import Annotated, Any, Final

from msgspec import Meta

from fedhlm.answering import Offer
from fedhlm_doors.chat import ChatTemplate, begun, text_ids
from fedhlm_doors.formats import ollama_grammar
from fedhlm_doors.openai import MESSAGES_MAX, ROLES, TOP_MAX, ApiRequest
from fedhlm_doors.parameters import Table, checked, idle, must_be_off, read, used
from fedhlm_doors.questions import MinP, SeedNumber, Stops, Temperature, TopK, TopP, no_probabilities, question
from fedhlm_doors.refusals import ApiError
from fedhlm_doors.tools import Tools, earlier_calls, wanted

_SCORES: Final = "the noise of both models is drawn for unchanged logits"
_MACHINE: Final = "The part's own configuration says how it runs."

OPTIONS: Final[Table] = {
    "num_ctx": used(
        Annotated[int, Meta(ge=1)], "Most tokens of prompt and answer together, up to the model's context."
    ),
    "num_predict": used(
        Annotated[int, Meta(ge=-2)], "Most tokens of the answer; -1, -2 or 0: up to the end of the context."
    ),
    "temperature": used(Temperature, "0 to 10; 0 takes the most probable token. Default: the part's own."),
    "top_p": used(TopP, "Above 0 and up to 1. Default: the part's own."),
    "top_k": used(TopK, "Only the k most probable tokens; 0 or -1: all. Default: the part's own."),
    "min_p": used(MinP, "Only tokens of this share of the largest probability; 0: all. Default: the part's own."),
    "seed": used(SeedNumber, "The same seed gives the same text."),
    "stop": used(Stops, "Texts that end the answer and are not part of it."),
    **{
        name: idle(Any, _MACHINE)
        for name in (
            "numa",
            "num_batch",
            "num_gpu",
            "main_gpu",
            "low_vram",
            "f16_kv",
            "logits_all",
            "vocab_only",
            "use_mmap",
            "use_mlock",
            "embedding_only",
            "num_thread",
            "num_keep",
        )
    },
    "tfs_z": must_be_off("the sampler has no such filter", 1),
    "typical_p": must_be_off("the sampler has no such filter", 1),
    "repeat_last_n": must_be_off(_SCORES, 0),
    "repeat_penalty": must_be_off(_SCORES, 1),
    "presence_penalty": must_be_off(_SCORES, 0),
    "frequency_penalty": must_be_off(_SCORES, 0),
    "penalize_newline": must_be_off(_SCORES, False),
    "mirostat": must_be_off("the sampler has no such mode", 0),
    "mirostat_eta": must_be_off("the sampler has no such mode"),
    "mirostat_tau": must_be_off("the sampler has no such mode"),
}

_MODEL: Final = used(str, "`fedhlm`, or `fedhlm:PRESET` for a preset that the agent allows.", required=True)
COMMON: Final[Table] = {
    "model": _MODEL,
    "stream": used(bool, "Whether the answer comes in lines of JSON. Default: true."),
    "options": used(dict[str, Any], "See the table of options."),
    "keep_alive": idle(float | str, "The model stays loaded as long as the part runs."),
    "format": used(str | dict[str, Any], "`json`, or a JSON schema that the answer follows."),
    "think": must_be_off("the models do not reason apart", False),
    "logprobs": used(bool, "Log-probabilities of the tokens: at a cloud. A device does not know the LLM's."),
    "top_logprobs": used(Annotated[int, Meta(ge=0, le=TOP_MAX)], "With `logprobs`: 0 to 20 alternatives per token."),
}
CHAT: Final[Table] = COMMON | {
    "messages": used(
        Annotated[list[dict[str, Any]], Meta(max_length=MESSAGES_MAX)],
        "The conversation, written with the model's chat template. Empty: the model is loaded, as it is anyway.",
    ),
    "tools": used(Tools, "Functions that the answer may call. Calls are valid under their schemas."),
}
GENERATE: Final[Table] = COMMON | {
    "prompt": used(str, "The prompt, written as a message with the chat template where the model has one."),
    "system": used(str, "A system message before the prompt."),
    "raw": used(bool, "Whether the prompt is taken as it is, without the chat template."),
    "suffix": must_be_off("the models do not fill in", ""),
    "template": must_be_off("the template is the model's own", ""),
    "context": must_be_off("a prompt is text", []),
    "images": must_be_off("the models know text only", []),
    "width": must_be_off("the models know text only"),
    "height": must_be_off("the models know text only"),
    "steps": must_be_off("the models know text only"),
}
MESSAGE: Final[Table] = {
    "role": used(str, "system, user, assistant or tool.", required=True),
    "content": used(str, "The text."),
    "thinking": must_be_off("the models do not reason apart", ""),
    "images": must_be_off("the models know text only", []),
    "tool_calls": used(Tools, "The calls of an earlier answer."),
    "tool_name": used(str, "The function whose result this is."),
}
NAMED: Final[Table] = {
    "model": used(str, "A model of /api/tags."),
    "name": used(str, "The same as `model`, in older clients."),
    "verbose": idle(bool, "There is nothing more to say."),
    "insecure": idle(bool, "Nothing is downloaded."),
    "stream": used(bool, "Whether the answer comes in lines of JSON. Default: true."),
    "system": idle(str, "Nothing is changed."),
    "username": idle(str, "Nothing is downloaded."),
    "password": idle(str, "Nothing is downloaded."),
}


def chat(body: bytes, offer: Offer, template: ChatTemplate | None, asker: str) -> ApiRequest:
    """Translate /api/chat. Without messages there is no question.

    Raises:
        ApiError: the request cannot be obeyed.
    """
    given = read(body, CHAT)
    messages = [_message(m, f"messages[{i}]") for i, m in enumerate(given.get("messages", ()))]
    if messages and template is None:
        raise ApiError(f"{offer.name} does not support chat: its model folder has no chat template")
    tools = wanted(given.get("tools", ()), otherwise=ollama_grammar(given.get("format")))
    ids = template.encode(messages, tools.for_template) if template is not None and messages else None
    asked = _asked(given, offer, asker, ids, "messages", tools.grammar)
    return asked._replace(calls=bool(tools.for_template))


def generate(body: bytes, offer: Offer, template: ChatTemplate | None, asker: str) -> ApiRequest:
    """Translate /api/generate. Without a prompt there is no question.

    Raises:
        ApiError: the request cannot be obeyed.
    """
    given = read(body, GENERATE)
    form = ollama_grammar(given.get("format"))
    prompt, system = given.get("prompt", ""), given.get("system", "")
    if not prompt:
        return _asked(given, offer, asker, None, "prompt", form)
    if template is None or given.get("raw"):
        ids = begun(offer, text_ids(offer, system + prompt, param="prompt"))
    else:
        before = [{"role": "system", "content": system}] if system else []
        ids = template.encode([*before, {"role": "user", "content": prompt}])
    return _asked(given, offer, asker, ids, "prompt", form)


def named(body: bytes) -> tuple[str, bool]:
    """The model that a request names, and whether it wants a stream.

    Raises:
        ApiError: there is no name, or the request is invalid.
    """
    given = read(body, NAMED)
    name = given.get("model") or given.get("name")
    if not name:
        raise ApiError("model must be given", param="model")
    return name, given.get("stream", True)


def _message(given: dict[str, Any], param: str) -> dict[str, Any]:
    found = checked(given, MESSAGE, f"{param}.")
    if found["role"] not in ROLES:
        raise ApiError(f"{param}.role must be one of {', '.join(ROLES)} (got {found['role'][:64]!r})", param=param)
    calls = earlier_calls(found.get("tool_calls", ()), f"{param}.tool_calls")
    more: dict[str, Any] = {"tool_calls": calls} if calls else {}
    if "tool_name" in found:
        more["name"] = found["tool_name"]
    return {"role": found["role"], "content": found.get("content", "")} | more


def _asked(
    given: dict[str, Any], offer: Offer, asker: str, ids: tuple[int, ...] | None, param: str, grammar: str | None
) -> ApiRequest:
    chat = param == "messages"
    options = checked(given.get("options", {}), OPTIONS, "options.")
    logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else None
    if logprobs is not None and not offer.probabilities:
        raise no_probabilities("logprobs")
    window = min(options.pop("num_ctx", offer.context), offer.context)
    limit = options.pop("num_predict", 0)
    stream = given.get("stream", True)
    asking = options | {"model": given["model"]}
    if ids is None:
        question(
            offer, asker, (0,), asking, max_tokens=1, param=param, grammar=grammar
        )  # the model is checked all the same
        return ApiRequest(given["model"], chat, [], stream, logprobs=logprobs)
    if len(ids) >= window:
        raise ApiError(
            f"{param} must be shorter than the context of {window} tokens (got {len(ids)} tokens)", param=param
        )
    room = window - len(ids)
    one = question(
        offer,
        asker,
        ids,
        asking,
        max_tokens=min(limit, room) if limit > 0 else room,
        param=param,
        logprobs=logprobs,
        grammar=grammar,
    )
    return ApiRequest(given["model"], chat, [one], stream, logprobs=logprobs)
