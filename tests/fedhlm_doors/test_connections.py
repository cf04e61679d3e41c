"""Connections that say nothing, or say it too slowly, take nothing from those that ask."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from fedhlm_doors import connections
from fedhlm_doors.connections import DoorServer, limits
from fedhlm_doors.flow import Streaming

LIMIT_S = 60.0
ASK = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n"
FEW_FILES = """
import asyncio, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from tests.fedhlm_doors.test_connections import serving
async def main():
    async with serving() as port:
        print(port, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def app(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """Answer once the whole body has come."""
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] == "http.request":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"here"})


@contextlib.asynccontextmanager
async def serving(app: Any = app, close_s: float = 0.0) -> AsyncIterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = DoorServer(uvicorn.Config(app, lifespan="off", ws="none", log_config=None, **limits()), close_s)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def asked(port: int, request: bytes = ASK) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


async def test_silent_connections_leave_those_who_ask_alone() -> None:
    """There are more of them than this process may open files, and all come at once."""
    async with asyncio.timeout(LIMIT_S):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FEW_FILES, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            port = int(await process.stdout.readline())
            with contextlib.ExitStack() as stack:
                process.send_signal(signal.SIGSTOP)
                silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(400)]
                process.send_signal(signal.SIGCONT)
                assert b" 200 OK" in await asked(port)
                assert await asyncio.to_thread(silent[0].recv, 1) == b"", "the oldest has made room"
        finally:
            process.kill()
        _, said = await process.communicate()
        assert b"out of system resource" not in said


@pytest.mark.parametrize("said", [b"", b"GET / HT", UPLOAD, UPLOAD + b"1234", ASK + b"GET"])
async def test_a_request_that_does_not_become_whole_ends(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.3)
    async with asyncio.timeout(LIMIT_S), serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if said.startswith(ASK):
            writer.write(ASK)
            assert b" 200 OK" in await reader.readuntil(b"here")
        writer.write(said.removeprefix(ASK))
        assert b" 408 Request Timeout" in await reader.read()
        writer.close()


async def test_a_slow_answer_is_not_a_slow_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.1)
    free = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await free.wait()
        await app(scope, receive, send)

    async with asyncio.timeout(LIMIT_S), serving(slow) as port:
        answer = asyncio.create_task(asked(port))
        assert b" 408 " in await asked(port, b"GET")  # its time has passed, and so has that of the other one
        free.set()
        assert b" 200 OK" in await answer


async def chunks() -> AsyncGenerator[bytes, None]:
    """An answer without an end."""
    while True:
        yield b"more"
        await asyncio.sleep(0.01)


async def flows(scope: Any, receive: Any, send: Any) -> None:
    async def after() -> None:
        pass

    await Streaming(chunks(), "text/plain", after)(scope, receive, send)


@pytest.mark.parametrize("leaves", ["client", "server"])
@pytest.mark.parametrize("reads", [True, False], ids=["reading", "deaf"])
async def test_a_stream_that_is_cut_off_is_no_error(
    leaves: str, *, reads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(LIMIT_S):
        async with serving(flows) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(ASK)
            assert b" 200 OK" in await reader.readuntil(b"more")
            if not reads:
                writer.transport.pause_reading()  # type: ignore[attr-defined]
            if leaves == "client":
                writer.transport.abort()
        writer.transport.abort()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_an_open_answer_may_end_when_the_server_stops() -> None:
    asked_for, free = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        asked_for.set()
        await free.wait()
        await app(scope, receive, send)

    async with asyncio.timeout(LIMIT_S):
        async with serving(slow, close_s=LIMIT_S) as port:
            answer = asyncio.create_task(asked(port))
            await asked_for.wait()
            asyncio.get_running_loop().call_later(0.3, free.set)
        assert b" 200 OK" in await answer
