"""Answers that flow: several at once, and only as long as their client is there."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Final, TypeVar

from starlette.types import Receive, Scope, Send

from fedhlm.answering import Slice

QUIET_S: Final = 15.0  # seconds of silence after which a stream sends a comment
T = TypeVar("T")


async def gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_there(receive: Receive, work: Awaitable[T]) -> T | None:
    """Await some work, but cancel it and return None if the client closes the connection before."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})
        if not (working.cancelled() or watching.cancelled()):
            watching.exception()


class Streaming:
    """A streamed response. `after` is awaited at its end, also if the client closes the connection before.

    After QUIET_S seconds without a chunk, `quiet` is sent where it is not empty.
    """

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], kind: str, after: Callable[[], Awaitable[None]], quiet: bytes = b""
    ) -> None:
        self._chunks = chunks
        self._kind = kind
        self._after = after
        self._quiet = quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_there(receive, self._flow(send))
        finally:
            await self._after()

    async def _flow(self, send: Send) -> None:
        headers = [(b"content-type", self._kind.encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await self._pump(send)
        finally:
            await self._chunks.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        following: asyncio.Future[bytes] | None = None
        try:
            while True:
                if following is None:
                    following = asyncio.ensure_future(anext(self._chunks))
                timeout_s = QUIET_S if self._quiet else None
                done, _ = await asyncio.wait({following}, timeout=timeout_s)
                chunk = self._quiet
                if done:
                    try:
                        chunk = following.result()
                    except StopAsyncIteration:
                        return
                    following = None
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            if following is not None and not following.done():
                following.cancel()
                await asyncio.wait({following})


async def together(answers: Sequence[AsyncGenerator[Slice, None]]) -> AsyncGenerator[tuple[int, Slice], None]:
    """Yield the slices of several answers as they come, with the number of each answer. Closing it closes them all."""
    if len(answers) == 1:
        try:
            async for piece in answers[0]:
                yield 0, piece
        finally:
            await answers[0].aclose()
        return
    ready: asyncio.Queue[tuple[int, Slice | BaseException | None]] = asyncio.Queue()

    async def forward(index: int, answer: AsyncGenerator[Slice, None]) -> None:
        try:
            async for piece in answer:
                ready.put_nowait((index, piece))
            ready.put_nowait((index, None))
        except Exception as exc:  # noqa: BLE001 - raised where the slices are read
            ready.put_nowait((index, exc))
        finally:
            await answer.aclose()

    tasks = [asyncio.create_task(forward(index, answer)) for index, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            index, given = await ready.get()
            if isinstance(given, BaseException):
                raise given
            if given is None:
                left -= 1
            else:
                yield index, given
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
