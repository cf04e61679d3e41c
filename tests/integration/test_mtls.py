"""Certificates and rights against a real mosquitto: who is refused and hears why, and a fleet that needs no more than it has."""

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import product
from pathlib import Path

import pytest

from fedhlm.bus import reasons
from fedhlm.bus.interface import Delivery, Retained
from fedhlm.bus.mqtt import MqttBus
from fedhlm.client import Client
from fedhlm.decoding.alone import Alone
from fedhlm.errors import BusError
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.open_topics import OPEN_TABLE, device_of
from fedhlm.protocol.topics import (
    ASSIGN,
    CLOUD_STATUS,
    FL_STATE,
    FL_UPDATE,
    TABLE,
    VERDICT,
)
from fedhlm_fleet.pki import authority
from fedhlm_fleet.pki.acl import BrokerPlace
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder
from tests.brokers import MOSQUITTO, take, until
from tests.fedhlm_fleet.pki.evaluator import Who, expected
from tests.fedhlm_fleet.pki.secured import LONG_AGO, Pki, Secured, now
from tests.integration.live import Live, asking

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
LIMIT_S = 60.0
TELL_DENIALS = "log_type debug\n"
PARTIES = (
    Who("agent", "porch", ("home",)),
    Who("agent", "attic", ("barn",)),
    Who("edge", "edge-home", ("home",)),
    Who("edge", "edge-barn", ("barn",)),
    Who("cloud", "cloud"),
    Who("client", "desk"),
    Who("client", "guest", ("barn",)),
    Who("operator", "chief"),
    Who("observer", "eye"),
)


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    with Pki() as made:
        for who in PARTIES:
            made.issue(who.name, who.role, *who.clusters)  # type: ignore[arg-type]
        made.issue("broker-home", "broker", "home")
        made.issue("broker", "broker")
        yield made


@pytest.fixture
async def shared(pki: Pki) -> AsyncIterator[Secured]:
    async with Secured(pki, BrokerPlace("shared"), extra=TELL_DENIALS) as broker:
        yield broker


async def refused(bus: MqttBus) -> str:
    with pytest.raises(BusError) as caught:
        async with asyncio.timeout(LIMIT_S), bus:
            pytest.fail("entered")
    return str(caught.value)


@pytest.mark.parametrize(
    "place",
    [BrokerPlace("cluster", "home"), BrokerPlace("cloud"), BrokerPlace("shared")],
    ids=lambda place: str(place.kind),
)
async def test_the_real_broker_allows_what_the_table_says(pki: Pki, place: BrokerPlace) -> None:
    """Everybody writes to everything and listens to everything, for every row of the table."""
    everything = [
        (topic, levels, topic.name(**levels))
        for topic in (*TABLE, *OPEN_TABLE)
        for levels in (
            {"cluster": c, "agent": a, "client": p, "member": a, "device": device_of(a), "org": "o", "suffix": "s"}
            for c, a, p in product(("home", "barn"), ("porch", "attic"), ("desk", "guest"))
        )
    ]
    unique = {
        name: (topic, {k: v for k, v in levels.items() if f"{{{k}}}" in topic.pattern})
        for topic, levels, name in everything
    }
    async with asyncio.timeout(LIMIT_S), AsyncExitStack() as stack:
        broker = await stack.enter_async_context(Secured(pki, place))
        buses = {who: await stack.enter_async_context(broker.bus(who.name)) for who in PARTIES}
        for bus in buses.values():
            await bus.subscribe("fedhlm/1/#", "homeassistant/#", "$a2a/#", "$SYS/#")
        heard: dict[Who, list[str]] = {who: [] for who in PARTIES}
        for who, (name, (topic, levels)) in product(PARTIES, unique.items()):
            before = buses[who].statistics.dropped_out
            await buses[who].publish(name, who.name.encode(), qos=1)
            await buses[who].wait_backlog(0)
            wanted = expected(who, "write", topic, levels, place.kind, place.cluster)
            assert (buses[who].statistics.dropped_out == before) == wanted, (who, name)
            if wanted:
                for reader in PARTIES:
                    if expected(reader, "read", topic, levels, place.kind, place.cluster):
                        heard[reader].append(f"{name} {who.name}")
        for reader, messages in heard.items():
            got = await take(buses[reader], len(messages))
            assert [f"{d.topic} {d.payload.decode()}" for d in got] == messages
            # Nothing is still to come: what arrives after all of it is the next thing sent.
            assert buses[reader].statistics.messages_in == len(messages)
        assert any(heard.values())


