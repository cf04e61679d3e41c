"""What a runtime must give the cloud, and nothing else: caches as values, and one batched call of a model.

A backend makes an `Engine` of its runtime (`cloud_verifier.backends`). Calls may be cut and batched in any way, so
logits must not depend on how ids are cut into calls, up to rounding.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray


class PrefixCache(Protocol):
    """Keys and values of a prefix. A value: a call never changes the one it is given."""

    def truncated(self, length: int, /) -> "PrefixCache":
        """The cache of the first `length` tokens."""


class EngineInput(NamedTuple):
    """Ids (at least one) to run after what `cache` holds; the logits after the last `rows` of them are wanted."""

    cache: Any
    ids: list[int]
    rows: int


class EngineOutput(NamedTuple):
    """Logits after the last `rows` ids of the request, shape (rows, V), and the cache that ends with all of its ids."""

    logits: NDArray[Any]
    cache: Any


def _nothing() -> None:
    """Nothing to give back."""


class Engine(NamedTuple):
    """A model: the cache before the first token, and `forward`, which runs several requests as one batch, in order.

    A cache takes `token_bytes` for each of its tokens. `release` gives unused memory back to the system; it is called
    when there is nothing to do.
    """

    empty_cache: Any
    forward: Callable[[Sequence[EngineInput]], Awaitable[list[EngineOutput]]]
    token_bytes: int = 0
    release: Callable[[], None] = _nothing
