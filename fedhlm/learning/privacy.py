"""Gaussian noise on a client's curve sums before they leave, with a stated (epsilon, delta) over all releases.

Neighbours differ in one token, which changes (seen, weight, harm, square) of one bin by at most 1 each: an L2 norm of
at most 2, as long as no weight exceeds 1. Accounting: zero-concentrated differential privacy (Bun and Steinke 2016).
"""

import math
from typing import Final

import numpy as np

from fedhlm.learning.curve import BINS, Curve

SENSITIVITY: Final = 2.0


def _check(releases: int, delta: float) -> None:
    if releases < 1:
        raise ValueError(f"releases must be at least 1 (got {releases!r})")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be a probability in (0, 1) (got {delta!r})")


def sigma_for(epsilon: float, delta: float, releases: int) -> float:
    """The standard deviation of the noise, in tokens, that makes `releases` releases (epsilon, delta)-private.

    One release has rho = SENSITIVITY^2 / (2 sigma^2); rho adds up, whatever earlier releases were (Bun and Steinke,
    propositions 1.6 and 1.7); epsilon = rho + 2 sqrt(rho ln(1/delta)) (proposition 1.3), solved for sigma. A token that forgetting lets fade is part of every later release: count them all.
    """
    _check(releases, delta)
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise ValueError(f"epsilon must be finite and positive (got {epsilon!r})")
    log = math.log(1.0 / delta)
    root = epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))  # sqrt(rho), without cancellation
    return SENSITIVITY * math.sqrt(releases / 2.0) / root


def noised(curve: Curve, sigma: float, rng: np.random.Generator) -> Curve:
    """The curve with independent N(0, sigma^2) on every sum of every bin, clipped back to sums a client can have.

    Empty bins get noise too, else which bins are empty would leak. Clipping reads only noised sums, so it costs no
    privacy; it lifts sums near zero by up to 0.4 sigma on average, and harm, cut at weight, is not quite unbiased.
    """
    if not (math.isfinite(sigma) and sigma >= 0.0):
        raise ValueError(f"sigma must be finite and not negative (got {sigma!r})")
    seen, weight, harm, square = curve.rows().T + sigma * rng.standard_normal((4, BINS))  # (BINS,) float64 each
    weight = np.maximum(0.0, weight)
    harm = np.clip(harm, 0.0, weight)
    return Curve(np.maximum(0.0, seen), weight, harm, np.clip(square, 0.0, harm))
