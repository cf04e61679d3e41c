"""Means over seeds with intervals of Student's t."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

import numpy as np

CONFIDENCE: Final = 0.95
GROUPED: Final = 1_000.0  # from here on numbers have commas and no digits after the point


class SeedMean(NamedTuple):
    """A mean over seeds, and half of its interval."""

    mean: float
    half: float

    @property
    def told(self) -> bool:
        """Whether the half is more than the rounding of sums."""
        return self.half > 1e-6 * abs(self.mean)

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.half:.2g}" if self.told else f"{self.mean:.3g}"

    @property
    def full(self) -> str:
        """The mean with four digits, for tables whose other numbers have as many."""
        mean = f"{self.mean:,.0f}" if abs(self.mean) >= GROUPED else f"{self.mean:,.4g}"
        half = f"{self.half:,.0f}" if self.half >= GROUPED / 10.0 else f"{self.half:.2g}"
        return f"{mean} ± {half}" if self.told else mean

    @property
    def percent(self) -> str:
        """A share in percent."""
        half = f" ± {100.0 * self.half:.2g}" if self.told else ""
        return f"{100.0 * self.mean:.4g}{half} %"


@cache
def student(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The quantile of Student's t that a two-sided interval of this confidence needs, by integrating the density."""
    x = np.linspace(0.0, 200.0, 400_001)  # (n,)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    density = scale * (1.0 + x * x / freedom) ** (-(freedom + 1) / 2)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2.0 * np.diff(x))])
    return float(np.interp(confidence / 2.0, mass, x))


def mean_of(values: Sequence[float]) -> SeedMean:
    """The mean over seeds, with its interval."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return SeedMean(float(np.mean(values)), student(len(values) - 1) * spread if spread else 0.0)
