"""The verifier driven by hand: a block is settled with the logits of a toy LLM, and every feed is checked."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cloud_verifier.verifier import Block, Session, Settled, settle
from fedhlm_lab.sim import toy

Logits = Callable[[Sequence[int]], NDArray[np.float64]]
"""Maps the ids so far to the logits of the next token, shape (VOCAB_SIZE,)."""


def drive(state: Session, block: Block, logits: Logits = toy.large_logits, small: Logits | None = None) -> Settled:
    """Settle a block, checking that every feed continues what the cache of its model holds."""
    steps = settle(state, block)
    caches: dict[bool, list[int]] = {False: list(state.fed), True: list(state.fed_small)}
    feed = next(steps)
    while True:
        held = caches[feed.small]
        assert feed.keep <= len(held)
        assert feed.ids
        held = caches[feed.small] = held[: feed.keep] + feed.ids
        model = small if feed.small else logits
        assert model is not None
        rows = [model(held[:end]) for end in range(len(held) - feed.rows + 1, len(held) + 1)]
        try:
            feed = steps.send(np.stack(rows))
        except StopIteration as stop:
            settled: Settled = stop.value
            return settled
