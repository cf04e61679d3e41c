"""Where pages use words of docs/glossary.md, and whether the first use is a link there.

python -m tests.docs.glossary docs/budget.md ...      adds the links that are missing
"""

import re
import sys
from pathlib import Path
from typing import Final, NamedTuple

# By the anchor of the entry: how the word looks in prose. Words that are also everyday English are not in the table.
TERMS: Final = {
    "coupling": r"\bcouplings?\b",
    "preset": r"\bpresets?\b",
    "doubt": r"\bdoubts?\b",
    "harm": r"\bharm\b",
    "budget": r"\b(?:error )?budgets?\b",
    "r-hat": r"\bR-hat\b",
    "learnt-curve": r"\bm\(u\)",
    "threshold": r"\b(?:thresholds?|tau)\b",
    "audit": r"\baudit(?:s|ed)?\b",
    "fixed": r"\bfixed (?:ids?|part|tokens?)\b",
    "prime": r"\bprimes?\b",
    "epoch": r"\bepochs?\b",
    "escalation": r"\bescalations?\b",
    "verdict": r"\bverdicts?\b",
    "context-key": r"\bcontext keys?\b|\bkeys of (?:their|the) contexts?\b",
    "similarity": r"\bsimilarity\b",
    "verified-token": r"\bverified tokens?\b",
    "proposal": r"\bproposals?\b",
    "contribution": r"\bcontributions?\b",
    "member": r"\bmembers?\b",
    "pool": r"\bpools?\b",
    "round": r"\brounds?\b(?! trip)",
    "journal": r"\bjournals?\b",
    "recording": r"\brecordings?\b",
    "oracle": r"\boracles?\b",
    "fingerprint": r"\bfingerprints?\b",
}

# Blanked before words are looked for: what is generated, fences, indented code, headings, tables, code spans, links with another target.
_NO_PROSE: Final = re.compile(
    r"^<!-- (\w+) -->$[\s\S]*?^<!-- end of \1 -->$|^```[\s\S]*?^```$|^(?: {4}|\t).*$|^#.*$|^\|.*$|`[^`\n]*`|!?\[[^\]]*\]\((?!glossary\.md#)[^)]*\)|\([^)\s]*\.md[^)]*\)",
    re.MULTILINE,
)
_LINK: Final = re.compile(r"\[([^\]]*)\]\(glossary\.md#([\w-]+)\)")


class Missing(NamedTuple):
    """A first use without a link: the entry's anchor and where the word stands."""

    anchor: str
    start: int
    end: int


def prose(text: str) -> str:
    """The text with everything blanked that is no prose, at the same length."""
    return _NO_PROSE.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def missing(text: str) -> list[Missing]:
    """First uses of words of the glossary that are no links to it, in the order of the page."""
    links = [(m.start(), m.end(), m.group(2)) for m in _LINK.finditer(text)]
    plain = prose(text)
    found = []
    for anchor, pattern in TERMS.items():
        for use in re.finditer(pattern, plain, re.IGNORECASE):
            inside = [target for start, end, target in links if start <= use.start() < end]
            if inside and inside[0] != anchor:
                continue  # a part of another word of the glossary
            if not inside:
                found.append(Missing(anchor, use.start(), use.end()))
            break
    return sorted(found, key=lambda use: use.start)


def linked(text: str) -> str:
    """The text with the missing links."""
    for use in reversed(missing(text)):
        text = f"{text[: use.start]}[{text[use.start : use.end]}](glossary.md#{use.anchor}){text[use.end :]}"
    return text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(linked(page.read_text("utf-8")), "utf-8")
