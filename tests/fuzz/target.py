"""A decoder under test: what to call, what it may raise, and inputs to begin from."""

import random
from collections.abc import Callable
from typing import Final, NamedTuple

from fedhlm.errors import ConfigError, FedhlmError, FingerprintMismatch, ProtocolError
from tests.fuzz import mutators
from tests.fuzz.mutators import Rng

REFUSALS: Final = (ProtocolError, ConfigError, FingerprintMismatch)


class Target(NamedTuple):
    """A decoder under test. `share` is how many times cheaper or rarer than a message it is in the long run."""

    run: Callable[[bytes], bool]
    seed: Callable[[Rng], bytes]
    share: float = 1.0
    structured: bool = False  # msgpack: mutated as a structure too


def refusing(decode: Callable[[bytes], object], *refusals: type[FedhlmError]) -> Callable[[bytes], bool]:
    """A target of a function that raises nothing but `refusals` (by default what decoders raise)."""

    allowed = refusals or REFUSALS

    def run(data: bytes) -> bool:
        try:
            decode(data)
        except allowed:
            return False
        return True

    return run


def require(condition: bool, what: str) -> None:
    """An invariant of what was taken; it holds under `python -O` too."""
    if not condition:
        raise AssertionError(what)


def input_of(target: Target, rng: random.Random) -> bytes:
    """A spoilt input for a target; one in ten is left whole."""
    data = target.seed(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 2, 2, 3, 5))):
        data = mutators.mutate(rng, data) if target.structured else mutators.spoilt_bytes(rng, data)
    return data
