"""The edge on the bus: answers from its memory, tells what it learnt before the verdict, relays what is not its own."""

import asyncio
import random
from typing import Any

import msgspec
import numpy as np

from edge_broker.memory import DIGEST_MAX
from edge_broker.service import DIGEST_S
from fedhlm.bus.party import presence
from fedhlm.peers.context_keys import DIMS
from fedhlm.protocol import topics
from fedhlm.protocol.messages import (
    Assignment,
    Escalation,
    EscalationBatch,
    Hints,
    Prime,
    Profile,
    RoutedVerdict,
    Sampling,
    Uncertain,
    UncertainTokens,
    Verdict,
    VerdictBatch,
    Verified,
    VerifiedTokens,
)
from fedhlm.protocol.packing import pack_ids, pack_probs
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.loopback_broker import LoopbackBroker
from fedhlm_lab.sim.virtual import run_virtual
from tests.edge_broker.world import Hand, World, contribute


def unlike(number: int) -> bytes:
    """Keys that have nothing in common."""
    return bytes(127 * (i == number) for i in range(DIMS))


KEY = unlike(0)


def doubts(agent: Hand, *items: tuple[int, int], key: bytes = KEY) -> UncertainTokens:
    return UncertainTokens(
        **agent.party.stamp(), session=1, space="s", items=tuple(Uncertain(p, t, 0.9, key) for p, t in items)
    )


def block(agent: Hand, ids: list[int], base: int, *, hints: Hints | None = Hints(0.9)) -> Escalation:  # noqa: B008
    packed, prime = pack_ids(ids, toy.VOCAB_SIZE), Prime(Sampling(1, 0.0), toy.FINGERPRINT, b"")
    return Escalation(
        **agent.party.stamp(),
        session=1,
        epoch=0,
        base=base,
        ids=packed,
        patience_ms=60_000,
        before=prime,
        hints=hints,
    )


def verdict(cloud: Hand, accepted: int, ids: list[int], base: int) -> Verdict:
    return Verdict(
        **cloud.party.stamp(),
        session=1,
        epoch=0,
        base=base,
        status="settled",
        accepted=accepted,
        ids=pack_ids(ids, toy.VOCAB_SIZE),
        target_probs=pack_probs(np.ones(accepted)),
    )


class Scene:
    """A world with one edge, an agent and a cloud moved by hand."""

    async def start(self, **edge: Any) -> "Scene":
        self.world = World()
        self.edge = await self.world.edge(**edge).start()
        self.cloud = await Hand(self.world, "cloud").start(topics.CLOUD_VERIFY.name(cluster="+"))
        state = presence(self.cloud.party.stamp, "cloud", online=True, fingerprint=toy.FINGERPRINT)
        await self.cloud.send(topics.CLOUD_STATUS, state)
        self.agent = await Hand(self.world, "a").start(
            topics.VERDICT.name(cluster="c1", agent="a"), topics.KNOWN.name(cluster="c1")
        )
        return self

    async def doubt_and_escalate(self, ids: list[int], base: int, **options: Any) -> None:
        await self.agent.send(topics.PEER, doubts(self.agent, (base, ids[0])), cluster="c1", agent="a")
        await self.agent.send(topics.ESCALATE, block(self.agent, ids, base, **options), cluster="c1", agent="a")

    async def say(self, *verdicts: Verdict) -> None:
        batch = VerdictBatch(**self.cloud.party.stamp(), items=tuple(RoutedVerdict("a", v) for v in verdicts))
        await self.cloud.send(topics.CLOUD_VERDICT, batch, cluster="c1")


