"""Clocks that are behind, counters that count, and claims of a liar, on real brokers."""

import asyncio
import struct
import time

from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.learning.curve import Curve
from fedhlm.learning.settled import SLACK_TOKENS
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Contribution, Learned
from fedhlm.telemetry import Counters
from tests.brokers import until
from tests.field.fleet import GuardedBroker, both_brokers, fleets

MEASURE = "closed-form/gumbel/sampled"
BEHIND_S = 600.0


def curve(tokens: float, harm: float) -> bytes:
    """All tokens in one bin."""
    return bytes([0, 4, 0, 0, 0, 0, 0, 0]) + struct.pack("<4f", tokens, tokens, harm, harm)


@both_brokers
async def test_a_device_whose_clock_is_behind_still_counts(kind: str) -> None:
    """Its second life numbers its messages from one again, ten minutes before its first."""
    async with fleets(kind) as (fleet,):
        await fleet.edge(**{"federation.round_s": "0.2"})
        await fleet.cloud()
        heard: list[Learned] = []
        observer = await fleet.client()
        observer._hear = lambda received: (
            heard.append(received.message) if isinstance(received.message, Learned) else None
        )
        await observer.subscribe(topics.FL_STATE.name(cluster="home"))

        def tokens() -> float:
            data = heard[-1].curves.get(MEASURE) if heard else None
            return 0.0 if data is None else float(Curve.from_bytes(data).total_weight)

        bus = MqttBus(fleet.url("agent home porch"), client_id="porch-by-hand")
        async with bus:
            for number, behind_s, count in ((50, 0.0, 100.0), (51, BEHIND_S, 120.0)):
                stamp = Stamp("porch", lambda behind_s=behind_s: time.time() - behind_s)  # type: ignore[misc]
                party = Party(bus=bus, stamp=stamp, counters=Counters())
                for online in (False, True):
                    state = presence(stamp, "agent", online=online)
                    await party.send(topics.AGENT_STATUS, state, cluster="home", agent="porch")
                    await asyncio.sleep(0.2)
                message = Contribution(**stamp(), round=number, members=1, curves={MEASURE: curve(count, count / 10)})
                await party.send(topics.FL_UPDATE, message, cluster="home", agent="porch")
                await until(lambda count=count: tokens() == count)  # type: ignore[misc]
            counted = fleet.counters["edge home"]
            assert (counted["contributions"], counted["duplicate_messages"], counted["cut_contributions"]) == (2, 0, 0)
            # A liar: no verdict that passed the edge scored a million tokens.
            message = Contribution(**stamp(), round=52, members=1, curves={MEASURE: curve(1e6, 0.0)})
            await party.send(topics.FL_UPDATE, message, cluster="home", agent="porch")
            await until(lambda: counted["cut_contributions"] == 1 and tokens() != 120.0)
            assert tokens() <= SLACK_TOKENS


@both_brokers
async def test_a_restart_of_the_broker_is_counted_by_every_part(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        client = await fleet.whole("porch")
        assert (await client.write("porch", "Oil", max_tokens=4)).finish == "length"
        broker = fleet._broker
        assert not isinstance(broker, GuardedBroker)
        await broker.stop()
        await asyncio.sleep(0.2)
        await broker.start()
        await until(lambda: all(bus.connected for buses in fleet.buses.values() for bus in buses))
        for name in ("agent home porch ", "edge home", "cloud"):
            assert fleet.counters[name]["reconnects"] >= 1, name
            assert fleet.counters[name]["received_bytes"] > 0, name
        assert (await client.write("porch", "Oil", max_tokens=4)).finish == "length"
        assert fleet.counters["agent home porch "]["downlink_bytes"] > 0
