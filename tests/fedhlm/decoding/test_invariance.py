"""The measure of block invariance, on decoders whose faults are known."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from fedhlm.decoding.decoder import DecoderInput, DecoderOutput
from fedhlm.decoding.invariance import TOLERANCE, block_difference


class Info(NamedTuple):
    vocab_size: int = 40
    context: int = 64


class Vocabulary(NamedTuple):
    size: int = 40


class Held(NamedTuple):
    ids: tuple[int, ...] = ()


class Faulty:
    """A decoder of a model that is a table; `fault(ids of the call, requests of the call)` is added to its logits."""

    def __init__(self, fault: Any) -> None:
        self.info, self.vocabulary = Info(), Vocabulary()
        self._fault = fault
        self._table = np.random.default_rng(7).normal(0.0, 3.0, (40, 40)).astype(np.float32)

    def empty_cache(self) -> Held:
        return Held()

    def forward(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        results = []
        for cache, ids, _ in requests:
            logits = self._table[list(ids)] + np.float32(self._fault(len(ids), len(requests)))
            results.append(DecoderOutput(logits, None, Held((*cache.ids, *ids))))
        return results


@pytest.mark.parametrize(
    ("fault", "difference"),
    [
        (lambda _ids, _requests: 0.0, 0.0),
        (lambda ids, _requests: 0.3 if ids == 1 else 0.0, 0.3),
        (lambda ids, _requests: 0.3 if ids > 16 else 0.0, 0.3),
        (lambda _ids, requests: 0.3 if requests > 1 else 0.0, 0.3),
    ],
)
def test_steps_blocks_and_batches_are_each_compared(fault: Any, difference: float) -> None:
    assert block_difference(Faulty(fault)) == pytest.approx(difference, abs=1e-5)  # type: ignore[arg-type]
    assert TOLERANCE < 0.3
