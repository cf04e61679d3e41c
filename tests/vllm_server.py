"""A server that follows vLLM's documented schema on top of a model folder, over real HTTP, and can be told to fail.

It answers /v1/models, /v1/completions with `logprobs`, `prompt_logprobs` and `return_token_ids`, and /tokenize.
"""

import asyncio
import contextlib
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedhlm.decoding.decoder import Cache, Decoder, DecoderInput
from fedhlm.decoding.ids import common_prefix

NAME = "news-llm"
MAX_LOGPROBS = 20
HELD = 8  # texts whose keys and values are kept


class Refusal(Exception):
    """A response other than 200, in vLLM's form."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def response(self) -> Response:
        kind = {404: "NotFoundError", 400: "BadRequestError"}.get(self.status, "Error")
        return JSONResponse(
            {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}, self.status
        )


class VllmServer:
    """The model, the requests that came, and how to fail.

    `faults` are the responses of the next completions in turn. `says` replaces the body of every completion.
    """

    def __init__(self, folder: Path, *, key: str = "", scores_prompts: bool = True, tokenizes: bool = True) -> None:
        self.decoder = Decoder.load(folder)
        self.key = key
        self.scores_prompts = scores_prompts
        self.tokenizes = tokenizes
        self.max_model_len = self.decoder.info.context
        self.max_logprobs = MAX_LOGPROBS
        self.names_ids = True
        self.shift = 0  # of every id of a tokenised text
        self.jitter = 0.0  # by which logits change with the length of what is computed
        self.slow_s = 0.0
        self.faults: list[Response] = []
        self.says: bytes | None = None
        self.asked: list[dict[str, Any]] = []
        self.open = 0
        self.most_open = 0
        self.url = ""
        self._one = asyncio.Lock()
        self._held: dict[tuple[int, ...], Cache] = {}

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            *([Route("/tokenize", self.tokenize, methods=["POST"])] if self.tokenizes else ()),
        ]

    def check_key(self, request: Request) -> None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            raise Refusal(401, "Unauthorized")

    async def models(self, request: Request) -> Response:
        self.check_key(request)
        return JSONResponse(
            {"object": "list", "data": [{"id": NAME, "object": "model", "max_model_len": self.max_model_len}]}
        )

    def ids_of(self, text: str) -> list[int]:
        ids: list[int] = self.decoder.tokenizer.encode(text, add_special_tokens=False).ids
        return [i + self.shift for i in ids]

    async def tokenize(self, request: Request) -> Response:
        body = await request.json()
        assert body["add_special_tokens"] is False
        ids = self.ids_of(body["prompt"])
        return JSONResponse({"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids})

    async def completions(self, request: Request) -> Response:
        self.check_key(request)
        body = await request.json()
        self.asked.append(body)
        if self.faults:
            return self.faults.pop(0)
        if self.says is not None:
            return Response(self.says, media_type="application/json")
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(self.slow_s)
            async with self._one:
                return JSONResponse(await asyncio.to_thread(self.complete, body))
        finally:
            self.open -= 1

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["model"] != NAME:
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        for field in ("logprobs", "prompt_logprobs"):
            if (wanted := body.get(field) or 0) > self.max_logprobs:
                raise Refusal(
                    400, f"Requested {field} of {wanted}, which is greater than max allowed: {self.max_logprobs}"
                )
        if body.get("prompt_logprobs") is not None and not self.scores_prompts:
            raise Refusal(400, "prompt_logprobs is not supported")
        prompts = body["prompt"]
        if isinstance(prompts, str):
            prompts = [self.ids_of(prompts)]
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": NAME,
            "choices": [self.choice(i, ids, body) for i, ids in enumerate(prompts)],
            "usage": {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": len(prompts)},
        }

    def rows(self, ids: list[int], count: int) -> NDArray[np.float32]:
        """The logits after the last `count` ids. Like vLLM it keeps what it has computed of other texts."""
        shared, before = max(((common_prefix(ids, list(known)), known) for known in self._held), default=(0, ()))
        kept = min(shared, len(ids) - count)
        cache = self._held[before].truncated(kept) if kept else self.decoder.empty_cache()
        result = self.decoder.forward([DecoderInput(cache, ids[kept:], count)])[0]
        self._held[tuple(ids)] = result.cache
        while len(self._held) > HELD:
            self._held.pop(next(iter(self._held)))
        return result.logits

    def choice(self, index: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        if len(ids) + body["max_tokens"] > self.max_model_len:
            raise Refusal(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        size = self.decoder.vocabulary.size
        real = [i % size for i in ids]
        wanted = body.get("prompt_logprobs")
        rows = self.rows(real, len(real) if wanted else 1).copy()
        rows += self.jitter * (len(rows) > 1) * np.sin(np.arange(size))
        last = self.told(rows[-1], body["logprobs"])
        drawn = max(last, key=lambda token: last[token])
        prefix = "token_id:" if self.names_ids and body.get("return_tokens_as_token_ids") else "t"
        found: dict[str, Any] = {
            "index": index,
            "text": self.decoder.tokenizer.decode([drawn]),
            "finish_reason": "length",
            "logprobs": {
                "text_offset": [0],
                "token_logprobs": [last[drawn]],
                "tokens": [f"{prefix}{drawn}"],
                "top_logprobs": [{f"{prefix}{token}": value for token, value in last.items()}],
            },
            "prompt_logprobs": None,
        }
        if body.get("return_token_ids"):
            found |= {"prompt_token_ids": ids, "token_ids": [drawn]}
        if wanted:
            scored: list[dict[str, Any] | None] = [None]
            for row, token in zip(rows[:-1], real[1:], strict=True):
                values = self.told(row, wanted, token)
                scored.append(
                    {
                        str(t): {"logprob": v, "rank": r, "decoded_token": ""}
                        for r, (t, v) in enumerate(values.items(), 1)
                    }
                )
            found["prompt_logprobs"] = scored
        return found

    def told(self, row: NDArray[np.float32], count: int, own: int | None = None) -> dict[int, float]:
        wide = row.astype(np.float64)
        logs = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
        best = np.argsort(-logs, kind="stable")[:count].tolist()
        return {int(i): float(logs[i]) for i in dict.fromkeys([*best, *([] if own is None else [own])])}


@asynccontextmanager
async def serving(server: VllmServer) -> AsyncIterator[VllmServer]:
    """Serve on a free port of this machine until the context exits."""

    async def refuse(_request: Request, exc: Exception) -> Response:
        assert isinstance(exc, Refusal)
        return exc.response()

    app = Starlette(routes=server.routes(), exception_handlers={Refusal: refuse})
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        web = uvicorn.Server(
            uvicorn.Config(app, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=1)
        )
        task = asyncio.create_task(web.serve(sockets=[listener]))
        while not web.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        try:
            yield server
        finally:
            web.should_exit = True
            await task
