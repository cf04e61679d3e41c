"""Specs, schedules, and what the network and the parts do under them."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhlm.bus.interface import Retained
from fedhlm.errors import ConfigError
from fedhlm_lab.sim import faults, links
from fedhlm_lab.sim.faults import BROKER, EVERYWHERE, KINDS, PAIR, Event, Weather
from fedhlm_lab.sim.link import ACK_BYTES, HEADER_BYTES, LinkModel
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import LoopbackBroker, Packet
from fedhlm_lab.sim.parts import Part, PartBus
from fedhlm_lab.sim.scenario import Scenario
from fedhlm_lab.sim.virtual import run_virtual

LAN = links.load("lan")


def scenario(agents: int = 3, clusters: int = 2, link: str = "lte") -> Scenario:
    return Scenario(seed=1, agents=agents, clusters=clusters, link=links.load(link), upstream=LAN)


def test_specs_are_read() -> None:
    assert faults.parse("none") == {}
    assert faults.parse("all") == {name: kind.amount for name, kind in KINDS.items()}
    assert faults.parse("drop=0.1, partition") == {"drop": 0.1, "partition": KINDS["partition"].amount}
    assert faults.parse("all,drop=0.5")["drop"] == faults.parse("drop=0.5,all")["drop"] == 0.5


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("drip", "--faults must be all, none, or a list of drop, duplicate"),
        ("", "--faults must be "),
        ("drop,none", "--faults must be "),
        ("drop=2", "--faults drop must be a number from 0 to 1, share of the messages"),
        ("crash=soon", "--faults crash must be a number from 0 to 3600"),
        ("full=0", "--faults full must be a number from 1 to 4096"),
        ("skew=nan", "--faults skew must be "),
    ],
)
def test_a_wrong_spec_is_named(spec: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        faults.parse(spec)
    assert expected in str(raised.value)


@given(
    kinds=st.sets(st.sampled_from(sorted(KINDS)), min_size=1),
    seed=st.integers(0, 1_000_000),
    agents=st.integers(1, 6),
    clusters=st.integers(1, 3),
    link=st.sampled_from(links.names()),
)
@settings(max_examples=60)
def test_a_schedule_follows_from_its_seed_and_ends_in_time(
    kinds: set[str], seed: int, agents: int, clusters: int, link: str
) -> None:
    world = scenario(agents, min(clusters, agents), link)
    targets, calm_s = world.targets(), world.calm_s
    amounts = {name: KINDS[name].amount for name in kinds}
    events = faults.schedule(amounts, targets, seed=seed, calm_s=calm_s)
    assert events == faults.schedule(amounts, targets, seed=seed, calm_s=calm_s)
    assert {e.kind for e in events} == kinds
    assert list(events) == sorted(events, key=lambda e: e.at_s)
    places = {*targets.links, *targets.pairs, *targets.parts, BROKER, EVERYWHERE}
    for event in events:
        assert event.target in places
        assert 0.0 <= event.at_s < event.at_s + event.for_s <= calm_s + 0.002
        assert abs(event.amount) <= max(1.01 * KINDS[event.kind].amount, calm_s)
    for name in kinds:  # no kind moves another one
        alone = faults.schedule({name: amounts[name]}, targets, seed=seed, calm_s=calm_s)
        assert alone == tuple(e for e in events if e.kind == name)


class World:
    """Two clients and a part without a service."""

    def __init__(self) -> None:
        self.broker = LoopbackBroker(random.Random(1), keepalive_s=1.0, reconnect_s=0.1)
        self.links = {name: LinkModel() for name in ("a", "b")}
        self.part = Part("p", lambda _part: ([], Idle()))
        self.weather = Weather(
            self.broker,
            parts={"p": self.part},
            link=self.links.__getitem__,
            links=("a", "b"),
            profile_of=lambda _name: links.LinkProfile(delay_ms=10.0),
        )

    def lives(self) -> int:
        return self.part.lives

    def bus(self, name: str) -> LoopbackBus:
        return LoopbackBus(self.broker, client_id=name, link=self.links[name])


class Idle:
    """A service that waits."""

    async def subscribe(self) -> None: ...

    async def run(self) -> None:
        await asyncio.Event().wait()


@given(
    st.lists(
        st.builds(
            Event,
            st.floats(0.0, 5.0),
            st.sampled_from(["drop", "duplicate", "reorder", "spikes", "partition"]),
            st.sampled_from(["a", "b", EVERYWHERE]),
            st.floats(0.001, 5.0),
            st.floats(0.0, 1.0),
        ),
        max_size=12,
    )
)
def test_after_any_schedule_the_links_are_what_they_were(events: list[Event]) -> None:
    async def run() -> None:
        world = World()
        await world.weather.unfold(e for e in events if e.kind != "partition" or e.target != EVERYWHERE)
        for link in world.links.values():
            assert not link.partitioned
            if any(e.target != EVERYWHERE or e.kind != "partition" for e in events):
                assert (link.loss, link.duplicate, link.reorder) == (0.0, 0.0, 0.0)
            assert link.delay_s in (0.0, 0.01)

    run_virtual(run())


def test_faults_at_one_place_add_up_and_end_one_by_one() -> None:
    async def run() -> None:
        world = World()
        events = [
            Event(0.0, "drop", "a", 4.0, 0.5),
            Event(1.0, "drop", EVERYWHERE, 2.0, 0.5),
            Event(1.0, "spikes", "a", 2.0, 0.3),
            Event(1.0, "slow", "p", 2.0, 0.2),
            Event(1.5, "full", "p", 1.0, 3.0),
            Event(1.0, "skew", "p", 2.0, -60.0),
            Event(2.0, "crash-disk", "p", 1.0),
            Event(2.5, "crash", "p", 1.0),
        ]
        world.part.start()
        world.part.disk.files["kept"] = b"state"
        task = asyncio.create_task(world.weather.unfold(events), name="weather")
        await asyncio.sleep(0.5)
        assert world.links["a"].loss == 0.5
        await asyncio.sleep(1.2)
        assert world.links["a"].loss == 0.75
        assert world.links["b"].loss == 0.5
        assert world.links["a"].delay_s == pytest.approx(0.31)
        assert (world.part.pace_s, world.part.room, world.part.skew_s) == (0.2, 3, -60.0)
        assert world.part.disk.files
        await asyncio.sleep(1.0)
        assert world.lives() == 1
        assert world.part.buses == []
        assert world.part.disk.files == {}
        await asyncio.sleep(0.6)
        assert world.lives() == 1, "the second crash goes on"
        assert (world.part.pace_s, world.part.room, world.part.skew_s) == (0.0, None, 0.0)
        await asyncio.sleep(0.5)
        assert world.lives() == 2
        await task
        assert world.links["a"].loss == 0.0
        await world.part.crash()

    run_virtual(run())


def test_a_cut_pair_misses_messages_and_gets_retained_state_when_mended() -> None:
    async def run() -> None:
        world = World()
        taken: list[tuple[str, str]] = []
        world.broker.tap = lambda sender, packet: taken.append((sender, packet.topic))
        async with world.bus("a") as a, world.bus("b") as b:
            await b.subscribe("#")
            task = asyncio.create_task(
                world.weather.unfold([Event(0.0, "partition", f"a{PAIR}b", 1.0)]), name="weather"
            )
            await asyncio.sleep(0.5)
            await a.publish("news", b"lost")
            await a.publish("state", b"old", retain=True)
            await a.publish("state", b"new", retain=True)
            await asyncio.sleep(0.1)
            assert b.unread == 0
            await task
            await asyncio.sleep(0.1)
            delivery = await anext(b.deliveries())
            assert (delivery.topic, delivery.payload, delivery.retain) == ("state", b"new", True)
            assert b.unread == 0
            await a.publish("news", b"heard")
            assert (await anext(b.deliveries())).payload == b"heard"
        assert taken == [("a", "news"), ("a", "state"), ("a", "state"), ("a", "news")]
        assert world.broker.faults.cut == 3

    run_virtual(run())


def test_each_direction_has_its_own_rate() -> None:
    async def run() -> None:
        broker = LoopbackBroker(random.Random(1))
        slow = LinkModel(up_bytes_per_s=1_000.0, down_bytes_per_s=100.0)
        async with LoopbackBus(broker, client_id="a", link=slow) as bus:
            arrived: list[float] = []
            broker.tap = lambda _sender, _packet: arrived.append(asyncio.get_running_loop().time())
            await bus.subscribe("t")
            began_s = asyncio.get_running_loop().time()
            await bus.publish("t", bytes(989 - HEADER_BYTES))
            await anext(bus.deliveries())
            assert arrived[0] - began_s == pytest.approx(1.0, rel=0.01)
            acknowledged_s = (ACK_BYTES + HEADER_BYTES) / 100.0  # goes down first
            took_s = asyncio.get_running_loop().time() - arrived[0]
            assert took_s == pytest.approx(10.0 + acknowledged_s, rel=0.01)

    run_virtual(run())


def test_what_is_sent_again_comes_late_and_in_order() -> None:
    async def run() -> None:
        broker = LoopbackBroker(random.Random(1))
        link = LinkModel(delay_s=0.01, resent=0.5, resend_s=1.0)
        async with LoopbackBus(broker, client_id="a", link=link) as bus:
            await bus.subscribe("t")
            for number in range(50):
                await bus.publish("t", bytes([number]))
            read = bus.deliveries()
            assert [(await anext(read)).payload[0] for _ in range(50)] == list(range(50))
        assert broker.faults.resent > 20
        assert broker.faults.lost == 0

    run_virtual(run())


def test_a_broker_that_loses_its_disk_forgets_what_it_retained() -> None:
    async def run() -> dict[str, Packet]:
        broker = LoopbackBroker(random.Random(1), reconnect_s=0.1)
        birth = Retained("born", b"1")
        async with LoopbackBus(broker, client_id="a", birth=birth) as bus:
            await bus.publish("state", b"1", retain=True)
            await asyncio.sleep(0.1)
            broker.stop()
            assert set(broker.retained) == {"born", "state"}
            broker.start()
            await asyncio.sleep(1.0)
            broker.stop(forget=True)
            broker.start()
            await asyncio.sleep(1.0)
            return dict(broker.retained)

    assert set(run_virtual(run())) == {"born"}


def test_a_slow_part_takes_its_time_and_a_full_one_drops() -> None:
    async def run() -> None:
        world = World()
        world.part.pace_s = 1.0
        clock = asyncio.get_running_loop().time
        async with PartBus(world.part, world.broker, client_id="b") as b, world.bus("a") as a:
            b.fit(3)
            await b.subscribe("t")
            for _ in range(10):
                await a.publish("t", b"")
            began_s = clock()
            read = b.deliveries()
            for number in range(1, 4):
                await anext(read)
                assert clock() - began_s == pytest.approx(number, abs=0.1)
            assert b.unread <= b.room_in
            assert b.statistics.dropped_in == 10 - 3 - b.unread

    run_virtual(run())


def test_the_dead_write_nothing() -> None:
    async def run() -> None:
        part = Part("p", lambda _part: ([], Idle()))
        part.start()
        store = part.disk.store()
        store.save("a", b"1")
        await part.crash()
        store.save("a", b"2")
        assert part.disk.store().load("a") == b"1"

    run_virtual(run())
