"""Pooling of clients' curves, and averaging of their thresholds, such that a few liars move the result little.

Weight is capped per client, near what the median client has, and the harm ratio of a bin is a trimmed mean or a median
of the clients' ratios there. Sums that no client can have are refused, and the refused are named.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.learning.curve import Curve

ENOUGH: Final = 5
NEAR: Final = 4.0  # times the median client's: the most that one client counts for


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


def near_median(sizes: Sequence[float]) -> float:
    """The most that a client may count for beside clients of these sizes: NEAR times the lower median of those above 0.

    As long as fewer than half of them lie, it is at most NEAR times what some honest client has. Infinite without any.
    """
    known = sorted(size for size in sizes if size > 0.0)
    return NEAR * known[(len(known) - 1) // 2] if known else math.inf


def winsorised(values: Sequence[float], *, trim: float, enough: int = ENOUGH) -> list[float]:
    """The values, those that trimming would cut moved to the nearest that it keeps; below `enough` values as they are."""
    if len(values) < enough:
        return list(values)
    order, cut = sorted(values), trimmed_count(len(values), trim)
    return [min(order[-1 - cut], max(order[cut], value)) for value in values]


def capped(curve: Curve, weight_cap: float, seen_cap: float | None = None) -> Curve:
    """The curve scaled down so that its total weight is at most weight_cap, and its decisions at most seen_cap.

    Decisions have a factor of their own: they only set the shares of the bins, and a client may not set those alone. None
    caps them as the weight.
    """
    most_seen = weight_cap if seen_cap is None else seen_cap
    weight = min(1.0, weight_cap / curve.total_weight) if curve.total_weight > 0.0 else 1.0
    seen = min(1.0, most_seen / curve.total_seen) if curve.total_seen > 0.0 else 1.0
    return Curve(curve.seen * seen, curve.weight * weight, curve.harm * weight, curve.square * weight)


def pool(
    contributions: Mapping[str, Curve],
    *,
    weight_cap: float,
    trim: float,
    enough: int = ENOUGH,
    agents: Mapping[str, int] | None = None,
) -> Pooled:
    """One curve from many clients, each with at most weight_cap total weight, and near the median client's.

    A client that speaks for several `agents` (by name, one where it is missing) may have as many times the weight that
    a client of one agent may have; the median is that of the weights per agent (`near_median`).

    In a bin where at least `enough` clients have weight, harm is the pooled weight times the trimmed mean (trim is the
    share cut at each end, 0.5 the median) of the clients' ratios harm/weight, and the second moment alike. In other
    bins sums are added.

    How far f liars move a bin's ratio, with n clients in it and c = trimmed_count(n, trim): f <= c leaves it within the
    honest clients' range. Where sums are added, and the honest have weight W there, by at most f cap / (W + f cap).
    Anywhere the weight and the decisions of a bin move by at most f cap, where cap is the smaller of weight_cap and NEAR
    times the median client's; a majority of liars sets the median.

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
    names = sorted(contributions.keys() - set(refused))
    heads = {name: max(1, (agents or {}).get(name, 1)) for name in names}
    weight_near = near_median([contributions[name].total_weight / heads[name] for name in names])
    seen_near = near_median([contributions[name].total_seen / heads[name] for name in names])
    curves = [
        capped(contributions[n], min(weight_cap, weight_near * heads[n]), min(weight_cap, seen_near * heads[n]))
        for n in names
    ]
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
