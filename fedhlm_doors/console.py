"""The console's page over HTTP: its files, its state, and what changes, as server-sent events.

It takes no orders, unless the console allows prompts: then the page has a form that asks an agent. Only the page itself
may send it. A page of another site can neither read the state nor ask.
"""

import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fedhlm.errors import FedhlmError
from fedhlm_doors.app import body_of, is_address, say_nothing
from fedhlm_doors.flow import Streaming, while_there
from fedhlm_doors.refusals import ApiError

ASSETS: Final = Path(__file__).with_name("console_page")
FILES: Final = {"/": ("index.html", "text/html"), "/console.css": ("console.css", "text/css")} | {
    f"/{name}": (name, "text/javascript") for name in ("console.js", "texts.js", "charts.js")
}
HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
QUIET: Final = b": quiet\n\n"
TEXT_MAX: Final = 4_000  # characters of a prompt
ASKING_MAX: Final = 8  # prompts at once


class ConsoleFeed(Protocol):
    """What the page shows.

    Attributes:
        length_s: how long a recording is, in seconds; None for what is live.
        opens_s: the second of a recording that is shown first.
        began_s: when a recording began, in Unix time; 0 for what is live.
    """

    length_s: float | None
    opens_s: float
    began_s: float

    def snapshot(self, at_s: float | None = None) -> dict[str, Any]:
        """Everything, as JSON: now, at the end of a recording, or at a second of it."""

    def follow(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield everything, then what changes from that moment on. Ends when the page should begin anew."""


class TypedPrompt(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt that somebody has typed into the page."""

    cluster: str
    agent: str
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_MAX)]


Ask = Callable[[TypedPrompt], Awaitable[None]]
"""Asks an agent, and returns when its answer is whole. Raises FedhlmError if it is not."""


class ConsolePage:
    """The routes around one feed. With `ask` the page has a form, and its prompts go there."""

    def __init__(self, feed: ConsoleFeed, ask: Ask | None = None) -> None:
        self._feed = feed
        self._ask = ask
        self._asking = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [Route(path, self._file) for path in FILES]
        routes += [Route("/state", self._show), Route("/events", self._follow)]
        if self._ask is not None:
            routes.append(Route("/ask", self._asked, methods=["POST"]))
        return Starlette(routes=routes, exception_handlers={ClientDisconnect: say_nothing})

    async def _asked(self, request: Request) -> Response:
        _check(request)
        _check_own(request)
        if self._ask is None:
            raise HTTPException(404)
        if self._asking >= ASKING_MAX:
            return _refused(f"{ASKING_MAX} prompts are on their way: wait for an answer", 429)
        self._asking += 1
        try:
            wanted = msgspec.json.decode(await body_of(request), type=TypedPrompt)
            await while_there(request.receive, self._ask(wanted))
        except ApiError as exc:
            return _refused(exc.message, exc.status)
        except msgspec.MsgspecError as exc:
            return _refused(f"the prompt must be an object with cluster, agent and text ({exc})", 400)
        except FedhlmError as exc:
            return _refused(str(exc), 502)
        finally:
            self._asking -= 1
        return JSONResponse({}, headers=HEADERS)

    async def _file(self, request: Request) -> Response:
        _check(request)
        name, kind = FILES[request.url.path]
        return Response((ASSETS / name).read_bytes(), media_type=kind, headers=HEADERS)

    async def _show(self, request: Request) -> Response:
        _check(request)
        return JSONResponse(self._dated(self._feed.snapshot(_seconds(request.query_params.get("at")))), headers=HEADERS)

    async def _follow(self, request: Request) -> ASGIApp:
        _check(request)
        return Streaming(self._events(), "text/event-stream", _nothing, QUIET)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        changes = self._feed.follow()
        try:
            yield _event("state", self._dated(await anext(changes)))
            async for change in changes:
                yield _event("change", change)
        finally:
            await changes.aclose()

    def _dated(self, state: dict[str, Any]) -> dict[str, Any]:
        feed = self._feed
        times = {"length": feed.length_s, "opens": feed.opens_s, "began": feed.began_s}
        return state | times | {"asks": self._ask is not None}


async def _nothing() -> None:
    pass


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n".encode()


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise HTTPException(400, "at must be a number of seconds")
    return found


def _check(request: Request) -> None:
    """Let in no page of another site, which could make its own name point here."""
    if not is_address(request.headers.get("host", "")):
        raise HTTPException(403, "the host must be an address or localhost")


def _check_own(request: Request) -> None:
    """Let in no request that a page of another site makes this browser send: forms cannot send JSON, and scripts there
    have another origin, which browsers tell.
    """
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if request.headers.get("origin") != own:
        raise HTTPException(403, "the request must come from the console's own page")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content type must be application/json")


def _refused(words: str, status: int) -> Response:
    return JSONResponse({"error": words}, status, headers=HEADERS)
