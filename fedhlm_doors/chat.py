"""Turns messages into prompt ids with the chat template of a model.

A template is a Jinja program that runs in a sandbox. Control tokens that the template writes become control tokens;
their names in a message stay text.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn, Self

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedhlm.answering import Offer
from fedhlm.decoding.chat import TurnIds, chat_of
from fedhlm.decoding.text import TOKEN_BYTES_MAX
from fedhlm.errors import ModelError
from fedhlm_doors.refusals import ApiError

_MARKS: Final = range(0xE000, 0xF8FF)  # characters for private use, of which one splits the names of control tokens


class ChatTemplate:
    """The chat template of a model, and the control tokens that it may write."""

    def __init__(self, source: str, special: Mapping[str, str], offer: Offer) -> None:
        """Compile `source`. `special` holds the tokens that templates know by name, such as bos_token.

        Raises:
            ModelError: the source is no template.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _complain, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except TemplateError as exc:
            raise ModelError(f"the chat template of {offer.folder} cannot be used: {exc}") from exc
        self.source = source
        self._special = special
        self._offer = offer
        decoder = offer.tokenizer.get_added_tokens_decoder()
        self._control = {added.content: token for token, added in decoder.items() if added.special}

    @classmethod
    def of(cls, offer: Offer) -> Self | None:
        """Read the template of a model; None if it has none.

        Raises:
            ModelError: a file of the model cannot be used.
        """
        found = chat_of(offer.folder)
        return None if found is None else cls(found.template, found.special, offer)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of a conversation up to where the assistant's answer begins, with the tools that it may call.

        Raises:
            ApiError: the template rejects the conversation.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=tools or None, documents=None, **self._special
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as exc:
            raise ApiError(
                f"the chat template rejects the messages: {exc}", param="messages", code="invalid_value"
            ) from exc

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[int, ...]:
        """The prompt ids of a conversation, the begin-of-text id included.

        Raises:
            ApiError: the template rejects the conversation, or it is far longer than the context.
        """
        mark = _unused([*messages, *tools])
        split = {name: name[0] + mark + name[1:] for name in self._control if len(name) > 1}
        text = self.render([_with(message, split) for message in messages], [_with(tool, split) for tool in tools])
        return begun(self._offer, self._ids(text, mark))

    def turns(self) -> TurnIds:
        """The ids that the template writes around turns.

        Raises:
            ModelError: the template changes turns, or leaves them out.
        """
        turns = [chr(_MARKS.start + number) * 2 for number in range(3)]
        talk = [{"role": role, "content": t} for role, t in zip(("user", "assistant", "user"), turns, strict=True)]
        try:
            first, whole = self.render(talk[:1]), self.render(talk)
        except ApiError as exc:
            raise ModelError(f"the chat template of {self._offer.folder} cannot be used: {exc}") from exc
        if first.count(turns[0]) != 1 or any(whole.count(turn) != 1 for turn in turns):
            raise ModelError(f"the chat template of {self._offer.folder} must write each turn once, as it is")
        opening, answer = first.split(turns[0])
        question = whole.split(turns[1])[1].split(turns[2])[0]
        ids = [self._ids(text, turns[0]) for text in (opening, answer, question)]
        return TurnIds(begun(self._offer, ids[0]), tuple(ids[1]), tuple(ids[2]))

    def _ids(self, text: str, mark: str) -> list[int]:
        """The ids of a rendered text, in which `mark` splits the names of control tokens that are not meant."""
        ids: list[int] = []
        for plain, control in _pieces(text, self._control):
            ids += text_ids(self._offer, plain.replace(mark, ""), param="messages")
            ids += [] if control is None else [self._control[control]]
        return ids


def text_ids(offer: Offer, text: str, *, param: str) -> list[int]:
    """The ids of a text in which no control token is meant.

    Raises:
        ApiError: the text cannot fit into the context.
    """
    if len(text) > TOKEN_BYTES_MAX * offer.context:  # encoding it would block everything else
        raise ApiError(
            f"{param} must fit the context of {offer.context} tokens (got {len(text)} characters)",
            param=param,
            code="context_length_exceeded",
        )
    ids: list[int] = offer.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def begun(offer: Offer, ids: list[int]) -> tuple[int, ...]:
    """Add the begin-of-text id where the model has one and it is not there."""
    if offer.bos_id is None or ids[:1] == [offer.bos_id]:
        return tuple(ids)
    return (offer.bos_id, *ids)


def _unused(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return next(chr(code) for code in _MARKS if chr(code) not in text)


def _with(value: Any, split: Mapping[str, str]) -> Any:
    """Replace the names of control tokens in all texts of a JSON value."""
    if isinstance(value, str):
        for name, harmless in split.items():
            value = value.replace(name, harmless)
        return value
    if isinstance(value, Mapping):
        return {key: _with(inner, split) for key, inner in value.items()}
    return [_with(inner, split) for inner in value] if isinstance(value, list) else value


def _pieces(text: str, control: Mapping[str, int]) -> list[tuple[str, str | None]]:
    """Split a text at the names of control tokens; of several that begin at one place, the longest counts."""
    pieces: list[tuple[str, str | None]] = []
    while found := [(at, -len(name), name) for name in control if (at := text.find(name)) >= 0]:
        at, _, name = min(found)
        pieces.append((text[:at], name))
        text = text[at + len(name) :]
    return [*pieces, (text, None)]


def _complain(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.now(UTC).strftime(form)
