"""What waits, runs and is cached is bounded, and no agent can fill it for the others."""

import pytest
from msgspec.structs import replace

from cloud_verifier import batching
from cloud_verifier.batching import RUNNING_OF_ONE, Batcher, Done
from cloud_verifier.calls import BlockJob
from cloud_verifier.queues import BYTES_OF_ONE, GOING_FIRST, WAITING_MAX, WAITING_OF_ONE
from cloud_verifier.sessions import Key, RefusedBlock
from cloud_verifier.verifier import Settled
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from tests.cloud_verifier.batches import PROMPT, batcher, job, long_prompt, nothing_left, settled, step


def test_an_agent_has_a_share_of_the_model_whatever_another_asks_for() -> None:
    work = batcher()
    for session in range(100):
        work.submit(job("greedy", session, extend=50))
    step(work)
    work.submit(job("modest"))
    found: list[Done] = []
    for _ in range(4):
        found += step(work)
        assert sum(r.job.key.agent == "greedy" for r in work.running) <= RUNNING_OF_ONE
    assert [done.job.key.agent for done in found] == ["modest"]


def audit(session: int, agent: str = "a") -> BlockJob:
    return job(agent, session, prompt=long_prompt(session, 80), ids=[7], fixed=1, extend=0)


def calls_until(work: Batcher, session: int) -> int:
    for number in range(1, 1_000):
        if any(done.job.key.session == session for done in step(work)):
            return number
    raise AssertionError("never settled")


def test_a_block_that_a_text_waits_for_is_not_behind_the_audits_of_its_device() -> None:
    waits = []
    for audits in (0, 8, 64):
        work = batcher(batch_tokens=32)
        for session in range(audits):
            work.submit(audit(session))
        step(work)
        work.submit(job(session=999, prompt=long_prompt(999, 80), ids=[7]))
        waits.append(calls_until(work, 999))
    assert waits[2] == waits[1]  # however many wait
    assert waits[1] <= RUNNING_OF_ONE * waits[0]


def test_audits_are_answered_however_many_texts_a_device_writes() -> None:
    work = batcher(batch_tokens=32)
    work.submit(audit(1_000))
    for session in range(40):
        work.submit(job(session=session, prompt=long_prompt(session, 80), ids=[7]))
    done = [one.job.key.session for one in settled(work)]
    assert done.index(1_000) == GOING_FIRST


def test_everything_that_was_taken_is_settled_in_the_end() -> None:
    work = batcher(batch_max=2, sessions_max=3)
    for session in range(40):
        work.submit(job(f"a{session % 3}", session, extend=1 + session % 5))
    found = settled(work)
    assert all(isinstance(done.outcome, Settled) for done in found)
    assert sorted(done.job.key.session for done in found) == list(range(40))
    assert nothing_left(work)


def fed_by(work: Batcher, *jobs: BlockJob) -> int:
    """The tokens that the model computes until these blocks are settled."""
    for one in jobs:
        work.submit(one)
    fed = 0
    while not work.idle:
        batch, _ = work.take(0.0)
        fed += sum(running.piece for running in batch)
        work.advance(batch, toy.large_outputs([work.request(running) for running in batch]))
    return fed


@pytest.mark.parametrize("cache_tokens", [100_000, 310])
def test_the_next_turn_of_a_conversation_goes_on_with_the_cache_of_the_one_before(cache_tokens: int) -> None:
    work, alone = batcher(cache_tokens=cache_tokens), batcher()
    history = long_prompt(1)
    assert fed_by(work, job(session=1, prompt=history)) == 300
    longer = [*history, *long_prompt(2, 6)]
    assert fed_by(work, job(session=2, prompt=longer)) == 6
    assert work.cached_bytes == 306
    work.submit(job(session=3, prompt=longer))
    alone.submit(job(session=3, prompt=longer))
    assert settled(work)[0].outcome == settled(alone)[0].outcome
    assert fed_by(work, job(session=1, primed=False, prompt=history)) >= 300  # computed again


@pytest.mark.parametrize(
    ("agent", "prompt"), [("b", long_prompt(1)), ("a", [*long_prompt(1)[:100], *long_prompt(3)]), ("a", long_prompt(4))]
)
def test_a_cache_stays_where_it_is_of_more_use(agent: str, prompt: list[int]) -> None:
    work = batcher()
    fed_by(work, job(session=1, prompt=long_prompt(1)))
    assert fed_by(work, job(agent=agent, session=2, prompt=prompt)) == len(prompt)
    assert work.cached_bytes == 300 + len(prompt)


