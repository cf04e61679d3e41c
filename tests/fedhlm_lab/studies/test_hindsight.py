"""The best threshold on recorded topic questions: nothing is lost by sending all, and no other choice by doubt is better."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm_lab.studies.hindsight import hindsight, show
from fedhlm_lab.studies.recorded import RecordedText

ANSWERS = st.tuples(st.floats(0.0, 1.0), st.booleans(), st.booleans())  # doubt; whether LLM and SLM are right


def questions(answers: list[tuple[float, bool, bool]]) -> list[RecordedText]:
    return [
        RecordedText(prompt=3, target=[int(large)], drafts=[int(small)], doubts=[doubt], right=(large, small))
        for doubt, large, small in answers
    ]


@given(st.lists(ANSWERS, min_size=1, max_size=40), st.floats(0.0, 1.0))
def test_what_is_kept_is_what_is_counted(answers: list[tuple[float, bool, bool]], sent: float) -> None:
    texts = questions(answers)
    nothing, some, everything = (hindsight(texts, share) for share in (0.0, sent, 1.0))
    large, small = (np.array([answer[place] for answer in answers], float) for place in (1, 2))
    assert nothing.points == pytest.approx(100.0 * (large.mean() - small.mean()))
    assert nothing.harm == pytest.approx(float((large != small).mean()))
    assert (everything.points, everything.harm, everything.error) == (0.0, 0.0, 0.0)
    assert some.sent == round(sent * len(texts)) / len(texts)
    assert some.harm <= nothing.harm
    above = sum(doubt > some.doubt for doubt, _, _ in answers)
    assert above <= round(sent * len(texts)) <= sum(doubt >= some.doubt for doubt, _, _ in answers) or some.sent == 0.0


def test_the_most_doubtful_are_sent_first() -> None:
    texts = questions([(0.9, True, False), (0.1, True, False), (0.5, False, True), (0.2, True, True)])
    lines = [hindsight(texts, share) for share in (0.0, 0.25, 0.5, 1.0)]
    assert [x.points for x in lines] == [25.0, 0.0, 25.0, 0.0]
    assert [x.harm for x in lines] == [0.75, 0.5, 0.25, 0.0]
    assert show(lines).splitlines()[3].startswith("| 25.0% | 75.0% | 0.90 | 50.00% | 0.00 ± ")


def test_only_topic_questions_have_right_answers() -> None:
    with pytest.raises(ValueError, match="topic questions"):
        hindsight([RecordedText(prompt=3, target=[1], drafts=[1], doubts=[0.1])], 0.5)
    with pytest.raises(ValueError, match="at least one"):
        hindsight([], 0.5)
