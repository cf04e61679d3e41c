"""Who else is on the bus: presences published on a real broker, toy models, and clocks that are wrong."""

import asyncio
import re
import time

import msgspec
import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Stamp, presence
from fedhlm.config import load
from fedhlm.decoding.sampling import NOISE
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import AnyMessage, Fingerprint
from fedhlm_fleet.doctor import broker, local, others
from fedhlm_fleet.doctor.finding import Remark, Subject

TOY = Fingerprint("toy", 48, NOISE, "toy")


async def say(bus: MqttBus, topic: topics.Topic, message: AnyMessage, **levels: str) -> None:
    await bus.publish(topic.name(**levels), encode(message), retain=topic.retain)
    await bus.wait_backlog(0)


def opened(url: str, role: str = "agent") -> Subject:
    """A subject whose session is open and whose subscriptions stand."""
    examined = Subject(role, load(environ={}, flags={"broker.url": url, "agent.id": "porch"}))  # type: ignore[arg-type]
    if role != "edge":
        assert local.model(examined).level == "ok"
    assert broker.login(examined, "broker").level == "ok"
    assert broker.rights(examined, "broker").level in ("ok", "warn")  # a broker without access rules is warned of
    return examined


async def test_an_agent_s_edge_is_absent_offline_alone_and_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "RETAINED_S", 0.3)
    stamp = Stamp("edge-home")
    async with EmbeddedBroker() as running, MqttBus(running.url, client_id="e", connect_timeout_s=10.0) as bus:

        async def look() -> tuple[Remark, Remark]:
            examined = await asyncio.to_thread(opened, running.url)
            try:
                edge = await asyncio.to_thread(others.edge, examined)
                return edge, await asyncio.to_thread(others.agreement_of_agent, examined)
            finally:
                examined.close()

        edge, agreement = await look()
        assert (edge.level, agreement.level) == ("fail", "skip")
        assert "cluster.name" in edge.advice

        await say(bus, topics.EDGE_STATUS, presence(stamp, "edge", online=False), cluster="home")
        assert "offline" in (await look())[0].found

        await say(bus, topics.EDGE_STATUS, presence(stamp, "edge", online=True), cluster="home")
        edge, _ = await look()
        assert edge.level == "fail"
        assert "sees no cloud" in edge.found

        await say(bus, topics.EDGE_STATUS, presence(stamp, "edge", online=True, upstream=TOY), cluster="home")
        edge, agreement = await look()
        assert (edge.level, agreement.level) == ("ok", "fail")
        assert "tokenizer differs" in agreement.found
        assert "'toy' at the cloud" in agreement.found

        examined = await asyncio.to_thread(opened, running.url)
        examined.close()
        assert examined.model is not None
        good = msgspec.structs.replace(examined.model.fingerprint, model="another")
        await say(bus, topics.EDGE_STATUS, presence(stamp, "edge", online=True, upstream=good), cluster="home")
        assert [said.level for said in await look()] == ["ok", "ok"]


async def test_an_edge_compares_the_cloud_with_its_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "RETAINED_S", 0.3)
    async with EmbeddedBroker() as running, MqttBus(running.url, client_id="c", connect_timeout_s=10.0) as bus:

        async def look() -> tuple[Remark, Remark]:
            examined = await asyncio.to_thread(opened, running.url, "edge")
            try:
                cloud = await asyncio.to_thread(others.cloud, examined)
                return cloud, await asyncio.to_thread(others.agreement_of_edge, examined)
            finally:
                examined.close()

        assert (await look())[0].level == "fail"
        await say(bus, topics.CLOUD_STATUS, presence(Stamp("cloud"), "cloud", online=True, fingerprint=TOY))
        assert [said.level for said in await look()] == ["ok", "warn"]
        for name, fingerprint, level in (
            ("porch", TOY, "ok"),
            ("attic", msgspec.structs.replace(TOY, vocab_size=49), "fail"),
        ):
            state = presence(Stamp(name), "agent", online=True, fingerprint=fingerprint)
            await say(bus, topics.AGENT_STATUS, state, cluster="home", agent=name)
            _, agreement = await look()
            assert agreement.level == level, agreement
        assert agreement.found.startswith("attic: vocab_size differs: 49 here, 48 at the cloud")


async def test_a_cloud_sees_its_own_running_self_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "RETAINED_S", 0.3)
    async with EmbeddedBroker() as running, MqttBus(running.url, client_id="c", connect_timeout_s=10.0) as bus:
        examined = await asyncio.to_thread(opened, running.url, "cloud")
        assert (await asyncio.to_thread(others.agreement_of_cloud, examined)).level == "skip"
        await say(bus, topics.CLOUD_STATUS, presence(Stamp("cloud"), "cloud", online=True, fingerprint=TOY))
        assert (await asyncio.to_thread(others.agreement_of_cloud, examined)).level == "fail"
        examined.close()


@pytest.mark.parametrize(
    ("ahead_s", "fresh", "level"),
    [
        (0.0, True, "ok"),
        (3_600.0, True, "warn"),
        (-3_600.0, True, "warn"),
        (3_600.0, False, "warn"),
        (-3_600.0, False, "ok"),
    ],
)
async def test_a_clock_that_is_wrong_is_seen_as_far_as_it_can_be(ahead_s: float, fresh: bool, level: str) -> None:
    stamp = Stamp("edge-home", lambda: time.time() + ahead_s)
    message = presence(stamp, "edge", online=True)
    async with EmbeddedBroker() as running, MqttBus(running.url, client_id="e", connect_timeout_s=10.0) as bus:
        if not fresh:
            await say(bus, topics.EDGE_STATUS, message, cluster="home")
        examined = await asyncio.to_thread(opened, running.url)
        if fresh:
            await say(bus, topics.EDGE_STATUS, message, cluster="home")
        await asyncio.to_thread(others.edge, examined)
        said = others.clocks(examined)
        examined.close()
    assert said.level == level, said
    # A busy machine hears the message late, which no clock can tell from a party whose clock is behind.
    apart = re.search(r"(\d+) s apart", said.found)
    assert level == "ok" or (apart is not None and 3_540 <= int(apart[1]) <= 3_660)
