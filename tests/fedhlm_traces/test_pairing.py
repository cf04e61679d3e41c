"""Answers find their questions in whatever is left of both."""

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from fedhlm_traces.check.pairing import Said, paired

talks = st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), max_size=12)


def most(questions: list[Said], answers: list[Said]) -> int:
    """The oracle: pairs at most, by trying everything."""

    @cache
    def best(i: int, j: int) -> int:
        if i == len(questions) or j == len(answers):
            return 0
        both = questions[i].about == answers[j].about and questions[i].at < answers[j].at
        return max(best(i + 1, j), best(i, j + 1), 1 + best(i + 1, j + 1) if both else 0)

    return best(0, 0)


@given(talk=talks)
def test_all_answers_are_paired_where_no_question_is_missing(talk: list[tuple[int, bool, bool]]) -> None:
    questions = [Said(about, 2 * i) for i, (about, _, _) in enumerate(talk)]
    answers = [Said(about, 2 * i + 1) for i, (about, answered, _) in enumerate(talk) if answered]
    assert sorted(paired(questions, answers).values()) == list(range(len(answers)))


@given(talk=talks)
def test_pairs_are_in_order_and_as_many_as_possible(talk: list[tuple[int, bool, bool]]) -> None:
    questions = [Said(about, 2 * i) for i, (about, _, kept) in enumerate(talk) if kept]
    answers = [Said(about, 2 * i + 1) for i, (about, answered, _) in enumerate(talk) if answered]
    pairs = paired(questions, answers)
    assert list(pairs) == sorted(pairs)
    assert list(pairs.values()) == sorted(set(pairs.values()))
    assert all(questions[i].about == answers[j].about and questions[i].at < answers[j].at for i, j in pairs.items())
    assert len(pairs) == most(questions, answers)