async def test_without_a_certificate_nobody_gets_in(shared: Secured) -> None:
    bus = MqttBus(f"{shared.host}?ca={shared.pki.folder / 'ca.crt'}", client_id="x", connect_timeout_s=10.0)
    assert await refused(bus) == f"broker {shared.host} asks for our certificate: set cert and key"


async def test_without_tls_nobody_gets_in(shared: Secured) -> None:
    bus = MqttBus(f"mqtt://localhost:{shared.port}", client_id="x", connect_timeout_s=1.0)
    assert "the broker closed the connection before answering" in await refused(bus)


async def test_a_certificate_of_another_authority_is_refused(shared: Secured) -> None:
    with Pki() as stranger:
        stranger.issue("porch", "agent", "home")
        told = await refused(shared.bus("porch", pki=stranger))
    assert f"{shared.host} refused our certificate: another CA made it" in told


async def test_a_broker_of_another_authority_is_not_trusted(shared: Secured) -> None:
    with Pki() as stranger:
        url = f"{shared.host}?ca={stranger.folder / 'ca.crt'}"
        told = await refused(MqttBus(url, client_id="x", connect_timeout_s=10.0))
    assert f"broker {shared.host} cannot be trusted: " in told


async def test_a_broker_under_another_name_is_not_trusted() -> None:
    with Pki() as pki:
        authority.issue(pki.folder, "broker", role="broker", hosts=("cloud.example", "127.0.0.9"), now=now())
        pki.issue("desk", "client")
        async with Secured(pki, BrokerPlace("shared")) as broker:
            told = await refused(broker.bus("desk"))
    assert "cannot be trusted: Hostname mismatch, certificate is not valid for 'localhost'" in told


async def test_an_expired_certificate_is_refused(pki: Pki) -> None:
    pki.issue("old", "agent", "home", at=LONG_AGO, days=1)
    async with Secured(pki, BrokerPlace("cluster", "home")) as broker:
        assert "refused our certificate: it, its CA or the broker's revocation list has expired" in await refused(
            broker.bus("old")
        )


async def test_a_brokers_certificate_opens_no_connection(shared: Secured) -> None:
    assert "refused our certificate: it was made for another purpose" in await refused(shared.bus("broker"))


async def test_a_certificate_for_parties_serves_no_broker(pki: Pki) -> None:
    async with Secured(pki, BrokerPlace("shared")) as broker:
        await broker.stop()
        for suffix in ("crt", "key"):
            shutil.copy(pki.folder / "issued" / "porch" / f"porch.{suffix}", broker.folder / f"broker.{suffix}")
        await broker.start()
        assert "cannot be trusted: " in await refused(broker.bus("desk"))


