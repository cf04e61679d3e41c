"""Robust pooling of members' curves and averaging of their thresholds: a few dishonest members move the result little.

The weight of a member is capped near that of the median member. The harm ratio of a bin is a trimmed mean or a median
of the members' ratios in that bin. Impossible sums are rejected.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.learning.curve import Curve

ENOUGH: Final = 5
NEAR: Final = 4.0  # a member counts for at most this many times what the median member counts for


class Pooled(NamedTuple):
    """The pooled sums, and the sorted names of the members whose contribution was rejected."""

    curve: Curve
    refused: tuple[str, ...]


def trimmed_count(count: int, trim: float) -> int:
    """The number of values to cut at each end of `count` sorted values: floor(trim count), leaving at least one or two.

    Raises:
        ValueError: `trim` is outside [0, 0.5].
    """
    if not 0.0 <= trim <= 0.5:
        raise ValueError(f"trim must be a share in [0, 0.5] (got {trim!r})")
    return max(0, min(int(trim * count), (count - 1) // 2))


def robust_mean(values: Sequence[float] | NDArray[np.float64], *, trim: float) -> float | None:
    """Trimmed mean of the finite values; None if there are none.

    `trim` is the share cut at each end, and 0.5 gives the median. With at most `trimmed_count` dishonest values, it
    lies between the least and the largest honest value.
    """
    array = np.asarray(values, np.float64)
    order = np.sort(array[np.isfinite(array)])
    if order.size == 0:
        return None
    cut = trimmed_count(order.size, trim)
    kept = order[cut : order.size - cut]
    return float(np.clip(kept.mean(), kept[0], kept[-1]))  # rounding may move the mean of equal values off them


def near_median(sizes: Sequence[float]) -> float:
    """The most that a member may count for: NEAR times the lower median of the sizes above 0; infinite without any.

    As long as fewer than half of the members are dishonest, it is at most NEAR times the size of some honest member.
    """
    return NEAR * lower_median([size for size in sizes if size > 0.0])


def lower_median(values: Sequence[float]) -> float:
    """The middle value, or the lower one of two; infinite without any.

    As long as fewer than half of the values are dishonest, it is at most the largest honest one. Of two values, it is at
    most the honest one.
    """
    return sorted(values)[(len(values) - 1) // 2] if values else math.inf


def honest_median(values: Sequence[float]) -> float:
    """The lower median of the lowest majority of the values; infinite without any.

    Where dishonest values are high and fewer than half of all, it is at most the lower median of the honest ones, so
    that the mean of values that are cut to it does not rise by the dishonest ones. Of two values, it is the lower one.
    """
    return lower_median(sorted(values)[: len(values) // 2 + 1])


def winsorised(values: Sequence[float], *, trim: float, enough: int = ENOUGH) -> list[float]:
    """Move values that trimming would cut to the nearest value that it keeps. Fewer than `enough` stay unchanged."""
    if len(values) < enough:
        return list(values)
    order, cut = sorted(values), trimmed_count(len(values), trim)
    return [min(order[-1 - cut], max(order[cut], value)) for value in values]


def capped(curve: Curve, weight_cap: float, seen_cap: float | None = None) -> Curve:
    """Scale a curve down to a total weight of at most `weight_cap` and at most `seen_cap` decisions.

    Decisions have a cap of their own, because they set the shares of the bins, which no member may set alone. With None
    they have the cap of the weight.
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
    """Pool the curves of many members, each with a total weight of at most `weight_cap` and near the median member's.

    `agents` gives the number of agents of a member by name, 1 where it is missing. A member of several agents may have
    that many times the weight of a member of one agent. The median is that of the weights per agent (`near_median`).

    In a bin where at least `enough` members have weight, harm is the pooled weight times the trimmed mean of the
    members' ratios harm/weight. `trim` is the share cut at each end, and 0.5 gives the median. The second moment is
    pooled in the same way. In the other bins, sums are added.

    Let f members be dishonest, n members have weight in a bin, and c = trimmed_count(n, trim). If f <= c, the bin's
    ratio stays within the range of the honest members. Where sums are added and honest members have weight W in the
    bin, it moves by at most f cap / (W + f cap). Weight and decisions of any bin move by at most f cap. Here cap is the
    smaller of `weight_cap` and NEAR times the median member's weight, which a dishonest majority can set.

    Trimming moves the mean of a skewed sample towards its typical value. When members have few tokens in a bin and harm
    is rare, a trimmed mean is below the mean, and a median even more so. Of 20 members with harm 0 or 1 and mean 0.1,
    trim 0.2 and the median give 0.05 and 0.01 at 3 tokens each in the bin, and 0.09 and 0.09 at 10 tokens. Do not cut
    more than the expected share of dishonest members.

    Raises:
        ValueError: `weight_cap` is not finite and positive, or `trim` is outside [0, 0.5].
    """
    if not (math.isfinite(weight_cap) and weight_cap > 0.0):
        raise ValueError(f"weight_cap must be finite and positive (got {weight_cap!r})")
    trimmed_count(1, trim)
    refused = tuple(sorted(name for name, curve in contributions.items() if curve.flaw() is not None))
    # Sorted, because float sums depend on their order and the result must not depend on the order of arrival.
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
            # E[h]^2 <= E[h^2] <= E[h]. A dishonest member, or noise, may report a moment below the square of its ratio.
            total.square[j] = min(ratio, max(ratio * ratio, moment)) * total.weight[j]
    return Pooled(total, refused)
