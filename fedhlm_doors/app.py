"""The routes of both APIs around one `Answerer`."""

import asyncio
import ipaddress
import logging
import secrets
import time
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fedhlm.answering import Answerer
from fedhlm.spans import TRACEPARENT, readable
from fedhlm_doors import ollama, ollama_replies, openai, openai_replies
from fedhlm_doors.chat import ChatTemplate
from fedhlm_doors.flow import Streaming, while_there
from fedhlm_doors.keys import ApiKeys, Rates
from fedhlm_doors.openai import ApiRequest
from fedhlm_doors.openapi import document
from fedhlm_doors.questions import check_grammars, models, preset_of
from fedhlm_doors.refusals import ApiError
from fedhlm_doors.tools import with_calls
from fedhlm_doors.written import Pace, Questions, Stage, Written

log = logging.getLogger(__name__)

BODY_MAX: Final = 4 * 1024 * 1024  # bytes
BODY_S: Final = 30.0  # seconds in which a body must have come
GONE: Final = 499  # the status, which nobody reads, where a client closed the connection before its answer
JSON: Final = "application/json"
_LOCAL: Final = ("localhost", "host.docker.internal")


class HttpApi:
    """The routes, with what they share: the answerer, its chat template, keys and rates."""

    def __init__(self, answerer: Answerer, keys: ApiKeys, rates: Rates) -> None:
        self._answerer = answerer
        self._offer = answerer.offer
        self._keys = keys
        self._rates = rates
        self._template = ChatTemplate.of(answerer.offer)
        self._since_s = time.time()
        self._pace = Pace()
        self._document = document(answerer.offer)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", _hello),
            Route("/openapi.json", self._show_document),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name}", self._show_model),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/api/version", self._version),
            Route("/api/tags", self._tags),
            Route("/api/ps", self._running),
            Route("/api/show", self._show, methods=["POST"]),
            Route("/api/pull", self._pull, methods=["POST"]),
            Route("/api/generate", self._generate, methods=["POST"]),
            Route("/api/chat", self._talk, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _say, HTTPException: _say_http, ClientDisconnect: say_nothing}
        return Starlette(routes=routes, exception_handlers=handlers)

    # OpenAI

    async def _show_document(self, _request: Request) -> Response:
        return JSONResponse(self._document)

    async def _list_models(self, request: Request) -> Response:
        self._client(request)
        return JSONResponse(openai_replies.listing(models(self._offer), int(self._since_s)))

    async def _show_model(self, request: Request) -> Response:
        self._client(request)
        name = request.path_params["name"]
        preset_of(self._offer, name)
        return JSONResponse(openai_replies.model(name, int(self._since_s)))

    async def _complete(self, request: Request) -> ASGIApp:
        client, body = await self._asking(request)
        return await self._answer(request, openai.completion(body, self._offer, client), "cmpl")

    async def _chat(self, request: Request) -> ASGIApp:
        client, body = await self._asking(request)
        return await self._answer(request, openai.chat(body, self._offer, self._template, client), "chatcmpl")

    async def _answer(self, request: Request, asked: ApiRequest, kind: str) -> ASGIApp:
        name = f"{kind}-{secrets.token_hex(12)}"
        return await self._write(request, asked, openai_replies.EventReply(asked, self._offer, name, int(time.time())))

    # Ollama

    async def _version(self, request: Request) -> Response:
        self._client(request)
        return JSONResponse({"version": ollama_replies.VERSION})

    async def _tags(self, request: Request) -> Response:
        self._client(request)
        since = ollama_replies.stamp(self._since_s)
        return JSONResponse({"models": [ollama_replies.tag(self._offer, n, since) for n in models(self._offer)]})

    async def _running(self, request: Request) -> Response:
        self._client(request)
        since = ollama_replies.stamp(self._since_s)
        return JSONResponse({"models": [ollama_replies.running(self._offer, self._offer.name, since)]})

    async def _show(self, request: Request) -> Response:
        self._client(request)
        name, _ = ollama.named(await body_of(request))
        preset_of(self._offer, name)
        template = "" if self._template is None else self._template.source
        return JSONResponse(ollama_replies.shown(self._offer, template, ollama_replies.stamp(self._since_s)))

    async def _pull(self, request: Request) -> Response:
        self._client(request)
        name, stream = ollama.named(await body_of(request))
        preset_of(self._offer, name)
        done = ollama_replies.line({"status": "success"})
        return Response(done, media_type=ollama_replies.KIND if stream else JSON)

    async def _generate(self, request: Request) -> ASGIApp:
        client, body = await self._asking(request)
        return await self._respond(request, ollama.generate(body, self._offer, self._template, client))

    async def _talk(self, request: Request) -> ASGIApp:
        client, body = await self._asking(request)
        return await self._respond(request, ollama.chat(body, self._offer, self._template, client))

    async def _respond(self, request: Request, asked: ApiRequest) -> ASGIApp:
        reply = ollama_replies.LineReply(asked, self._offer, self._pace.now_s)
        if not asked.questions:
            return Response(reply.loaded(), media_type=ollama_replies.KIND if asked.stream else JSON)
        return await self._write(request, asked, reply)

    # Both

    async def _write(self, request: Request, asked: ApiRequest, reply: Written) -> ASGIApp:
        await check_grammars(self._offer, asked.questions)
        context = readable(request.headers.get(TRACEPARENT, ""))
        asked_for = [question._replace(context=context) for question in asked.questions]
        stages: list[Stage] = [with_calls] if asked.calls else []
        questions = await Questions.ask(self._answerer, asked_for, self._pace, *stages)
        if asked.stream:
            return Streaming(questions.stream(reply), reply.kind, questions.aclose, reply.quiet)
        try:
            whole = await while_there(request.receive, questions.whole(reply))
        finally:
            await questions.aclose()
        return Response(whole or b"", status_code=GONE if whole is None else 200, media_type=JSON)

    async def _asking(self, request: Request) -> tuple[str, bytes]:
        """The client and the body of a request for a text."""
        client = self._client(request)
        self._rates.spend(client)
        return client, await body_of(request)

    def _client(self, request: Request) -> str:
        """Let in a client: no page of a browser that another site has sent here, and nobody without a needed key."""
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError("pages of other sites are not let in", status=403, code="forbidden_origin")
        if not self._keys.needed and not is_address(host):
            raise ApiError("the host must be an address or localhost", status=403, code="forbidden_host")
        return self._keys.client(request.headers.get("authorization", ""))


