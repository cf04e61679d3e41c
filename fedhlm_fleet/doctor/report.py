"""Output of findings, as text with colours on a terminal, or as JSON (described in docs/doctor.md)."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.text import Text

from fedhlm_fleet.doctor.finding import Finding, Level, Subject

SCHEMA: Final = 1
MARKS: Final[dict[Level, str]] = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
_MARK_WIDTH: Final = 6
_NAME_WIDTH: Final = 24
_TEXT_MIN: Final = 30
_ARROW: Final = "-> "


def show(finding: Finding, console: Console) -> None:
    """Print one finding: its level, its name, what was found and, below, what to do."""
    style = MARKS[finding.level]
    indent = _MARK_WIDTH + _NAME_WIDTH
    width = max(console.width - indent, _TEXT_MIN)
    first, *rest = textwrap.wrap(finding.found, width) or [""]
    text = Text.assemble((f"{finding.level:<{_MARK_WIDTH}}", style), f"{finding.name:<{_NAME_WIDTH}}")
    lines = [text.append(first), *(Text(" " * indent + line) for line in rest)]
    for number, advice in enumerate(textwrap.wrap(finding.advice, width - len(_ARROW))):
        lead = Text(" " * indent + (_ARROW if number == 0 else " " * len(_ARROW)), style)
        lines.append(lead.append(advice, "default"))
    console.print(Text("\n").join(lines), soft_wrap=True)


def summary(findings: Sequence[Finding]) -> str:
    """Return the number of findings of each level, in words."""
    counts = Counter(finding.level for finding in findings)
    words: dict[Level, str] = {"ok": "in order", "warn": "worth a look", "fail": "failed", "skip": "not looked at"}
    return ", ".join(f"{counts[level]} {word}" for level, word in words.items() if counts[level])


def failed(findings: Sequence[Finding]) -> bool:
    """Return whether any check failed."""
    return any(finding.level == "fail" for finding in findings)


def as_json(subject: Subject, findings: Sequence[Finding], seconds: float) -> str:
    """Return the findings as one JSON object; docs/doctor.md describes its fields."""
    counts = Counter(finding.level for finding in findings)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "role": subject.role,
        "name": subject.name,
        "failed": failed(findings),
        "seconds": round(seconds, 3),
        "counts": {level: counts[level] for level in MARKS},
        "findings": findings,
    }
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
