"""Which answer belongs to which question, where some of either may be missing but their order is the same."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

Fit = Callable[[int, int], bool]


class Said(NamedTuple):
    """A question or an answer: what it is about, and when it was said, as a running number of both."""

    about: Hashable
    at: int


def paired(questions: Sequence[Said], answers: Sequence[Said], could: Fit | None = None) -> dict[int, int]:
    """Index of its answer for each question that has one: the same matter, later, both in order; as many as possible.

    Each question takes the earliest answer that it can have. `could` says of a question and an answer, by index, whether
    their contents go together; that counts only as long as every answer finds a question so, or some cannot at all.
    Quadratic in time only where an answer's question is missing.
    """
    could = could or _always
    for fit in (could, _always):
        found = _greedy(questions, answers, fit)
        if len(found) == len(answers):
            return found
    return _longest(questions, answers, could)


def _always(_question: int, _answer: int) -> bool:
    return True


def _fits(question: Said, answer: Said) -> bool:
    return question.about == answer.about and question.at < answer.at


def _greedy(questions: Sequence[Said], answers: Sequence[Said], could: Fit) -> dict[int, int]:
    pairs: dict[int, int] = {}
    for i, question in enumerate(questions):
        j = len(pairs)
        if j < len(answers) and _fits(question, answers[j]) and could(i, j):
            pairs[i] = j
    return pairs


def _longest(questions: Sequence[Said], answers: Sequence[Said], could: Fit) -> dict[int, int]:
    """The longest common subsequence."""
    n, m = len(questions), len(answers)
    fits = [[_fits(questions[i], answers[j]) and could(i, j) for j in range(m)] for i in range(n)]
    best = [[0] * (m + 1) for _ in range(n + 1)]  # pairs among what follows
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            best[i][j] = max(best[i + 1][j], best[i][j + 1])
            if fits[i][j]:
                best[i][j] = max(best[i][j], 1 + best[i + 1][j + 1])
    pairs: dict[int, int] = {}
    i = j = 0
    while i < n and j < m:
        if fits[i][j] and best[i][j] == 1 + best[i + 1][j + 1]:
            pairs[i] = j
            i, j = i + 1, j + 1
        elif best[i][j] == best[i][j + 1]:
            j += 1
        else:
            i += 1
    return pairs
