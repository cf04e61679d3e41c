"""Who settles a drafted token: True sends it up, False keeps it on the device."""

from collections.abc import Callable
from typing import Final, NamedTuple

from fedhlm.decoding.sampling import GATE_STREAM, uniform

Gate = Callable[[float, int], bool]
"""From the uncertainty of a draft, in [0, 1], and its position to whether it must be settled elsewhere."""


class Settings(NamedTuple):
    """`threshold` and `probability` in [0, 1]; the seed of the generation."""

    threshold: float
    probability: float
    seed: int


def always(_settings: Settings) -> Gate:
    """Every token is verified."""
    return lambda _uncertainty, _position: True


def never(_settings: Settings) -> Gate:
    """No token is verified."""
    return lambda _uncertainty, _position: False


def threshold(settings: Settings) -> Gate:
    """Verify iff u > tau (U-HLM, FedHLM section IV-B)."""
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