def test_what_the_cloud_settled_is_known_before_its_verdict_and_settles_the_next_block() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        await scene.doubt_and_escalate([7], 5)
        assert [i.escalation.base for b in scene.cloud.of(EscalationBatch) for i in b.items] == [5]
        await scene.say(verdict(scene.cloud, 0, [9], 5))
        assert [type(m) for _, m in scene.agent.heard] == [VerifiedTokens, Verdict]
        assert scene.agent.of(VerifiedTokens)[0].items == (Verified(KEY, 9),)

        await scene.doubt_and_escalate([9, 3], 20)
        assert len(scene.cloud.of(EscalationBatch)) == 1, "it never went to the cloud"
        answer = scene.agent.of(Verdict)[1]
        assert (answer.base, answer.status, answer.accepted, answer.source) == (20, "settled", 2, "peer")
        assert (answer.ids, answer.target_probs, answer.missed) == (b"", b"", b"")

        await scene.doubt_and_escalate([9, 3], 30)
        assert scene.agent.of(Verdict)[2].accepted == 2
        counted = scene.world.counters
        assert (counted["peer_answers"], counted["neighbour_answers"], counted["verified_tokens"]) == (2, 0, 1)

    run_virtual(scenario())


def test_a_block_without_leave_goes_to_the_cloud_whatever_is_known() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        await scene.doubt_and_escalate([7], 5)
        await scene.say(verdict(scene.cloud, 1, [], 5))
        await scene.agent.send(topics.PEER, doubts(scene.agent, (9, 7)), cluster="c1", agent="a")
        await scene.agent.send(topics.ESCALATE, block(scene.agent, [7], 9, hints=None), cluster="c1", agent="a")
        assert len(scene.cloud.of(EscalationBatch)) == 2

    run_virtual(scenario())


def test_verified_tokens_reach_the_neighbours_edge_in_digests_and_settle_blocks_there() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        watcher = await Hand(scene.world, "watcher").start(topics.NEIGHBOUR.name(cluster="+"))
        await scene.world.edge("c2").start()
        b = await Hand(scene.world, "b").start(topics.VERDICT.name(cluster="c2", agent="b"))
        for base in (5, 6):
            await scene.doubt_and_escalate([7 + base], base, hints=None)
            await scene.say(verdict(scene.cloud, 1, [], base))
        assert watcher.heard == []
        await asyncio.sleep(DIGEST_S)
        (digest,) = watcher.of(VerifiedTokens)
        assert digest.items == (Verified(KEY, 12), Verified(KEY, 13))

        many = [Uncertain(100 + i, 1 + i % 9, 0.9, unlike(i)) for i in range(DIGEST_MAX)]
        message = UncertainTokens(**scene.agent.party.stamp(), session=1, space="s", items=tuple(many))
        await scene.agent.send(topics.PEER, message, cluster="c1", agent="a")
        await scene.agent.send(
            topics.ESCALATE, block(scene.agent, [u.token for u in many], 100, hints=None), cluster="c1", agent="a"
        )
        await scene.say(verdict(scene.cloud, DIGEST_MAX, [], 100))
        assert len(watcher.of(VerifiedTokens)) == 2, "a full digest does not wait"
        await asyncio.sleep(60.0)
        assert {name for name, _ in watcher.heard} == {topics.NEIGHBOUR.name(cluster="c1")}, "no echo"

        await b.send(topics.PEER, doubts(b, (3, 6), key=unlike(5)), cluster="c2", agent="b")
        await b.send(topics.ESCALATE, block(b, [6], 3), cluster="c2", agent="b")
        (answer,) = b.of(Verdict)
        assert (answer.source, answer.accepted) == ("neighbour", 1)
        assert scene.world.counters["neighbour_answers"] == 1

    run_virtual(scenario())


def test_keys_of_another_length_and_a_profile_in_anothers_name_are_refused_with_a_count() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        profiles = await Hand(scene.world, "w").start(topics.CLOUD_PROFILE.name(cluster="+"))
        await scene.agent.send(topics.PEER, doubts(scene.agent, (5, 7), key=b"short"), cluster="c1", agent="a")
        assert scene.world.counters["refused_keys"] == 1
        for name in ("a", "b"):
            profile = Profile(**scene.agent.party.stamp(), agent=name, dims=DIMS, keys=KEY, uncertainties=b"x")
            await scene.agent.send(topics.PROFILE, profile, cluster="c1", agent="a")
        assert [p.agent for p in profiles.of(Profile)] == ["a"]
        assert scene.world.counters["refused_messages"] == 1

    run_virtual(scenario())


