"""Work is shared: calls are bounded in tokens, and long contexts and crowds delay nobody much."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier import batching
from cloud_verifier.batching import LARGE, Batcher
from cloud_verifier.calls import READS, BlockJob
from cloud_verifier.sessions import Key
from cloud_verifier.shares import BURST
from cloud_verifier.verifier import Settled
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from tests.cloud_verifier.batches import (
    BESIDE,
    LOTS,
    PROMPT,
    batcher,
    cost,
    drafted,
    job,
    long_prompt,
    nothing_left,
    settled,
    step,
)

# Exactness


@settings(max_examples=60, deadline=None)
@given(
    batch_tokens=st.integers(1, 80),
    batch_max=st.integers(1, 6),
    cache_tokens=st.integers(1, 400),
    beside=st.sampled_from([None, 1, 4]),
    pace=st.sampled_from([0.0, 0.1, 10.0, 1e6]),
    shapes=st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 12), st.integers(1, 9), st.integers(0, 3), st.floats(-60.0, 0.0)),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 99),
)
def test_verdicts_do_not_depend_on_order_pieces_batches_or_lost_caches(
    batch_tokens: int,
    batch_max: int,
    cache_tokens: int,
    beside: int | None,
    pace: float,
    shapes: list[tuple[int, int, int, int, float]],
    seed: int,
) -> None:
    """Each text is the target's own, and the probabilities are those of one call for all of it."""

    def jobs() -> list[BlockJob]:
        made = []
        for number, (length, drafts, extend, agent, came_s) in enumerate(shapes):
            prompt = long_prompt(seed + number, length)
            text = toy.large_alone(prompt, Sampling(1), drafts)
            if number % 2 and text:
                text[-1] = 1 + text[-1] % (toy.VOCAB_SIZE - 1)
            cluster = f"c{number % 2}"
            made.append(
                job(
                    f"a{agent}", number, extend=extend, prompt=prompt, ids=text, cluster=cluster, drafts=beside,
                    came_s=came_s,
                )
            )  # fmt: skip
        return made

    def outcomes(work: Batcher) -> dict[Key, object]:
        for made in jobs():
            work.submit(made)
        found = settled(work)
        assert nothing_left(work)
        assert any(done.outcome.guesses for done in found if isinstance(done.outcome, Settled)) <= (work is narrow)
        return {
            done.job.key: done.outcome._replace(guesses=()) if isinstance(done.outcome, Settled) else done.outcome
            for done in found
        }

    narrow = batcher(batch_tokens=batch_tokens, batch_max=batch_max, cache_tokens=cache_tokens, small=BESIDE, pace=pace)
    wide = batcher(batch_tokens=LOTS, batch_max=1, cache_tokens=LOTS)
    assert outcomes(narrow) == outcomes(wide)
    assert wide.evicted == 0


def test_the_clouds_own_drafts_save_calls_of_the_large_model_and_are_charged_to_nobody() -> None:
    def calls(drafts: int | None) -> tuple[int, object]:
        work, count = batcher(small=BESIDE), 0
        work.submit(job(extend=60, drafts=drafts))
        while True:
            batch, _ = work.take(0.0)
            count += bool(batch)
            done = work.advance(batch, toy.large_outputs([work.request(running) for running in batch]))
            done += drafted(work, work.take_drafting())
            if done:
                (ended,) = done
                assert isinstance(ended.outcome, Settled)
                return count, ended.outcome.ids

    plain, text = calls(None)
    fewer, same = calls(4)
    assert text == same
    assert plain == 60
    assert fewer < 0.7 * plain


def test_a_text_beyond_the_small_models_context_is_written_without_its_drafts() -> None:
    work = batcher(small=BESIDE._replace(context=20))
    work.submit(job(extend=19, drafts=4))
    (done,) = settled(work)
    assert isinstance(done.outcome, Settled)
    assert not done.outcome.guesses
    assert done.outcome.ids == toy.large_alone(PROMPT, Sampling(1), 19)


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


def crowded(names: int, cluster: str, *, extend: int = 1, length: int = 300, pace: float = 0.0) -> Batcher:
    """A cloud on which each of many names has asked for two contexts at once, again and again, for a while."""
    work = batcher(pace=pace)
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
@pytest.mark.parametrize(("length", "extend", "pace"), [(300, 1, 0.0), (20, 100, 0.0), (20, 100, 10.0)])
def test_a_quiet_agent_beside_63_hogs_waits_for_one_small_call_more_than_alone(
    cluster: str, length: int, extend: int, pace: float
) -> None:
    """Not only at first: over a text of many blocks, in which it asks for more of the model than any hog gets."""
    alone = text_cost(batcher(), cluster)
    work = crowded(63, "c", extend=extend, length=length, pace=pace)
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
