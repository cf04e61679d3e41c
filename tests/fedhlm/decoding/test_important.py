"""The rules about drafts that are always verified: what they see, and that no way of cutting a text hides it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.decoding.important import RULES, important_of, rules_of


def marked(name: str, pieces: list[str]) -> list[bool]:
    """Which pieces of a text are important by a rule, each seen with the text before it."""
    rule = rules_of([name])[name if name in RULES else "pattern"]
    return [rule("".join(pieces[:i]), piece) for i, piece in enumerate(pieces)]


@pytest.mark.parametrize(
    ("name", "pieces", "expected"),
    [
        ("number", ["It", " cost", " 1", "2", ".", "5", " million"], [False, False, True, True, False, True, False]),
        ("number", ["one", " two"], [False, False]),
        ("negation", ["This", " is", " not", " so"], [False, False, True, False]),
        ("negation", ["is", "n", "'t", " it"], [False, False, True, False]),
        ("negation", ["kn", "ot", " note"], [False, False, False]),
        ("negation", ["NE", "VER"], [False, True]),
        ("tool-call", ["a", "<tool_call>", "{", "}", "</tool_call>", "b"], [False, True, True, True, True, False]),
        ("tool-call", ["<tool", "_call>", "x"], [False, True, True]),
        ("tool-call", ["</tool_call>", "b"], [False, False]),
        ("re:EUR|\\bdose\\b", ["a", " dose", " of", " EU", "R"], [False, True, False, False, True]),
    ],
)
def test_rules_see_what_is_important_and_nothing_else(name: str, pieces: list[str], expected: list[bool]) -> None:
    assert marked(name, pieces) == expected


TEXTS = st.lists(st.sampled_from(["no", "t", " ", "7", ".", "never", "a", "n't", "<tool_call>", "</tool_call>", "12"]))


@given(TEXTS, st.data())
def test_every_digit_and_every_negation_ends_in_an_important_piece_however_the_text_is_cut(
    words: list[str], data: st.DataObject
) -> None:
    text = "".join(words)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1))) if len(text) > 1 else [])
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [0, *cuts, len(text)]
    numbers, negations = marked("number", pieces), marked("negation", pieces)
    for found in re.finditer(r"\d", text):
        assert numbers[next(i for i, end in enumerate(ends[1:]) if found.end() <= end)]
    for found in re.finditer(r"\b(?:not|never|no)\b", text):
        assert negations[next(i for i, end in enumerate(ends[1:]) if found.end() <= end)]


@given(TEXTS)
def test_a_tool_call_is_important_from_its_mark_to_its_end(words: list[str]) -> None:
    is_open = False
    for word, important in zip(words, marked("tool-call", words), strict=True):
        assert important == (is_open or word == "<tool_call>")
        is_open = word == "<tool_call>" or (is_open and word != "</tool_call>")


def test_the_first_rule_that_applies_is_named_and_without_text_none_does() -> None:
    def read(ids: list[int]) -> str:
        return "".join(["<tool_call>", "4", "x"][i] for i in ids)

    important = important_of(["tool-call", "number"], read)  # type: ignore[arg-type]
    assert [important([], 1), important([0], 1), important([], 2)] == ["number", "tool-call", ""]
    assert important_of(["number"], None)([], 1) == ""
    assert important_of([], read)([], 1) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["numbers", "re:(", ""])
def test_an_unknown_rule_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="regular expression|none of"):
        rules_of([name])
