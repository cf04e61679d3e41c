"""Groups agents into clusters by their tokens. A classifier measures the distance, and average linkage groups.

Pure: profiles and times go in, assignments come out. An agent moves only if its new mates are clearly nearer to it than
its present ones. One `compute` measures at most AGENTS_MAX * (AGENTS_MAX - 1) / 2 pairs, about 10 ms each. Source: the
FedHLM paper, section III.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import combinations
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

TOKENS_MIN: Final = 64  # fewer are no evidence: chance alone would reach a distance of 0.3
TOKENS_MAX: Final = 256  # per agent and pair
AGENTS_MAX: Final = 32  # per computation, which makes 496 pairs
PROFILES_MAX: Final = 512  # the agent that has been silent longest is forgotten first
CLUSTERS_MAX: Final = 1_024  # cluster names to assign agents to; beyond it, names without agents are forgotten
FOLDS: Final = 4
RIDGE: Final = 0.1  # scikit-learn's C: strong enough for 64 columns and a few hundred tokens

Matrix = NDArray[np.float64]


class Sample(NamedTuple):
    """An agent's tokens: (n, f) float32, one row per token in the order of drafting. The columns are key and doubt.

    Tokens from many prompts tell more about an agent than as many tokens from a few prompts, whose subjects would be
    taken for the agent's.
    """

    features: NDArray[np.float32]


def distance(a: Sample, b: Sample, *, seed: int) -> float:
    """How well a linear classifier tells two agents' tokens apart: 0 is chance, 1 is never wrong.

    The distance is max(0, 2 accuracy - 1), with the cross-validated accuracy of logistic regression on equally many
    tokens of both agents. Each fold is a stretch of neighbouring tokens. Tokens of one prompt resemble each other, so
    with mixed folds the classifier would learn prompts instead of agents.

    With fewer than TOKENS_MIN tokens on either side there is no evidence, and the answer is 0. Source: the FedHLM
    paper, section III; a classifier two-sample test.

    Raises:
        ValueError: the two samples have different numbers of columns.
    """
    if a.features.shape[1] != b.features.shape[1]:
        raise ValueError(
            f"columns of both features must be as many (got {a.features.shape[1]} and {b.features.shape[1]})"
        )
    with _one_thread():
        return _separation(a, b, seed)


def distances(samples: Mapping[str, Sample], *, seed: int) -> tuple[tuple[str, ...], Matrix]:
    """Compute all pairwise distances: the names in ascending order and their symmetric (n, n) float64 matrix.

    Raises:
        ValueError: there are more than AGENTS_MAX samples, or their numbers of columns differ.
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
    """Group agents by average linkage: name -> number of its group.

    The two nearest groups are merged while they are within `cut`, or while there are more than `clusters` groups.
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
    # In the linkage table the singletons have the numbers 0 .. n - 1, and each merge gets the next number.
    for number, (left, right, height) in enumerate(_merges(matrix[np.ix_(order, order)]), start=len(names)):
        if height > cut and (clusters is None or len(groups) <= clusters):
            break
        groups[number] = groups.pop(left) + groups.pop(right)
    ranked = sorted(sorted(group) for group in groups.values())
    return {name: number for number, group in enumerate(ranked) for name in group}


def assign(previous: Mapping[str, str], groups: Mapping[str, int], cluster_names: Sequence[str]) -> dict[str, str]:
    """Give each group its own cluster so that as few agents as possible move. Agents without a group stay.

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
    """Select the moves of `proposed` that are worth it: agent -> cluster.

    An agent moves if the mean distance to its mates falls by more than `margin`. Without mates this distance counts as
    0, so an agent that is alone in its cluster never moves. A move changes the mates of others, so the check is
    repeated for those that stayed until nobody else moves.

    Only this half of the silhouette counts. Two clusters that resemble each other are not joined, because joining them
    brings nobody nearer to its mates.
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
    """Keeps the latest profile of every agent and the assignment that follows. Not thread-safe."""

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
            clusters: names that agents can be assigned to. Clusters of profiles are added, up to CLUSTERS_MAX.
            columns: the number of feature columns that every profile must have.
            interval_s: the least time between two computations, in seconds.
            margin: how much nearer, in distance, the new mates of an agent must be for it to move.
            cut: groups within this distance count as alike.
            seed: seed of the subsampling. The same calls give the same assignments.
        """
        self._given = frozenset(clusters)
        self._clusters = list(dict.fromkeys(clusters))
        self._columns = columns
        self._interval_s = interval_s
        self._margin = margin
        self._cut = cut
        self._seed = seed
        self._profiles: dict[str, Sample] = {}  # the profile that arrived last is at the end
        self._homes: dict[str, str] = {}
        self._fresh = False
        self._last_s: float | None = None
        self._rounds = 0

    @property
    def assignment(self) -> Mapping[str, str]:
        """The cluster of each agent, as the agent last reported it or as decided here, whichever is later."""
        return dict(self._homes)

    def note_profile(self, agent: str, cluster: str, sample: Sample) -> None:
        """Remember an agent's latest TOKENS_MAX tokens and its cluster.

        Raises:
            ValueError: the features are not finite numbers of shape (n, columns). Nothing is remembered then.
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
        """Whether new profiles have arrived and the last computation is at least `interval_s` seconds ago."""
        return self._fresh and (self._last_s is None or now_s - self._last_s >= self._interval_s)

    def compute(self, now_s: float) -> Mapping[str, str]:
        """Group the agents that have shown enough tokens, and return the changed assignments: agent -> cluster.

        If there are more than AGENTS_MAX agents, each computation draws that many at random and leaves the others in
        place.
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

    # Folds of equal size for both agents keep the test symmetric.
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
    """Limit numerical libraries to one thread.

    On busy cores a thread pool makes problems this small ten times slower.
    """
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(limits=1)
    return limits


def _thinned(sample: Sample, count: int, seed: int) -> Matrix:
    """Draw `count` random rows and keep their order; shape (count, f) float64."""
    kept = np.random.default_rng(seed).permutation(len(sample.features))[:count]
    return sample.features[np.sort(kept)].astype(np.float64)  # (count, f) float64


def _merges(matrix: Matrix) -> list[tuple[int, int, float]]:
    """The merges of average linkage in order: the numbers of the two groups and their mean distance."""
    if len(matrix) < 2:
        return []
    from scipy.cluster.hierarchy import linkage

    upper = matrix[np.triu_indices(len(matrix), 1)]  # (n (n - 1) / 2,) float64
    return [(int(left), int(right), float(height)) for left, right, height, _ in linkage(upper, "average")]


def _mates(names: Sequence[str], matrix: Matrix, homes: Mapping[str, str]) -> Matrix:
    """The mean distance of each agent to the others of its cluster, shape (n,); 0 if it has no mates."""
    codes = np.unique([homes[name] for name in names], return_inverse=True)[1]  # (n,) int64
    together = (codes[:, None] == codes[None, :]) & ~np.eye(len(names), dtype=bool)  # (n, n) bool
    means: Matrix = (matrix * together).sum(axis=1) / np.maximum(1, together.sum(axis=1))  # (n,) float64
    return means
