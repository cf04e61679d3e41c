"""Pair questions with answers when some of either are missing but both are in the same order."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

Fit = Callable[[int, int], bool]


class Said(NamedTuple):
    """A question or an answer: its subject, and its running number among both."""

    about: Hashable
    at: int


def paired(questions: Sequence[Said], answers: Sequence[Said], could: Fit | None = None) -> dict[int, int]:
    """Return the index of the answer to each question that has one.

    An answer has the question's subject and comes later. Pairs keep both orders, and there are as many as possible.
    Each question takes the earliest answer that it can have.

    `could` says whether a question and an answer, given by index, fit by content. It is used only if every answer
    then still finds a question, or if some answers cannot find one in any case. Time is quadratic only if an answer's
    question is missing.
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
