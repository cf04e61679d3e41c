"""What a broker does not take: divided where that can be, else dropped, counted and answered; no link is lost for ever."""

import asyncio
from typing import Any

import pytest

from edge_broker.embedded import EmbeddedBroker
from edge_broker.mqtt import wire
from edge_broker.mqtt.packets import PacketType
from fedhlm.bus.interface import Retained
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp
from fedhlm.errors import ConfigError
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Escalation, EscalationBatch, RoutedEscalation, Verified, VerifiedTokens
from fedhlm.telemetry import Counters
from tests.brokers import Mosquitto, take, until
from tests.field.fleet import both_brokers, broker_of, fleets

LARGEST = 20_000
LIMIT_S = 60.0


def block(agent: str, size: int) -> RoutedEscalation:
    escalation = Escalation(**Stamp(agent)(), session=1, epoch=0, base=0, ids=bytes(size), patience_ms=1_000)
    return RoutedEscalation(agent, escalation)


@both_brokers
async def test_lists_are_divided_and_a_lone_item_that_is_too_large_is_named(kind: str) -> None:
    async with asyncio.timeout(LIMIT_S), broker_of(kind, largest=LARGEST) as broker:
        counters = Counters()
        async with (
            MqttBus(broker.url, client_id="edge", connect_timeout_s=5.0) as bus,
            MqttBus(broker.url, client_id="cloud", connect_timeout_s=5.0) as other,
        ):
            assert bus.max_packet_bytes == LARGEST
            await other.subscribe("fedhlm/1/#")
            party = Party(bus=bus, stamp=Stamp("edge-home"), counters=counters)
            cloud = Party(bus=other, stamp=Stamp("cloud"), counters=Counters())
            items = tuple(block(f"a{n}", LARGEST if n == 5 else 6_000) for n in range(9))
            batch = EscalationBatch(**party.stamp(), items=items)
            sent = await party.send(topics.CLOUD_VERIFY, batch, cluster="home")
            refused: Any = sent.too_large
            assert [message.items[0].agent for message in refused] == ["a5"]
            assert counters["too_large_messages"] == 1
            known = VerifiedTokens(**party.stamp(), space="s", items=tuple(Verified(bytes(999), n) for n in range(64)))
            assert not (await party.send(topics.KNOWN, known, cluster="home")).too_large
            heard: list[Any] = []
            async for received in cloud.received():
                heard += received.message.items  # type: ignore[union-attr]
                if len(heard) == 8 + 64:
                    break
            assert [routed.agent for routed in heard[:8]] == [f"a{n}" for n in range(9) if n != 5]
            assert [verified.token for verified in heard[8:]] == list(range(64))
            assert bus.statistics.reconnects == 0


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@both_brokers
async def test_a_message_that_ends_the_connection_ends_it_a_few_times_only(kind: str, protocol: Any) -> None:
    async with asyncio.timeout(LIMIT_S), broker_of(kind, largest=LARGEST) as broker:
        will = Retained("p/x", b"off")
        async with (
            MqttBus(broker.url, client_id="x", will=will, protocol=protocol, backoff_cap_s=0.1) as bus,
            MqttBus(broker.url, client_id="y", connect_timeout_s=5.0) as other,
        ):
            await other.subscribe("t/#")
            for n in range(3):
                await bus.publish(f"t/{n}", b"")
            # As if the broker had said nothing of its limit, which brokers of 3.1.1 never do.
            bus._dial.limits = bus._dial.limits._replace(max_packet_bytes=None)
            large = await bus.publish("t/large", bytes(2 * LARGEST))
            for n in range(3, 6):
                await bus.publish(f"t/{n}", b"")
            assert large
            topics_heard: set[str] = set()
            while len(topics_heard) < 6:
                topics_heard.add((await take(other, 1))[0].topic)
            await until(lambda: bus.connected and len(bus._outbox) == 0)
            assert topics_heard == {f"t/{n}" for n in range(6)}
            assert bus.statistics.dropped_out == 1
            assert 1 <= bus.statistics.reconnects <= 3
            # It has learnt: the next one of that size is refused at once.
            assert not await bus.publish("t/large", bytes(2 * LARGEST))
            assert bus.max_packet_bytes is not None


async def test_a_message_above_mosquittos_other_limit_is_dropped_and_the_link_stays() -> None:
    """It answers with a reason code that a PUBACK must not have, and never says in its CONNACK what it takes."""
    async with (
        asyncio.timeout(LIMIT_S),
        Mosquitto(extra=f"message_size_limit {LARGEST}") as broker,
        MqttBus(broker.url, client_id="x") as bus,
        MqttBus(broker.url, client_id="y") as other,
    ):
        await other.subscribe("t/#")
        assert await bus.publish("t/0", bytes(2 * LARGEST))
        await until(lambda: bus.statistics.dropped_out == 1)
        assert not await bus.publish("t/1", bytes(2 * LARGEST)), "it has learnt"
        await bus.publish("t/2", b"small")
        assert [delivery.topic for delivery in await take(other, 1)] == ["t/2"]
        assert bus.statistics.reconnects == 0


@pytest.mark.parametrize("code", [0x95, 0x82, 0x01, 0xFF])
async def test_a_reason_code_that_no_puback_has_is_a_refusal(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wire.answer

    def strange(kind: PacketType, number: int, version: int, *more: Any) -> bytes:
        return bytes([kind << 4, 3, *number.to_bytes(2), code]) if number == 2 else plain(kind, number, version, *more)

    async with asyncio.timeout(LIMIT_S), EmbeddedBroker() as broker, MqttBus(broker.url, client_id="x") as bus:
        await bus.wait_connected()
        monkeypatch.setattr(wire, "answer", strange)
        for n in range(4):
            await bus.publish(f"t/{n}", bytes(100))
        await until(lambda: len(bus._outbox) == 0)
        assert (bus.statistics.dropped_out, bus.statistics.reconnects) == (1 if code >= 0x80 else 0, 0)
        assert (bus.max_packet_bytes == 102) == (code == 0x95)


@both_brokers
async def test_a_prompt_that_does_not_fit_is_an_error_at_once_and_the_fleet_goes_on(kind: str) -> None:
    async with fleets(kind, largest=4_000) as (fleet,):
        client = await fleet.whole("porch")
        assert (await client.write("porch", "Oil", max_tokens=4)).finish == "length"
        with pytest.raises(ConfigError, match="4000 bytes"):
            await client.write("porch", "x" * 5_000, max_tokens=4)
        assert (await client.write("porch", "Oil", max_tokens=4)).finish == "length"
        assert fleet.reconnects == {}


@pytest.mark.parametrize(
    ("line", "qos", "retains"), [("max_qos 0", 0, True), ("retain_available false", 1, False)], ids=["qos", "retain"]
)
async def test_a_broker_without_qos_1_or_retained_messages_is_served_as_it_can_be(
    line: str, qos: int, retains: bool
) -> None:
    async with asyncio.timeout(LIMIT_S), Mosquitto(extra=line) as broker:
        birth, will = Retained("p/x", b"on"), Retained("p/x", b"off")
        async with MqttBus(broker.url, client_id="x", birth=birth, will=will, backoff_cap_s=0.1) as bus:
            await bus.wait_connected()
            await bus.subscribe("t", "p/x")
            await bus.publish("t", b"1", retain=True)
            assert [delivery.payload for delivery in await take(bus, 1)][-1:] in ([b"1"], [b"on"])
            assert min(1, bus._dial.limits.max_qos) == qos
            assert bus._dial.limits.retains == retains
            assert bus.statistics.reconnects == 0
