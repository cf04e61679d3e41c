"""The responses of Ollama's API: lines of JSON made of slices, and what it says of models. No I/O."""

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from fedhlm.answering import Offer, Slice, TokenOrigin, ToolCall
from fedhlm.receipts import proof_of
from fedhlm_doors.metrics import metrics, origin
from fedhlm_doors.openai import ApiRequest
from fedhlm_doors.refusals import ApiError

VERSION: Final = "0.12.0"  # of Ollama's API, which clients compare with what they need
KIND: Final = "application/x-ndjson"
_FOREVER: Final = "9999-12-31T23:59:59Z"
_NANOSECONDS: Final = 1_000_000_000
_encode: Final = msgspec.json.Encoder().encode


def line(value: object) -> bytes:
    """One line of JSON."""
    return _encode(value) + b"\n"


class LineReply:
    """The response to a question of /api/chat or /api/generate. `clock_s` is monotonic. See `Written`."""

    kind = KIND
    quiet = b""  # a line of JSON could only be an answer

    def __init__(self, asked: ApiRequest, offer: Offer, clock_s: Callable[[], float]) -> None:
        self._asked = asked
        self._offer = offer
        self._clock_s = clock_s
        self._began_s = self._ended_s = clock_s()
        self._first_s: float | None = None
        self._tokens: list[TokenOrigin] = []
        self._text = ""
        self._calls: list[ToolCall] = []
        self._end: Slice | None = None

    def feed(self, _index: int, piece: Slice) -> None:
        """Add a slice."""
        self._ended_s = self._clock_s()
        if self._first_s is None and piece.tokens:
            self._first_s = self._ended_s
        self._text += piece.text
        self._calls += piece.calls
        self._tokens += piece.tokens
        self._end = piece if piece.finish is not None else None

    def opening(self, _index: int) -> bytes:
        """Nothing."""
        return b""

    def closing(self) -> bytes:
        """Nothing."""
        return b""

    def failed(self, error: ApiError) -> bytes:
        """The line that ends a stream with an error."""
        return line(error.ollama())

    def chunk(self, _index: int, piece: Slice) -> bytes:
        """The line of a slice that was fed; empty if the slice says nothing."""
        if piece.finish is not None:
            return line(self._proven(self._said(piece.text, piece.tokens, piece.calls)) | self._last())
        if not (piece.text or piece.tokens or piece.calls):
            return b""
        return line(self._said(piece.text, piece.tokens, piece.calls) | {"done": False})

    def whole(self) -> bytes:
        """The response without streaming, after all slices were fed."""
        return _encode(self._proven(self._said(self._text, self._tokens, self._calls)) | self._last())

    def loaded(self) -> bytes:
        """The response to a request without a question."""
        return line(self._said("", ()) | {"done": True, "done_reason": "load"})

    def _said(self, text: str, tokens: Sequence[TokenOrigin], calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self._asked.model, "created_at": _now()}
        found |= {"message": {"role": "assistant", "content": text}} if self._asked.chat else {"response": text}
        if calls:
            found["message"]["tool_calls"] = [
                {"function": {"name": c.name, "arguments": msgspec.Raw(c.arguments.encode())}} for c in calls
            ]
        if tokens:
            found["fedhlm"] = {"tokens": [origin(token) for token in tokens]}
        if tokens and self._asked.logprobs is not None:
            found["logprobs"] = [
                self._entry(t.token, t.logprob) | {"top_logprobs": [self._entry(*top) for top in t.top]}
                for t in tokens
                if t.logprob is not None
            ]
        return found

    def _proven(self, said: dict[str, Any]) -> dict[str, Any]:
        """Add the answer's receipt to its last line."""
        proofs = {} if self._end is None else proof_of(self._end.receipt, self._asked.questions[0].ids)
        return said | {"fedhlm": said.get("fedhlm", {}) | proofs} if proofs else said

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": str(self._offer.tokenizer.decode([token], skip_special_tokens=False)), "logprob": logprob}

    def _last(self) -> dict[str, Any]:
        end = self._end
        stopped = end is not None and end.finish == "stop"
        first_s = self._ended_s if self._first_s is None else self._first_s
        return {
            "done": True,
            "done_reason": "stop" if stopped else "length",
            "total_duration": _ns(self._ended_s - self._began_s),
            "load_duration": 0,
            "prompt_eval_count": len(self._asked.questions[0].ids),
            "prompt_eval_duration": _ns(first_s - self._began_s),
            "eval_count": len(self._tokens),
            "eval_duration": _ns(self._ended_s - first_s),
            "metrics": metrics([] if end is None else [end], self._tokens),
        }


def details(offer: Offer) -> dict[str, Any]:
    """What is said of the model's kind."""
    return {
        "parent_model": "",
        "format": "onnx",
        "family": offer.architecture,
        "families": [offer.architecture],
        "parameter_size": f"{offer.parameters / 1e6:.1f}M",
        "quantization_level": offer.quantisation,
    }


def tag(offer: Offer, name: str, modified: str) -> dict[str, Any]:
    """A model in /api/tags."""
    full = name if ":" in name else f"{name}:latest"
    return {
        "name": full,
        "model": full,
        "modified_at": modified,
        "size": offer.size_bytes,
        "digest": hashlib.sha256(full.encode()).hexdigest(),
        "details": details(offer),
    }


def running(offer: Offer, name: str, modified: str) -> dict[str, Any]:
    """A model in /api/ps."""
    found = tag(offer, name, modified)
    del found["modified_at"]
    return found | {"expires_at": _FOREVER, "size_vram": 0, "context_length": offer.context}


def shown(offer: Offer, template: str, modified: str) -> dict[str, Any]:
    """A model in /api/show."""
    family = offer.architecture
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": details(offer),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": offer.parameters,
            f"{family}.context_length": offer.context,
        },
        "capabilities": ["completion", "tools"],
        "modified_at": modified,
    }


def stamp(seconds: float) -> str:
    """A Unix time as RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _ns(seconds: float) -> int:
    return max(0, round(seconds * _NANOSECONDS))
