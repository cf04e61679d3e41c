"""Gaussian noise on the sums of a curve before a device sends them, with (epsilon, delta)-privacy over all releases.

Neighbouring data sets differ in one token. It changes each of (seen, weight, harm, square) of one bin by at most 1, an
L2 norm of at most 2, as long as no weight exceeds 1. The accounting is exact: releases of the Gaussian mechanism
compose to one Gaussian mechanism, whose privacy curve is known (Balle and Wang 2018; Dong, Roth and Su 2022).
"""

import math
from typing import Final

import numpy as np

from fedhlm.learning.curve import BINS, Curve

SENSITIVITY: Final = 2.0
_SHIFT_LEAST, _SHIFT_MOST = math.log(1e-300), math.log(1e3)  # the range in which a shift is looked for
_FRACTION: Final = 40  # terms of the continued fraction; at 10 they leave an error below 1e-16
_SQRT_2: Final = math.sqrt(2.0)


def sigma_for(epsilon: float, delta: float, releases: int) -> float:
    """The smallest standard deviation of the noise, in tokens, that makes `releases` releases (epsilon, delta)-private.

    `releases` releases, each of which may depend on the earlier ones, are as private as one release of a change that is
    sqrt(releases) times as large (Dong, Roth and Su, corollary 3.3). A token is part of every release after it, even
    when forgetting fades it, so all releases count.

    Raises:
        ValueError: `epsilon` is not finite and positive, `delta` is not in (0, 1), or `releases` is below 1.
    """
    if releases < 1:
        raise ValueError(f"releases must be at least 1 (got {releases!r})")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be a probability in (0, 1) (got {delta!r})")
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise ValueError(f"epsilon must be finite and positive (got {epsilon!r})")
    low, high = _SHIFT_LEAST, _SHIFT_MOST  # in logarithms, because the smallest shifts are tiny
    while low < (middle := (low + high) / 2.0) < high:
        low, high = (middle, high) if gaussian_delta(epsilon, math.exp(middle)) <= delta else (low, middle)
    return SENSITIVITY * math.sqrt(releases) / math.exp(low)


def gaussian_delta(epsilon: float, shift: float) -> float:
    """The smallest delta for which noise N(0, 1) on a change of norm `shift` > 0 is (epsilon, delta)-private.

    It is Phi(a) - e^epsilon Phi(b) with a, b = +-shift/2 - epsilon/shift (Balle and Wang, theorem 8). Because e^epsilon
    times the density at b is the density at a, it equals the density at a times the difference of two Mills ratios,
    which neither overflows nor cancels.
    """
    near, far = epsilon / shift - shift / 2.0, epsilon / shift + shift / 2.0  # -a and -b
    if near < 0.0:  # Phi(a) is above 1/2 here, so that the subtraction is harmless
        return 0.5 * math.erfc(near / _SQRT_2) - _density(near) * _mills(far)
    return _density(near) * (_mills(near) - _mills(far))


def _density(x: float) -> float:
    return math.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi)


def _mills(x: float) -> float:
    """The Mills ratio (1 - Phi(x)) / phi(x) for x >= 0. From 10 on by its continued fraction (Laplace)."""
    if x < 10.0:
        return math.sqrt(math.pi / 2.0) * math.exp(x * x / 2.0) * math.erfc(x / _SQRT_2)
    below = x
    for k in range(_FRACTION, 0, -1):
        below = x + k / below
    return 1.0 / below


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
