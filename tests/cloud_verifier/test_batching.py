"""Work is shared: calls are bounded in tokens, caches in bytes, and each agent in what it may take from the others."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from cloud_verifier import batching
from cloud_verifier.batching import LARGE, RUNNING_OF_ONE, Batcher, Done
from cloud_verifier.calls import READS, BlockJob, Running
from cloud_verifier.engine import Engine
from cloud_verifier.queues import BYTES_OF_ONE, GOING_FIRST, WAITING_MAX, WAITING_OF_ONE
from cloud_verifier.sessions import Key, RefusedBlock, Sessions
from cloud_verifier.shares import BURST
from cloud_verifier.verifier import Settled
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, Prime, Sampling
from fedhlm.protocol.packing import pack_ids
from fedhlm_lab.sim import toy

PROMPT = [5, 6]
LOTS = 1 << 40


def batcher(
    *, batch_max: int = 8, sessions_max: int = 128, batch_tokens: int = 64, cache_tokens: int = 100_000
) -> Batcher:
    """On the toy LLM, whose cache takes one byte a token."""
    sessions = Sessions(
        fingerprint=toy.FINGERPRINT, eos_ids=frozenset(), context_max=toy.CONTEXT, sessions_max=sessions_max
    )
    engine = Engine(toy.ToyCache(), toy.large_forward, token_bytes=1)
    return Batcher(sessions, engine, batch_max=batch_max, batch_tokens=batch_tokens, cache_bytes=cache_tokens)


def job(
    agent: str = "a",
    session: int = 1,
    *,
    extend: int = 1,
    expires_s: float = 1e9,
    primed: bool = True,
    prompt: Iterable[int] = PROMPT,
    ids: Iterable[int] = (),
    cluster: str = "c",
    fixed: int = 0,
) -> BlockJob:
    prompt = list(prompt)
    context = pack_ids(prompt, toy.VOCAB_SIZE)
    escalation = Escalation(
        version=SCHEMA_VERSION, sender=agent, sequence=1, sent_ms=0, session=session, epoch=0, base=len(prompt),
        ids=pack_ids(list(ids), toy.VOCAB_SIZE), patience_ms=1, extend=extend, fixed=fixed,
        before=Prime(Sampling(1), toy.FINGERPRINT, context) if primed else None,
    )  # fmt: skip
    return BlockJob(Key(cluster, agent, session), escalation, expires_s)


def long_prompt(seed: int, length: int = 300) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(length)]


def cost(batch: list[Running]) -> float:
    """Of a call, in tokens: rows padded to the longest piece, and what is read of caches."""
    return len(batch) * (max(r.piece for r in batch) + max(r.entry.cached for r in batch) / READS)


def step(work: Batcher, now_s: float = 0.0) -> list[Done]:
    """One model call, within its bounds."""
    batch, done = work.take(now_s)
    assert len(batch) <= work.batch_max
    most = work.batch_tokens * (1 if any(r.short and r.left <= work.batch_tokens for r in batch) else LARGE)
    assert len(batch) <= 1 or cost(batch) <= most
    for running in batch:
        assert 1 <= running.piece <= most
        assert running.wanted <= running.piece
    done += work.advance(batch, toy.large_outputs([work.request(running) for running in batch]))
    growing = max((r.entry.cached for r in batch), default=0)
    assert work.cached_bytes <= max(work.cache_bytes, sum(r.entry.cached for r in batch)), growing
    return done


def settled(work: Batcher, limit: int = 5_000) -> list[Done]:
    found: list[Done] = []
    for _ in range(limit):
        found += step(work)
        if work.idle:
            return found
    raise AssertionError("never idle")


def nothing_left(work: Batcher) -> bool:
    return not (work.waiting or work._queue.load.bytes or any(work._running.values()) or not work.idle)


# Exactness


@settings(max_examples=60, deadline=None)
@given(
    batch_tokens=st.integers(1, 80),
    batch_max=st.integers(1, 6),
    cache_tokens=st.integers(1, 400),
    shapes=st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 12), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=6
    ),
    seed=st.integers(0, 99),
)
def test_verdicts_do_not_depend_on_pieces_batches_or_lost_caches(
    batch_tokens: int, batch_max: int, cache_tokens: int, shapes: list[tuple[int, int, int, int]], seed: int
) -> None:
    """Each text is the target's own, and the probabilities are those of one call for all of it."""

    def jobs() -> list[BlockJob]:
        made = []
        for number, (length, drafts, extend, agent) in enumerate(shapes):
            prompt = long_prompt(seed + number, length)
            text = toy.large_alone(prompt, Sampling(1), drafts)
            if number % 2 and text:
                text[-1] = 1 + text[-1] % (toy.VOCAB_SIZE - 1)
            made.append(job(f"a{agent}", number, extend=extend, prompt=prompt, ids=text, cluster=f"c{number % 2}"))
        return made

    def outcomes(work: Batcher) -> dict[Key, object]:
        for made in jobs():
            work.submit(made)
        found = settled(work)
        assert nothing_left(work)
        return {done.job.key: done.outcome for done in found}

    narrow = batcher(batch_tokens=batch_tokens, batch_max=batch_max, cache_tokens=cache_tokens)
    wide = batcher(batch_tokens=LOTS, batch_max=1, cache_tokens=LOTS)
    assert outcomes(narrow) == outcomes(wide)
    assert wide.evicted == 0


