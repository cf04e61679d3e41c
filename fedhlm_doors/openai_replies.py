"""The responses of OpenAI's API, made of slices. No I/O."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from fedhlm.answering import Offer, Slice, TokenOrigin, ToolCall
from fedhlm.receipts import proof_of
from fedhlm_doors.metrics import metrics, origin
from fedhlm_doors.openai import ApiRequest
from fedhlm_doors.refusals import ApiError

DONE: Final = b"data: [DONE]\n\n"
_FINISH: Final = {"stop": "stop", "length": "length", "context": "length"}
_encode: Final = msgspec.json.Encoder().encode


def event(value: object) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + _encode(value) + b"\n\n"


class EventReply:
    """The response to one request. `name` is its id, and `created_s` its Unix time. See `Written`."""

    kind = "text/event-stream; charset=utf-8"
    quiet = b": waiting\n\n"  # a comment, which keeps a quiet connection open

    def __init__(self, asked: ApiRequest, offer: Offer, name: str, created_s: int) -> None:
        self._asked = asked
        self._offer = offer
        self._head = {"id": name, "created": created_s, "model": asked.model}
        self._tokens: list[list[TokenOrigin]] = [[] for _ in asked.questions]
        self._text = ["" for _ in asked.questions]
        self._offset = [0 for _ in asked.questions]
        self._ends: list[Slice] = []
        self._proofs: list[dict[str, Any]] = [{} for _ in asked.questions]
        self._finish: list[str | None] = [None for _ in asked.questions]
        self._calls: list[list[dict[str, Any]]] = [[] for _ in asked.questions]

    def feed(self, index: int, piece: Slice) -> None:
        """Add a slice to the choice `index`."""
        self._text[index] += piece.text
        self._calls[index] += [self._call(index, call) for call in piece.calls]
        self._tokens[index] += piece.tokens
        if piece.finish is not None:
            called = self._calls[index] and piece.finish == "stop"
            self._finish[index] = "tool_calls" if called else _FINISH.get(piece.finish)
            self._ends.append(piece)
            self._proofs[index] = proof_of(piece.receipt, self._asked.questions[index].ids)

    @property
    def complete(self) -> bool:
        """Whether every choice has had its last slice."""
        return len(self._ends) == len(self._asked.questions)

    def opening(self, index: int) -> bytes:
        """The first chunk of a choice, which carries the role; empty for a completion."""
        if not self._asked.chat:
            return b""
        return self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def chunk(self, index: int, piece: Slice) -> bytes:
        """The chunk of a slice that was fed; empty if the slice says nothing."""
        if not (piece.text or piece.tokens or piece.calls or piece.finish is not None):
            return b""
        choice: dict[str, Any] = {"index": index, "finish_reason": self._finish[index] if piece.finish else None}
        choice |= {"delta": self._delta(index, piece)} if self._asked.chat else {"text": piece.text}
        choice |= self._about(index, piece.tokens, piece.text)
        last = self.complete and piece.finish is not None and not self._asked.include_usage
        return self._chunk([choice], self._metrics() if last else {})

    def failed(self, error: ApiError) -> bytes:
        """The event that ends a stream with an error."""
        return event(error.openai())

    def closing(self) -> bytes:
        """What follows the last chunk of the last choice."""
        if not self._asked.include_usage:
            return DONE
        return self._chunk([], {"usage": self._usage()} | self._metrics()) + DONE

    def whole(self) -> bytes:
        """The response without streaming, after every choice was fed."""
        choices = []
        for index, text in enumerate(self._text):
            choice: dict[str, Any] = {"index": index, "finish_reason": self._finish[index]}
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
            if calls := self._calls[index]:
                said["message"] |= {"content": text or None, "tool_calls": calls}
            choice |= said if self._asked.chat else {"text": text}
            choices.append(choice | self._about(index, self._tokens[index], text))
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return _encode(
            self._head | {"object": kind, "choices": choices, "usage": self._usage()} | self._metrics()
        )  # fmt: skip

    def _call(self, index: int, call: ToolCall) -> dict[str, Any]:
        name = f"call_{self._head['id']}_{index}_{len(self._calls[index])}"
        return {"id": name, "type": "function", "function": call._asdict()}

    def _delta(self, index: int, piece: Slice) -> dict[str, Any]:
        if not piece.calls:
            return {"content": piece.text}
        first = len(self._calls[index]) - len(piece.calls)
        calls = [{"index": i} | call for i, call in enumerate(self._calls[index][first:], start=first)]
        return {"content": piece.text or None, "tool_calls": calls}

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        usage = {"usage": None} if self._asked.include_usage and choices else {}
        return event(self._head | {"object": kind, "choices": choices} | usage | (more or {}))

    def _about(self, index: int, tokens: Sequence[TokenOrigin], text: str) -> dict[str, Any]:
        origins = {"tokens": [origin(token) for token in tokens]}
        found: dict[str, Any] = {"logprobs": None, "fedhlm": origins | self._proofs[index]}
        if self._asked.logprobs is not None and tokens:
            given = [token for token in tokens if token.logprob is not None]
            found["logprobs"] = self._chat_logprobs(given) if self._asked.chat else self._logprobs(index, given)
        return found

    def _metrics(self) -> dict[str, Any]:
        return {"metrics": metrics(self._ends, [token for tokens in self._tokens for token in tokens])}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(ids) for ids in {id(q.ids): q.ids for q in self._asked.questions}.values())
        completion = sum(map(len, self._tokens))
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _word(self, token: int) -> str:
        return str(self._offer.tokenizer.decode([token], skip_special_tokens=False))

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        word = self._word(token)
        # A token may be a part of a character, whose bytes a decoder of texts does not tell.
        found = None if "\N{REPLACEMENT CHARACTER}" in word else list(word.encode())
        return {"token": word, "logprob": logprob, "bytes": found}

    def _chat_logprobs(self, tokens: Sequence[TokenOrigin]) -> dict[str, Any]:
        content = [
            self._entry(t.token, t.logprob or 0.0) | {"top_logprobs": [self._entry(*top) for top in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _logprobs(self, index: int, tokens: Sequence[TokenOrigin]) -> dict[str, Any]:
        words = [self._word(token.token) for token in tokens]
        offsets = []
        for word in words:
            offsets.append(self._offset[index])
            self._offset[index] += len(word)
        return {
            "tokens": words,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._word(t): p for t, p in token.top} for token in tokens],
            "text_offset": offsets,
        }


def listing(names: Sequence[str], created_s: int) -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": [model(name, created_s) for name in names]}


def model(name: str, created_s: int) -> dict[str, Any]:
    """One model of the list."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "fedhlm"}
