"""An order to forget a liar takes it out of every cluster at once, and no restart brings it back."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fedhlm.learning.learnt_state import State
from fedhlm.learning.orders import FUTURE_MS
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import Forget, Learned, Roster
from fedhlm.protocol.roles import edge_name
from fedhlm_lab.sim.virtual import run_virtual
from tests.edge_broker.world import PRIOR_TOKENS, RULES, Disk, Hand, Node, World, contribute

ROUND_S = RULES.round_s + 0.1
SOON_S = 0.05
LIE, TRUTH = 5_000.0, 40.0


def harm(world: World, topic: topics.Topic, **levels: str) -> tuple[float, float]:
    """Tokens and the share of wrong ones in a retained state."""
    packet = world.broker.retained.get(topic.name(**levels))
    if packet is None:
        return 0.0, 0.0
    message = decode(packet.payload)
    assert isinstance(message, Learned)
    curves = State.of(message).curves
    if "u" not in curves or not curves["u"].total_weight:
        return 0.0, 0.0
    return curves["u"].total_weight, float(curves["u"].harm.sum()) / curves["u"].total_weight


def roster(world: World, topic: topics.Topic, **levels: str) -> Roster:
    message = decode(world.broker.retained[topic.name(**levels)].payload)
    assert isinstance(message, Roster)
    return message


async def order(world: World, member: str, *, number: int = 7, ahead_ms: int = 0) -> Hand:
    operator = await Hand(world, "operator").start()
    header = operator.party.stamp()
    header["sent_ms"] += ahead_ms
    await operator.send(topics.FORGET, Forget(**header, order=number), member=member)
    await asyncio.sleep(SOON_S)
    return operator


class Misled:
    """Two clusters that a liar of the first one has misled; c2 knows nothing but the prior."""

    def __init__(self, *, disks: bool) -> None:
        self.world = World()
        self.disks = {name: Disk() for name in ("cloud", "c1", "c2")} if disks else {}
        self.nodes: dict[str, Node] = {}

    async def start(self, name: str) -> None:
        disk = self.disks.get(name)
        store = None if disk is None else disk.store
        node = self.world.cloud(store=store) if name == "cloud" else self.world.edge(name, store=store)
        self.nodes[name] = await node.start()

    async def lie(self) -> "Misled":
        for name in ("cloud", "c1", "c2"):
            await self.start(name)
        self.liar, self.honest = [await Hand(self.world, name).start() for name in ("liar", "honest")]
        await contribute(self.liar, 1, LIE, harm=0.0)
        await contribute(self.honest, 1, TRUTH, harm=0.5)
        await asyncio.sleep(4 * ROUND_S)
        assert harm(self.world, topics.FL_STATE, cluster="c2")[0] == pytest.approx(200.0), "4 times the honest one's"
        return self

    def is_gone(self) -> None:
        for topic, levels, most in (
            (topics.FL_STATE, {"cluster": "c1"}, TRUTH),
            (topics.CLOUD_FL_STATE, {}, TRUTH),
            (topics.FL_STATE, {"cluster": "c2"}, min(TRUTH, PRIOR_TOKENS)),
        ):
            tokens, share = harm(self.world, topic, **levels)
            assert tokens <= most * 1.001, topic.pattern
            assert share in (0.0, pytest.approx(0.5)), topic.pattern


def test_an_order_takes_a_member_out_everywhere_at_once() -> None:
    async def scenario() -> None:
        misled = await Misled(disks=False).lie()
        await order(misled.world, "liar")
        misled.is_gone()
        await asyncio.sleep(4 * ROUND_S)
        misled.is_gone()
        for topic, levels in ((topics.FL_STATE, {"cluster": "c1"}), (topics.CLOUD_FL_STATE, {})):
            assert harm(misled.world, topic, **levels) == pytest.approx((TRUTH, 0.5)), "the honest ones still count"
        assert harm(misled.world, topics.FL_STATE, cluster="c2") == pytest.approx((TRUTH, 0.5))
        assert misled.world.counters["forgotten_members"] == 3

    run_virtual(scenario())


Absent = Callable[[Misled], Any]


@pytest.mark.parametrize("disks", [True, False], ids=["disks", "no disks"])
@pytest.mark.parametrize("absent", ["cloud", "c1", "c2", "everybody"])
def test_no_restart_brings_a_forgotten_member_back(absent: str, disks: bool) -> None:
    """Parts that are away when the order is given obey it when they start; then all start once more."""

    async def scenario() -> None:
        misled = await Misled(disks=disks).lie()
        for name in misled.nodes if absent == "everybody" else (absent,):
            await misled.nodes[name].stop()
        await order(misled.world, "liar")
        for name in misled.nodes if absent == "everybody" else (absent,):
            await misled.start(name)
            await asyncio.sleep(SOON_S)
        await asyncio.sleep(4 * ROUND_S)
        misled.is_gone()
        for name in misled.nodes:
            await misled.nodes[name].stop()
        for name in misled.nodes:
            await misled.start(name)
        await asyncio.sleep(4 * ROUND_S)
        misled.is_gone()
        await contribute(misled.honest, 2, TRUTH, harm=0.5)
        await asyncio.sleep(4 * ROUND_S)
        misled.is_gone()
        assert harm(misled.world, topics.FL_STATE, cluster="c1")[0] == pytest.approx(TRUTH)

    run_virtual(scenario())


def test_a_cluster_away_from_the_cloud_uses_no_prior_from_before_the_order() -> None:
    async def scenario() -> None:
        misled = await Misled(disks=True).lie()
        await misled.nodes["cloud"].stop()
        await order(misled.world, "liar")
        assert harm(misled.world, topics.FL_STATE, cluster="c2")[0] == 0.0
        await misled.nodes["c2"].stop()
        await misled.start("c2")
        await asyncio.sleep(4 * ROUND_S)
        assert harm(misled.world, topics.FL_STATE, cluster="c2")[0] == 0.0, "the retained state of the cloud is older"
        await misled.start("cloud")
        await asyncio.sleep(4 * ROUND_S)
        misled.is_gone()
        assert harm(misled.world, topics.FL_STATE, cluster="c2")[0] == pytest.approx(TRUTH)

    run_virtual(scenario())


def test_clocks_that_are_behind_do_not_keep_the_fleet_apart() -> None:
    async def scenario() -> None:
        misled = await Misled(disks=True).lie()
        await order(misled.world, "liar", ahead_ms=3_600_000)
        await asyncio.sleep(4 * ROUND_S)
        misled.is_gone()
        assert harm(misled.world, topics.FL_STATE, cluster="c2")[0] == pytest.approx(TRUTH)
        for name in misled.nodes:
            await misled.nodes[name].stop()
        for name in misled.nodes:
            await misled.start(name)
        await contribute(misled.honest, 2, 2 * TRUTH, harm=0.5)
        await asyncio.sleep(4 * ROUND_S)
        assert harm(misled.world, topics.CLOUD_FL_STATE)[0] == pytest.approx(2 * TRUTH)
        assert harm(misled.world, topics.FL_STATE, cluster="c2")[0] == pytest.approx(2 * TRUTH)

    run_virtual(scenario())


def test_orders_from_far_in_the_future_are_refused_by_all() -> None:
    async def scenario() -> None:
        misled = await Misled(disks=False).lie()
        await order(misled.world, "liar", ahead_ms=2 * FUTURE_MS)
        assert misled.world.counters["forgotten_members"] == 0
        assert harm(misled.world, topics.FL_STATE, cluster="c1")[0] == pytest.approx(200.0)

    run_virtual(scenario())


def test_a_whole_cluster_is_forgotten_by_the_name_of_its_edge() -> None:
    async def scenario() -> None:
        misled = await Misled(disks=False).lie()
        await misled.nodes["c1"].stop()
        await order(misled.world, edge_name("c1"))
        await asyncio.sleep(4 * ROUND_S)
        assert harm(misled.world, topics.CLOUD_FL_STATE) == (0.0, 0.0)
        assert harm(misled.world, topics.FL_STATE, cluster="c2") == (0.0, 0.0)

    run_virtual(scenario())


def test_the_members_of_each_part_are_told_to_operators() -> None:
    async def scenario() -> None:
        misled = await Misled(disks=False).lie()
        await contribute(misled.liar, 2, 1e9, harm=0.0)
        await asyncio.sleep(10.0)
        told = roster(misled.world, topics.ROSTER, cluster="c1")
        assert [row.name for row in told.members] == ["liar", "honest"]
        assert told.members[0].blamed == {"cut": 1}
        assert told.members[1].harm == pytest.approx(TRUTH / 2)
        assert [row.name for row in roster(misled.world, topics.CLOUD_ROSTER).members] == ["c1"]
        await order(misled.world, "liar", number=9)
        await asyncio.sleep(10.0)
        told = roster(misled.world, topics.ROSTER, cluster="c1")
        assert ([row.name for row in told.members], told.obeyed) == (["honest"], (9,))

    run_virtual(scenario())
