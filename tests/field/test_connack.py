"""What a broker states in its CONNACK is kept to: a broker with few means, and one that lacks some."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from edge_broker.embedded import EmbeddedBroker
from edge_broker.mqtt import server, wire
from edge_broker.mqtt.packets import PacketType, Property, ReasonCode
from fedhlm.bus.mqtt import NO_WILDCARDS, MqttBus
from fedhlm.errors import BusError
from tests.brokers import take, until

LIMIT_S = 30.0
KEEPALIVE_S = 1


@pytest.fixture
def stated(monkeypatch: pytest.MonkeyPatch) -> dict[Property, int | str]:
    """What the embedded broker states; a test adds to it."""
    values: dict[Property, int | str] = {}
    plain = wire.connack

    def connack(version: int, reason: ReasonCode, own: Iterable[tuple[Property, int | str]] = ()) -> bytes:
        return plain(version, reason, (dict(own) | values).items())

    monkeypatch.setattr(wire, "connack", connack)
    return values


def mqtt(broker: EmbeddedBroker, name: str = "x", **options: Any) -> MqttBus:
    return MqttBus(broker.url, client_id=name, backoff_cap_s=0.1, **options)


async def test_without_wildcards_none_is_asked_for_and_the_link_stays(
    stated: dict[Property, int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stated[Property.WILDCARDS] = 0
    asked: list[str] = []
    subscribe = server.Server.subscribe

    def noted(self: server.Server, link: Any, one: Any) -> int:
        asked.append(one.pattern)
        return subscribe(self, link, one)

    monkeypatch.setattr(server.Server, "subscribe", noted)
    async with asyncio.timeout(LIMIT_S), EmbeddedBroker() as broker, mqtt(broker) as bus:
        await bus.wait_connected()
        with pytest.raises(BusError, match=NO_WILDCARDS):
            await bus.subscribe("t/+", "t/1")
        await bus.subscribe("t/1")
        await bus.publish("t/1", b"x")
        assert (await take(bus, 1))[0].payload == b"x"
        assert set(asked) == {"t/1"}
        assert bus.statistics.reconnects == 0


async def test_the_brokers_keepalive_replaces_ours(
    stated: dict[Property, int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stated[Property.SERVER_KEEP_ALIVE] = KEEPALIVE_S
    pings: list[str] = []
    handle = server.Link._handle

    def heard(self: server.Link, first: int, body: bytes) -> None:
        if first >> 4 == PacketType.PINGREQ:
            pings.append(self.name)
        handle(self, first, body)

    monkeypatch.setattr(server.Link, "_handle", heard)
    async with asyncio.timeout(LIMIT_S), EmbeddedBroker() as broker, mqtt(broker, keepalive_s=600):
        await until(lambda: len(pings) >= 2)


async def test_no_more_messages_are_unacknowledged_than_the_broker_takes(
    stated: dict[Property, int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stated[Property.RECEIVE_MAXIMUM] = 2
    held: list[bytes] = []
    answer = wire.answer

    def withheld(kind: PacketType, number: int, version: int, *more: Any) -> bytes:
        packet = answer(kind, number, version, *more)
        held.append(packet)
        return b""

    async with asyncio.timeout(LIMIT_S), EmbeddedBroker() as broker, mqtt(broker) as bus:
        await bus.wait_connected()
        monkeypatch.setattr(wire, "answer", withheld)
        for n in range(10):
            await bus.publish("t", bytes([n]))
        await asyncio.sleep(0.5)
        assert len(held) == 2
        assert bus._outbox.under_way == 2
        monkeypatch.undo()


async def test_a_broker_that_names_us_and_takes_no_aliases_is_served(stated: dict[Property, int | str]) -> None:
    stated |= {
        Property.ASSIGNED_ID: "you",
        Property.TOPIC_ALIAS_MAXIMUM: 0,
        Property.SHARED: 0,
        Property.SUBSCRIPTION_IDS: 0,
    }
    async with asyncio.timeout(LIMIT_S), EmbeddedBroker() as broker, mqtt(broker) as bus:
        await bus.subscribe("t/#")
        for n in range(3):
            await bus.publish("t/1", bytes([n]))
        assert [d.payload for d in await take(bus, 3)] == [b"\0", b"\1", b"\2"]
        assert bus.statistics.reconnects == 0