def test_caches_that_do_not_fit_are_dropped_and_computed_again() -> None:
    work = batcher(cache_tokens=350)
    for agent in range(4):
        work.submit(job(f"a{agent}", prompt=long_prompt(agent)))
    first = settled(work)
    assert work.evicted >= 3
    for agent in range(4):  # the sessions are still known: no prime is needed
        prompt = long_prompt(agent)
        more = job(f"a{agent}", prompt=[*prompt, toy.large_alone(prompt, Sampling(1), 1)[0]], primed=False)
        work.submit(more)
    again = settled(work)
    assert all(isinstance(done.outcome, Settled) for done in (*first, *again))
    assert work.cached_bytes <= 350


def test_only_the_rows_that_are_needed_are_asked_for() -> None:
    work = batcher(batch_tokens=16 // LARGE)
    prompt = long_prompt(1, 100)
    work.submit(job(prompt=prompt, ids=toy.large_alone(prompt, Sampling(1), 3)))
    asked, calls = 0, 0
    while not work.idle:
        batch, _ = work.take(0.0)
        requests = [work.request(r) for r in batch]
        asked, calls = asked + sum(r.rows for r in requests), calls + 1
        work.advance(batch, toy.large_outputs(requests))
    assert calls >= 6
    assert asked == 4


# Fairness


def wait_of(work: Batcher, quiet: BlockJob, more: Iterable[BlockJob] = ()) -> float:
    """Cost of all calls from a quiet agent's block to its verdict; the others ask again as soon as they are answered."""
    work.submit(quiet)
    total = 0.0
    for _ in range(10_000):
        batch, done = work.take(0.0)
        if batch:
            total += cost(batch)
        done += work.advance(batch, toy.large_outputs([work.request(r) for r in batch]))
        if any(d.job.key == quiet.key for d in done):
            return total
        for d in done:
            work.submit(_next(d.job))
    raise AssertionError("never answered")


def _next(before: BlockJob) -> BlockJob:
    key, session = before.key, before.key.session + 1_000
    return job(key.agent, session, prompt=long_prompt(session), cluster=key.cluster)


def text_cost(work: Batcher, cluster: str, *, blocks: int = 60) -> float:
    """Cost of all calls while a quiet agent writes a text, one short block after the other, each when the last is back."""
    context, total = long_prompt(7, 20), 0.0
    for number in range(blocks):
        drafts = toy.large_alone(context, Sampling(1), 2)
        quiet = job("quiet", prompt=context, ids=drafts, extend=1, primed=number == 0, cluster=cluster)
        total += wait_of(work, quiet)
        context = [*context, *toy.large_alone(context, Sampling(1), 3)]
    return total


def crowded(names: int, cluster: str, *, extend: int = 1, length: int = 300) -> Batcher:
    """A cloud on which each of many names has asked for two contexts at once, again and again, for a while."""
    work = batcher()
    for name in range(names):
        for session in range(2):
            work.submit(
                job(
                    f"hog{name}", 100 * name + session, prompt=long_prompt(name, length), cluster=cluster, extend=extend
                )
            )
    for _ in range(400):
        for done in step(work):
            work.submit(_next(done.job))
    return work


@pytest.mark.parametrize("cluster", ["c", "quiet's own"])
@pytest.mark.parametrize(("length", "extend"), [(300, 1), (20, 100)])
def test_a_quiet_agent_beside_63_hogs_waits_for_one_small_call_more_than_alone(
    cluster: str, length: int, extend: int
) -> None:
    """Not only at first: over a text of many blocks, in which it asks for more of the model than any hog gets."""
    alone = text_cost(batcher(), cluster)
    work = crowded(63, "c", extend=extend, length=length)
    assert text_cost(work, cluster) <= 2.0 * alone + 60 * work.batch_tokens / 2


def test_names_that_an_edge_invents_delay_nobody_of_another_cluster() -> None:
    alone = text_cost(batcher(), "calm")
    work = crowded(300, "loud")
    assert text_cost(work, "calm") <= 2.0 * alone + 60 * work.batch_tokens / 2


def test_names_that_ask_for_little_delay_a_quiet_cluster_little() -> None:
    """300 names with one short block each at all times."""
    alone = text_cost(batcher(), "calm")
    work = batcher()
    for name in range(300):
        work.submit(job(f"hog{name}", prompt=long_prompt(name, 20), cluster="loud"))
    assert text_cost(work, "calm") <= 2.0 * alone + 60 * work.batch_tokens / 2


def test_long_contexts_get_half_of_the_model_beside_many_short_blocks() -> None:
    work = batcher()
    served = {True: 0.0, False: 0.0}
    for agent in range(8):
        work.submit(job(f"long{agent}", prompt=long_prompt(agent), cluster="c"))
    for agent in range(60):
        work.submit(job(f"short{agent}", prompt=long_prompt(agent, 20)))
    for _ in range(300):
        batch, done = work.take(0.0)
        for running in batch:
            served[running.short] += running.cost
        done += work.advance(batch, toy.large_outputs([work.request(r) for r in batch]))
        for d in done:
            again = d.job.key.agent.startswith("long")
            work.submit(
                _next(d.job) if again else d.job._replace(key=d.job.key._replace(session=d.job.key.session + 1))
            )
    assert served[False] == pytest.approx(served[True], rel=0.25)


def test_clusters_get_equal_parts_however_many_names_they_have() -> None:
    work = batcher()
    served = {"one": 0.0, "many": 0.0}
    for cluster, names in (("one", 1), ("many", 30)):
        for name in range(names):
            for session in range(60 // names):
                work.submit(job(f"{cluster}{name}", session, prompt=long_prompt(session), cluster=cluster))
    for _ in range(150):
        batch, _ = work.take(0.0)
        for running in batch:
            served[running.job.key.cluster] += running.piece + running.entry.cached / READS
        work.advance(batch, toy.large_outputs([work.request(r) for r in batch]))
    assert served["one"] == pytest.approx(served["many"], rel=0.2)


def test_credit_for_silence_is_bounded() -> None:
    """An agent that was silent for long is not served for longer than its credit before the others."""
    work = batcher()
    for session in range(200):
        work.submit(job("busy", session, prompt=long_prompt(session)))
    for _ in range(300):
        step(work)
    for session in range(100):
        work.submit(job("late", 1_000 + session, prompt=long_prompt(session)))
    served = {"busy": 0.0, "late": 0.0}
    for _ in range(100):
        batch, _ = work.take(0.0)
        for running in batch:
            served[running.job.key.agent] += running.piece + running.entry.cached / READS
        work.advance(batch, toy.large_outputs([work.request(r) for r in batch]))
    assert served["late"] - served["busy"] <= BURST + 3 * batching.QUANTUM


def test_many_long_contexts_are_answered_one_after_the_other() -> None:
    """The first is there long before the last, and few caches are held on the way."""
    work = batcher(cache_tokens=64 * 500 // 4)
    for agent in range(64):
        work.submit(job(f"a{agent}", prompt=long_prompt(agent, 500)))
    at: list[int] = []
    for call in range(5_000):
        at += [call] * len(step(work))
        if work.idle:
            break
    assert len(at) == 64
    assert at[0] < 0.1 * at[-1]
    assert at[31] < 0.6 * at[-1]


# Bounds


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


def test_beside_short_blocks_calls_for_long_contexts_are_small() -> None:
    """Whoever asks for little waits for the call that runs, and no longer than a quarter of a full one takes."""
    work = batcher(batch_tokens=64)
    work.submit(job("hog", prompt=long_prompt(1)))
    assert [running.piece for running in work.take(0.0)[0]] == [64 * LARGE], "nobody else asked lately"
    work = batcher(batch_tokens=64)
    for now_s, agent in enumerate(("quiet", "hog", "hog")):
        if agent == "quiet":
            work.submit(job("quiet"))
        else:
            work.submit(job("hog", now_s, prompt=long_prompt(now_s)))
    while not work.idle:
        batch, _ = work.take(0.5)
        assert [r.job.key.agent for r in batch] == ["quiet"] or all(r.piece <= 16 for r in batch)
        work.advance(batch, toy.large_outputs([work.request(running) for running in batch]))
