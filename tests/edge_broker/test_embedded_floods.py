"""What a member can make the embedded broker hold, and how long it makes others wait."""

import asyncio
import sys
from contextlib import AsyncExitStack, suppress

import aiomqtt

from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from tests.integration.test_broker_memory import doubts, resident_bytes

PACKETS = 600
DEAF = 4
# One queue's limit, what the deaf clients' sockets hold, and what the program takes for the packets that it handles.
# Without limits it would hold every packet.
GROWTH_BYTES = 48 * 1024 * 1024
ANSWER_S = 10.0


def packet(kind: int, body: bytes) -> bytes:
    length, rest = b"", len(body)
    while True:
        rest, digit = divmod(rest, 128)
        length += bytes([digit | 128 if rest else digit])
        if not rest:
            return bytes([kind]) + length + body


def text(value: str) -> bytes:
    return len(value).to_bytes(2, "big") + value.encode()


async def ended(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


async def connected(stack: AsyncExitStack, port: int, name: str) -> asyncio.StreamWriter:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stack.push_async_callback(ended, writer)
    writer.write(packet(0x10, text("MQTT") + b"\4\2\0\0" + text(name)))
    await reader.readexactly(4)
    return writer


async def test_large_messages_to_clients_that_never_read_stay_within_the_brokers_memory() -> None:
    """Messages of 4,000 doubts, as fast as the broker reads; messages of others arrive meanwhile and afterwards."""
    words = (sys.executable, "-m", "edge_broker.embedded", "--port", "0")
    broker = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    stack = AsyncExitStack()
    try:
        assert broker.stdout is not None
        port = int((await broker.stdout.readline()).decode().rpartition(":")[2])
        topic, before = topics.PEER.name(cluster="home", agent="liar"), resident_bytes(broker.pid)
        for number in range(DEAF):
            (await connected(stack, port, f"deaf{number}")).write(packet(0x82, b"\0\1" + text(topic) + b"\1"))
        message = packet(0x30, text(topic) + encode(doubts(4_000)))
        assert PACKETS * len(message) > 2 * GROWTH_BYTES

        async def flood() -> None:
            liar = await connected(stack, port, "liar")
            for _ in range(PACKETS):
                liar.write(message)
                await liar.drain()

        async with aiomqtt.Client("127.0.0.1", port, identifier="honest") as honest:
            await honest.subscribe("honest", qos=1)
            flooding, heard = asyncio.create_task(flood()), aiter(honest.messages)
            while True:
                over = flooding.done()
                async with asyncio.timeout(ANSWER_S):
                    await honest.publish("honest", "still there", qos=1)
                    await anext(heard)
                if over:
                    break
            await flooding
        assert resident_bytes(broker.pid) - before < GROWTH_BYTES
    finally:
        await stack.aclose()
        broker.terminate()
        await broker.wait()
