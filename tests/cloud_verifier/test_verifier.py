"""Settling a block gives the target's own text, whatever was settled, cached or lost before."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_verifier.verifier import Block, Session, Settled, settle
from fedhlm.messages import Sampling
from fedhlm.sampling import law
from lab import toy

SAMPLING = Sampling(seed=3)


def session(context: Sequence[int], sampling: Sampling = SAMPLING) -> Session:
    return Session(sampling, toy.VOCAB_SIZE, frozenset({toy.EOS_ID}), list(context))


def drive(state: Session, block: Block) -> Settled:
    """Run a block on the toy LLM, checking that every feed continues what the cache holds."""
    steps = settle(state, block)
    held: list[int] = list(state.fed)
    feed = next(steps)
    while True:
        assert feed.keep <= len(held)
        assert feed.ids
        held = held[: feed.keep] + feed.ids
        rows = [toy.large_logits(held[: feed.keep + i + 1]) for i in range(len(feed.ids))]
        try:
            feed = steps.send(np.stack(rows))
        except StopIteration as stop:
            settled: Settled = stop.value
            return settled


def block(base: int, ids: list[int], *, fixed: int = 0, extend: int = 1) -> Block:
    return Block(base, ids, fixed, extend, [b""] * len(ids))


prompts = st.lists(st.integers(1, toy.VOCAB_SIZE - 1), min_size=1, max_size=4)


@given(prompt=prompts, right=st.integers(0, 6), wrong=st.booleans(), extend=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_block_is_settled_to_the_targets_text(
    prompt: list[int], right: int, wrong: bool, extend: int, seed: int
) -> None:
    sampling = Sampling(seed=seed)
    text = toy.large_alone(prompt, sampling, 16)
    ids = text[:right]
    if wrong and len(ids) == right < len(text):
        ids = [*ids, (text[right] + 1) % toy.VOCAB_SIZE, 5, 5]
    if not ids and not extend:
        return
    state = session(prompt, sampling)
    settled = drive(state, block(len(prompt), ids, extend=extend))
    if len(ids) > right:
        assert (settled.accepted, settled.ids) == (right, [text[right]])
    else:
        assert settled.accepted == len(ids)
        assert settled.ids == text[len(ids) : len(ids) + extend] or toy.EOS_ID in ids
    if toy.EOS_ID not in ids:
        assert state.context == prompt + text[: len(state.context) - len(prompt)]


@given(prompt=prompts, cuts=st.lists(st.integers(0, 5), max_size=5), seed=st.integers(0, 99))
def test_blocks_of_any_size_and_repeated_blocks_agree(prompt: list[int], cuts: list[int], seed: int) -> None:
    sampling = Sampling(seed=seed)
    text = toy.large_alone(prompt, sampling, 30)
    state = session(prompt, sampling)
    base = len(prompt)
    for size in cuts:
        ids = text[base - len(prompt) : base - len(prompt) + size]
        first = drive(state, block(base, ids))
        state.fed = state.fed[: len(state.fed) // 2] if size % 2 else []  # a cache that was lost changes nothing
        assert drive(state, block(base, ids)) == first
        base = len(state.context)
        if state.context[-1] == toy.EOS_ID:
            break
    assert state.context == prompt + text[: len(state.context) - len(prompt)]


def test_fixed_ids_overwrite_what_was_settled() -> None:
    state = session([4, 5])
    drive(state, block(2, [], extend=5))
    settled = drive(state, block(2, [9, 9, 9], fixed=3, extend=1))
    assert settled.accepted == 3
    assert state.context[2:5] == [9, 9, 9]
    assert settled.ids == toy.large_alone([4, 5, 9, 9, 9], SAMPLING, 1)


def test_target_probabilities_are_the_targets() -> None:
    text = toy.large_alone([7], SAMPLING, 3)
    settled = drive(session([7]), block(1, text))
    for i, token in enumerate(text):
        expected = law(toy.large_logits([7, *text[:i]]), SAMPLING)[token]
        assert settled.target_probs[i] == pytest.approx(expected)
