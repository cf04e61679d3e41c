"""Which agents belong together: a classifier tries to tell their tokens apart, average linkage groups the rest.

Pure: profiles and times in, assignments out. An agent moves only where its new mates are clearly nearer to it than
its present ones. One `compute` costs at most AGENTS_MAX * (AGENTS_MAX - 1) / 2 pairs, about 10 ms each.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import combinations
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

TOKENS_MIN: Final = 64  # fewer tell nothing: chance alone would reach a distance of 0.3
TOKENS_MAX: Final = 256  # per agent and pair
AGENTS_MAX: Final = 32  # per computation; 496 pairs
PROFILES_MAX: Final = 512  # remembered; the one not heard from for longest is forgotten
CLUSTERS_MAX: Final = 1_024  # names that agents can be sent to; then those where nobody lives are forgotten
FOLDS: Final = 4
RIDGE: Final = 0.1  # scikit-learn's C: strong enough for 64 columns on a few hundred tokens

Matrix = NDArray[np.float64]


class Sample(NamedTuple):
    """An agent's tokens: (n, f) float32, one row a token in the order drafted; key columns, uncertainty, entropy.

    Tokens picked from many prompts say more than as many from a few, whose subjects pass for the agent's.
    """

    features: NDArray[np.float32]


def distance(a: Sample, b: Sample, *, seed: int) -> float:
    """How well a linear classifier tells two agents' tokens apart: 0 is chance, 1 is never wrong.

    Cross-validated accuracy of logistic regression on equally many tokens of both, as max(0, 2 accuracy - 1). Folds
    are stretches of neighbouring tokens: tokens of one prompt resemble each other, and split between training and
    test they would tell prompts apart instead of agents. Below TOKENS_MIN tokens on either side the answer is 0:
    no evidence of a difference. Source: the paper, section III; a classifier two-sample test.

    Raises:
        ValueError: the two have different numbers of columns.
    """
    if a.features.shape[1] != b.features.shape[1]:
        raise ValueError(
            f"columns of both features must be as many (got {a.features.shape[1]} and {b.features.shape[1]})"
        )
    with _one_thread():
        return _separation(a, b, seed)


def distances(samples: Mapping[str, Sample], *, seed: int) -> tuple[tuple[str, ...], Matrix]:
    """All pairwise distances: the names in ascending order and their symmetric (n, n) matrix.

    Raises:
        ValueError: more than AGENTS_MAX samples, or different numbers of columns.
    """
    if len(samples) > AGENTS_MAX:
        raise ValueError(f"samples must be of at most {AGENTS_MAX} agents (got {len(samples)})")
    names = tuple(sorted(samples))
    matrix = np.zeros((len(names), len(names)))  # (n, n) float64
    columns = {sample.features.shape[1] for sample in samples.values()}
    if len(columns) > 1:
        raise ValueError(f"columns of the features must be as many for every agent (got {sorted(columns)})")
    with _one_thread():
        for i, j in combinations(range(len(names)), 2):
            matrix[i, j] = matrix[j, i] = _separation(samples[names[i]], samples[names[j]], seed)
    return names, matrix


def agglomerate(names: Sequence[str], matrix: Matrix, *, clusters: int | None, cut: float) -> dict[str, int]:
    """Average linkage: merge the two nearest groups while they are within `cut`, or while there are over `clusters`.

    Groups are numbered by their first name in ascending order, so the order of `names` does not matter.

    Raises:
        ValueError: `matrix` is not a symmetric (n, n) matrix of finite distances, or `clusters` is below 1.
    """
    if matrix.shape != (len(names), len(names)) or not np.isfinite(matrix).all() or not (matrix == matrix.T).all():
        raise ValueError(
            f"matrix must be symmetric and finite, with one row for each of {len(names)} (got shape {matrix.shape})"
        )
    if clusters is not None and clusters < 1:
        raise ValueError(f"clusters must be at least 1, or None (got {clusters})")
    order = sorted(range(len(names)), key=lambda i: names[i])
    groups = {i: [names[k]] for i, k in enumerate(order)}
    # In the table of merges the singletons are 0 .. n - 1 and each merge makes the next number.
    for number, (left, right, height) in enumerate(_merges(matrix[np.ix_(order, order)]), start=len(names)):
        if height > cut and (clusters is None or len(groups) <= clusters):
            break
        groups[number] = groups.pop(left) + groups.pop(right)
    ranked = sorted(sorted(group) for group in groups.values())
    return {name: number for number, group in enumerate(ranked) for name in group}


def assign(previous: Mapping[str, str], groups: Mapping[str, int], cluster_names: Sequence[str]) -> dict[str, str]:
    """Give each group a cluster of its own so that as few agents as possible move; others stay where they are.

    Raises:
        ValueError: there are more groups than cluster names.
    """
    from scipy.optimize import linear_sum_assignment

    numbers = sorted(set(groups.values()))
    if len(numbers) > len(cluster_names):
        raise ValueError(
            f"groups must be at most as many as the {len(cluster_names)} cluster names (got {len(numbers)})"
        )
    homes = Counter((group, previous.get(agent)) for agent, group in groups.items())
    staying = np.array([[homes[group, name] for name in cluster_names] for group in numbers], dtype=np.int64)
    rows, columns = linear_sum_assignment(staying.reshape(len(numbers), len(cluster_names)), maximize=True)
    home_of = {numbers[row]: cluster_names[column] for row, column in zip(rows, columns, strict=True)}
    return {**previous, **{agent: home_of[group] for agent, group in groups.items()}}


def worthwhile(
    names: Sequence[str], matrix: Matrix, current: Mapping[str, str], proposed: Mapping[str, str], *, margin: float
) -> dict[str, str]:
    """The moves of `proposed` that pay: agent -> cluster.

    An agent moves if the mean distance to its mates falls by more than `margin`; without mates it counts as 0, so
    nobody is moved out of a cluster of its own. A move changes whom the others live with, so those that stayed are
    asked again until nobody moves. Only this half of the silhouette counts: two clusters that resemble each other are
    left as they are, because joining them brings nobody nearer to its mates.
    """
    now = {name: current[name] for name in names}
    ahead = {name: proposed[name] for name in names}
    while True:
        gains = _mates(names, matrix, now) - _mates(names, matrix, ahead)  # (n,) float64
        movers = [name for name, gain in zip(names, gains, strict=True) if gain > margin and now[name] != ahead[name]]
        if not movers:
            return {name: now[name] for name in names if now[name] != current[name]}
        now |= {name: ahead[name] for name in movers}


class Clusterer:
    """The latest profile of every agent, and the assignment that follows from them. Not for two threads at once."""

    def __init__(
        self,
        clusters: Sequence[str],
        *,
        columns: int,
        interval_s: float = 60.0,
        margin: float = 0.15,
        cut: float = 0.25,
        seed: int = 0,
    ) -> None:
        """Start without profiles.

        Args:
            clusters: names that agents can be sent to; those that profiles come from are added, up to CLUSTERS_MAX.
            columns: the number of feature columns every profile must have.
            interval_s: least time between two computations.
            margin: how much nearer, in distance, the new mates must be for an agent to move.
            cut: groups within this distance count as alike.
            seed: of the subsampling; same calls, same assignments.
        """
        self._given = frozenset(clusters)
        self._clusters = list(dict.fromkeys(clusters))
        self._columns = columns
        self._interval_s = interval_s
        self._margin = margin
        self._cut = cut
        self._seed = seed
        self._profiles: dict[str, Sample] = {}  # the one noted last is at the end
        self._homes: dict[str, str] = {}
        self._fresh = False
        self._last_s: float | None = None
        self._rounds = 0

    @property
    def assignment(self) -> Mapping[str, str]:
        """Agent -> cluster, as last reported by the agent or decided here, whichever came later."""
        return dict(self._homes)

    def note_profile(self, agent: str, cluster: str, sample: Sample) -> None:
        """Remember an agent's latest tokens (TOKENS_MAX of them) and the cluster it is in.

        Raises:
            ValueError: the features are not (n, columns) finite numbers; nothing is remembered.
        """
        shape = sample.features.shape
        if len(shape) != 2 or shape[1] != self._columns or not np.isfinite(sample.features).all():
            raise ValueError(f"features of {agent} must be finite numbers of shape (n, {self._columns}) (got {shape})")
        self._profiles.pop(agent, None)
        self._profiles[agent] = Sample(sample.features[-TOKENS_MAX:].astype(np.float32))
        self._homes[agent] = cluster
        if cluster not in self._clusters:
            if len(self._clusters) >= CLUSTERS_MAX:
                lived_in = self._given.union(self._homes.values())
                self._clusters = [name for name in self._clusters if name in lived_in]
            self._clusters.append(cluster)
        if len(self._profiles) > PROFILES_MAX:
            silent = next(iter(self._profiles))
            del self._profiles[silent], self._homes[silent]
        self._fresh = True

    def due(self, now_s: float) -> bool:
        """Whether profiles have come in since the last computation and that is `interval_s` ago."""
        return self._fresh and (self._last_s is None or now_s - self._last_s >= self._interval_s)

    def compute(self, now_s: float) -> Mapping[str, str]:
        """Group the agents that have shown enough tokens; returns the changed assignments, agent -> cluster.

        Above AGENTS_MAX agents each computation looks at that many, drawn anew, and leaves the others in place.
        """
        self._last_s, self._fresh = now_s, False
        self._rounds += 1
        ready = sorted(name for name, sample in self._profiles.items() if len(sample.features) >= TOKENS_MIN)
        if len(ready) > AGENTS_MAX:
            rng = np.random.default_rng((self._seed, self._rounds))
            ready = [ready[i] for i in rng.permutation(len(ready))[:AGENTS_MAX]]
        names, matrix = distances({name: self._profiles[name] for name in ready}, seed=self._seed)
        groups = agglomerate(names, matrix, clusters=max(1, len(self._clusters)), cut=self._cut)
        proposed = assign(self._homes, groups, self._clusters)
        moves = worthwhile(names, matrix, self._homes, proposed, margin=self._margin)
        self._homes |= moves
        return moves


def _separation(a: Sample, b: Sample, seed: int) -> float:
    count = min(len(a.features), len(b.features), TOKENS_MAX)
    if count < TOKENS_MIN:
        return 0.0
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    # Folds of equal size for both owners keep the test symmetric.
    count -= count % FOLDS
    rows = np.concatenate([_thinned(a, count, seed), _thinned(b, count, seed)])  # (2 count, f) float64
    spread = rows.std(axis=0)
    rows = (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    owners = np.repeat([0, 1], count)  # (2 count,) int64
    model = LogisticRegression(C=RIDGE, max_iter=1000)
    right = sum(
        np.count_nonzero(model.fit(rows[seen], owners[seen]).predict(rows[held]) == owners[held])
        for seen, held in StratifiedKFold(FOLDS).split(rows, owners)
    )
    return max(0.0, 2.0 * right / len(rows) - 1.0)


def _one_thread() -> AbstractContextManager[object]:
    """Problems this small run ten times slower on a pool of threads that wait for one another on busy cores."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(limits=1)
    return limits


def _thinned(sample: Sample, count: int, seed: int) -> Matrix:
    """`count` random rows, still in order."""
    kept = np.random.default_rng(seed).permutation(len(sample.features))[:count]
    return sample.features[np.sort(kept)].astype(np.float64)  # (count, f) float64


def _merges(matrix: Matrix) -> list[tuple[int, int, float]]:
    """Average linkage's merges in order: the numbers of the two groups and their mean distance."""
    if len(matrix) < 2:
        return []
    from scipy.cluster.hierarchy import linkage

    upper = matrix[np.triu_indices(len(matrix), 1)]  # (n (n - 1) / 2,) float64
    return [(int(left), int(right), float(height)) for left, right, height, _ in linkage(upper, "average")]


def _mates(names: Sequence[str], matrix: Matrix, homes: Mapping[str, str]) -> Matrix:
    """Mean distance of every agent to the others of its cluster; 0 where there are none."""
    codes = np.unique([homes[name] for name in names], return_inverse=True)[1]  # (n,) int64
    together = (codes[:, None] == codes[None, :]) & ~np.eye(len(names), dtype=bool)  # (n, n) bool
    means: Matrix = (matrix * together).sum(axis=1) / np.maximum(1, together.sum(axis=1))  # (n,) float64
    return means
