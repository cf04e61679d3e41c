"""Work is shared: what one agent may have waiting and running is bounded, and what nobody waits for is given up."""

from msgspec.structs import replace

from cloud_verifier import batching
from cloud_verifier.batching import RUNNING_OF_ONE, WAITING_OF_ONE, Batcher, BlockJob, Done
from cloud_verifier.sessions import Key, Sessions
from cloud_verifier.verifier import Settled
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, Prime, Sampling, pack_ids
from fedhlm_lab.sim import toy

PROMPT = [5, 6]


def batcher(*, batch_max: int = 8, sessions_max: int = 16) -> Batcher:
    sessions = Sessions(
        fingerprint=toy.FINGERPRINT, eos_ids=frozenset(), context_max=toy.CONTEXT, sessions_max=sessions_max
    )
    return Batcher(sessions, toy.ToyCache(), batch_max)


def job(
    agent: str = "a", session: int = 1, *, extend: int = 1, expires_s: float = 1e9, primed: bool = True
) -> BlockJob:
    context = pack_ids(PROMPT, toy.VOCAB_SIZE)
    escalation = Escalation(
        version=SCHEMA_VERSION, sender=agent, sequence=1, sent_ms=0, session=session, epoch=0, base=2, ids=b"",
        patience_ms=1, extend=extend, before=Prime(Sampling(1), toy.FINGERPRINT, context) if primed else None,
    )  # fmt: skip
    return BlockJob(Key("c", agent, session), escalation, expires_s)


def step(work: Batcher, now_s: float = 0.0) -> list[Done]:
    """One model call."""
    batch, done = work.take(now_s)
    return done + work.advance(batch, toy.large_outputs([work.request(running) for running in batch]))


def settled(work: Batcher, limit: int = 2_000) -> list[Done]:
    found: list[Done] = []
    for _ in range(limit):
        found += step(work)
        if work.idle:
            return found
    raise AssertionError("never idle")


def test_an_agent_has_a_share_of_the_model_whatever_another_asks_for() -> None:
    work = batcher()
    for session in range(100):
        work.submit(job("greedy", session, extend=50))
    step(work)
    work.submit(job("modest"))
    found: list[Done] = []
    for _ in range(4):
        found += step(work)
        assert sum(r.job.key.agent == "greedy" for r in work._running.values()) <= RUNNING_OF_ONE
    assert [done.job.key.agent for done in found] == ["modest"]


def test_everything_that_was_taken_is_settled_in_the_end() -> None:
    work = batcher(batch_max=2, sessions_max=3)
    for session in range(40):
        work.submit(job(f"a{session % 3}", session, extend=1 + session % 5))
    found = settled(work)
    assert all(isinstance(done.outcome, Settled) for done in found)
    assert sorted(done.job.key.session for done in found) == list(range(40))
    assert (work._count, work._bytes, len(work._counts), len(work._busy)) == (0, 0, 0, 0)


def test_as_many_run_as_caches_may_be_kept() -> None:
    work = batcher(batch_max=2, sessions_max=3)
    for number in range(20):
        work.submit(job(f"a{number}", extend=9))
    step(work)
    assert len(work._running) == 3


def test_one_agent_cannot_fill_the_queue() -> None:
    work = batcher()
    for session in range(WAITING_OF_ONE + 10):
        work.submit(job("greedy", session))
    assert work.overflowed == 10
    work.submit(job("modest"))
    assert work.overflowed == 10
    assert {done.job.key.agent for done in settled(work)} == {"greedy", "modest"}


def test_waiting_blocks_are_bounded_in_bytes() -> None:
    work = batcher()
    large = job("greedy")
    large = large._replace(escalation=replace(large.escalation, laws=bytes(batching.BYTES_OF_ONE - 100)))
    work.submit(large)
    work.submit(large)
    assert work.overflowed == 1
    work.submit(job("modest"))
    assert (work._count, work.overflowed) == (2, 1)


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
