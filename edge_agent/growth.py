"""Grows a tree draft: decides which nodes the model evaluates next, and when to stop (docs/algorithms.md, 6.1).

Pure: logits go in, the tree comes out. The acceptance probability of a candidate is learnt from the target's texts on
earlier trees. `grow` drives any model, and time is an argument.
"""

from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.grammar import POSSIBLE
from fedhlm.decoding.sampling import gumbel, scores
from fedhlm.decoding.tree import Branch
from fedhlm.protocol.messages import Sampling

RANKS: Final = 8  # ranked candidates per node
SLACK: Final = 0.25  # a leaf at least this share as probable as the best one joins its model call
FORGETTING: Final = 0.998  # weight of a settled token after the next one: about 500 of them count
PRIOR_TEMPERATURE: Final = 0.6
PRIOR_TOKENS: Final = 20.0
PRIOR_FIRST: Final = 0.72
PRIOR_DELAY_S: Final = 0.1
DELAY_WEIGHT: Final = 0.1  # weight of the newest block in the running mean of the delay
LOSS_MAX: Final = 10.0  # nats: a single outlier must not decide
_TEMPERATURES: Final = np.array([0.25, 0.35, 0.45, 0.6, 0.75, 1.0, 1.4, 2.0])  # (temperatures,)
_PRIOR_LOSSES: Final = (
    PRIOR_TOKENS * np.log(_TEMPERATURES / PRIOR_TEMPERATURE) ** 2
)  # nats: the curvature is of that size

Logits = NDArray[Any]  # (V,) floating


class TreeLimits(NamedTuple):
    """The limits of one tree.

    `nodes` includes the main chain. A node has at most `width` children, the tree has at most `levels` below the root,
    and a model call evaluates at most `batch` nodes. `delay_s` is the time from sending a block to its verdict, and
    `send_s` is what each node adds to it.
    """

    nodes: int
    width: int
    levels: int
    delay_s: float
    batch: int = 16
    send_s: float = 0.0


class TreeRequest(NamedTuple):
    """A tree that is wanted below `ids` (at least one) under a shared coupling.

    The first `settled` ids (None: all) belong to the prompt or were settled by the target. What they say about the last
    tree is learnt. `uncertainty` is a key of `fedhlm.decoding.uncertainty.UNCERTAINTIES`.
    """

    ids: Sequence[int]
    sampling: Sampling
    limits: TreeLimits
    uncertainty: str = "closed-form"
    settled: int | None = None


class Candidates(NamedTuple):
    """Candidate tokens, best first.

    `scores` are their perturbed log-probabilities up to a constant, shape (candidates,) float64.
    """

    tokens: tuple[int, ...]
    scores: NDArray[np.float64]


class Acceptance:
    """The probability that the target emits each candidate: softmax(scores / T), with T learnt by maximum likelihood.

    The distance of a score to the next one says much more than its rank. Measured on the shipped pair of models at
    temperature 0.8, the first candidate is accepted in 0.40 of the narrowest eighth and in 0.99 of the widest. The
    log-loss is 0.88 nats, against 1.08 for rank frequencies. The outcome "none of them" takes part with the score of
    the last candidate.
    """

    def __init__(self) -> None:
        self._losses = _PRIOR_LOSSES.copy()  # nats per temperature, with forgetting
        self.first = PRIOR_FIRST  # how often the first candidate was accepted, with forgetting

    @property
    def temperature(self) -> float:
        """The temperature T in use."""
        return float(_TEMPERATURES[int(np.argmin(self._losses))])

    def probabilities(self, ranked: NDArray[np.float64]) -> NDArray[np.float64]:
        """The probability of each candidate, from scores in descending order; same shape, sums to less than 1."""
        return np.exp(self._log_shares(ranked)[int(np.argmin(self._losses)), :-1])

    def learn(self, ranked: NDArray[np.float64], rank: int | None) -> None:
        """Learn that the target emitted candidate number `rank` (from 0), or none of them (None)."""
        own = self._log_shares(ranked)[:, -1 if rank is None else rank]
        self._losses = FORGETTING * self._losses + np.minimum(-own, LOSS_MAX)
        self.first = FORGETTING * self.first + (1.0 - FORGETTING) * (rank == 0)

    def _log_shares(self, ranked: NDArray[np.float64]) -> NDArray[np.float64]:
        lead = np.append(ranked, ranked[-1]) - ranked[0]  # (candidates + 1,) <= 0
        z = lead / _TEMPERATURES[:, None]
        return np.asarray(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))  # (temperatures, candidates + 1)


