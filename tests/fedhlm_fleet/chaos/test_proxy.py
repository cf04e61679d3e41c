"""The proxy does to a connection what it says, and nothing to the bytes."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest

from fedhlm_fleet.chaos.proxy import Proxy

WITHIN_S = 10.0
QUIET_S = 0.1  # long enough for a byte on this machine; a proxy that leaks one fails only the more surely for more
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class World(NamedTuple):
    """A proxy before a server whose connections come out of `accepted`."""

    proxy: Proxy
    accepted: "asyncio.Queue[Stream]"
    writers: list[asyncio.StreamWriter]  # all that are to be closed at the end

    async def near(self) -> Stream:
        """The near end of a new connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port)
        self.writers.append(writer)
        return reader, writer

    async def connect(self) -> tuple[Stream, Stream]:
        """A new connection: the near end and the far end, of which the proxy knows that it is there."""
        near, far = await self.near(), await self.accepted.get()
        near[1].write(b"!")
        await far[0].readexactly(1)
        return near, far


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    accepted: asyncio.Queue[Stream] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        accepted.put_nowait((reader, writer))

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with asyncio.timeout(WITHIN_S), Proxy("127.0.0.1", port) as proxy:
        yield World(proxy, accepted, writers)
    server.close()
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0)  # an aborted transport says so in the next turn of the loop
    await server.wait_closed()


async def silent(reader: asyncio.StreamReader) -> bool:
    """Whether nothing, not even an end, comes for a while."""
    try:
        async with asyncio.timeout(QUIET_S):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the connection is over: an end or a reset."""
    try:
        return await reader.read(1) == b""
    except ConnectionResetError:
        return True


async def test_bytes_arrive_whole_and_in_order_both_ways() -> None:
    async with world() as w:
        (near_in, near_out), (far_in, far_out) = await w.connect()
        sent = bytes(range(256)) * 4_096  # more than any buffer on the way
        near_out.write(sent)
        assert await far_in.readexactly(len(sent)) == sent
        far_out.write(sent[::-1])
        assert await near_in.readexactly(len(sent)) == sent[::-1]
        assert w.proxy.forwarded_bytes == 2 * len(sent) + 1


@pytest.mark.parametrize("closer", ["near", "far"])
async def test_the_end_of_one_side_ends_the_other_after_its_last_byte(closer: str) -> None:
    async with world() as w:
        near, far = await w.connect()
        (_, out), (reader, _) = (near, far) if closer == "near" else (far, near)
        out.write(b"last words")
        out.close()
        assert await reader.readexactly(10) == b"last words"
        assert await ended(reader)


async def test_a_stall_keeps_everything_and_heal_lets_it_go() -> None:
    async with world() as w:
        (near_in, near_out), (far_in, far_out) = await w.connect()
        w.proxy.stall()
        near_out.write(b"up")
        far_out.write(b"down")
        assert await silent(far_in)
        assert await silent(near_in)
        other_in, other_out = await w.near()
        other_out.write(b"me too")  # a new connection is taken and stalls as well
        assert await silent(other_in)
        w.proxy.heal()
        assert await far_in.readexactly(2) == b"up"
        assert await near_in.readexactly(4) == b"down"
        assert await (await w.accepted.get())[0].readexactly(6) == b"me too"


async def test_a_stall_hides_the_end_of_a_connection() -> None:
    async with world() as w:
        (_, near_out), (far_in, _) = await w.connect()
        w.proxy.stall()
        near_out.close()
        assert await silent(far_in)
        w.proxy.heal()
        assert await ended(far_in)


async def test_a_stalled_link_holds_no_more_than_its_buffer() -> None:
    async with world() as w:
        (_, near_out), _ = await w.connect()
        w.proxy.stall()
        near_out.write(bytes(64 * 1024 * 1024))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await near_out.drain()  # it would come back if the proxy read on
        near_out.transport.abort()


async def test_a_cut_resets_both_ends_and_lets_new_ones_in() -> None:
    async with world() as w:
        (near_in, _), (far_in, _) = await w.connect()
        w.proxy.cut()
        assert await ended(near_in)
        assert await ended(far_in)
        (_, near_out), (far_in, _) = await w.connect()
        near_out.write(b"again")
        assert await far_in.readexactly(5) == b"again"


async def test_a_cut_that_refuses_lets_nobody_in_until_healed() -> None:
    async with world() as w:
        await w.connect()
        w.proxy.cut(refuse=True)
        near_in, _ = await w.near()
        assert await ended(near_in)
        assert w.accepted.empty()
        assert w.proxy.refused == 1
        w.proxy.heal()
        await w.connect()


@pytest.mark.parametrize("unaware", ["near", "far"])
async def test_half_open_leaves_one_side_unaware(unaware: str) -> None:
    async with world() as w:
        ends = dict(zip(("near", "far"), await w.connect(), strict=True))
        w.proxy.half_open("near" if unaware == "near" else "far")
        reader, writer = ends.pop(unaware)
        ((aware, _),) = ends.values()
        assert await ended(aware)
        writer.write(b"hello?")
        await writer.drain()
        assert await silent(reader)
        assert w.proxy.connections == 1
        (_, near_out), (far_in, _) = await w.connect()  # new connections are whole
        near_out.write(b"new")
        assert await far_in.readexactly(3) == b"new"
        writer.close()
        while w.proxy.connections > 1:  # noqa: ASYNC110 - the unaware side gives up, and nothing is left of it
            await asyncio.sleep(0.005)


async def test_a_throttle_takes_the_time_that_its_rate_says() -> None:
    async with world() as w:
        (_, near_out), (far_in, _) = await w.connect()
        w.proxy.throttle(10_000)
        began = time.monotonic()
        near_out.write(bytes(3_000))
        await far_in.readexactly(3_000)
        assert time.monotonic() - began > 0.25
        w.proxy.heal()
        near_out.write(bytes(1_000_000))  # 100 s at the old rate
        await far_in.readexactly(1_000_000)


async def test_a_delay_shifts_everything_and_costs_no_bandwidth() -> None:
    async with world() as w:
        (_, near_out), (far_in, _) = await w.connect()
        w.proxy.delay(0.2)
        began = time.monotonic()
        for number in range(20):
            near_out.write(bytes([number]) * 1_000)
            await asyncio.sleep(0.005)  # pieces of their own
        received = await far_in.readexactly(20_000)
        took = time.monotonic() - began
        assert received == b"".join(bytes([n]) * 1_000 for n in range(20))
        assert 0.2 < took < 20 * 0.2  # in a row, not one after the other


async def test_nobody_behind_it_is_a_reset() -> None:
    server = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    async with asyncio.timeout(WITHIN_S), Proxy("127.0.0.1", port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ended(reader)
        writer.close()


async def test_leaving_the_proxy_ends_its_connections_even_stalled_ones() -> None:
    async with world() as w:
        (near_in, near_out), _ = await w.connect()
        w.proxy.stall()
        near_out.write(b"held")
        await w.proxy.__aexit__(None, None, None)
        assert await ended(near_in)
        assert w.proxy.connections == 0
