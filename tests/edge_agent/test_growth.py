"""A tree stays within its budget, is the best of its size, and with one child a node is the chain; nothing it holds can
change the text."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cloud_verifier.verifier import Block, Session, Settled
from edge_agent.growth import (
    PRIOR_FIRST,
    RANKS,
    Acceptance,
    Candidates,
    Delay,
    Growth,
    TreeLimits,
    TreeRequest,
    ranking,
)
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.tree import Tree
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from tests.cloud_verifier.driven import drive

prompts = st.lists(st.integers(1, toy.VOCAB_SIZE - 1), min_size=1, max_size=4)
samplings = st.builds(
    Sampling,
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.0, 0.8]),
    top_p=st.sampled_from([1.0, 0.7]),
    coupling=st.sampled_from(["gumbel", "greedy"]),
    top_k=st.sampled_from([None, 3]),
    min_p=st.sampled_from([None, 0.2]),
)
budgets = st.builds(
    TreeLimits,
    nodes=st.integers(1, 40),
    width=st.integers(1, RANKS),
    levels=st.integers(1, 12),
    delay_s=st.floats(0.0, 10.0),
    batch=st.integers(1, 8),
)


class FixedShares(Acceptance):
    """The candidate number r stands with probability `shares[r]`, whatever its score."""

    def __init__(self, shares: list[float]) -> None:
        super().__init__()
        self.shares = np.array(shares)
        self.first = shares[0]

    def probabilities(self, ranked: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.shares[: len(ranked)]


def grown(shares: list[float], budget: TreeLimits) -> Growth:
    growth = Growth(budget, FixedShares(shares))
    some = Candidates(tuple(range(len(shares))), np.zeros(len(shares)))
    while leaves := growth.leaves(1.0, 1e-9):
        assert len(leaves) <= budget.batch
        for leaf in leaves:
            growth.add(leaf, some)
    return growth


def best_possible(shares: list[float], nodes: int) -> float:
    """1 + the sum of the `nodes` largest products, by brute force over the infinite tree."""
    frontier, taken = [1.0], []
    for _ in range(nodes + 1):
        frontier.sort()
        top = frontier.pop()
        taken.append(top)
        frontier += [top * share for share in shares]
    return sum(taken)


falling = st.lists(st.floats(0.01, 0.3), min_size=1, max_size=4).map(lambda s: sorted(s, reverse=True))


@given(shares=falling, nodes=st.integers(1, 30), batch=st.integers(1, 8))
def test_a_tree_is_the_best_of_its_size_and_at_least_the_chain(shares: list[float], nodes: int, batch: int) -> None:
    budget = TreeLimits(nodes=nodes, width=RANKS, levels=1_000, delay_s=1e12, batch=batch)
    tree, chain = grown(shares, budget), grown(shares, budget._replace(width=1))
    assert tree.expected == pytest.approx(best_possible(shares, nodes))
    assert chain.expected == pytest.approx(best_possible(shares[:1], nodes))
    assert tree.expected >= chain.expected * (1.0 - 1e-12)


@given(prompt=prompts, sampling=samplings, budget=budgets)
def test_growth_keeps_its_budget_and_its_main_chain_is_the_models_drafts(
    prompt: list[int], sampling: Sampling, budget: TreeLimits
) -> None:
    drafter = toy.ToyDrafter(agreement=0.6)
    tree, _ = drafter.grow_now(TreeRequest(prompt, sampling, budget))
    assert tree.chain
    assert len(tree.chain) + len(tree.branches) <= budget.nodes
    walked = Tree([d.token for d in tree.chain], tree.branches)
    assert walked.depth <= budget.levels
    parents = [*range(len(tree.chain)), *(b.parent for b in tree.branches)]
    assert max(np.bincount(parents)) <= budget.width
    ids = list(prompt)
    for drawn in tree.chain:
        assert drawn == drafter.draft_now(ids, sampling)
        ids.append(drawn.token)
    assert toy.EOS_ID not in ids[len(prompt) : -1]
    assert budget.width > 1 or not tree.branches


@given(prompt=prompts, sampling=samplings)
def test_the_first_candidate_is_the_couplings_draft(prompt: list[int], sampling: Sampling) -> None:
    logits = toy.small_logits(prompt, 0.5)
    ranked = ranking(sampling)(logits, len(prompt))
    assert ranked.tokens[0] == COUPLINGS[sampling.coupling].draft(logits, sampling, len(prompt)).token
    assert list(ranked.scores) == sorted(ranked.scores, reverse=True)
    assert len(set(ranked.tokens)) == len(ranked.tokens) == len(ranked.scores) <= RANKS


def test_growth_goes_on_while_a_node_repays_its_time() -> None:
    def size(delay_s: float, node_s: float = 0.01, send_s: float = 0.0) -> int:
        drafter = toy.ToyDrafter(agreement=0.8, step_s=node_s)
        budget = TreeLimits(nodes=200, width=4, levels=50, delay_s=delay_s, send_s=send_s)
        tree, _ = drafter.grow_now(TreeRequest([3, 4], Sampling(seed=5), budget))
        return len(tree.chain) + len(tree.branches)

    assert size(0.0) < size(0.1) < size(1.0)
    assert size(1.0, node_s=0.1) < size(1.0)
    assert size(1.0, send_s=0.1) < size(1.0)
    assert size(0.0, send_s=100.0) == 1


@given(shares=falling, send_s=st.floats(1e-6, 10.0), elapsed_s=st.floats(0.0, 1.0))
def test_trimming_leaves_the_best_rate(shares: list[float], send_s: float, elapsed_s: float) -> None:
    growth = grown(shares, TreeLimits(nodes=20, width=RANKS, levels=50, delay_s=0.5, send_s=send_s))
    reaches = sorted((math.prod(shares[t] for t in path) for path in paths_of(growth)), reverse=True)

    def rate(count: int) -> float:
        return (1.0 + sum(reaches[:count])) / (elapsed_s + 0.5 + send_s * count)

    growth.trim(elapsed_s)
    assert rate(len(paths_of(growth))) == pytest.approx(max(rate(n) for n in range(1, len(reaches) + 1)))


def paths_of(growth: Growth) -> list[tuple[int, ...]]:
    """The token paths of the nodes in the tree."""
    chain, branches = growth.tree()
    paths: list[tuple[int, ...]] = [(), *(growth.paths[node] for node in chain)]
    for parent, token in branches:
        paths.append((*paths[parent], token))
    return paths[1:]


def settle_tree(state: Session, chain: list[int], tree: Tree) -> Settled:
    return drive(state, Block(len(state.context), chain, 0, 1, [b""] * len(chain), tree.branches))


def run(prompt: list[int], sampling: Sampling, budget: TreeLimits, tokens: int) -> tuple[list[int], int, float]:
    """A generation by trees alone: its text, round trips, and the tokens that the device expected of them."""
    drafter = toy.ToyDrafter(agreement=0.7)
    state = Session(sampling, toy.VOCAB_SIZE, frozenset({toy.EOS_ID}), list(prompt))
    trips, expected = 0, 0.0
    while len(state.context) < len(prompt) + tokens and state.context[-1] != toy.EOS_ID:
        tree, _ = drafter.grow_now(TreeRequest(state.context, sampling, budget))
        chain = [d.token for d in tree.chain]
        settle_tree(state, chain, Tree(chain, tree.branches))
        if toy.EOS_ID in state.context:
            del state.context[state.context.index(toy.EOS_ID) + 1 :]
        trips, expected = trips + 1, expected + tree.expected
    return state.context[len(prompt) :], trips, expected


@given(prompt=prompts, sampling=samplings, budget=budgets)
def test_text_by_grown_trees_is_the_targets_alone(prompt: list[int], sampling: Sampling, budget: TreeLimits) -> None:
    text, _, _ = run(prompt, sampling, budget, 20)
    alone = toy.large_alone(prompt, sampling, len(text))
    assert text == alone


def test_a_tree_needs_fewer_round_trips_than_a_chain_of_as_many_nodes() -> None:
    tree = TreeLimits(nodes=24, width=6, levels=24, delay_s=1e9)
    trips = {"tree": 0, "chain": 0}
    expected = tokens = 0.0
    for seed in range(12):
        for name, budget in (("tree", tree), ("chain", tree._replace(width=1))):
            text, count, hoped = run([seed + 1, 7], Sampling(seed=seed), budget, 60)
            trips[name] += count
            if name == "tree":
                expected, tokens = expected + hoped, tokens + len(text)
    assert trips["tree"] < 0.8 * trips["chain"]
    assert expected == pytest.approx(tokens, rel=0.35)  # what the device expects is about what it gets


@given(
    gaps=st.lists(st.floats(0.0, 20.0), min_size=1, max_size=RANKS),
    ranks=st.lists(st.one_of(st.none(), st.integers(0, RANKS - 1)), max_size=20),
)
def test_acceptance_stays_a_falling_law_whatever_it_learns(gaps: list[float], ranks: list[int | None]) -> None:
    scores = -np.cumsum([0.0, *gaps])[:RANKS]
    acceptance = Acceptance()
    for rank in ranks:
        acceptance.learn(scores, rank if rank is None or rank < len(scores) else None)
    shares = acceptance.probabilities(scores)
    assert np.all(np.diff(shares) <= 0.0)
    assert 0.0 < shares.sum() <= 1.0 + 1e-12
    assert 0.0 <= acceptance.first <= 1.0


@pytest.mark.parametrize("true", [0.25, 1.0, 2.0])
def test_the_temperature_of_the_acceptance_is_learnt(true: float) -> None:
    rng = np.random.default_rng(7)
    acceptance = Acceptance()
    assert acceptance.first == PRIOR_FIRST
    firsts = 0
    for _ in range(2_000):
        scores = -np.sort(rng.exponential(1.0, RANKS))
        shares = np.exp(np.append(scores, scores[-1]) / true)
        rank = int(rng.choice(RANKS + 1, p=shares / shares.sum()))
        acceptance.learn(scores, None if rank == RANKS else rank)
        firsts += rank == 0
    assert acceptance.temperature == true
    assert acceptance.first == pytest.approx(firsts / 2_000, abs=0.08)


def test_the_delay_is_that_of_blocks_sent_once() -> None:
    delay = Delay()
    for number in range(100):
        began = 10.0 * number
        delay.sent(number, began)
        if number % 3 == 0:
            delay.sent(number, began + 5.0)
        delay.heard(number - 1, began + 0.1)  # of another block
        delay.heard(number, began + (7.0 if number % 3 == 0 else 0.4))
        delay.heard(number, began + 9.0)  # a duplicate
    assert delay.mean_s == pytest.approx(0.4, abs=0.01)
