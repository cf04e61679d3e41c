"""Gaussian noise on the sums of a curve before a device sends them, with (epsilon, delta)-privacy over all releases.

Neighbouring data sets differ in one token. It changes each of (seen, weight, harm, square) of one bin by at most 1, an
L2 norm of at most 2, as long as no weight exceeds 1. The accounting is that of zero-concentrated differential privacy
(Bun and Steinke 2016).
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

    One release has rho = SENSITIVITY^2 / (2 sigma^2), and rho adds up over releases, whatever the earlier ones were
    (Bun and Steinke, propositions 1.6 and 1.7). The equation epsilon = rho + 2 sqrt(rho ln(1/delta)) (proposition 1.3)
    is solved for sigma. A token is part of every release after it, even when forgetting fades it, so all releases
    count.

    Raises:
        ValueError: `epsilon` is not finite and positive, `delta` is not in (0, 1), or `releases` is below 1.
    """
    _check(releases, delta)
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise ValueError(f"epsilon must be finite and positive (got {epsilon!r})")
    log = math.log(1.0 / delta)
    root = epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))  # sqrt(rho), without cancellation
    return SENSITIVITY * math.sqrt(releases / 2.0) / root


def noised(curve: Curve, sigma: float, rng: np.random.Generator) -> Curve:
    """Add independent N(0, sigma^2) noise to every sum of every bin, and clip the result to valid sums.

    Empty bins get noise too; otherwise it would leak which bins are empty. Clipping reads only noised sums, so it costs
    no privacy. It lifts sums near zero by up to 0.4 sigma on average, and harm, clipped at weight, is slightly biased.

    Raises:
        ValueError: sigma is negative or not finite.
    """
    if not (math.isfinite(sigma) and sigma >= 0.0):
        raise ValueError(f"sigma must be finite and not negative (got {sigma!r})")
    seen, weight, harm, square = curve.rows().T + sigma * rng.standard_normal((4, BINS))  # (BINS,) float64 each
    weight = np.maximum(0.0, weight)
    harm = np.clip(harm, 0.0, weight)
    return Curve(np.maximum(0.0, seen), weight, harm, np.clip(square, 0.0, harm))
