"""Whole fleets under faults: every invariant holds, and a part that is broken on purpose fails the right one."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from cloud_verifier.engine import EngineInput
from cloud_verifier.engine import EngineOutput as Logits
from cloud_verifier.service import CloudService
from cloud_verifier.sessions import Admission, Key, Sessions
from edge_agent.core import AgentCore
from edge_agent.events import Commit, Committed
from edge_agent.pipeline import PIPELINES
from edge_agent.result import GenerationResult
from edge_agent.service import AgentService
from edge_broker.service import EdgeService
from fedhlm.bus.interface import Delivery
from fedhlm.bus.party import Party, Sent, presence
from fedhlm.config import presets
from fedhlm.protocol import topics
from fedhlm.protocol.messages import EscalationBatch, Presence, VerdictBatch
from fedhlm_lab.sim import links, toy
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.parts import Disk
from fedhlm_lab.sim.scenario import Scenario
from fedhlm_lab.sim.simulator import Violation, simulate
from fedhlm_lab.sim.sweep import SweepPlan, Totals, sweep

SMALL: dict[str, Any] = {"agents": 3, "tokens": 10}
PRESETS = tuple(presets())


def run(first: int, seeds: int, **options: Any) -> Totals:
    plan = SweepPlan(**({"presets": ("exact",), "links": ("lte",)} | SMALL | options))
    totals = Totals()
    for ended in sweep(plan, range(first, first + seeds)):
        assert ended.failure is None, f"{ended.failure}\n{plan.command(ended.seed)}"
        totals.add(ended)
    return totals


@pytest.mark.parametrize("link", links.names())
def test_every_preset_keeps_its_word_on_every_link_under_all_faults(link: str) -> None:
    totals = run(1_000, len(PRESETS), presets=PRESETS, links=(link,))
    assert totals.faults.total() > 20 * len(PRESETS)
    assert {"cloud", "local"} <= set(totals.tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_exact_text_survives_every_fault(temperature: float) -> None:
    totals = run(2_000, 12, links=("lan", "lte", "satellite"), temperature=temperature)
    assert set(totals.tokens) == {"cloud"}
    assert totals.counters["rollbacks"] > 12
    assert totals.counters["reprimes"] > 12
    assert totals.counters["asked_again"] > 12
    assert min(totals.counters[name] for name in ("lost", "duplicated", "reordered")) > 12


def test_short_deadlines_leave_tokens_unverified_and_nothing_else() -> None:
    totals = run(3_000, len(PRESETS), presets=PRESETS, deadline_s=1.0, faults="partition,crash,drop")
    assert totals.tokens["unverified"] > 0


def test_trees_survive_every_fault_too() -> None:
    totals = run(4_000, 8, settings=("generation.pipeline.kind=tree", "generation.pipeline.nodes=12"))
    assert set(totals.tokens) == {"cloud"}


def calm(seed: int = 1, **options: Any) -> Scenario:
    lan = links.load("lan")
    return Scenario(seed=seed, link=links.load("lte"), upstream=lan, **(SMALL | options))


def test_one_scenario_is_one_run() -> None:
    scenario = calm(5).with_faults("all")
    assert simulate(scenario) == simulate(scenario)
    assert simulate(scenario).texts != simulate(calm(6).with_faults("all")).texts


def test_calm_weather_needs_no_second_try() -> None:
    outcome = simulate(calm())
    assert set(outcome.tokens) == {"cloud"}
    assert outcome.counters["asked_again"] == outcome.counters["retries"] == outcome.counters["dropped_messages"] == 0
    assert len(outcome.texts) == SMALL["agents"] * 3


def test_agents_and_edges_come_back_with_what_their_disks_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash alone keeps the files; with its disk a part loses them."""
    lives: Counter[int] = Counter()
    store = Disk.store

    def counted(self: Disk) -> Any:
        lives[len(self.files)] += 1
        return store(self)

    monkeypatch.setattr(Disk, "store", counted)
    run(5_000, 6, presets=("budget",), faults="crash", settings=("generation.learning.round_tokens=1",))
    assert lives[1] + lives[2] > 0
    lives.clear()
    run(5_000, 6, presets=("budget",), faults="crash-disk", settings=("generation.learning.round_tokens=1",))
    assert lives[1] + lives[2] == 0


# Parts that are broken on purpose


def violations(seeds: int, **options: Any) -> Counter[str]:
    """How the first seed that fails fails."""
    options = {"presets": ("exact",), "links": ("lan", "lte", "satellite")} | SMALL | options
    for ended in sweep(SweepPlan(**options), range(seeds)):
        if ended.failure is not None:
            return Counter([ended.failure.name])
    return Counter()


def test_a_wrong_cloud_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = toy.large_forward

    async def crooked(requests: Sequence[EngineInput], *, step_s: float = 0.02) -> list[Logits]:
        return [o._replace(logits=-o.logits) for o in await honest(requests, step_s=step_s)]

    monkeypatch.setattr(toy, "large_forward", crooked)
    with pytest.raises(Violation, match="source: token 0 of"):
        simulate(calm())


def trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the cloud settle a block on whatever it holds before it: blocks travel without the digest of the text before."""
    monkeypatch.setattr("edge_agent.generation.digest_of", lambda _ids: None)


OVERTAKING: dict[str, Any] = {
    "links": ("lte",),
    "faults": "drop=0.3,reorder",
    "settings": ("generation.pipeline.block=1",),
}


def test_a_verdict_taken_for_more_than_it_says_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    trust(monkeypatch)
    assert set(violations(60, **OVERTAKING)) == {"source"}


def test_a_cloud_that_answers_behind_a_rejection_is_caught_without_digests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is lost, so that the digests, which are taken away too, would not be needed."""
    honest = Sessions._admit

    def careless(self: Sessions, key: Key, escalation: Any) -> Admission:
        entry = self.entry(key)
        if entry is not None:
            entry.state.rejected_at = None
        return honest(self, key, escalation)

    trust(monkeypatch)
    monkeypatch.setattr(Sessions, "_admit", careless)
    assert set(violations(20, **OVERTAKING | {"faults": "reorder"})) == {"source"}


def test_an_agent_that_says_what_it_did_not_commit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AgentService._publish

    async def lying(self: AgentService, request: Any, tokens: list[Committed], *rest: Any, **named: Any) -> None:
        wrong = [t._replace(token=t.token % (toy.VOCAB_SIZE - 1) + 1) for t in tokens]
        await honest(self, request, wrong, *rest, **named)

    monkeypatch.setattr(AgentService, "_publish", lying)
    with pytest.raises(Violation, match="output: agent-"):
        simulate(calm())


def test_an_agent_that_commits_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AgentCore._act

    async def twice(self: AgentCore, action: Any, turn: Any) -> None:
        await honest(self, action, turn)
        if isinstance(action, Commit):
            await honest(self, action, turn)

    monkeypatch.setattr(AgentCore, "_act", twice)
    with pytest.raises(Violation, match="exactly-once|source"):
        simulate(calm())


def test_an_agent_that_reports_less_than_it_committed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AgentCore.generate

    async def forgetful(self: AgentCore, *given: Any) -> GenerationResult:
        result = await honest(self, *given)
        result.ids.pop()
        return result

    monkeypatch.setattr(AgentCore, "generate", forgetful)
    with pytest.raises(Violation, match="exactly-once: agent-"):
        simulate(calm())


def test_an_agent_that_never_asks_again_is_caught() -> None:
    assert set(violations(10, settings=("generation.retry_ms=3600000",), faults="drop=1")) == {"ends"}


def test_a_draft_without_end_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PIPELINES["async"]
    greedy = lambda limits: honest(limits)._replace(may_draft=lambda _pending: True)  # noqa: E731
    monkeypatch.setitem(PIPELINES, "async", greedy)
    with pytest.raises(Violation, match="bounded: the tail of agent-. must be at most 4 tokens .got 5"):
        simulate(calm(settings=("generation.pipeline.window=4", "generation.pipeline.block=4")))


def test_a_queue_without_bound_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(self: LoopbackBus, delivery: Delivery, size: int) -> None:
        self._inbox.put(delivery, size)

    monkeypatch.setattr(LoopbackBus, "receive", everything)
    assert set(violations(60, faults="slow=2,full=1")) == {"bounded"}


def test_an_edge_that_does_not_come_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    async def once(self: EdgeService) -> None:
        message = presence(self.down.stamp, "edge", online=True, upstream=toy.FINGERPRINT)
        await self.down.send(topics.EDGE_STATUS, message, cluster=self.cluster)
        await asyncio.Event().wait()

    monkeypatch.setattr(EdgeService, "_announce", once)
    assert set(violations(20, faults="partition")) == {"steady"}


def test_an_edge_that_missed_the_clouds_presence_learns_of_it_from_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue loses it; an edge that would not ask again is blind until it connects anew."""
    note, settle = EdgeService._note_cloud, EdgeService._settle
    missed: set[int] = set()

    async def deaf(self: EdgeService, state: Presence) -> None:
        if id(self) in missed:
            await note(self, state)
        missed.add(id(self))

    async def blind(self: EdgeService, batch: VerdictBatch) -> None:
        self.upstream = toy.FINGERPRINT
        await settle(self, batch)
        self.upstream = None

    monkeypatch.setattr(EdgeService, "_note_cloud", deaf)
    simulate(calm())
    assert len(missed) == 2
    missed.clear()
    monkeypatch.setattr(EdgeService, "_settle", blind)
    with pytest.raises(Violation, match="steady: after the faults edge-c. does not see the cloud"):
        simulate(calm())


def test_an_edge_says_again_what_a_full_queue_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, dropped = Party.send, Counter[str]()

    async def full(self: Party, topic: topics.Topic, *given: Any, **named: Any) -> Sent:
        if topic is topics.EDGE_STATUS and dropped[self.stamp.sender] < 3:
            dropped[self.stamp.sender] += 1
            return Sent()
        return await honest(self, topic, *given, **named)

    monkeypatch.setattr(Party, "send", full)
    simulate(calm())
    assert dropped == {"edge-c0": 3, "edge-c1": 3}


def test_a_part_that_ends_by_itself_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = CloudService._submit

    async def frail(self: CloudService, cluster: str, batch: EscalationBatch, contexts: Sequence[str]) -> None:
        if any(item.escalation.epoch > 2 for item in batch.items):
            raise ValueError("no third epoch here")
        await honest(self, cluster, batch, contexts)

    monkeypatch.setattr(CloudService, "_submit", frail)
    with pytest.raises(Violation, match="alive: cloud ended by itself"):
        simulate(calm())
