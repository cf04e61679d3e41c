"""Pooling of clients' curves, and averaging of their thresholds, such that a few liars move the result little.

Weight is capped per client and the harm ratio of a bin is a trimmed mean or a median of the clients' ratios there.
Sums that no client can have are refused, and the refused are named.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.learning.curve import Curve

ENOUGH: Final = 5


class Pooled(NamedTuple):
    """The pooled sums, and the names whose contribution was refused, sorted."""

    curve: Curve
    refused: tuple[str, ...]


def trimmed_count(count: int, trim: float) -> int:
    """How many of `count` sorted values are cut at each end: floor(trim count), but one or two always remain."""
    if not 0.0 <= trim <= 0.5:
        raise ValueError(f"trim must be a share in [0, 0.5] (got {trim!r})")
    return max(0, min(int(trim * count), (count - 1) // 2))


def robust_mean(values: Sequence[float] | NDArray[np.float64], *, trim: float) -> float | None:
    """Mean of finite values without the trimmed ones at each end; trim 0.5 is the median; None without finite values.

    With at most `trimmed_count` liars it lies between the least and the largest honest value.
    """
    array = np.asarray(values, np.float64)
    order = np.sort(array[np.isfinite(array)])
    if order.size == 0:
        return None
    cut = trimmed_count(order.size, trim)
    kept = order[cut : order.size - cut]
    return float(np.clip(kept.mean(), kept[0], kept[-1]))  # rounding may carry a mean past equal values


def capped(curve: Curve, weight_cap: float) -> Curve:
    """The curve scaled down so that its total weight is at most weight_cap, and its decisions likewise.

    Decisions have a factor of their own: they only set the shares of the bins, and a client may not set those alone.
    """
    weight = min(1.0, weight_cap / curve.total_weight) if curve.total_weight > 0.0 else 1.0
    seen = min(1.0, weight_cap / curve.total_seen) if curve.total_seen > 0.0 else 1.0
    return Curve(curve.seen * seen, curve.weight * weight, curve.harm * weight, curve.square * weight)


def pool(contributions: Mapping[str, Curve], *, weight_cap: float, trim: float, enough: int = ENOUGH) -> Pooled:
    """One curve from many clients, each with at most weight_cap total weight.

    In a bin where at least `enough` clients have weight, harm is the pooled weight times the trimmed mean (trim is the
    share cut at each end, 0.5 the median) of the clients' ratios harm/weight, and the second moment alike. In other
    bins sums are added.

    How far f liars move a bin's ratio, with n clients in it and c = trimmed_count(n, trim): f <= c leaves it within the
    honest clients' range. Where sums are added, and the honest have weight W there, by at most f cap / (W + f cap).
    Anywhere the weight and the decisions of a bin move by at most f cap.

    Trimming pulls a skewed sample towards its typical value: when clients have few tokens in a bin and harm is rare,
    a trimmed mean, and more so a median, is below the mean. Of 20 clients with harm 0 or 1 and mean 0.1, trim 0.2
    and the median find 0.05 and 0.01 at 3 tokens each in the bin, 0.09 and 0.09 at 10. So cut no more than the liars
    one expects.
    """
    if not (math.isfinite(weight_cap) and weight_cap > 0.0):
        raise ValueError(f"weight_cap must be finite and positive (got {weight_cap!r})")
    trimmed_count(1, trim)
    refused = tuple(sorted(name for name, curve in contributions.items() if curve.flaw() is not None))
    # Sorted, because float sums depend on their order and edges must agree whoever spoke first.
    curves = [capped(contributions[name], weight_cap) for name in sorted(contributions.keys() - set(refused))]
    total = sum(curves, Curve.empty())
    enough = max(1, enough)
    if len(curves) < enough:
        return Pooled(total, refused)
    weight = np.stack([curve.weight for curve in curves])  # (n, BINS) float64, as are the next two
    harm = np.stack([curve.harm for curve in curves])
    square = np.stack([curve.square for curve in curves])
    present = weight > 0.0
    for j in np.flatnonzero(present.sum(axis=0) >= enough).tolist():
        able = present[:, j]
        ratio = robust_mean(harm[able, j] / weight[able, j], trim=trim)
        moment = robust_mean(square[able, j] / weight[able, j], trim=trim)
        if ratio is not None and moment is not None:
            ratio = min(1.0, ratio)
            total.harm[j] = ratio * total.weight[j]
            # E[h]^2 <= E[h^2] <= E[h]; a liar, or noise, may report a moment below its ratio's square.
            total.square[j] = min(ratio, max(ratio * ratio, moment)) * total.weight[j]
    return Pooled(total, refused)
