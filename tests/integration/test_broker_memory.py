"""A real mosquitto with the limits that `fedhlm pki mosquitto` writes, and a member that floods it with doubts."""

import asyncio
import re
from pathlib import Path

import aiomqtt
import pytest

from fedhlm.errors import ProtocolError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import MAX_DOUBTS
from fedhlm.protocol.messages import SCHEMA_VERSION, Uncertain, UncertainTokens
from fedhlm_fleet.pki.acl import Kind
from fedhlm_fleet.pki.mosquitto import LIMITS, Listener, _limits
from tests.brokers import MOSQUITTO, Mosquitto

FLOOD_S = 2.0
PROGRAM_BYTES = 32 * 1024 * 1024  # what mosquitto takes for itself, and in one step beyond its limit


def doubts(count: int) -> UncertainTokens:
    items = tuple(Uncertain(position, 5, 0.9, bytes(32)) for position in range(count))
    return UncertainTokens(
        version=SCHEMA_VERSION, sender="liar", sequence=1, sent_ms=0, session=1, space="s", items=items
    )


def test_a_message_has_64_doubts_at_most() -> None:
    topics.decode_for(topics.PEER, encode(doubts(MAX_DOUBTS)))
    with pytest.raises(ProtocolError, match="64"):
        topics.decode_for(topics.PEER, encode(doubts(MAX_DOUBTS + 1)))


def resident_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text("utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
@pytest.mark.parametrize("kind", ["cluster", "cloud"])
async def test_messages_of_4000_doubts_to_clients_that_never_read_stay_within_the_brokers_memory(kind: Kind) -> None:
    """Also afterwards, messages of others arrive as before."""
    payload = encode(doubts(4_000))
    topic = topics.PEER.name(cluster="home", agent="liar")
    lines = _limits(Listener(1883, data="/tmp"), kind)  # noqa: S108 - not used: nothing persists here
    extra = "\n".join(line for line in lines if not line.startswith(("#", "log_", "persistence", "autosave")))
    async with Mosquitto(extra=extra) as broker:
        assert broker._process is not None
        deaf: list[asyncio.StreamWriter] = []
        for _ in range(4):
            reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
            name = f"deaf{len(deaf)}".encode()
            writer.write(b"\x10" + bytes([12 + len(name)]) + b"\0\4MQTT\4\2\0\0\0" + bytes([len(name)]) + name)
            await writer.drain()
            await reader.readexactly(4)
            wanted = topic.encode()
            writer.write(b"\x82" + bytes([5 + len(wanted)]) + b"\0\1\0" + bytes([len(wanted)]) + wanted + b"\1")
            await writer.drain()
            deaf.append(writer)

        async def flood() -> None:
            end_s = asyncio.get_running_loop().time() + FLOOD_S
            while asyncio.get_running_loop().time() < end_s:
                try:
                    async with aiomqtt.Client("127.0.0.1", broker.port, identifier="liar") as liar:
                        while asyncio.get_running_loop().time() < end_s:
                            await liar.publish(topic, payload)
                except aiomqtt.MqttError:
                    await asyncio.sleep(0.05)

        async with aiomqtt.Client("127.0.0.1", broker.port, identifier="honest") as honest:
            await honest.subscribe("honest", qos=1)
            flooding = asyncio.create_task(flood())
            for number in range(20):
                await honest.publish("honest", str(number), qos=1)
                await asyncio.sleep(FLOOD_S / 20)
            await flooding
            await honest.publish("honest", "last", qos=1)
            async with asyncio.timeout(30.0):
                heard = []
                async for message in honest.messages:
                    heard.append(bytes(message.payload).decode())
                    if heard[-1] == "last":
                        break
        assert heard == [*(str(number) for number in range(20)), "last"]
        assert resident_bytes(broker._process.pid) <= LIMITS[kind].memory_bytes + PROGRAM_BYTES
        for writer in deaf:
            writer.close()
