"""Earliest deadline first: texts that are behind go first, audits wait but not for ever, and nobody starves."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.batching import QUANTUM, RUNNING_OF_ONE, Batcher
from cloud_verifier.calls import BlockJob
from cloud_verifier.deadlines import CREDIT, due_s, rank_of
from cloud_verifier.reports import PATIENCE_MAX_S
from cloud_verifier.sessions import Key, TextStart
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.packing import id_bytes
from fedhlm_lab.sim import toy
from tests.cloud_verifier.batches import PROMPT, batcher, job, long_prompt, step

BYTES = id_bytes(toy.VOCAB_SIZE)
PACE = 10.0


def due(block: BlockJob, start: TextStart | None = None, pace: float = PACE) -> float:
    return due_s(block, start, pace=pace, id_bytes=BYTES)


@given(came_s=st.floats(0.0, 1e4), drafts=st.integers(0, 9), extend=st.integers(1, 40), pace=st.floats(0.1, 1e3))
def test_a_block_is_due_when_its_last_token_is(came_s: float, drafts: int, extend: int, pace: float) -> None:
    first = job(ids=[7] * drafts, extend=extend, came_s=came_s)
    assert math.isclose(due(first, pace=pace), came_s + (drafts + extend) / pace)


@given(began_s=st.floats(0.0, 100.0), ahead=st.integers(0, 50), later_s=st.floats(0.0, 50.0))
def test_tokens_that_are_there_already_put_the_deadline_off_and_waiting_does_not(
    began_s: float, ahead: int, later_s: float
) -> None:
    behind = job(prompt=[5] * 10, came_s=began_s + later_s)
    further = job(prompt=[5] * (10 + ahead), came_s=began_s)
    start = TextStart(began_s, 10)
    assert math.isclose(due(further, start), due(behind, start) + ahead / PACE)
    assert due(behind, start) == due(behind._replace(came_s=began_s), start)


def test_an_audit_is_due_after_half_of_its_senders_patience_wherever_its_text_stands() -> None:
    audit = job(ids=[7], fixed=1, extend=0, came_s=3.0)
    assert due(audit) == due(audit, TextStart(0.0, 1)) == 3.0 + audit.escalation.patience_ms / 2_000.0
    patient = audit._replace(escalation=job(ids=[7], fixed=1, extend=0, patience_ms=3_600_000).escalation)
    assert due(patient) == 3.0 + PATIENCE_MAX_S / 2.0


@given(
    one=st.tuples(st.floats(0.0, 2.0 * CREDIT), st.floats(0.0, 100.0)),
    other=st.tuples(st.floats(0.0, 2.0 * CREDIT), st.floats(0.0, 100.0)),
)
def test_deadlines_decide_within_the_credit_and_service_beyond_it(
    one: tuple[float, float], other: tuple[float, float]
) -> None:
    if max(one[0], other[0]) <= CREDIT:
        assert (rank_of(*one) < rank_of(*other)) == (one[1] < other[1])
    if one[0] < other[0] and other[0] > CREDIT:
        assert rank_of(*one) < rank_of(*other)


def begun(work: Batcher, agent: str, *, came_s: float, tokens: int) -> BlockJob:
    """A text of `tokens` tokens, written in two blocks, the first of which came at `came_s`; the result is its next one."""
    text = list(PROMPT)
    for number, extend in enumerate((1, tokens - 1)):
        work.submit(job(agent, prompt=text, extend=extend, primed=not number, came_s=8.0 if number else came_s))
        while not work.idle:
            step(work)
        text += toy.large_alone(text, Sampling(1), extend)
    return job(agent, prompt=text, primed=False, came_s=came_s + 10.0)


def first_of(*texts: tuple[float, int], pace: float) -> int:
    """Which of some texts (when each began, and its tokens) has its next block run first, in calls of one block."""
    work = batcher(batch_max=1, pace=pace)
    blocks = [begun(work, f"a{number}", came_s=came_s, tokens=n) for number, (came_s, n) in enumerate(texts)]
    for block in blocks:
        work.submit(block)
    (running,) = work.take(0.0)[0]
    return [block.key.agent for block in blocks].index(running.job.key.agent)


def test_a_text_that_is_behind_goes_before_one_that_is_ahead() -> None:
    assert first_of((0.0, 30), (0.0, 3), pace=PACE) == 1
    assert first_of((0.0, 3), (0.0, 30), pace=PACE) == 0
    assert first_of((-4.0, 30), (0.0, 3), pace=PACE) == 0, "it began long ago, and has too few tokens for that"
    assert first_of((-4.0, 30), (0.0, 3), pace=0.0) == 1, "without a pace, whoever has used the model less"


def test_a_text_goes_before_an_audit_of_another_device_until_that_is_due() -> None:
    def first(now_s: float) -> str:
        work = batcher(batch_max=1, pace=PACE)
        work.submit(job("audited", ids=[7], fixed=1, extend=0, patience_ms=20_000))
        work.submit(job("writes", came_s=now_s))
        (running,) = work.take(now_s)[0]
        return running.job.key.agent

    assert first(9.0) == "writes"
    assert first(11.0) == "audited"


@settings(max_examples=15, deadline=None)
@given(
    others=st.integers(1, 6),
    late_s=st.lists(st.floats(0.0, 1e4), min_size=1, max_size=6),
    extend=st.integers(1, 20),
    length=st.sampled_from([2, 30, 200]),
    audit=st.booleans(),
)
def test_however_urgent_others_are_a_block_waits_for_no_more_than_their_credit(
    others: int, late_s: list[float], extend: int, length: int, audit: bool
) -> None:
    """Audits and long contexts too. `late_s` is how long ago the texts of others were due."""
    work, key, session, served = batcher(batch_max=2, pace=PACE), Key("c", "waits", 1), 0, 0.0

    def urgent(number: int) -> BlockJob:
        nonlocal session
        session += 1
        came_s = -late_s[session % len(late_s)]
        return job(f"a{number}", session, prompt=long_prompt(session, length), extend=extend, came_s=came_s)

    for number in range(others):
        for _ in range(RUNNING_OF_ONE + 1):
            work.submit(urgent(number))
    ids, extend_of_it = ([7], 0) if audit else ([], 1)
    work.submit(
        job(
            "waits", prompt=long_prompt(0, length), ids=ids, fixed=len(ids), extend=extend_of_it, came_s=1e9,
            patience_ms=60_000,
        )
    )  # fmt: skip
    most = others * (CREDIT + RUNNING_OF_ONE * (QUANTUM + length + 20)) * 2  # two lanes
    while served <= most:
        batch, done = work.take(0.0)
        served += sum(running.cost for running in batch if running.job.key != key)
        done += work.advance(batch, toy.large_outputs([work.request(running) for running in batch]))
        if any(one.job.key == key for one in done):
            return
        for one in done:
            work.submit(urgent(int(one.job.key.agent[1:])))
    raise AssertionError(f"not answered while others used {served} tokens")


def test_a_client_on_the_clouds_own_machine_is_not_told_that_the_cloud_is_at_work() -> None:
    for expires_s, told in ((60.0, 1), (math.inf, 0)):
        work = batcher()
        work.submit(job(prompt=long_prompt(1, 200), expires_s=expires_s, patience_ms=60_000))
        work.take(4.9)
        assert len(work.reports.due(5.0)) == told
