"""The glossary: every entry complete, every page links a word of it at its first use."""

import re
from pathlib import Path

import pytest

from tests.docs.glossary import TERMS, linked, missing

DOCS = Path(__file__).parents[2] / "docs"
GLOSSARY = (DOCS / "glossary.md").read_text("utf-8")
PAGES = sorted(page for page in DOCS.glob("*.md") if page.name not in ("glossary.md", "LOG.md"))
ENTRIES = re.findall(r"^### (.+)\n\n(.+(?:\n.+)*)\n\n(.+(?:\n.+)*)$", GLOSSARY, re.MULTILINE)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_words_of_the_glossary_at_their_first_use(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not [text[use.start : use.end] for use in missing(text)]


def test_every_entry_has_symbol_unit_the_fields_word_and_one_sentence() -> None:
    assert len(ENTRIES) == len(re.findall(r"^### ", GLOSSARY, re.MULTILINE))
    for heading, wrapped, text in ENTRIES:
        facts, sentence = " ".join(wrapped.split()), " ".join(text.split())
        assert re.fullmatch(r"Symbol: .+ · Unit: .+ · In the literature: .+", facts), heading
        assert re.fullmatch(r"[A-Z].*\.", sentence), heading
        assert not re.search(r"\. [A-Z]", sentence), f"{heading}: more than one sentence"


def test_every_word_that_is_looked_for_has_an_entry() -> None:
    assert set(TERMS) <= {anchor(heading) for heading, _, _ in ENTRIES}


def test_the_words_that_the_documentation_is_built_on_have_entries() -> None:
    wanted = {"doubt", "harm", "budget", "r-hat", "fixed", "prime", "epoch", "context-key", "threshold", "learnt-curve"}
    assert wanted | {"audit", "limit", "round", "member"} <= {anchor(heading) for heading, _, _ in ENTRIES}


def test_a_first_use_is_found_in_prose_only() -> None:
    code = "# Doubt\n\n    doubt\n\n| doubt |\n\n```\ndoubt\n```\n\n`doubt`, [a doubt](peers.md)\n"
    assert not missing(code)
    text = f"{code}\nA Doubt, a doubt.\n"
    assert [text[use.start : use.end] for use in missing(text)] == ["Doubt"]
    assert linked(text).endswith("A [Doubt](glossary.md#doubt), a doubt.\n")
    assert not missing(linked(text))
