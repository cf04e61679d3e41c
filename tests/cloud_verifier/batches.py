"""Batches of the toy LLM, one call at a time, each within its bounds."""

import random
from collections.abc import Iterable
from functools import partial

from cloud_verifier.batching import LARGE, Batcher, Done
from cloud_verifier.calls import READS, BlockJob, Running
from cloud_verifier.engine import DraftModel, Engine
from cloud_verifier.sessions import Key, Sessions
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, Prime, Sampling
from fedhlm.protocol.packing import pack_ids
from fedhlm_lab.sim import toy

PROMPT = [5, 6]
LOTS = 1 << 40


AGREEMENT = 0.8
BESIDE = DraftModel(toy.beside(AGREEMENT).engine._replace(token_bytes=0), toy.CONTEXT)


def batcher(
    *,
    batch_max: int = 8,
    sessions_max: int = 128,
    batch_tokens: int = 64,
    cache_tokens: int = 100_000,
    small: DraftModel | None = None,
    pace: float = 0.0,
) -> Batcher:
    """On the toy LLM, whose cache takes one byte a token; that of `small`, which is BESIDE or like it, takes none."""
    sessions = Sessions(
        fingerprint=toy.FINGERPRINT, eos_ids=frozenset(), context_max=toy.CONTEXT, sessions_max=sessions_max
    )
    engine = Engine(toy.ToyCache(), toy.large_forward, token_bytes=1)
    return Batcher(
        sessions,
        engine,
        batch_max=batch_max,
        batch_tokens=batch_tokens,
        cache_bytes=cache_tokens,
        small=small,
        pace=pace,
    )


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
    drafts: int | None = None,
    came_s: float = 0.0,
    patience_ms: int = 1,
) -> BlockJob:
    prompt = list(prompt)
    context = pack_ids(prompt, toy.VOCAB_SIZE)
    escalation = Escalation(
        version=SCHEMA_VERSION, sender=agent, sequence=1, sent_ms=0, session=session, epoch=0, base=len(prompt),
        ids=pack_ids(list(ids), toy.VOCAB_SIZE), patience_ms=patience_ms, extend=extend, fixed=fixed, hints=drafts,
        before=Prime(Sampling(1), toy.FINGERPRINT, context) if primed else None,
    )  # fmt: skip
    return BlockJob(Key(cluster, agent, session), escalation, expires_s, came_s=came_s)


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
    drafting = work.take_drafting()
    assert len(drafting) <= 1 or len(drafting) * max(r.piece for r in drafting) <= work.batch_tokens
    assert len(drafting) <= work.batch_max
    done += drafted(work, drafting)
    assert work.cached_bytes <= max(work.cache_bytes, sum(r.entry.cached for r in {*batch, *drafting}))
    return done


def drafted(work: Batcher, drafting: list[Running]) -> list[Done]:
    """One call of the small model."""
    small = partial(toy.small_logits, agreement=AGREEMENT)
    return work.advance(drafting, toy.outputs_of(small, [work.request(running) for running in drafting]))


def settled(work: Batcher, limit: int = 5_000) -> list[Done]:
    found: list[Done] = []
    for _ in range(limit):
        found += step(work)
        if work.idle:
            return found
    raise AssertionError("never idle")


def nothing_left(work: Batcher) -> bool:
    return not (work.waiting or work._queue.load.bytes or any(work._running.values()) or not work.idle)
