"""What our MQTT client does with a socket that is gone before its turn comes."""

import asyncio
import socket
from typing import Any

from fedhlm.bus.aiomqtt_patches import PatchedClient


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
