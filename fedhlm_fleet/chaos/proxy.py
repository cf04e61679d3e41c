"""A TCP proxy that impairs a link: it stalls, cuts, refuses, throttles or delays, or leaves a half-open connection.

It forwards bytes completely and in order. Conditions hold for all connections, old and new, until `heal`. `cut` and
`half_open` act once, on the present connections.
"""

import asyncio
import socket
from contextlib import suppress
from types import TracebackType
from typing import Final, Literal, Self

READ_BYTES: Final = 16_384
BUFFER_BYTES: Final = 256 * 1024  # buffer of a link in each direction, as in a socket
THROTTLED_PIECES: Final = 20  # pieces per second, so that a slow link flows evenly

Side = Literal["near", "far"]


class Conditions:
    """The present conditions of a link. `bytes_per_s` 0 means no limit."""

    def __init__(self) -> None:
        self.flowing = asyncio.Event()
        self.heal()

    def heal(self) -> None:
        """Restore a good link."""
        self.flowing.set()
        self.refusing = False
        self.delay_s = 0.0
        self.bytes_per_s = 0


class Proxy:
    """Listens on a free local port and forwards to host:port; leaving the context closes every connection."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._conditions = Conditions()
        self._links: set[_Link] = set()
        self.accepted = 0
        self.refused = 0
        self.forwarded_bytes = 0

    @property
    def port(self) -> int:
        """The port on which the proxy listens."""
        return self._port

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._links)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        tasks = [link.task for link in self._links]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def stall(self) -> None:
        """Forward nothing, not even the end of a connection, and buffer up to BUFFER_BYTES in each direction."""
        self._conditions.flowing.clear()

    def delay(self, seconds: float) -> None:
        """Delay every byte by this time."""
        self._conditions.delay_s = seconds

    def throttle(self, bytes_per_s: int) -> None:
        """Limit the rate in each direction of each connection."""
        self._conditions.bytes_per_s = bytes_per_s

    def cut(self, *, refuse: bool = False) -> None:
        """Reset every connection at both ends; with `refuse`, reset new ones as well until `heal`."""
        self._conditions.refusing = refuse
        for link in self._links:
            link.task.cancel()

    def half_open(self, unaware: Side) -> None:
        """Reset one end of every connection; the `unaware` end (near: the client's) stays open, without answers."""
        for link in self._links:
            link.half_open(unaware)

    def heal(self) -> None:
        """Restore good conditions. A half-open connection stays half-open."""
        self._conditions.heal()

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._conditions.refusing:
            self.refused += 1
            _reset(writer)
            return
        link = _Link(self, self._conditions)
        link.task = asyncio.create_task(link.run(reader, writer, *self._target), name="proxy-link")
        self._links.add(link)
        self.accepted += 1
        link.task.add_done_callback(lambda _: self._links.discard(link))


class _Link:
    """One connection through the proxy."""

    task: "asyncio.Task[None]"

    def __init__(self, proxy: Proxy, conditions: Conditions) -> None:
        self._proxy = proxy
        self._conditions = conditions
        self._ends: dict[Side, asyncio.StreamWriter] = {}
        self._swallowing = False

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
        self._ends["near"] = writer
        try:
            far_reader, self._ends["far"] = await asyncio.open_connection(host, port)
            ways = [
                asyncio.create_task(self._forward(reader, "far"), name="proxy-up"),
                asyncio.create_task(self._forward(far_reader, "near"), name="proxy-down"),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                if self._swallowing:  # one end is closed already; wait until the unaware one gives up
                    await asyncio.wait(ways)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # the target does not accept connections, so the client's connection is reset
        finally:
            for end in self._ends.values():
                _reset(end)

    def half_open(self, unaware: Side) -> None:
        gone: Side = "far" if unaware == "near" else "near"
        if gone in self._ends:
            self._swallowing = True
            _reset(self._ends[gone])
        else:
            self.task.cancel()  # the connection to the target is not open yet

    async def _forward(self, reader: asyncio.StreamReader, to: Side) -> None:
        """Forward one direction; reading ahead of the writer means that a delay does not reduce the bandwidth."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(BUFFER_BYTES // READ_BYTES)

        async def read() -> None:
            with suppress(OSError):
                while data := await reader.read(READ_BYTES):
                    await pieces.put((loop.time() + self._conditions.delay_s, data))
            await pieces.put((loop.time(), b""))

        reading = asyncio.create_task(read(), name="proxy-read")
        try:
            while True:
                due_s, data = await pieces.get()
                if (wait_s := due_s - loop.time()) > 0.0:
                    await asyncio.sleep(wait_s)
                await self._conditions.flowing.wait()
                if not data:
                    return
                if not self._swallowing:
                    with suppress(OSError):
                        await self._write(self._ends[to], data)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        while data:
            await self._conditions.flowing.wait()
            rate = self._conditions.bytes_per_s
            size = max(1, rate // THROTTLED_PIECES) if rate else len(data)
            piece, data = data[:size], data[size:]
            writer.write(piece)
            await writer.drain()
            self._proxy.forwarded_bytes += len(piece)
            if rate:
                await asyncio.sleep(len(piece) / rate)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a TCP reset."""
    with suppress(OSError):
        plain = writer.get_extra_info("socket")
        if plain is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()
