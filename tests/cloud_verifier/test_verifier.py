"""Settling a block gives the target's own text, whatever was settled, cached or lost before."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.verifier import Block, Session
from fedhlm.decoding.laws import encode_full
from fedhlm.decoding.sampling import law
from fedhlm.decoding.tree import Branch, Tree
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from tests.cloud_verifier.driven import drive

SAMPLING = Sampling(seed=3)


def session(context: Sequence[int], sampling: Sampling = SAMPLING) -> Session:
    return Session(sampling, toy.VOCAB_SIZE, frozenset({toy.EOS_ID}), list(context))


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


@settings(max_examples=60)
@given(
    prompt=prompts,
    extend=st.integers(1, 24),
    drafts=st.integers(1, 8),
    agreement=st.sampled_from([0.0, 0.7, 1.0]),
    coupling=st.sampled_from(["gumbel", "greedy", "full"]),
    lost=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_clouds_own_drafts_change_no_token(
    prompt: list[int], extend: int, drafts: int, agreement: float, coupling: str, lost: bool, seed: int
) -> None:
    sampling = Sampling(seed=seed, coupling=coupling)
    often = frozenset(range(8))  # texts end often, so that some end in the middle of a block of drafts
    plain, guessed = (Session(sampling, toy.VOCAB_SIZE, often, list(prompt)) for _ in range(2))
    for part in (extend, 5):
        if len(plain.context) > len(prompt) and plain.context[-1] in often:
            return
        base = len(plain.context)
        alone = drive(plain, block(base, [], extend=part))
        asked = block(base, [], extend=part)._replace(drafts=drafts)
        beside = drive(guessed, asked, small=lambda ids: toy.small_logits(ids, agreement))
        assert (beside.ids, guessed.context) == (alone.ids, plain.context)
        assert all(0 <= good <= made <= drafts for made, good in beside.guesses)
        # Each call of the large model settles what it accepts and one token more; the first one has no drafts.
        assert 1 + sum(good + 1 for _, good in beside.guesses) in (
            len(alone.ids),
            len(alone.ids) - 1,
            len(alone.ids) + 1,
        )
        if agreement == 1.0 and coupling != "full":
            assert all(good == made for made, good in beside.guesses)
        if lost:
            guessed.fed_small = guessed.fed_small[: len(guessed.fed_small) // 2]


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


@st.composite
def trees(draw: st.DrawFn, text: list[int]) -> Tree:
    """A nonsense tree in which the target's own tokens are frequent, so that every kind of walk occurs."""
    size = draw(st.integers(0, 6))
    chain = [draw(st.one_of(st.just(t), st.integers(0, toy.VOCAB_SIZE - 1))) for t in text[:size]]
    depths = list(range(len(chain) + 1))
    branches = []
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.integers(0, len(depths) - 1))
        depth = depths[parent]
        right = text[depth] if depth < len(text) else 1
        branches.append(Branch(parent, draw(st.one_of(st.just(right), st.integers(0, toy.VOCAB_SIZE - 1)))))
        depths.append(depth + 1)
    return Tree(chain, branches)


@settings(max_examples=50)
@given(data=st.data(), prompt=prompts, seed=st.integers(0, 999), temperature=st.sampled_from([0.0, 0.8]))
def test_text_settled_with_any_trees_is_the_targets_alone(
    data: st.DataObject, prompt: list[int], seed: int, temperature: float
) -> None:
    sampling = Sampling(seed=seed, temperature=temperature, coupling=data.draw(st.sampled_from(["gumbel", "greedy"])))
    text = toy.large_alone(prompt, sampling, 16)
    state = session(prompt, sampling)
    base, repeatable = len(prompt), []
    while len(state.context) - len(prompt) < len(text):
        tree = data.draw(trees(text[base - len(prompt) :]))
        asked = Block(base, list(tree.chain), 0, data.draw(st.integers(1, 3)), [b""] * len(tree.chain), tree.branches)
        settled = drive(state, asked)
        after = base - len(prompt) + settled.accepted
        assert (
            list(tree.chain[: settled.accepted]) == text[after - settled.accepted : after] or toy.EOS_ID in tree.chain
        )
        assert settled.ids[: len(text) - after] == text[after : after + len(settled.ids)]
        assert settled.ids
        repeatable.append((asked, settled))
        if data.draw(st.booleans()):
            state.fed = state.fed[: data.draw(st.integers(0, len(state.fed)))]  # a cache that was cut changes nothing
        again, answer = data.draw(st.sampled_from(repeatable))
        assert drive(state, again) == answer
        base += settled.accepted + len(settled.ids)
        if data.draw(st.booleans()):
            base = data.draw(st.integers(len(prompt), base))  # overlaps what is settled already
            base = min(base, len(state.context))
        if toy.EOS_ID in state.context[len(prompt) :]:
            break
    assert state.context[len(prompt) :][: len(text)] == text[: len(state.context) - len(prompt)]


def test_a_right_branch_stands_with_what_follows_it_and_one_more_token() -> None:
    text = toy.large_alone([7], SAMPLING, 6)
    wrong = (text[1] + 1) % toy.VOCAB_SIZE
    branches = (Branch(1, text[1]), Branch(4, text[2]), Branch(5, wrong), Branch(5, text[3]))
    state = session([7])
    settled = drive(state, Block(1, [text[0], wrong, wrong], 0, 1, [b""] * 3, branches))
    assert (settled.accepted, settled.ids) == (1, text[1:5])
    assert state.rejected_at == 2
    assert len(settled.target_probs) == 2


def test_a_block_without_branches_ends_at_its_first_rejection() -> None:
    text = toy.large_alone([7], SAMPLING, 6)
    wrong = (text[1] + 1) % toy.VOCAB_SIZE
    settled = drive(session([7]), block(1, [text[0], wrong, wrong]))
    assert (settled.accepted, settled.ids) == (1, [text[1]])


@given(
    prompt=prompts,
    committed=st.lists(st.one_of(st.none(), st.integers(1, toy.VOCAB_SIZE - 1)), min_size=1, max_size=6),
    drafts=st.lists(st.integers(1, toy.VOCAB_SIZE - 1), max_size=3),
    coupling=st.sampled_from(["gumbel", "greedy", "full"]),
)
def test_missed_bits_tell_where_the_target_would_have_gone_another_way(
    prompt: list[int], committed: list[int | None], drafts: list[int], coupling: str
) -> None:
    sampling = Sampling(seed=3, coupling=coupling)
    laws = [encode_full(law(toy.large_logits([5]), sampling)) for _ in drafts] if coupling == "full" else [b""] * 3
    fixed: list[int] = []
    expected = []
    for choice in committed:  # None: what the target emits
        own = toy.large_alone([*prompt, *fixed], sampling, 1)[0]
        fixed.append(own if choice is None else choice)
        expected.append(coupling != "full" and own != fixed[-1])
    state = session(prompt, sampling)
    asked = Block(len(prompt), fixed + drafts, len(fixed), 1, [b""] * len(fixed) + laws[: len(drafts)])
    settled = drive(state, asked)
    assert settled.missed == expected
    assert drive(state, asked) == settled