def test_assignments_are_carried_to_the_clusters_own_broker_for_own_agents_also_late_ones() -> None:
    async def scenario() -> None:
        own = LoopbackBroker(random.Random(2))
        scene = await Scene().start(own=own)
        cloud = await Hand(scene.world, "coordinator").start()
        ears = await Hand(scene.world, "ears", own).start(topics.ASSIGN.name(agent="+"))
        agents = {name: await Hand(scene.world, name, own).start() for name in ("early", "late")}

        async def come(name: str) -> None:
            hand = agents[name]
            state = presence(hand.party.stamp, "agent", online=True)
            await hand.send(topics.AGENT_STATUS, state, cluster="c1", agent=name)

        await come("early")
        for name in ("early", "late", "stranger"):
            order = Assignment(**cloud.party.stamp(), cluster="c2")
            await cloud.send(topics.ASSIGN, order, agent=name)
        assert [name for name, _ in ears.heard] == [topics.ASSIGN.name(agent="early")]
        await come("late")
        await come("late")
        assert [name for name, _ in ears.heard][1:] == [topics.ASSIGN.name(agent="late")]
        assert topics.ASSIGN.name(agent="late") in own.retained

    run_virtual(scenario())


def test_on_a_shared_broker_nothing_is_carried_over() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        ears = await Hand(scene.world, "ears").start(topics.ASSIGN.name(agent="+"))
        state = presence(scene.agent.party.stamp, "agent", online=True)
        await scene.agent.send(topics.AGENT_STATUS, state, cluster="c1", agent="a")
        await ears.send(topics.ASSIGN, Assignment(**ears.party.stamp(), cluster="c2"), agent="a")
        await asyncio.sleep(10.0)
        assert len(ears.of(Assignment)) == 1

    run_virtual(scenario())


def test_an_agent_that_moved_takes_its_sums_along_and_a_silent_one_does_not() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        b = await Hand(scene.world, "b").start()
        for hand in (scene.agent, b):
            await contribute(hand, 1, 10.0)
            online = presence(hand.party.stamp, "agent", online=True)
            await hand.send(topics.AGENT_STATUS, online, cluster="c1", agent=hand.party.stamp.sender)
        await b.send(topics.ASSIGN, Assignment(**b.party.stamp(), cluster="c2"), agent="a")
        await asyncio.sleep(5.0)
        members = scene.edge.service.members
        assert members.state().curves["u"].total_weight == 20.0, "assigned, not yet gone"
        for hand in (scene.agent, b):
            offline = presence(hand.party.stamp, "agent", online=False)
            await hand.send(topics.AGENT_STATUS, offline, cluster="c1", agent=hand.party.stamp.sender)
        assert members.state().curves["u"].total_weight == 10.0
        assert not members.forget("a")

    run_virtual(scenario())


def test_what_another_target_said_is_forgotten() -> None:
    async def scenario() -> None:
        scene = await Scene().start()
        edge = scene.edge.service

        async def appear(model: str) -> None:
            other = msgspec.structs.replace(toy.FINGERPRINT, model=model)
            state = presence(scene.cloud.party.stamp, "cloud", online=True, fingerprint=other)
            await scene.cloud.send(topics.CLOUD_STATUS, state)

        await appear("old")
        await scene.doubt_and_escalate([7], 5)
        await scene.say(verdict(scene.cloud, 1, [], 5))
        await appear("old")
        assert edge.memory.size == 1
        await appear("new")
        assert edge.memory.size == 0

    run_virtual(scenario())