async def test_a_revoked_certificate_is_refused_after_sighup(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("lost", "kept"):
        pki.issue(name, "agent", "home")
    async with asyncio.timeout(LIMIT_S), Secured(pki, BrokerPlace("cluster", "home")) as broker:
        name = FL_UPDATE.name(cluster="home", agent="lost")
        async with broker.bus("lost") as lost, broker.bus("kept") as kept, broker.bus("edge-home") as edge:
            await edge.subscribe(FL_UPDATE.name(cluster="home", agent="+"))
            await lost.publish(name, b"before")
            assert [d.payload for d in await take(edge, 1)] == [b"before"]
            authority.revoke(pki.folder, "lost", now=now())
            broker.write()
            await broker.reload()
            # mosquitto asks for certificates at the handshake only: the connection lives on, without any right.
            await lost.publish(name, b"after")
            await lost.wait_backlog(0)
            assert lost.statistics.dropped_out == 1
            await kept.publish(FL_UPDATE.name(cluster="home", agent="kept"), b"good")
            assert [d.payload for d in await take(edge, 1)] == [b"good"]
            told = f"{broker.host} refused our certificate: it has been revoked"
            assert told in await refused(broker.bus("lost", client_id="second"))
            # And once the link is lost it does not come back, and says why.
            caplog.clear()
            await broker.stop()
            await broker.start()
            await until(lambda: any(told in record.getMessage() for record in caplog.records))
            assert not lost.connected
            assert next(r.levelno for r in caplog.records if told in r.getMessage()) == logging.WARNING
            await kept.wait_connected()


async def test_renewing_keeps_both_certificates_good_and_superseding_ends_the_former(pki: Pki, tmp_path: Path) -> None:
    pki.issue("twice", "agent", "home")
    home = pki.folder / "issued" / "twice"
    for suffix in ("crt", "key"):
        shutil.copy(home / f"twice.{suffix}", tmp_path)
    authority.issue(pki.folder, "twice", renew=True, now=now())
    async with asyncio.timeout(LIMIT_S), Secured(pki, BrokerPlace("cluster", "home")) as broker:
        former = broker.url_of("twice").replace(str(home), str(tmp_path))
        for url in (former, broker.url_of("twice")):
            async with MqttBus(url, client_id="twice", connect_timeout_s=10.0) as bus:
                assert bus.connected
        authority.revoke(pki.folder, "twice", superseded=True, now=now())
        broker.write()
        await broker.reload()
        assert "it has been revoked" in await refused(MqttBus(former, client_id="twice", connect_timeout_s=10.0))
        async with broker.bus("twice") as bus:
            await bus.publish(FL_UPDATE.name(cluster="home", agent="twice"), b"x")
            await bus.wait_backlog(0)
            assert bus.statistics.dropped_out == 0


FOREIGN = {
    "another's id": FL_UPDATE.name(cluster="home", agent="attic"),
    "another cluster's FL topic": FL_UPDATE.name(cluster="barn", agent="porch"),
    "another cluster's FL state": FL_STATE.name(cluster="barn"),
    "its own cluster's FL state": FL_STATE.name(cluster="home"),
    "a verdict for itself": VERDICT.name(cluster="home", agent="porch"),
    "the cloud's presence": CLOUD_STATUS.name(),
    "a cloud topic": "fedhlm/1/cloud/verify/home",
    "an assignment of itself": ASSIGN.name(agent="porch"),
}


@pytest.mark.parametrize("topic", FOREIGN.values(), ids=FOREIGN.keys())
async def test_what_an_agent_may_not_publish_is_refused_and_told_once(
    shared: Secured, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with asyncio.timeout(LIMIT_S), shared.bus("porch") as bus, shared.bus("eye") as eye:
        await eye.subscribe("#")
        for _ in range(3):
            await bus.publish(topic, b"x", retain=True)
        await bus.publish(FL_UPDATE.name(cluster="home", agent="porch"), b"mine")
        assert [d.payload for d in await take(eye, 1)] == [b"mine"]
        await bus.wait_backlog(0)
        assert bus.statistics.dropped_out == 3
    assert shared.log.count("Denied PUBLISH from porch") == 3
    size, reason = len(topic) + 1, reasons.described(0x87)
    words = f"refused a message of {size} bytes on {topic}: {reason}"
    told = [record for record in caplog.records if words in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING, logging.DEBUG, logging.DEBUG]


async def test_a_last_will_under_another_name_is_not_published(shared: Secured) -> None:
    forged, own = "fedhlm/1/c/home/a/attic/status", "fedhlm/1/c/home/a/porch/status"
    async with asyncio.timeout(LIMIT_S), shared.bus("eye") as eye:
        await eye.subscribe("fedhlm/1/c/+/a/+/status")
        for will in (Retained(forged, b"gone"), Retained(own, b"gone")):
            async with shared.bus("porch", will=will):
                pass
        assert [d.topic for d in await take(eye, 1)] == [own]
    async with asyncio.timeout(LIMIT_S), shared.bus("desk") as late:
        await late.subscribe("fedhlm/1/c/+/a/+/status")
        assert await take(late, 1) == [Delivery(own, b"gone", True)]


async def test_nobody_takes_over_another_ones_connection(shared: Secured) -> None:
    async with asyncio.timeout(LIMIT_S), shared.bus("cloud", client_id="cloud") as cloud:
        async with shared.bus("porch", client_id="cloud") as porch:
            await porch.publish(FL_UPDATE.name(cluster="home", agent="porch"), b"x")
            await porch.wait_backlog(0)
        await cloud.publish(CLOUD_STATUS.name(), b"x")
        await cloud.wait_backlog(0)
        assert cloud.connected
        assert cloud.statistics.reconnects == 0


class SecureFleet(Live):
    """`Live`, where each part has its own certificate and the edge two brokers."""

    def __init__(self, client: Client, pki: Pki, cluster: Secured, cloud: Secured, flags: dict[str, object]) -> None:
        super().__init__(client, cluster.host, flags)
        self._pki, self._cluster, self._cloud = pki, cluster, cloud
        self._shared = self.flags

    def start(self, name: str) -> None:
        own: dict[str, object] = {"broker.url": (self._cloud if name == "cloud" else self._cluster).host}
        own |= self._pki.keys("edge-home" if name == "edge" else name)
        if name == "edge" and self._cloud is not self._cluster:
            own |= {"edge.upstream.url": self._cloud.host, **self._pki.keys("edge-home", "edge.upstream")}
        self.flags = {**self._shared, **own}
        super().start(name)


@asynccontextmanager
async def secure_fleet(*, brokers: int, flags: dict[str, object]) -> AsyncIterator[SecureFleet]:
    """Cloud, edge, the agents porch and garden, and a client, each with what `fedhlm pki issue` would give it."""
    async with AsyncExitStack() as stack:
        pki = stack.enter_context(Pki())
        for name, role in (("porch", "agent"), ("garden", "agent"), ("edge-home", "edge")):
            pki.issue(name, role, "home")  # type: ignore[arg-type]
        pki.issue("cloud", "cloud")
        pki.issue("desk", "client")
        pki.issue("broker-home", "broker", "home")
        pki.issue("broker", "broker")
        places = [BrokerPlace("cluster", "home"), BrokerPlace("cloud")] if brokers == 2 else [BrokerPlace("shared")]
        running = [await stack.enter_async_context(Secured(pki, place, extra=TELL_DENIALS)) for place in places]
        making = lambda client: SecureFleet(client, pki, running[0], running[-1], flags)  # noqa: E731
        async with asking(running[0].bus("desk"), making, name="desk") as fleet:
            for part in ("edge", "cloud", "porch", "garden"):
                fleet.start(part)
            await fleet.ready("porch", "garden")
            yield fleet
        for broker in running:
            assert "Received PUBLISH" in broker.log
            assert [line for line in broker.log.splitlines() if "Denied" in line] == []


@pytest.mark.parametrize("brokers", [1, 2])
async def test_under_certificates_and_rights_exact_is_the_llm_alone(brokers: int) -> None:
    llm = Alone.load(model_folder("", "llm"), threads=1)
    items = load_items()[:2]
    async with secure_fleet(brokers=brokers, flags={"preset": "exact"}) as fleet:
        answers = await asyncio.gather(
            *(
                fleet.ask(item.title, name=name, max_tokens=32, seed=9)
                for name, item in zip(("porch", "garden"), items, strict=True)
            )
        )
    for item, answer in zip(items, answers, strict=True):
        assert list(answer.ids) == llm.write(llm.encode(item.title), Sampling(9), 32)


# A threshold is learnt, in rounds as short as can be, and the cloud looks for better clusters all the time.
LEARNING: dict[str, object] = {
    "preset": "budget",
    "generation.learning.round_tokens": 16,
    "federation.round_updates": 1,
    "federation.assign_s": 1,
    "telemetry.journal": "true",
}
# A threshold that leaves doubts, and one vote is enough to settle them.
ASKING: dict[str, object] = {
    "preset": "budget",
    "generation.threshold": "fixed",
    "generation.tau": 0.6,
    "generation.consensus.votes": 1,
}


async def write_twice(fleet: SecureFleet) -> set[str]:
    """Both agents continue the same titles; who settled their tokens."""
    sources: set[str] = set()
    for item, name in product(load_items()[:2], ("porch", "garden")):
        answer = await fleet.ask(item.title, name=name, max_tokens=32, seed=1, temperature=0.0)
        sources |= set(answer.sources)
    return sources


@pytest.mark.parametrize("brokers", [1, 2])
async def test_under_certificates_and_rights_the_federation_learns(brokers: int) -> None:
    async with secure_fleet(brokers=brokers, flags=LEARNING) as fleet:
        assert "cloud" in await write_twice(fleet)
        async with asyncio.timeout(LIMIT_S):
            await until(lambda: fleet.counters["cloud"]["rounds"] > 0)
        assert fleet.counters["edge"]["rounds"] > 0
        assert fleet.counters["edge"]["contributions"] > 0
        assert fleet.counters["cloud"]["contributions"] > 0


@pytest.mark.parametrize("brokers", [1, 2])
async def test_under_certificates_and_rights_peers_settle_doubts(brokers: int) -> None:
    async with secure_fleet(brokers=brokers, flags=ASKING) as fleet:
        sources = await write_twice(fleet)
        assert fleet.counters["edge"]["verified_tokens"] > 0
        assert {"cloud", "peer"} <= sources
