"""What our MQTT client does with a socket, or a connection, that is gone before its turn comes."""

import asyncio
import gc
import socket
from typing import Any

import aiomqtt
import pytest

from fedhlm.bus.aiomqtt_patches import PatchedClient
from fedhlm.bus.mqtt import MqttBus
from tests.brokers import until


async def test_a_socket_closed_at_once_leaves_no_writer_to_the_next_one_of_its_number() -> None:
    loop = asyncio.get_running_loop()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: errors.append(context))
    client = PatchedClient("127.0.0.1", 1)
    near, far = socket.socketpair()
    number = near.fileno()
    client._on_socket_register_write(client._client, None, near)
    near.close()
    others = [*socket.socketpair()]
    try:
        assert number in [other.fileno() for other in others], "the system gives the lowest free number"
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not loop.remove_writer(number)
    finally:
        for end in (far, *others):
            end.close()
    assert errors == []


async def test_a_socket_closed_at_once_is_no_error_of_the_loop() -> None:
    loop = asyncio.get_running_loop()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: errors.append(context))
    client = PatchedClient("127.0.0.1", 1)
    near, far = socket.socketpair()
    client._on_socket_register_write(client._client, None, near)
    near.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    far.close()
    assert errors == []


async def test_an_open_socket_is_written_to() -> None:
    loop = asyncio.get_running_loop()
    client = PatchedClient("127.0.0.1", 1)
    near, far = socket.socketpair()
    client._on_socket_register_write(client._client, None, near)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert loop.remove_writer(near.fileno())
    near.close()
    far.close()


CONNACK_5 = b"\x20\x03\0\0\0"
TAKEN_OVER_5 = b"\xe0\x02\x8e\0"


@pytest.mark.parametrize("behind", [TAKEN_OVER_5, b""], ids=["taken over", "closed"])
async def test_a_connection_that_ends_behind_its_connack_is_told_and_tried_again(
    behind: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.read(1_024)
        writer.write(CONNACK_5 + behind)
        writer.close()

    async with asyncio.timeout(20.0), await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        # No birth and no filters: nothing else would notice that nobody is there.
        async with MqttBus(f"mqtt://127.0.0.1:{port}", client_id="x", protocol="5", backoff_cap_s=0.1) as bus:
            # Behind each CONNACK it counts as connected, until it has read that the connection has ended.
            await until(lambda: calls >= 3 and not bus.connected)
        gc.collect()
    assert ("session taken over (reason code 0x8E)" in caplog.text) == bool(behind)
    assert "never retrieved" not in caplog.text


async def test_a_cancellation_in_the_same_turn_as_the_answer_is_not_lost() -> None:
    client = PatchedClient("127.0.0.1", 1)
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(client._wait_for(answer, None))
    await asyncio.sleep(0)
    answer.set_result(7)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_an_answer_that_does_not_come_in_time_is_an_error() -> None:
    client = PatchedClient("127.0.0.1", 1)
    with pytest.raises(aiomqtt.MqttError, match="timed out"):
        await client._wait_for(asyncio.Event().wait(), 0.01)
