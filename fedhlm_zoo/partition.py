"""Split labelled items over parties, not identically distributed: each label's shares are one Dirichlet draw.

A small alpha gives every party a few labels, a large alpha gives all parties the same mixture. Equal arguments give
equal splits.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def dirichlet_partition(labels: Sequence[str], parties: int, alpha: float, seed: int) -> list[list[int]]:
    """Assign every index of `labels` to exactly one party; the lists are ascending.

    For each label, the shares over the parties are drawn from Dirichlet(alpha, ..., alpha), and the label's shuffled
    items are cut at the rounded cumulative shares. Then each empty party takes one random item from the party that
    holds most (the first of them), while that one keeps an item itself.

    With at least as many items as parties, no party is empty. With fewer, each item has a party of its own.

    Raises:
        ValueError: `parties` below 1, or `alpha` not a finite number above 0.
    """
    if parties < 1:
        raise ValueError(f"parties must be at least 1 (got {parties!r})")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a finite number above 0 (got {alpha!r})")
    rng = np.random.default_rng(seed)
    held: list[list[int]] = [[] for _ in range(parties)]
    names, codes = np.unique(np.asarray(labels, dtype=np.str_), return_inverse=True)  # codes (n,) int64
    for code in range(len(names)):
        items = rng.permutation(np.flatnonzero(codes == code))  # (m,) int64
        cuts = np.rint(np.cumsum(_shares(parties, alpha, rng))[:-1] * len(items)).astype(np.int64)  # (parties - 1,)
        for party, given in zip(held, np.split(items, cuts), strict=True):
            party.extend(given.tolist())
    for party in held:
        richest = max(held, key=len)
        if not party and len(richest) > 1:
            party.append(richest.pop(int(rng.integers(len(richest)))))
    return [sorted(party) for party in held]


def skew(labels: Sequence[str], parts: Iterable[Sequence[int]]) -> float:
    """Mean total variation between a party's label law and that of all `labels`, over parties with items.

    At 0 every party mirrors the whole. The upper end, 1 minus a label's share, is reached by parties with one label
    each.
    """
    names, codes = np.unique(np.asarray(labels, dtype=np.str_), return_inverse=True)
    overall = _law(codes, len(names))
    gaps = [0.5 * np.abs(_law(codes[list(part)], len(names)) - overall).sum() for part in parts if part]
    return float(np.mean(gaps)) if gaps else 0.0


def _shares(parties: int, alpha: float, rng: np.random.Generator) -> NDArray[np.float64]:
    shares = rng.dirichlet(np.full(parties, alpha))  # (parties,) float64
    if np.isfinite(shares).all():
        return shares
    # An alpha at the end of the float range overflows inside the draw; its limit is the even split.
    return np.full(parties, 1.0 / parties)


def _law(codes: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    return np.bincount(codes, minlength=size) / max(1, len(codes))  # (size,) float64
