"""Learners of a device that has met no models, what they are taught, and their threshold."""

from typing import Any

import numpy as np

from edge_agent import policy
from edge_agent.accounts import OpenText
from edge_agent.events import Observation, Token
from edge_agent.learner import Learner
from edge_agent.measures import Measures, measures_of
from fedhlm.config import load
from fedhlm.protocol.fields import Source
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Federation, Generation

PAIR = ""  # of a learner that has met no models
SAMPLING = Sampling(1, 0.8, 1.0, "gumbel")


def config(preset: str = "budget", **flags: Any) -> Generation:
    named = {f"generation.{key.replace('__', '.')}": str(value) for key, value in flags.items()}
    return load(preset=preset, environ={}, flags=named).config.generation


def learner(**federation: Any) -> Learner:
    return Learner(Federation(**federation), np.random.default_rng(0))


def seen(u: float, harm: float, *, match: tuple[float, float] | None = None, skipped: bool = False) -> Observation:
    return Observation(u, harm, harm, match, harm if skipped else 0.0, "local", skipped, False)


def teach(device: Learner, settings: Generation, tokens: int, *, seed: int = 0) -> Measures:
    """Tokens whose harm is a coin of u squared."""
    rng = np.random.default_rng(seed)
    measures = measures_of(settings, SAMPLING, PAIR)
    u = rng.random(tokens)
    harm = rng.random(tokens) < u**2
    device.observe(measures, settings, [seen(float(a), float(b)) for a, b in zip(u, harm, strict=True)])
    return measures


def finish(device: Learner, settings: Generation, observations: list[Observation], **options: Any) -> OpenText | None:
    options = {"tail": (), "tokens": 10, "tau": 0.5, "escalation_bytes": 0, "escalated": 0, "coin": 1.0, **options}
    return device.finished(measures_of(settings, SAMPLING, PAIR), settings, observations, **options)


def left(count: int, source: Source = "local") -> tuple[Token, ...]:
    """Committed tokens that no verdict has scored."""
    return (Token(1, 0.5, 0.1, b"", False, 0.0, b"", 1, source),) * count


def tau_of(device: Learner, measures: Measures, settings: Generation) -> float:
    return policy.tau(device.knowledge(measures, settings), settings)


def similarity_of(device: Learner, measures: Measures, settings: Generation) -> float | None:
    return policy.similarity(device.knowledge(measures, settings), settings)
