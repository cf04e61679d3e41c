"""What both APIs share when they make questions: the types of parameters, models and presets, and the context."""

import asyncio
from collections.abc import Iterable
from typing import Annotated, Any, Final

from msgspec import Meta
from msgspec.structs import fields

from fedhlm.answering import Offer, Question
from fedhlm.errors import GrammarError
from fedhlm.protocol.fields import MAX_GRAMMAR, MAX_STOPS, MAX_TOKENS, Seed
from fedhlm.protocol.messages import Grammar, Prompt
from fedhlm_doors.refusals import ApiError

CHOICES_MAX: Final = 16
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
StopText = Annotated[str, Meta(min_length=1, max_length=1_024)]
Stops = StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)]
_TYPES: Final = {field.name: field.type for field in fields(Prompt)}
Temperature: Final = _TYPES["temperature"]
TopP: Final = _TYPES["top_p"]
MinP: Final = _TYPES["min_p"]
TopK = Annotated[int, Meta(ge=-1, lt=2**24)]
SeedNumber: Final = Seed

# How a model of this server may be named: `fedhlm`, `fedhlm:latest`, `fedhlm:exact`.
LATEST: Final = "latest"


def models(offer: Offer) -> list[str]:
    """The names of all models of an offer: the model, and the model with each preset."""
    return [offer.name, *(f"{offer.name}:{preset}" for preset in offer.presets)]


def preset_of(offer: Offer, model: str) -> str | None:
    """The preset that a model's name chooses; None: the part's own.

    Raises:
        ApiError: there is no such model.
    """
    name, _, tag = model.partition(":")
    if name == offer.name and (not tag or tag == LATEST):
        return None
    if name == offer.name and tag in offer.presets:
        return tag
    raise ApiError(
        f"model must be one of {', '.join(models(offer))} (got {model[:64]!r})",
        status=404,
        param="model",
        code="model_not_found",
    )


def stops(value: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings of a parameter that may be one text."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def question(
    offer: Offer,
    asker: str,
    ids: tuple[int, ...],
    given: dict[str, Any],
    *,
    max_tokens: int | None,
    param: str,
    number: int = 0,
    logprobs: int | None = None,
    grammar: str | None = None,
) -> Question:
    """Make the question of one choice, the choice `number` of its request. `param` holds the prompt.

    With a seed, each choice has its own: the seed plus the number.

    Raises:
        ApiError: the prompt is empty or fills the context, the model does not exist, or the grammar is too long.
    """
    if not ids:
        raise ApiError(f"{param} must hold at least one token (got none)", param=param, code="invalid_value")
    if len(ids) >= offer.context:
        raise ApiError(
            f"{param} must be shorter than the context of {offer.context} tokens (got {len(ids)} tokens)",
            param=param,
            code="context_length_exceeded",
        )
    if grammar is not None and len(grammar) > MAX_GRAMMAR:
        raise ApiError(
            f"schemas and tools must be at most {MAX_GRAMMAR} characters as a grammar (got {len(grammar)})",
            param="response_format",
            code="invalid_grammar",
        )
    seed = given.get("seed")
    return Question(
        asker=asker,
        ids=ids,
        max_tokens=min(max_tokens or MAX_TOKENS, MAX_TOKENS),
        seed=None if seed is None else (seed + number) % 2**63,
        temperature=given.get("temperature"),
        top_p=given.get("top_p"),
        top_k=None if "top_k" not in given else max(0, given["top_k"]),
        min_p=given.get("min_p"),
        stop=stops(given.get("stop")),
        preset=preset_of(offer, given["model"]),
        logprobs=logprobs,
        grammar=grammar,
    )


async def check_grammars(offer: Offer, questions: Iterable[Question]) -> None:
    """Compile the grammars of questions on another thread, which may take long, so that others are served meanwhile.

    Raises:
        ApiError: a grammar cannot be used.
    """
    for source, start in {q.grammar: len(q.ids) for q in questions if q.grammar is not None}.items():
        try:
            await asyncio.to_thread(offer.constrain, Grammar(start, source))
        except GrammarError as exc:
            raise ApiError(str(exc), param="response_format", code="invalid_grammar") from exc


def no_probabilities(param: str) -> ApiError:
    """Make the error for log-probabilities at a part that has none."""
    return ApiError(
        f"{param} is not supported: a device does not know the LLM's probabilities; a cloud does",
        param=param,
        code="unsupported_parameter",
    )


def known_ids(ids: Iterable[int], offer: Offer, param: str) -> tuple[int, ...]:
    """Check token ids that a client sends.

    Raises:
        ApiError: an id is not in the vocabulary.
    """
    size, found = offer.tokenizer.get_vocab_size(), tuple(ids)
    if any(not 0 <= token < size for token in found):
        raise ApiError(f"{param} must be token ids from 0 to {size - 1}", param=param, code="invalid_value")
    return found
