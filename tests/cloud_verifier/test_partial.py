"""Laws of which only the likeliest ids are told: what is certain is the whole law's token, and what is not is named."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_verifier.partial import row_of, settle_told
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.protocol.messages import Sampling

SIZE = 300
TOLD = 20
TEXTS = 400


def law_of(seed: int, *, scale: float) -> NDArray[np.float64]:
    logits = np.random.default_rng(seed).normal(0.0, scale, SIZE)
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def told_of(law: NDArray[np.float64], *also: int) -> NDArray[np.float32]:
    likeliest = np.argsort(-law)[:TOLD].tolist()
    return row_of({i: float(law[i]) for i in (*likeliest, *also)}, SIZE, TOLD)


def drawn(scale: float, sampling: Sampling, coupling: str = "gumbel") -> tuple[int, int, int]:
    """Of TEXTS tokens: how many are certain, how many of these differ, and how many of the others do."""
    certain = wrong = other = 0
    settle = COUPLINGS[coupling].settle
    for seed in range(TEXTS):
        law = law_of(seed, scale=scale)
        token, sure = settle_told(COUPLINGS[coupling], told_of(law), sampling, seed, None, b"", told=TOLD)
        differs = token != settle(law, sampling, seed, None, b"")
        certain += sure
        wrong += sure and differs
        other += differs and not sure
    return certain, wrong, other


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(7, 0.0),
        Sampling(7, 0.8, top_k=1),
        Sampling(7, 0.8, top_k=TOLD),
        Sampling(7, 1.3, top_k=TOLD, top_p=0.9, min_p=0.01),
        Sampling(7, 0.8, min_p=0.9),
    ],
)
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_a_law_that_lies_inside_what_is_told_is_drawn_from_exactly(sampling: Sampling, scale: float) -> None:
    certain, wrong, _ = drawn(scale, sampling)
    assert wrong == 0
    if sampling.min_p != 0.9 or scale == 4.0:
        assert certain == TEXTS
    assert drawn(scale, sampling, "greedy") == (TEXTS, 0, 0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(3, 0.8),
        Sampling(3, 1.5),
        Sampling(3, 0.8, top_p=0.9),
        Sampling(3, 0.8, top_k=60),
        Sampling(3, 0.8, top_k=60, top_p=0.7),
        Sampling(3, 1.0, min_p=0.001),
    ],
)
def test_what_is_certain_of_a_whole_law_is_right(sampling: Sampling) -> None:
    for scale, least in ((8.0, 0.5), (3.0, 0.1), (0.5, 0.0)):
        certain, wrong, _ = drawn(scale, sampling)
        assert wrong == 0
        assert certain >= least * TEXTS
    # It is not certain where it can be wrong: of a flat law most tokens are not told at all.
    certain, _, other = drawn(0.5, Sampling(3, 1.5))
    assert other > TEXTS / 20
    assert certain < TEXTS / 10


def test_couplings_whose_drafts_bring_their_law_are_certain_only_inside_it() -> None:
    law = law_of(1, scale=2.0)
    for name in ("full", "lattice", "published-cu"):
        rule = COUPLINGS[name]
        whole, cut = Sampling(5, 0.8), Sampling(5, 0.8, top_k=TOLD)
        draft = rule.draft(law, cut, 9)
        assert not settle_told(rule, told_of(law), whole, 9, draft.token, draft.law, told=TOLD).certain
        settled = settle_told(rule, told_of(law), cut, 9, draft.token, draft.law, told=TOLD)
        assert settled == (rule.settle(law, cut, 9, draft.token, draft.law), True)
        assert settle_told(rule, law, whole, 9, draft.token, draft.law, told=0).certain


def test_a_row_spreads_what_is_left_and_leaves_out_padding_and_unlikely_drafts() -> None:
    law = law_of(2, scale=2.0)
    order = np.argsort(-law)
    for also in ((), (int(order[-1]),), (int(order[TOLD]),)):
        row = told_of(law, *also)
        assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-6)
        assert np.allclose(row[order[:TOLD]], law[order[:TOLD]], atol=1e-6)
        assert (row[order[TOLD + 1 :]] == row.min()).all()
    assert told_of(law, int(order[TOLD]))[order[TOLD]] == np.float32(law[order[TOLD]])
    padded = row_of({int(i): float(law[i]) for i in order[:TOLD]} | {SIZE: -0.1, -1: -0.1}, SIZE, TOLD)
    assert np.array_equal(padded, told_of(law))