async def body_of(request: Request) -> bytes:
    """Read a body of at most BODY_MAX bytes.

    Raises:
        ApiError: it is larger, or does not come in time.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > BODY_MAX:
                    raise ApiError(f"the body must be at most {BODY_MAX} bytes", status=413, code="body_too_large")
                parts.append(part)
    except TimeoutError as exc:
        raise ApiError(f"the body must come within {BODY_S:g} s", status=408, code="body_too_slow") from exc
    return b"".join(parts)


def is_address(host: str) -> bool:
    """Whether a Host header is an address. A site's own name could be made to point here by that site."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in _LOCAL or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


async def _hello(_request: Request) -> Response:
    return PlainTextResponse("fedhlm is running")


def _error(request: Request, error: ApiError) -> Response:
    body = error.ollama() if request.url.path.startswith("/api/") else error.openai()
    return JSONResponse(body, status_code=error.status, headers=error.headers)


async def _say(request: Request, exc: ApiError) -> Response:
    return _error(request, exc)


async def _say_http(request: Request, exc: HTTPException) -> Response:
    what = f"{request.method} {request.url.path[:128]}: {exc.detail}"
    response = _error(
        request, ApiError(what, status=exc.status_code, code="not_found" if exc.status_code == 404 else None)
    )
    response.headers.update(exc.headers or {})
    return response


async def say_nothing(_request: Request, _exc: Exception) -> Response:
    """Handle a client that leaves before its request is whole."""
    return Response(status_code=GONE)