def test_a_session_whose_next_block_starts_keeps_its_own_cache_and_takes_the_room_of_others() -> None:
    """It was used longest ago until that moment."""
    work = batcher(cache_tokens=210)
    for number, name in enumerate("ab"):
        work.submit(job(name, prompt=long_prompt(number, 100)))
        settled(work)
    text = long_prompt(0, 100)
    text += toy.large_alone(text, Sampling(1), 1)
    work.submit(job("a", prompt=text, ids=toy.large_alone(text, Sampling(1), 20), primed=False))
    work.take(0.0)
    kept = {key.agent: entry.cached for key, entry in work.sessions._entries.items()}
    assert kept == {"a": 100, "b": 0}


def test_a_session_that_runs_keeps_its_cache() -> None:
    work = batcher()
    history = long_prompt(1)
    work.submit(job(session=1, prompt=history, extend=30))
    for _ in range(20):
        step(work)
    (first,) = work.running
    assert first.entry.cached > 290
    work.submit(job(session=2, prompt=[*history, 7]))
    step(work)
    assert first.entry.cached > 290
    settled(work)


def test_the_same_block_sent_again_waits_once() -> None:
    work = batcher()
    for expires_s in (1.0, 2.0, 3.0):
        work.submit(job(expires_s=expires_s))
    assert work.waiting == 1
    (done,) = step(work, 2.5)
    assert done.job.expires_s == 3.0
    assert nothing_left(work)


def test_the_end_of_a_session_drops_what_waits_and_comes_after_what_runs() -> None:
    work = batcher(batch_tokens=8)
    work.submit(job(prompt=long_prompt(1)))
    step(work)
    for ids in ([7], [7, 8]):
        work.submit(job(prompt=[1, *ids], ids=ids))
    work.submit(job("b"))
    work.submit(job(prompt=(), primed=False, extend=0))
    assert work.waiting == 2
    found = settled(work)
    assert sorted((done.job.key.agent, type(done.outcome).__name__) for done in found) == [
        ("a", "Settled"),
        ("a", "StaleBlock"),
        ("b", "Settled"),
    ]
    assert [key.agent for key in work.sessions._entries] == ["b"]
    assert nothing_left(work)


def test_one_agent_cannot_fill_the_queue() -> None:
    work = batcher()
    for session in range(WAITING_OF_ONE + 10):
        work.submit(job("greedy", session))
    assert work.overflowed == 10
    work.submit(job("modest"))
    assert work.overflowed == 10
    assert {done.job.key.agent for done in settled(work)} == {"greedy", "modest"}


def test_an_agent_is_told_at_once_that_there_is_no_room() -> None:
    work = batcher()
    for session in range(WAITING_OF_ONE):
        assert work.submit(job("greedy", session)) == []
    (done,) = work.submit(job("greedy", WAITING_OF_ONE))
    assert done.job.key.session == WAITING_OF_ONE
    assert done.outcome == RefusedBlock(batching.BUSY)


def test_there_is_always_room_for_a_cluster_and_an_agent_that_have_nothing_here() -> None:
    """However many names others invent, in this cluster or in another one."""
    work = batcher()
    for cluster in ("c", "loud", "louder"):
        for name in range(2 * WAITING_MAX // WAITING_OF_ONE):
            for session in range(WAITING_OF_ONE):
                work.submit(job(f"hog{name}", session, cluster=cluster))
    assert work.overflowed > 0
    assert work.waiting <= WAITING_MAX
    for cluster in ("c", "calm"):
        (refused,) = work.submit(job("quiet", cluster=cluster))
        assert refused.job.key.agent.startswith("hog")


def test_waiting_blocks_are_bounded_in_bytes() -> None:
    work = batcher()
    large = job("greedy")
    large = large._replace(escalation=replace(large.escalation, laws=bytes(BYTES_OF_ONE - 100)))
    work.submit(large)
    work.submit(large._replace(key=Key("c", "greedy", 2)))
    assert work.overflowed == 1
    work.submit(job("modest"))
    assert (work.waiting, work.overflowed) == (2, 1)


def test_a_block_whose_deadline_passes_is_given_up_and_its_session_goes_on() -> None:
    """Nobody waits for the rest, and the tokens that were settled until then stay what they are."""
    work = batcher()
    work.submit(job(extend=20, expires_s=1.0))
    for _ in range(5):
        assert step(work, 0.5) == []
    assert step(work, 2.0) == []
    assert work.idle
    assert work.expired == 1
    work.submit(job(extend=20, primed=False))
    (done,) = settled(work)
    assert isinstance(done.outcome, Settled)
    assert done.outcome.ids == toy.large_alone(PROMPT, Sampling(1), 20)
