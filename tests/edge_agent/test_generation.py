"""Whatever is delayed, lost, doubled or overtaken, committed text is the oracle's and never changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.events import Answered, Cancelled, Drafted, LinkDown, LinkUp, Refused, Tick, Unprimed
from edge_agent.generation import GenerationMachine
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm_lab.sim import toy
from tests.edge_agent.machine import Bench, plan

PROMPT = [5, 9]
PIPELINE_KINDS = ("async", "blocking", "remote", "tree")


def oracle(bench: Bench) -> list[int]:
    return toy.large_alone(bench.prompt, bench.plan.sampling, bench.plan.max_tokens)


def check_sources(bench: Bench) -> None:
    """Each token is the LLM's, or the SLM's where it is marked so, after the tokens before it."""
    ids = list(bench.prompt)
    settle = COUPLINGS[bench.plan.sampling.coupling].settle
    for token, source, _ in bench.committed:
        if source == "cloud":
            assert token == settle(toy.large_logits(ids), bench.plan.sampling, len(ids), None, b"")
        else:
            assert token == bench.drafter.draft_now(ids, bench.plan.sampling).token
        ids.append(token)


@pytest.mark.parametrize("kind", PIPELINE_KINDS)
@given(
    seed=st.integers(0, 10_000),
    agreement=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([0.0, 0.8]),
    block=st.integers(1, 6),
)
@settings(max_examples=40)
def test_without_faults_the_text_is_the_oracles(
    kind: str, seed: int, agreement: float, temperature: float, block: int
) -> None:
    bench = Bench(plan(kind, seed=seed, temperature=temperature, block=block), PROMPT, agreement=agreement)
    bench.run()
    assert bench.ids == oracle(bench)
    assert bench.finish is not None
    assert bench.finish.reason == ("stop" if bench.ids[-1] == toy.EOS_ID else "length")
    assert {c.source for c in bench.committed} == {"cloud"}


steps = st.lists(
    st.sampled_from(["draft", "settle", "hear", "lose_up", "lose_down", "double_up", "double_down", "time", "restart"])
    .flatmap(lambda kind: st.tuples(st.just(kind), st.integers(0, 5))),
    max_size=150,
)  # fmt: skip


def shake(bench: Bench, schedule: list[tuple[str, int]]) -> None:
    for kind, index in schedule:
        if bench.finish is not None:
            return
        match kind:
            case "draft":
                bench.draft()
            case "settle":
                bench.settle(index)
            case "hear":
                bench.hear(index)
            case "lose_up" if bench.up:
                bench.up.pop(index % len(bench.up))
            case "lose_down" if bench.down:
                bench.down.pop(index % len(bench.down))
            case "double_up" if bench.up:
                bench.up.append(bench.up[index % len(bench.up)])
            case "double_down" if bench.down:
                bench.down.append(bench.down[index % len(bench.down)])
            case "time":
                bench.now += index * 0.4
                bench.handle(Tick())
            case "restart":
                bench.cloud.lose()
            case _:
                pass


@pytest.mark.parametrize("kind", PIPELINE_KINDS)
@given(schedule=steps, seed=st.integers(0, 1_000), agreement=st.sampled_from([0.3, 0.7, 0.95]))
@settings(max_examples=120)
def test_faults_change_no_committed_token(
    kind: str, schedule: list[tuple[str, int]], seed: int, agreement: float
) -> None:
    bench = Bench(plan(kind, seed=seed, deadline_s=1e6), PROMPT, agreement=agreement)
    shake(bench, schedule)
    assert bench.ids == oracle(bench)[: len(bench.ids)]
    bench.run()
    assert bench.ids == oracle(bench)


@pytest.mark.parametrize("kind", PIPELINE_KINDS)
@given(schedule=steps, seed=st.integers(0, 1_000))
@settings(max_examples=120)
def test_deadlines_mark_what_nobody_verified(kind: str, schedule: list[tuple[str, int]], seed: int) -> None:
    bench = Bench(plan(kind, seed=seed, deadline_s=1.5), PROMPT)
    shake(bench, schedule)
    bench.run()
    check_sources(bench)
    assert len(bench.ids) == bench.plan.max_tokens or bench.ids[-1] == toy.EOS_ID


@given(schedule=steps, seed=st.integers(0, 1_000))
@settings(max_examples=60)
def test_the_full_law_coupling_ends_and_rejects_honestly(schedule: list[tuple[str, int]], seed: int) -> None:
    bench = Bench(plan("blocking", block=1, coupling="full", seed=seed, bonus=False, deadline_s=1e6), PROMPT)
    shake(bench, schedule)
    bench.run()
    ids = list(PROMPT)
    settle = COUPLINGS["full"].settle
    for token, _, _ in bench.committed:
        draft = bench.drafter.draft_now(ids, bench.plan.sampling)
        assert token == settle(toy.large_logits(ids), bench.plan.sampling, len(ids), draft.token, draft.law)
        ids.append(token)


def test_nothing_is_sent_when_the_gate_keeps_everything() -> None:
    bench = Bench(plan(gate="never"), PROMPT)
    bench.run()
    assert bench.sent == []
    assert {c.source for c in bench.committed} == {"local"}
    check_sources(bench)


@pytest.mark.parametrize("kind", ["blocking", "async"])
@pytest.mark.parametrize("gate", ["threshold", "random"])
@given(schedule=steps, seed=st.integers(0, 1_000))
@settings(max_examples=40)
def test_what_the_gate_keeps_is_the_slms_and_the_rest_the_llms(
    kind: str, gate: str, schedule: list[tuple[str, int]], seed: int
) -> None:
    bench = Bench(plan(kind, gate=gate, seed=seed, deadline_s=1e6), PROMPT)
    shake(bench, schedule)
    bench.run()
    check_sources(bench)
    for position, (token, source, _) in enumerate(bench.committed, start=len(PROMPT)):
        ids = [*PROMPT, *bench.ids[: position - len(PROMPT)]]
        if source == "local":
            assert not bench.plan.gate(bench.drafter.draft_now(ids, bench.plan.sampling).uncertainty, position)
            assert token == bench.ids[position - len(PROMPT)]


def test_a_dead_link_costs_one_deadline_and_then_nothing() -> None:
    bench = Bench(plan(deadline_s=5.0, tokens=40), PROMPT)
    while bench.finish is None:
        bench.up.clear()
        if not bench.draft():
            bench.now = bench.machine.wake_s()
            bench.handle(Tick())
    assert bench.now == pytest.approx(5.0, abs=0.6)
    assert {c.source for c in bench.committed} == {"unverified"}
    assert not bench.machine.link_up


def test_the_first_answer_after_an_outage_brings_verification_back() -> None:
    bench = Bench(plan(deadline_s=2.0, tokens=60, seed=4), PROMPT)
    while len(bench.committed) < 10:
        bench.up.clear()
        if not bench.draft():
            bench.now = bench.machine.wake_s()
            bench.handle(Tick())
    bench.now += 60.0
    bench.handle(Tick())  # the probe is due
    while not bench.machine.link_up:
        assert bench.settle()
        assert bench.hear()
    bench.run()
    assert bench.committed[-1].source == "cloud"
    check_sources(bench)
    assert any(e.fixed for e in bench.sent)


def test_a_link_that_is_known_to_be_down_is_not_waited_for() -> None:
    bench = Bench(plan(), PROMPT, link_up=False)
    bench.draft()
    assert [c.source for c in bench.committed] == ["unverified"]
    bench.handle(LinkUp())
    while not bench.up:
        bench.draft()
    assert bench.up[0].base == len(PROMPT)


def test_a_text_does_not_wait_for_a_link_that_is_announced_to_be_down() -> None:
    bench = Bench(plan(), PROMPT)
    while not bench.up:
        bench.draft()
    assert not bench.committed
    bench.handle(LinkDown())
    assert bench.committed
    assert {c.source for c in bench.committed} == {"unverified"}
    bench.handle(LinkUp())
    while not bench.up:
        bench.draft()
    bench.run()
    assert bench.committed[-1].source == "cloud"


def test_async_drafts_ahead_only_as_far_as_the_window() -> None:
    bench = Bench(plan(window=8, tokens=100), PROMPT)
    while bench.draft():
        pass
    assert bench.machine.length - len(PROMPT) == 8


def test_blocking_waits_for_each_block() -> None:
    bench = Bench(plan("blocking", block=4, tokens=100), PROMPT)
    while bench.draft():
        pass
    assert [len(e.ids) for e in bench.up] == [4]


def test_without_bonus_a_block_asks_for_nothing_of_the_targets() -> None:
    bench = Bench(plan("blocking", block=1, bonus=False), PROMPT)
    bench.run()
    assert {e.extend for e in bench.sent} == {0}
    assert bench.ids == oracle(bench)


def test_an_uncertain_draft_leaves_at_once_and_a_sure_one_at_its_age() -> None:
    bench = Bench(plan(block=8), PROMPT)
    revision = bench.work.pop().revision
    bench.handle(Drafted(revision, 2, 7, 0.9, 0.1))
    assert bench.up == []
    bench.now = bench.machine.wake_s()
    assert bench.now == pytest.approx(0.5)
    bench.handle(Tick())
    assert [e.ids for e in bench.up] == [[7]]
    bench.handle(Drafted(bench.work.pop().revision, 3, 8, 0.1, 0.95))
    assert [e.ids for e in bench.up] == [[7], [8]]


def test_a_draft_that_is_always_verified_goes_up_however_sure_it_is_and_peers_may_not_settle_it() -> None:
    asked = []

    def consult(draft: Drafted) -> None:
        asked.append(draft.token)

    for rule, kept in (("", True), ("number", False)):
        given_plan = plan("blocking", block=1)._replace(gate=lambda _u, _p: False, consult=consult)
        bench = Bench(given_plan, PROMPT)
        bench.handle(Drafted(bench.work.pop().revision, 2, 7, 0.9, 0.0, rule=rule))
        assert bool(bench.committed) == kept
        assert [block.for_target for block in bench.sent] == ([] if kept else [True])
    assert asked == []


def test_stale_and_impossible_answers_are_counted_and_dropped() -> None:
    bench = Bench(plan(), PROMPT)
    for _ in range(3):
        bench.draft()
    before = list(bench.ids)
    bench.handle(Answered(9, 2, 1, [], [], "cloud"))
    bench.handle(Answered(0, 2, 50, [], [], "cloud"))
    bench.handle(Unprimed(4))
    assert bench.ids == before
    assert bench.machine.tally.stale == 2
    assert bench.machine.epoch == 0


def test_a_refusal_ends_with_its_reason() -> None:
    bench = Bench(plan(), PROMPT)
    bench.handle(Refused("fingerprint.tokenizer differs"))
    assert bench.finish is not None
    assert bench.finish[:2] == ("error", "fingerprint.tokenizer differs")


def test_cancelling_keeps_what_is_committed() -> None:
    bench = Bench(plan(), PROMPT)
    while not bench.committed:
        bench.draft()
        bench.settle()
        bench.hear()
    before = list(bench.ids)
    bench.handle(Cancelled("cancelled"))
    assert bench.finish is not None
    assert bench.finish.reason == "cancelled"
    bench.handle(Answered(0, 2, 1, [], [], "cloud"))
    assert bench.ids == before


def test_the_models_context_ends_a_generation() -> None:
    bench = Bench(plan(tokens=50, context_max=10), PROMPT)
    bench.run()
    assert bench.finish is not None
    assert bench.finish.reason == ("stop" if bench.ids[-1] == toy.EOS_ID else "context")
    assert len(bench.ids) <= 8


@pytest.mark.parametrize(("prompt", "said"), [([], "at least 1 token"), (list(range(1, 13)), r"\(got 12\)")])
def test_prompts_without_room_are_refused(prompt: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=f"prompt must be .*{said}"):
        GenerationMachine(plan(context_max=12), prompt)
