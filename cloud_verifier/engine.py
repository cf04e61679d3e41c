"""The interface between the cloud and its model: caches as values, and one batched model call.

`cloud_verifier.backends` wraps models in an `Engine`. The cloud may cut ids into calls and batches in
any way, so logits must not depend on the cut, up to rounding.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from fedhlm.decoding.grammar import Constrain, nothing_constrains


class EngineInput(NamedTuple):
    """One request: run `ids` (at least one) after the tokens in `cache`, a `fedhlm.decoding.models.PrefixCache`.

    The last `rows` of the ids need logits.
    """

    cache: Any
    ids: list[int]
    rows: int


class EngineOutput(NamedTuple):
    """The logits after the last `rows` ids, shape (rows, V), and the cache that now includes all ids of the request."""

    logits: NDArray[Any]
    cache: Any


class EngineFailure(NamedTuple):
    """Why one request of a batch has no output, while the others have theirs."""

    reason: str


def _nothing() -> None:
    """Release nothing."""


class Engine(NamedTuple):
    """A model: the cache before the first token, and `forward`, which runs several requests as one batch, in order.

    A cache takes `token_bytes` bytes per token. `release` returns unused memory to the system; the cloud calls it when
    it is idle. `constrain` begins a text under a grammar over the model's vocabulary.

    `told` is 0 if the logits hold the whole law. A model behind a server tells only that many of the likeliest ids
    (`cloud_verifier.partial`): those and a few more have log-probabilities in a row, and all others share its lowest value.
    """

    empty_cache: Any
    forward: Callable[[Sequence[EngineInput]], Awaitable[Sequence[EngineOutput | EngineFailure]]]
    token_bytes: int = 0
    release: Callable[[], None] = _nothing
    constrain: Constrain = nothing_constrains
    told: int = 0


class DraftModel(NamedTuple):
    """A small model beside the large one, which drafts for it. `context` is in tokens."""

    engine: Engine
    context: int
