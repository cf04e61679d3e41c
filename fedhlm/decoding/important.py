"""Which drafts are verified whatever their doubt: those that carry meaning that must not be wrong.

A rule looks at the text of the generation, and says whether the newest draft is part of something important. It can
only see what the device drafts: a number that the LLM would have written where the device writes a word is not seen.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

TOOL_CALL: Final = "tool-call"
PATTERN: Final = "re:"  # begins a pattern of the user
WINDOW: Final = 256  # characters before the draft that patterns may match
_TOOL_OPENS: Final = re.compile(r"<tool_call>|<function=|<\|python_tag\|>|\[TOOL_CALLS\]")
_TOOL_CLOSES: Final = re.compile(r"</tool_call>|</function>|<\|eom_id\|>")
_NUMBER: Final = re.compile(r"\d(?:[\d.,:/-]*\d)?")
_NEGATION: Final = re.compile(
    r"\b(?:no|not|nor|none|never|neither|nothing|nobody|nowhere|without|cannot)\b|n['\u2019]t\b", re.IGNORECASE
)

Rule = Callable[[str, str], bool]
"""Whether a draft is important, from the text before it and the text of the draft."""
Important = Callable[[Sequence[int], int], str]
"""The name of the first rule by which a draft is important, from the generated ids before it and its own; "": none."""


def _matching(pattern: re.Pattern[str]) -> Rule:
    """A rule by which a draft is important if it is part of a match."""

    def rule(before: str, draft: str) -> bool:
        start = len(before := before[-WINDOW:])
        return any(found.end() > start for found in pattern.finditer(before + draft))

    return rule


def _in_tool_call(before: str, draft: str) -> bool:
    """Whether a tool call is open before the draft, or opens in it."""
    text = before + draft
    opened = max((found.end() for found in _TOOL_OPENS.finditer(text)), default=0)
    closed = max((found.end() for found in _TOOL_CLOSES.finditer(before)), default=0)
    return opened > closed


RULES: Final[dict[str, Rule]] = {
    TOOL_CALL: _in_tool_call,
    "number": _matching(_NUMBER),
    "negation": _matching(_NEGATION),
}


def rules_of(names: Iterable[str]) -> dict[str, Rule]:
    """The rules of a setting by their labels: keys of RULES, or `re:` and a regular expression, labelled `pattern`.

    Raises:
        ValueError: a name is unknown, or a regular expression is wrong.
    """
    rules: dict[str, Rule] = {}
    patterns = []
    for name in names:
        if name.startswith(PATTERN):
            try:
                re.compile(name.removeprefix(PATTERN))
            except re.error as exc:
                raise ValueError(f"{name!r} is no regular expression: {exc}") from exc
            patterns.append(f"(?:{name.removeprefix(PATTERN)})")
        elif name in RULES:
            rules[name] = RULES[name]
        else:
            raise ValueError(f"{name!r} is none of {', '.join(RULES)}, and does not begin with {PATTERN}")
    if patterns:
        rules["pattern"] = _matching(re.compile("|".join(patterns)))
    return rules


def important_of(names: Iterable[str], read: Callable[[Sequence[int]], str] | None) -> Important:
    """The rules of a setting as a function of ids. `read` returns their text; without it no draft is important."""
    rules = rules_of(names)
    if read is None or not rules:
        return lambda _ids, _draft: ""

    def important(ids: Sequence[int], draft: int) -> str:
        before = read(ids)
        text = read([*ids, draft])
        shared = len(before) if text.startswith(before) else len(read(ids[:-1]))
        return next((name for name, rule in rules.items() if rule(text[:shared], text[shared:])), "")

    return important
