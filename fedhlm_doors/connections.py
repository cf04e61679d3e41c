"""Bounds on the connections of a door: how many there are, and how long a client may take to say what it wants."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedhlm.process.descriptors import ACCEPTED_AT_ONCE, BACKLOG, room_for

CONNECTIONS_MAX: Final = 1_024
REQUEST_S: Final = 30.0
KEEP_ALIVE_S: Final = 75
_LATE: Final = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def limits() -> dict[str, Any]:
    """The settings of uvicorn that bound connections.

    A request that comes while all connections are busy is answered by 503.
    """
    return {
        "http": BoundedConnection,
        "limit_concurrency": room_for(CONNECTIONS_MAX),
        "backlog": ACCEPTED_AT_ONCE,
        "timeout_keep_alive": KEEP_ALIVE_S,
    }


class BoundedConnection(H11Protocol):
    """A connection that ends if its request is not whole after REQUEST_S seconds.

    At the server's limit of connections, the one that has waited longest for its request makes room.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.since_s = 0.0
        self._patience: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> bool:
        """Whether no request has come, or only a part of one."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Set up a new connection."""
        super().connection_made(transport)
        self._begin()
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            others = [one for one in self.connections if isinstance(one, BoundedConnection) and one is not self]
            idle = min((one for one in others if one.waiting), key=lambda one: one.since_s, default=None)
            if idle is not None:
                idle.transport.abort()
                self.connections.discard(idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after the connection is lost."""
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request. Its time begins with its first byte."""
        super().data_received(data)
        if not self.waiting:
            self._end()
        elif self._patience is None:
            self._begin()

    def _begin(self) -> None:
        self.since_s = self.loop.time()
        self._patience = self.loop.call_later(REQUEST_S, self._late)

    def _end(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _late(self) -> None:
        self._patience = None
        if self.conn.our_state is h11.IDLE or self.conn.our_state is h11.SEND_RESPONSE:  # nothing was answered yet
            self.transport.write(_LATE)
        self.transport.close()


class DoorServer(uvicorn.Server):
    """A server that leaves the signals to the part, and connections to the system until it can accept them.

    When it stops, open responses have `close_s` seconds to end. The others are cut off as if their clients had left,
    which every route knows how to end.
    """

    def __init__(self, config: uvicorn.Config, close_s: float = 0.0) -> None:
        super().__init__(config)
        self._close_s = close_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Change no handler of a signal."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        for sock in sockets or []:
            sock.listen(BACKLOG)  # asyncio has set its own limit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, and end those that are open."""
        cut = asyncio.get_running_loop().call_later(self._close_s, self._cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
