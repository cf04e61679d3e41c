"""The gates: decide which drafted tokens must be verified."""

from collections.abc import Callable
from typing import Final, NamedTuple

from fedhlm.decoding.sampling import GATE_STREAM, uniform

Gate = Callable[[float, int], bool]
"""Maps the doubt of a draft, 0 to 1, and its position to whether the draft must be verified (True) or is kept (False).
"""


class Settings(NamedTuple):
    """The settings of a gate: `threshold` and `probability` in [0, 1], and the seed of the generation."""

    threshold: float
    probability: float
    seed: int


def always(_settings: Settings) -> Gate:
    """Verify every token."""
    return lambda _uncertainty, _position: True


def never(_settings: Settings) -> Gate:
    """Verify no token."""
    return lambda _uncertainty, _position: False


def threshold(settings: Settings) -> Gate:
    """Verify a token iff u > tau (U-HLM; FedHLM section IV-B)."""
    return lambda uncertainty, _position: uncertainty > settings.threshold


def random(settings: Settings) -> Gate:
    """Verify with a fixed probability, by a coin of (seed, position) (Rand-HLM)."""
    return lambda _uncertainty, position: uniform(settings.seed, position, GATE_STREAM) < settings.probability


GATES: Final[dict[str, Callable[[Settings], Gate]]] = {
    "always": always,
    "never": never,
    "threshold": threshold,
    "random": random,
}
