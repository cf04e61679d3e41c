"""Agents, edges and cloud learn together over the bus; late ones, silent ones and restarts change nothing for the worse."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from msgspec.structs import replace

from fedhlm.bus.party import Stamp, presence
from fedhlm.learning.certificate import Certificate
from fedhlm.learning.learnt_state import State
from fedhlm.learning.settled import SLACK_SHARE, SLACK_TOKENS
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import (
    Contribution,
    Evidence,
    Learned,
    PaperThreshold,
    RoutedVerdict,
    Verdict,
    VerdictBatch,
)
from fedhlm.protocol.packing import pack_probs
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from tests.edge_broker.world import PRIOR_TOKENS, RULES, Disk, Hand, Node, World, contribute, curve

ROUND_S = RULES.round_s + 0.1


def retained(world: World, topic: topics.Topic, **levels: str) -> State | None:
    """What a late joiner gets."""
    packet = world.broker.retained.get(topic.name(**levels))
    if packet is None:
        return None
    message = decode(packet.payload)
    assert isinstance(message, Learned)
    return State.of(message)


def tokens(state: State | None) -> float:
    return 0.0 if state is None or "u" not in state.curves else state.curves["u"].total_weight


def test_sums_rise_to_the_cloud_and_come_back_as_a_prior_for_a_new_cluster() -> None:
    async def scenario() -> None:
        world = World()
        cloud, _ = await world.cloud().start(), await world.edge("c1").start()
        hands = [await Hand(world, name).start() for name in "ab"]
        for hand, amount in zip(hands, (3000.0, 5000.0), strict=True):
            await contribute(hand, 1, amount, harm=0.25)
        await asyncio.sleep(3 * ROUND_S)
        state = retained(world, topics.CLOUD_FL_STATE)
        assert state is not None
        assert (tokens(state), state.members) == (8000.0, 2)
        await world.edge("c2").start()
        await asyncio.sleep(ROUND_S)
        young = retained(world, topics.FL_STATE, cluster="c2")
        assert young is not None
        assert tokens(young) == pytest.approx(PRIOR_TOKENS)
        assert young.curves["u"].harm.sum() == pytest.approx(0.25 * PRIOR_TOKENS)
        assert young.members == 0
        assert len(cloud.service.coordinator.members) == 1, "a cluster without agents contributes nothing"
        own = retained(world, topics.FL_STATE, cluster="c1")
        assert tokens(own) == pytest.approx(8000.0)

    run_virtual(scenario())


def test_full_rounds_do_not_wait_and_repetition_counts_once() -> None:
    async def scenario() -> None:
        world = World()
        await world.edge("c1").start()
        hands = [await Hand(world, f"a{i}").start() for i in range(RULES.round_updates)]
        for hand in hands:
            await contribute(hand, 1, 10.0)
        assert tokens(retained(world, topics.FL_STATE, cluster="c1")) == 40.0
        for _ in range(5):
            await contribute(hands[0], 1, 10.0)
        await asyncio.sleep(5 * ROUND_S)
        assert world.counters["rounds"] == 1
        assert world.counters["duplicate_messages"] == 5
        assert tokens(retained(world, topics.FL_STATE, cluster="c1")) == 40.0

    run_virtual(scenario())


def test_an_impossible_contribution_is_refused_with_a_count() -> None:
    async def scenario() -> None:
        world = World()
        await world.cloud().start()
        edge = await world.edge("c1").start()
        agent = await Hand(world, "a").start()
        bad = Contribution(**agent.party.stamp(), round=1, members=1, curves={"u": b"liar"})
        await agent.send(topics.FL_UPDATE, bad, cluster="c1", agent="a")
        await agent.send(topics.CLOUD_FL_UPDATE, bad, cluster="c9")
        await agent.send(topics.CLOUD_FL_STATE, Learned(**agent.party.stamp(), round=1, members=3, curves={"u": b"?"}))
        await asyncio.sleep(5 * ROUND_S)
        assert world.counters["refused_contributions"] == 3
        assert edge.service.federation.above is None
        assert world.counters["rounds"] == 0

    run_virtual(scenario())


def test_the_papers_threshold_goes_up_by_tokens_across_by_clusters_and_down_to_all() -> None:
    async def scenario() -> None:
        world = World()
        await world.cloud().start()
        for cluster, said in (("c1", [(0.2, 30), (0.6, 10), (0.6, 0), (0.6, 0)]), ("c2", [(0.7, 1)])):
            await world.edge(cluster).start()
            for i, (threshold, count) in enumerate(said):
                agent = await Hand(world, f"{cluster}-{i}").start()
                await contribute(agent, 1, 5.0, cluster=cluster, threshold=PaperThreshold(threshold, count))
        await asyncio.sleep(5 * ROUND_S)
        for cluster in ("c1", "c2"):
            state = retained(world, topics.FL_STATE, cluster=cluster)
            assert state is not None
            assert state.thresholds["u"].threshold == pytest.approx((0.3 + 0.7) / 2)

    run_virtual(scenario())


async def learnt(world: World, hands: list[Hand]) -> float:
    for i, hand in enumerate(hands, start=1):
        await contribute(hand, 5, 100.0 * i, threshold=PaperThreshold(0.4, 3))
    await asyncio.sleep(4 * ROUND_S)
    return tokens(retained(world, topics.CLOUD_FL_STATE))


Restart = Callable[[World, dict[str, Node], Disk | None], Awaitable[None]]


async def restart_edge(world: World, nodes: dict[str, Node], disk: Disk | None) -> None:
    await nodes["edge"].stop()
    await asyncio.sleep(5.0)
    nodes["edge"] = await world.edge("c1", store=disk.store if disk is not None else None).start()


async def restart_cloud(world: World, nodes: dict[str, Node], disk: Disk | None) -> None:
    await nodes["cloud"].stop()
    await asyncio.sleep(5.0)
    nodes["cloud"] = await world.cloud(store=disk.store if disk is not None else None).start()


@pytest.mark.parametrize("restart", [restart_edge, restart_cloud])
@pytest.mark.parametrize("keeps", [True, False], ids=["disk", "no disk"])
def test_a_restart_loses_nothing_and_publishes_nothing_poorer(restart: Restart, keeps: bool) -> None:
    async def scenario() -> None:
        world, disk = World(), Disk() if keeps else None
        store = disk.store if disk is not None else None
        nodes = {"cloud": await world.cloud(store=store).start(), "edge": await world.edge("c1", store=store).start()}
        hands = [await Hand(world, name).start() for name in "abc"]
        before = await learnt(world, hands)
        assert before == 600.0
        watcher = await Hand(world, "w").start(
            topics.CLOUD_FL_STATE.name(), topics.FL_STATE.name(cluster="c1"), topics.CLOUD_FL_UPDATE.name(cluster="+")
        )
        for _ in range(2):
            await restart(world, nodes, disk)
        await asyncio.sleep(4 * ROUND_S)
        # Sums of 100, 200 and 300 tokens come back one by one, the smallest first: the worst order.
        number = 6
        for i, hand in enumerate(hands, start=1):
            await contribute(hand, number, 100.0 * i)
            await asyncio.sleep(4 * ROUND_S)
        said = [State.of(m) for m in watcher.of(Learned)]
        assert min(tokens(s) for s in said) >= 0.8 * before, "poorer by more than unequal members explain"
        rounds_said = [s.round for s in said if s.members]
        assert rounds_said
        final = retained(world, topics.CLOUD_FL_STATE)
        assert final is not None
        assert (tokens(final), final.members) == (600.0, 3)
        assert final.thresholds["u"].threshold == pytest.approx(0.4)
        own = retained(world, topics.FL_STATE, cluster="c1")
        assert tokens(own) == pytest.approx(600.0)
        if disk is not None:
            assert disk.rejected == []

    run_virtual(scenario())


@pytest.mark.parametrize("absent", [(), ("c1",)], ids=["everybody", "no edge"])
def test_a_broker_that_lost_its_retained_messages_gets_them_again(absent: tuple[str, ...]) -> None:
    async def scenario() -> None:
        world = World()
        world.broker._keeps_retained = False
        await world.cloud().start()
        edge = await world.edge("c1").start()
        await learnt(world, [await Hand(world, name).start() for name in "abc"])
        if absent:
            await edge.stop()
        await world.broker.restart(1.0)
        assert world.broker.retained == {}
        await asyncio.sleep(2.0)
        assert tokens(retained(world, topics.CLOUD_FL_STATE)) == 600.0
        expected = 0.0 if absent else pytest.approx(600.0)
        assert tokens(retained(world, topics.FL_STATE, cluster="c1")) == expected

    run_virtual(scenario())


def test_a_cloud_without_a_disk_does_not_forget_a_cluster_that_is_away() -> None:
    async def scenario() -> None:
        world = World()
        cloud, away = await world.cloud().start(), await world.edge("c1").start()
        await world.edge("c2").start()
        await learnt(world, [await Hand(world, "a").start()])
        b = await Hand(world, "b").start()
        await contribute(b, 1, 100.0, cluster="c2")
        await asyncio.sleep(4 * ROUND_S)
        await away.stop()
        await cloud.stop()
        await world.cloud().start()
        await contribute(b, 2, 110.0, cluster="c2")
        await asyncio.sleep(4 * ROUND_S)
        state = retained(world, topics.CLOUD_FL_STATE)
        assert state is not None
        assert (tokens(state), state.members) == (110.0 + 200.0 / 2, 2)

    run_virtual(scenario())


def test_restarts_of_an_edge_without_a_disk_do_not_add_up() -> None:
    async def scenario() -> None:
        world = World()
        await world.cloud().start()
        edge = await world.edge("c1").start()
        await world.edge("c2").start()
        await learnt(world, [await Hand(world, "a").start()])
        before = tokens(retained(world, topics.FL_STATE, cluster="c1"))
        for i in range(4):
            await edge.stop()
            edge = await world.edge("c1").start()
            # A change of the global state makes it publish again.
            await contribute(await Hand(world, f"b{i}").start(), 1, 1000.0, cluster="c2")
            await asyncio.sleep(4 * ROUND_S)
        assert tokens(retained(world, topics.FL_STATE, cluster="c1")) == before

    run_virtual(scenario())


def test_an_agent_speaks_for_one_whatever_it_says() -> None:
    async def scenario() -> None:
        world = World()
        await world.edge("c1").start()
        agent = await Hand(world, "a").start()
        boast = Contribution(**agent.party.stamp(), round=1, members=1000, curves={"u": curve(5.0).to_bytes()})
        await agent.send(topics.FL_UPDATE, boast, cluster="c1", agent="a")
        await asyncio.sleep(ROUND_S)
        state = retained(world, topics.FL_STATE, cluster="c1")
        assert state is not None
        assert state.members == 1

    run_virtual(scenario())


def test_a_contribution_beyond_what_passed_is_cut_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        world = World()
        await world.edge("c1").start()
        agent = await Hand(world, "a").start()
        await contribute(agent, 1, 10.0)
        await contribute(agent, 2, 1e6, harm=0.0)
        await asyncio.sleep(ROUND_S)
        assert tokens(retained(world, topics.FL_STATE, cluster="c1")) == pytest.approx(SLACK_TOKENS)
        assert world.counters["cut_contributions"] == 1
        assert "cut a contribution of a: it claims 1000000 tokens" in caplog.text

    run_virtual(scenario())


def test_a_certificate_that_hides_the_harm_that_passed_is_cut_counted_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        world = World()
        await world.edge("c1").start()
        cloud, agent = await Hand(world, "cloud").start(), await Hand(world, "a").start()
        verdict = Verdict(
            **cloud.party.stamp(), session=1, epoch=0, base=1, status="settled", accepted=1_000,
            target_probs=pack_probs(np.full(1_000, 0.5)), missed=((1 << 100) - 1).to_bytes(125, "little"),
        )  # fmt: skip
        batch = VerdictBatch(**cloud.party.stamp(), items=(RoutedVerdict("a", verdict),))
        await cloud.send(topics.CLOUD_VERDICT, batch, cluster="c1")
        for number, wrong in enumerate((100, 100, 0), start=1):
            known = Certificate()
            known.add(number + 990, [1.0] * wrong)
            evidence = Evidence(1, {"3fa4b1.": known.to_bytes()})
            said = Contribution(**agent.party.stamp(), round=number, members=1, evidence=evidence)
            await agent.send(topics.FL_UPDATE, said, cluster="c1", agent="a")
            assert world.counters["cut_evidence"] == (wrong == 0)
        assert "cut the evidence of a to what its verdicts show" in caplog.text

    run_virtual(scenario())


def test_an_agent_that_starts_again_counts_whatever_its_clock_says() -> None:
    async def scenario() -> None:
        world = World()
        await world.edge("c1").start()
        old = await Hand(world, "a").start()
        await old.send(topics.AGENT_STATUS, presence(old.party.stamp, "agent", online=True), cluster="c1", agent="a")
        await contribute(old, 50, 100.0)
        await old.send(topics.AGENT_STATUS, presence(old.party.stamp, "agent", online=False), cluster="c1", agent="a")
        new = await Hand(world, "a").start()
        new.party.stamp = Stamp("a", lambda: world.wall_s() - 600.0)
        await contribute(new, 51, 110.0)
        assert world.counters["duplicate_messages"] == 1
        await new.send(topics.AGENT_STATUS, presence(new.party.stamp, "agent", online=True), cluster="c1", agent="a")
        await contribute(new, 51, 120.0)
        await asyncio.sleep(ROUND_S)
        assert tokens(retained(world, topics.FL_STATE, cluster="c1")) == 120.0

    run_virtual(scenario())


def test_what_the_cloud_scored_may_be_claimed() -> None:
    async def scenario() -> None:
        world = World()
        await world.edge("c1").start()
        cloud, agent = await Hand(world, "cloud").start(), await Hand(world, "a").start()
        await contribute(agent, 1, 10.0)
        scored = pack_probs(np.full(1_000, 0.5))
        verdict = Verdict(
            **cloud.party.stamp(), session=1, epoch=0, base=1, status="settled", accepted=1_000, target_probs=scored
        )
        batch = VerdictBatch(**cloud.party.stamp(), items=(RoutedVerdict("a", verdict),))
        await cloud.send(topics.CLOUD_VERDICT, batch, cluster="c1")
        await contribute(agent, 2, 1_010.0)
        await asyncio.sleep(ROUND_S)
        assert tokens(retained(world, topics.FL_STATE, cluster="c1")) == pytest.approx(1_010.0)
        assert world.counters["cut_contributions"] == 0

    run_virtual(scenario())


def test_another_fingerprint_reopens_no_account() -> None:
    """What an agent brings along is believed once, whatever it announces afterwards."""

    async def scenario() -> None:
        world = World()
        await world.edge("c1").start()
        agent = await Hand(world, "a").start()
        for number, model in enumerate(("small", "other", "small")):
            fingerprint = replace(toy.FINGERPRINT, model=model)
            state = presence(agent.party.stamp, "agent", online=True, fingerprint=fingerprint)
            await agent.send(topics.AGENT_STATUS, state, cluster="c1", agent="a")
            await contribute(agent, 1 + number, 1e3 * 100**number)
        await asyncio.sleep(ROUND_S)
        told = tokens(retained(world, topics.FL_STATE, cluster="c1"))
        assert told == pytest.approx(1e3 * (1.0 + SLACK_SHARE) + SLACK_TOKENS)
        assert world.counters["cut_contributions"] == 2

    run_virtual(scenario())


def test_a_cloud_that_lost_everything_is_told_again_at_once() -> None:
    async def scenario() -> None:
        world = World()
        cloud = await world.cloud().start()
        await world.edge("c1").start()
        await learnt(world, [await Hand(world, "a").start()])
        await cloud.stop()
        world.broker.retained.pop(topics.CLOUD_FL_STATE.name())
        await world.cloud().start()
        await asyncio.sleep(2 * ROUND_S)
        assert tokens(retained(world, topics.CLOUD_FL_STATE)) == 100.0

    run_virtual(scenario())


def test_a_garbled_state_file_is_put_aside_and_the_service_starts() -> None:
    async def scenario() -> None:
        world, disk = World(), Disk()
        disk.files = {"edge-c1.federation": b"?", "edge-c1.memory": curve(1.0).to_bytes(), "cloud.federation": b""}
        await world.edge("c1", store=disk.store).start()
        await world.cloud(store=disk.store).start()
        assert sorted(disk.rejected) == ["cloud.federation", "edge-c1.federation", "edge-c1.memory"]
        assert await learnt(world, [await Hand(world, "a").start()]) == 100.0

    run_virtual(scenario())
