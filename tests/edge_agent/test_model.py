"""The Slm on toy logits: whatever prefix it holds, drafts and trees are those of a model that starts afresh."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.growth import RANKS, TreeLimits, TreeRequest
from edge_agent.model import Slm, threaded
from fedhlm.decoding.decoder import Decoder, DecoderInput, DecoderOutput
from fedhlm.decoding.tree import Tree
from fedhlm.peers.context_keys import Projection
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy

HIDDEN = 8
SAMPLING = Sampling(seed=3)
PATIENT = TreeLimits(nodes=24, width=RANKS, levels=10, delay_s=1e12)


class ToyDecoder:
    """A Decoder whose cache is the ids themselves, so that a wrong prefix shows in the logits."""

    info = SimpleNamespace(eos_ids=(toy.EOS_ID,), context=toy.CONTEXT)

    def __init__(self) -> None:
        self.fed = 0
        self.calls = 0

    def empty_cache(self) -> toy.ToyCache:
        return toy.ToyCache()

    def forward(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        self.calls += 1
        assert [request.wanted for request in requests] == [1] * len(requests), "logits of one id are used"
        return [self._one(cast(Any, request.cache), request.ids) for request in requests]

    def _one(self, cache: toy.ToyCache, ids: Sequence[int]) -> DecoderOutput:
        assert ids
        self.fed += len(ids)
        whole = (*cache.ids, *ids)
        row = toy.small_logits(whole, 0.7)
        hidden = np.random.default_rng(whole).standard_normal(HIDDEN)
        return DecoderOutput(
            row[None].astype(np.float32), hidden[None].astype(np.float32), cast(Any, toy.ToyCache(whole))
        )


def slm(projection: Projection | None = None) -> Slm:
    # A clock that stands still: growth then depends on the budget alone.
    return Slm(cast(Decoder, ToyDecoder()), projection, clock_s=lambda: 0.0)


ids_lists = st.lists(st.integers(1, toy.VOCAB_SIZE - 1), min_size=1, max_size=6)


@given(texts=st.lists(st.tuples(ids_lists, st.integers(0, 24), st.booleans()), min_size=1, max_size=5))
def test_trees_and_drafts_do_not_depend_on_what_came_before(texts: list[tuple[list[int], int, bool]]) -> None:
    held = slm()
    ids: list[int] = []
    for more, steps, restart in texts:
        ids = list(more) if restart else ids + more
        # Learning from earlier trees is left out (settled=0), for it is meant to change the next one.
        grown = held.grow(TreeRequest(ids, SAMPLING, PATIENT, settled=0))
        assert grown == slm().grow(TreeRequest(ids, SAMPLING, PATIENT, settled=0))
        chain = [d.token for d in grown.chain]
        assert held.draft(ids + chain[:steps], SAMPLING) == slm().draft(ids + chain[:steps], SAMPLING)
        node = 0
        for parent, token in grown.branches[:steps]:  # go on below some branch
            if parent == node:
                node = Tree(chain, grown.branches).child(parent, token) or 0
                ids.append(token)


def test_the_settled_prefix_is_not_fed_again() -> None:
    drafter = slm()
    decoder = cast(ToyDecoder, drafter.decoder)
    prompt = list(range(1, 31))
    grown = drafter.grow(TreeRequest(prompt, SAMPLING, PATIENT))
    chain = [d.token for d in grown.chain]
    decoder.fed = decoder.calls = 0
    drafter.grow(TreeRequest([*prompt, *chain[:2]], SAMPLING, PATIENT._replace(nodes=1)))
    assert decoder.fed == 1


def test_branches_share_model_calls() -> None:
    drafter = slm()
    grown = drafter.grow(TreeRequest([1, 2], SAMPLING, PATIENT._replace(nodes=64)))
    nodes = len(grown.chain) + len(grown.branches)
    assert nodes == 64
    assert cast(ToyDecoder, drafter.decoder).calls < nodes / 2


def test_a_trees_text_teaches_the_next() -> None:
    drafter = slm()
    first = drafter.trees.acceptance.first
    chain = [d.token for d in drafter.grow(TreeRequest([5], SAMPLING, PATIENT)).chain]
    drafter.grow(TreeRequest([5, *chain[:3]], SAMPLING, PATIENT, settled=1))
    assert drafter.trees.acceptance.first == first  # the device's own text proves nothing
    chain = [d.token for d in drafter.grow(TreeRequest([5], SAMPLING, PATIENT)).chain]
    drafter.grow(TreeRequest([5, *chain[:3]], SAMPLING, PATIENT))
    learnt = drafter.trees.acceptance.first
    assert learnt > first
    drafter.grow(TreeRequest([5], Sampling(seed=9), PATIENT))
    drafter.grow(TreeRequest([5, *chain[:3]], SAMPLING, PATIENT))
    assert drafter.trees.acceptance.first == learnt  # a tree of another session


def test_a_tree_ends_with_the_context() -> None:
    ids = [1] * (toy.CONTEXT - 3)
    grown = slm().grow(TreeRequest(ids, SAMPLING, PATIENT))
    assert len(grown.chain) == 3


def test_keys_travel_where_a_projection_is_given() -> None:
    projection = Projection.fallback(HIDDEN, 4)
    drawn = slm(projection).draft([4, 5], SAMPLING)
    hidden = np.random.default_rng((4, 5)).standard_normal(HIDDEN).astype(np.float32)
    assert drawn.key == projection.key(hidden).tobytes()
    assert drawn._replace(key=b"") == slm().draft([4, 5], SAMPLING)
    grown = slm(projection).grow(TreeRequest([4, 5], SAMPLING, PATIENT))
    assert grown.chain[0] == drawn
    assert all(len(d.key) == 4 for d in grown.chain)


async def test_the_threaded_drafter_grows_the_same_tree() -> None:
    async with threaded(slm()) as drafter:
        grown = await drafter.grow(TreeRequest([4, 5], SAMPLING, PATIENT, uncertainty="entropy", settled=2))
    assert grown == slm().grow(TreeRequest([4, 5], SAMPLING, PATIENT, uncertainty="entropy", settled=2))
    assert grown.chain[0].uncertainty == pytest.approx(slm().draft([4, 5], SAMPLING, "entropy").uncertainty)
