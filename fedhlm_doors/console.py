"""The console's page over HTTP: its files, its state, and what changes, as server-sent events. It takes no orders."""

import json
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fedhlm_doors.app import is_address
from fedhlm_doors.flow import Streaming

ASSETS: Final = Path(__file__).with_name("console_page")
FILES: Final = {"/": ("index.html", "text/html"), "/console.css": ("console.css", "text/css")} | {
    "/console.js": ("console.js", "text/javascript")
}
HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
QUIET: Final = b": quiet\n\n"


class ConsoleFeed(Protocol):
    """What the page shows.

    Attributes:
        length_s: how long a recording is, in seconds; None for what is live.
        opens_s: the second of a recording that is shown first.
    """

    length_s: float | None
    opens_s: float

    def snapshot(self, at_s: float | None = None) -> dict[str, Any]:
        """Everything, as JSON: now, at the end of a recording, or at a second of it."""

    def follow(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield everything, then what changes from that moment on. Ends when the page should begin anew."""


class ConsolePage:
    """The routes around one feed."""

    def __init__(self, feed: ConsoleFeed) -> None:
        self._feed = feed

    def app(self) -> Starlette:
        """The ASGI application."""
        files = [Route(path, self._file) for path in FILES]
        return Starlette(routes=[*files, Route("/state", self._show), Route("/events", self._follow)])

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
        return state | {"length": self._feed.length_s, "opens": self._feed.opens_s}


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