class Growth:
    """A tree that grows best first: `leaves` selects the nodes to evaluate, and `add` takes their candidates.

    Node 0 is the root. The most probable nodes are kept, `nodes` at most. No node is more probable than its parent, so
    the kept nodes form a tree. It is the best one of its size among the evaluated nodes.
    """

    def __init__(self, budget: TreeLimits, acceptance: Acceptance, stop_ids: frozenset[int] = frozenset()) -> None:
        self.budget = budget
        self.paths: list[tuple[int, ...]] = [()]  # tokens from the root to each node
        self._acceptance = acceptance
        self._stop_ids = stop_ids
        self.parents = [0]
        self._reach = [1.0]  # probability that the target's text passes through each node
        self._ranked: dict[int, Candidates] = {}  # of the evaluated nodes
        self._children: dict[tuple[int, int], int] = {}  # (node, token) -> node
        self._kept: list[tuple[float, int]] = []  # (-reach, node), the best first

    @property
    def expected(self) -> float:
        """The expected tokens per round trip: the accepted ones of the tree, and the target's own token after them."""
        return 1.0 - sum(loss for loss, _ in self._kept)

    def leaves(self, elapsed_s: float, node_s: float) -> list[int]:
        """The nodes to evaluate in the next model call; none if the tree is finished.

        Growth stops when the next node yields fewer tokens per second than the tree so far. The rate of the tree is its
        expected tokens over `elapsed_s`, the time since growth began, plus the delay. `node_s` is the time that one
        node takes.
        """
        if 0 not in self._ranked:
            return [0]
        budget = self.budget
        best = [node for _, node in self._kept if node not in self._ranked and self._open(node)]
        if not best:
            return []
        top = self._reach[best[0]]
        full = len(self._kept) == budget.nodes
        gain = top * self._acceptance.first + (self._kept[-1][0] if full else 0.0)  # less what would be dropped
        if gain <= 0.0 or gain * (elapsed_s + budget.delay_s) < self.expected * (node_s + budget.send_s):
            return []
        return [node for node in best if self._reach[node] >= SLACK * top][: budget.batch]

    def _open(self, node: int) -> bool:
        path = self.paths[node]
        return len(path) < self.budget.levels and path[-1] not in self._stop_ids

    def add(self, node: int, candidates: Candidates) -> None:
        """Add the best candidates as children of a node."""
        self._ranked[node] = candidates
        shares = self._acceptance.probabilities(candidates.scores)
        for token, share in list(zip(candidates.tokens, shares, strict=True))[: self.budget.width]:
            reach = self._reach[node] * float(share)
            if reach <= 0.0:
                continue
            number = len(self.paths)
            self.paths.append((*self.paths[node], token))
            self.parents.append(node)
            self._reach.append(reach)
            self._children[node, token] = number
            insort(self._kept, (-reach, number))
        del self._kept[self.budget.nodes :]

    def trim(self, elapsed_s: float) -> None:
        """Drop improbable nodes whose time to send is not worth it. At least one node stays."""
        expected, time_s = 1.0, elapsed_s + self.budget.delay_s
        for count, (loss, _) in enumerate(self._kept):
            if count and -loss * time_s < expected * self.budget.send_s:
                del self._kept[count:]
                return
            expected -= loss
            time_s += self.budget.send_s

    def tree(self) -> tuple[list[int], list[Branch]]:
        """The main chain's nodes (numbered as here) and the branches (numbered as in `fedhlm.decoding.tree`)."""
        kept = [node for _, node in self._kept]  # parents before children, and of siblings the more probable first
        heirs: dict[int, int] = {}
        for node in kept:
            heirs.setdefault(self.parents[node], node)
        chain: list[int] = []
        node = 0
        while node in heirs:
            chain.append(node := heirs[node])
        numbers = {0: 0} | {node: i for i, node in enumerate(chain, start=1)}
        branches: list[Branch] = []
        for node in kept:
            if node not in numbers:
                branches.append(Branch(numbers[self.parents[node]], self.paths[node][-1]))
                numbers[node] = len(chain) + len(branches)
        return chain, branches

    def learn(self, settled: Sequence[int]) -> None:
        """Learn from the target's text after the root, as far as its nodes were evaluated."""
        node: int | None = 0
        for token in settled:
            if node is None or node not in self._ranked:
                return
            tokens, ranked = self._ranked[node]
            self._acceptance.learn(ranked, tokens.index(token) if token in tokens else None)
            node = self._children.get((node, token))


