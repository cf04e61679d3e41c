"""Samples of drafts: bounded, of many prompts, each prompt's tokens together and in order."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_verifier.clustering import TOKENS_MAX, TOKENS_MIN
from cloud_verifier.coordinator import sample_of
from edge_agent.profile import FRESH_MIN, PROMPT_ROWS, ROWS_MAX, PromptSample, Sampler
from fedhlm.peers.context_keys import DIMS
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.messages import SCHEMA_VERSION, Profile

HEADER: dict[str, Any] = {"version": SCHEMA_VERSION, "sender": "a", "sequence": 1, "sent_ms": 1}


def key(prompt: int, position: int) -> bytes:
    """A key that tells where it comes from."""
    return bytes([prompt, position]) + bytes(DIMS - 2)


def feed(sampler: Sampler, prompt: int, tokens: int) -> None:
    sample = sampler.begin()
    for position in range(tokens):
        sample.see(position, key(prompt, position), position / 255.0)
    sampler.end(sample)


def places(fields: dict[str, Any]) -> list[tuple[int, int]]:
    keys = fields["keys"]
    return [(keys[i], keys[i + 1]) for i in range(0, len(keys), DIMS)]


@given(lengths=st.lists(st.integers(0, 60), max_size=60), seed=st.integers(0, 2**32))
def test_a_profile_holds_the_latest_prompts_in_order_and_no_more_than_it_may(lengths: list[int], seed: int) -> None:
    sampler = Sampler(np.random.default_rng(seed))
    for prompt, tokens in enumerate(lengths):
        feed(sampler, prompt, tokens)
    fields = sampler.take()
    found = places(fields)
    assert found == sorted(set(found))
    assert list(fields["uncertainties"]) == [position for _, position in found]
    assert len(found) <= ROWS_MAX
    kept: dict[int, int] = {}
    for prompt, position in found:
        assert position < lengths[prompt]
        kept[prompt] = kept.get(prompt, 0) + 1
    wanted = [(prompt, min(PROMPT_ROWS, tokens)) for prompt, tokens in enumerate(lengths) if tokens]
    latest = wanted[len(wanted) - len(kept) :]
    assert kept == dict(latest)
    if len(latest) < len(wanted):
        assert sum(kept.values()) + wanted[-len(latest) - 1][1] > ROWS_MAX, "a prompt was dropped that had room"


def test_every_position_of_a_prompt_is_as_likely() -> None:
    rng = np.random.default_rng(0)
    runs, tokens = 4_000, 24
    counts = np.zeros(tokens)  # (tokens,)
    for _ in range(runs):
        sample = PromptSample(rng)
        for position in range(tokens):
            sample.see(position, key(0, position), 0.5)
        for row, _ in sample.rows:
            counts[row[1]] += 1
    share = PROMPT_ROWS / tokens
    spread = np.sqrt(runs * share * (1.0 - share))
    assert np.abs(counts - runs * share).max() < 5.0 * spread


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 255)), max_size=200))
def test_a_redraft_takes_the_place_of_what_was_rolled_back(drafts: list[tuple[int, int]]) -> None:
    sample = PromptSample(np.random.default_rng(1))
    last: dict[int, int] = {}
    for position, mark in drafts:
        sample.see(position, bytes([position, mark]) + bytes(DIMS - 2), 0.0)
        last[position] = mark
    rows = [(row[0], row[1]) for row, _ in sample.rows]
    assert len(rows) == len({position for position, _ in rows})
    assert all(last[position] == mark for position, mark in rows)


def test_due_after_enough_new_tokens_and_readable_by_the_cloud() -> None:
    sampler = Sampler(np.random.default_rng(2))
    for prompt in range(FRESH_MIN // PROMPT_ROWS):
        assert not sampler.due
        feed(sampler, prompt, 20)
    assert sampler.due
    message = decode(encode(Profile(**HEADER, agent="a", **sampler.take())))
    assert isinstance(message, Profile)
    assert sample_of(message).features.shape == (FRESH_MIN, DIMS + 1)
    assert TOKENS_MIN <= FRESH_MIN
    assert ROWS_MAX <= TOKENS_MAX
    assert not sampler.due


@pytest.mark.parametrize("bad", [b"", b"\1" * (DIMS - 1)])
def test_drafts_without_a_key_are_left_out(bad: bytes) -> None:
    sampler = Sampler(np.random.default_rng(3))
    sample = sampler.begin()
    sample.see(0, bad, 0.5)
    sampler.end(sample)
    assert sampler.take()["keys"] == b""
