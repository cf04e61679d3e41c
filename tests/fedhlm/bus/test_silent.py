"""A bus without a broker takes every message and brings none; what other buses count is followed when they are exchanged."""

import asyncio

import pytest

from fedhlm.bus.party import Party, Stamp
from fedhlm.bus.silent import SilentBus, silent
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Prompt
from fedhlm.telemetry import Counters


async def test_what_is_published_is_taken_and_nothing_comes_until_it_closes() -> None:
    bus = silent(client_id="porch")
    heard = asyncio.create_task(anything(bus), name="heard")
    async with bus:
        await bus.wait_connected()
        await bus.subscribe("#")
        assert await bus.publish("a/b", b"c")
        await asyncio.sleep(0)
        assert not heard.done()
        assert not bus.connected
    async with asyncio.timeout(5.0):
        assert await heard == 0


async def anything(bus: SilentBus) -> int:
    return len([delivery async for delivery in bus.deliveries()])


@pytest.mark.parametrize("same", [True, False])
async def test_a_party_counts_on_when_its_bus_is_replaced(same: bool) -> None:
    counters, first = Counters(), SilentBus()
    second = first if same else SilentBus()
    party = Party(bus=first, stamp=Stamp("porch"), counters=counters)
    first.statistics.reconnects = 2
    party.bus = second
    second.statistics.reconnects += 3
    assert party.bus is second
    assert counters["reconnects"] == 5
    prompt = Prompt(**party.stamp(), request="r", text="x", max_tokens=1, seed=0)
    assert await party.send(topics.PROMPT, prompt, cluster="home", agent="porch")
    assert counters["dropped_messages"] == 0