class Trees:
    """The trees of one device, one after the other. The target's text on one tree is learnt before the next begins."""

    def __init__(self, stop_ids: frozenset[int]) -> None:
        self.acceptance = Acceptance()
        self._stop_ids = stop_ids
        self._last: tuple[list[int], Sampling, Growth] | None = None  # the ids before the last tree, and its growth

    def begin(self, request: TreeRequest) -> Growth:
        """Begin a tree."""
        ids = list(request.ids)
        if self._last is not None:
            root, of_tree, growth = self._last
            text = ids[: request.settled]
            if of_tree == request.sampling and text[: len(root)] == root:
                growth.learn(text[len(root) :])
        growth = Growth(request.limits, self.acceptance, self._stop_ids)
        self._last = ids, request.sampling, growth
        return growth


class Delay:
    """A running mean of the time from sending a block to its verdict, in seconds. One block is on its way at a time."""

    def __init__(self) -> None:
        self.mean_s = PRIOR_DELAY_S
        self._out: tuple[Hashable, float | None] | None = None

    def sent(self, block: Hashable, now_s: float) -> None:
        """Note that a block was sent.

        A block that was sent twice is not measured, as its verdict is ambiguous (Karn's rule).
        """
        repeated = self._out is not None and self._out[0] == block
        self._out = block, None if repeated else now_s

    def heard(self, block: Hashable, now_s: float) -> None:
        """Note that a verdict has arrived."""
        if self._out is not None and self._out[0] == block:
            if self._out[1] is not None:
                self.mean_s += DELAY_WEIGHT * (now_s - self._out[1] - self.mean_s)
            self._out = None


def ranking(sampling: Sampling) -> Callable[[Logits, int], Candidates]:
    """Return a function that ranks a position's tokens as the shared coupling of `sampling` would draft them.

    The first candidate is the coupling's draft. Under gumbel the order is by ln q + g. Under greedy, and at temperature
    0, it is by the logits, because g is 0 there and the law has one token.
    """
    plain = sampling.temperature == 0.0 or COUPLINGS[sampling.coupling].greedy

    @cache  # all nodes of a level share the same noise
    def noise(position: int, vocab_size: int) -> NDArray[np.float64]:
        return gumbel(sampling.seed, position, vocab_size)

    def rank(logits: Logits, position: int) -> Candidates:
        if plain:
            wide = np.asarray(logits, np.float64)  # (V,)
        else:
            wide = scores(logits, sampling) + noise(position, len(logits))
        count = min(RANKS, int((wide > POSSIBLE).sum()))
        some = np.argpartition(-wide, count - 1)[:count]
        best = some[np.lexsort((some, -wide[some]))]
        return Candidates(tuple(int(t) for t in best), wide[best])

    return rank


def grow(
    growth: Growth,
    evaluate: Callable[[list[int]], Sequence[Logits]],
    *,
    sampling: Sampling,
    position: int,
    node_s: float,
    clock_s: Callable[[], float],
) -> None:
    """Grow a tree until another node no longer pays.

    `evaluate` returns the logits after each of the given nodes, each of shape (V,). The first token below the root has
    the position `position`.
    """
    rank = ranking(sampling)
    began_s = clock_s()
    while leaves := growth.leaves(clock_s() - began_s, node_s):
        for node, logits in zip(leaves, evaluate(leaves), strict=True):
            growth.add(node, rank(logits, position + len(growth.paths[node])))
    growth.trim(clock_s() - began_s)
