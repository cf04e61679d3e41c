"""Tokens that the cloud did not settle: peers' hits, the edge's answers, and the audit of what nobody scored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.events import Answered, Cancelled, Drafted, Observe, Plan, Proposal
from edge_agent.generation import GenerationMachine
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from tests.edge_agent.machine import Bench, plan

PROMPT = [5, 6, 7]


class Watched(Bench):
    """A bench that keeps what the machine observes."""

    def __init__(self, plan: Plan, prompt: list[int]) -> None:
        self.seen: list[Observe] = []
        super().__init__(plan, prompt)

    def _take(self, actions: list[object]) -> None:  # type: ignore[override]
        self.seen += [a for a in actions if isinstance(a, Observe)]
        super()._take(actions)  # type: ignore[arg-type]

    @property
    def over(self) -> bool:
        return self.finish is not None

    @property
    def observations(self) -> list[tuple[float, bool, bool]]:
        return [(o.committed_harm, o.skipped, o.audit) for seen in self.seen for o in seen.observations]


def misses(bench: Bench) -> list[bool]:
    """For every committed token whether the LLM, after the same text, would have written another one."""
    ids, missed = list(bench.prompt), []
    settle = COUPLINGS[bench.plan.sampling.coupling].settle
    for token in bench.ids:
        missed.append(settle(toy.large_logits(ids), bench.plan.sampling, len(ids), None, b"") != token)
        ids.append(token)
    return missed


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.8]))
def test_verdicts_and_the_tail_cover_what_was_kept_and_the_scores_are_the_truth(seed: int, temperature: float) -> None:
    bench = Watched(plan("blocking", gate="threshold", seed=seed, temperature=temperature, tokens=16), PROMPT)
    bench.run()
    assert bench.finish is not None
    tail = bench.finish.tail
    assert [*tail.context, *(t.token for t in tail.tokens)] == [*PROMPT, *bench.ids]
    assert {t.source for t in tail.tokens} <= {"local"}
    skipped = [harm for harm, skip, _ in bench.observations if skip]
    local = [float(m) for m, c in zip(misses(bench), bench.committed, strict=True) if c.source == "local"]
    assert skipped == local[: len(local) - len(tail.tokens)]
    assert not any(audit for _, _, audit in bench.observations)


def test_a_stopped_text_drops_its_drafts_and_leaves_its_tail() -> None:
    bench = Watched(plan("blocking", gate="never", tokens=50), PROMPT)
    for _ in range(5):
        bench.draft()
    bench.handle(Cancelled("stop"))
    assert bench.finish is not None
    assert bench.finish.reason == "stop"
    assert [t.token for t in bench.finish.tail.tokens] == bench.ids
    assert len(bench.ids) == 5
    assert not bench.finish.tail.primed


def proposing(token: int, *, adopt: bool, settles: bool) -> Plan:
    """Peers that propose a token for the first position only."""

    def consult(draft: Drafted) -> Proposal | None:
        return Proposal(token, 0.1, adopt, "peer" if settles else None) if draft.position == len(PROMPT) else None

    return plan("blocking", tokens=3, block=1, temperature=0.0)._replace(consult=consult)


def truth() -> list[int]:
    return toy.large_alone(PROMPT, Sampling(1, 0.0), 3)


@pytest.mark.parametrize("offset", [0, 1])
def test_peers_settle_a_token_and_the_verdict_after_it_scores_them(offset: int) -> None:
    token = (truth()[0] + offset) % toy.VOCAB_SIZE
    bench = Watched(proposing(token, adopt=True, settles=True), PROMPT)
    bench.run()
    assert bench.committed[0].token == token
    assert bench.committed[0].source == "peer"
    first = bench.seen[0].observations[0]
    assert (first.source, first.skipped, first.committed_harm) == ("peer", True, float(offset))
    assert first.match == (0.1, float(offset))


@pytest.mark.parametrize("offset", [0, 1])
def test_a_proposal_that_settles_nothing_never_changes_the_text(offset: int) -> None:
    token = (truth()[0] + offset) % toy.VOCAB_SIZE
    bench = Watched(proposing(token, adopt=True, settles=False), PROMPT)
    bench.run()
    assert bench.ids == truth()
    assert all(c.source == "cloud" for c in bench.committed)
    first = bench.seen[0].observations[0]
    assert first.match == (0.1, float(offset))
    assert not first.skipped


def test_what_is_not_adopted_is_compared_with_the_verdict_only() -> None:
    wrong = (truth()[0] + 1) % toy.VOCAB_SIZE
    bench = Watched(proposing(wrong, adopt=False, settles=True), PROMPT)
    bench.run()
    assert bench.ids == truth()
    own = toy.ToyDrafter(agreement=0.7).draft_now(PROMPT, Sampling(1, 0.0)).token
    observation = bench.seen[0].observations[0]
    assert observation.harm == float(own != truth()[0])
    assert observation.match == (0.1, 1.0)


@given(st.integers(0, 10_000), st.booleans())
def test_what_the_edge_settles_is_committed_and_scored_by_the_cloud_later(seed: int, replaces: bool) -> None:
    """The edge answers the first block; all later ones, and so the whole text, are the cloud's affair."""
    settings = plan("blocking", seed=seed, tokens=12, block=2)._replace(similarity=0.9)
    bench = Watched(settings, PROMPT)
    bench.draft()
    bench.draft()
    block = bench.up.pop()
    ids = [(block.ids[0] + 1) % toy.VOCAB_SIZE] if replaces else []
    if toy.EOS_ID in [*block.ids, *ids]:
        return
    bench.handle(Answered(block.epoch, block.base, 0 if replaces else len(block.ids), ids, [], "neighbour"))
    assert [c.source for c in bench.committed] == ["neighbour"] * (1 if replaces else 2)
    bench.run()
    ours = [c.token for c in bench.committed if c.source == "neighbour"]
    assert bench.ids[: len(ours)] == ours
    rest = toy.large_alone([*PROMPT, *ours], settings.sampling, 12 - len(ours))
    assert bench.ids[len(ours) :] == rest
    scored = [harm for harm, skip, _ in bench.observations if skip]
    assert scored == [float(m) for m in misses(bench)[: len(ours)]]


def test_the_edges_answer_ends_the_wait() -> None:
    bench = Bench(plan("blocking", tokens=4, block=1)._replace(similarity=0.9), PROMPT)
    bench.draft()
    block = bench.up.pop()
    machine: GenerationMachine = bench.machine
    waited = machine.awaiting
    bench.handle(Answered(block.epoch, block.base, 1, [], [], "peer"))
    assert (waited, machine.awaiting) == (True, False)
    bench.draft()
    again = bench.up.pop()
    assert (again.base, again.fixed, len(again.ids)) == (block.base, 1, 2)
    assert again.context == PROMPT
