"""What code and documentation cite is in the repository: pages, sections and files that exist, and nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("fedhlm*", "edge_*", "cloud_*", "tests", "benchmarks", "deploy", "docs", "examples")
KINDS = {".py", ".md", ".toml", ".yml", ".sh"}
NOWHERE = re.compile(
    r"\b(?:ALGORITHMS|CERTIFICATE|HOUSE|STYLE)\b(?! =|-----)|\bliterature\.md|\bliterature \d|/shared/"
)


def sources() -> Iterator[tuple[str, str]]:
    """Path and text of every source and page."""
    folders = [folder for pattern in FOLDERS for folder in ROOT.glob(pattern)]
    paths = [p for folder in folders for p in folder.rglob("*") if p.suffix in KINDS] + list(ROOT.glob("*.*"))
    for path in paths:
        if path.suffix in KINDS and path != Path(__file__):
            yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")


def test_nothing_outside_the_repository_is_cited() -> None:
    found = [f"{path}: {match.group()}" for path, text in sources() for match in NOWHERE.finditer(text)]
    assert not found


def test_every_page_that_is_named_exists() -> None:
    named = {(path, page) for path, text in sources() for page in re.findall(r"\bdocs/[\w/-]+\.md\b", text)}
    assert ("fedhlm/decoding/couplings.py", "docs/algorithms.md") in named
    assert not {(path, page) for path, page in named if not (ROOT / page).is_file()}


def test_every_section_of_the_mathematics_that_is_cited_exists() -> None:
    sections = set(re.findall(r"^#+ (\d(?:\.\d)?)\b", (ROOT / "docs/algorithms.md").read_text("utf-8"), re.MULTILINE))
    cited = [
        (path, number)
        for path, text in sources()
        for numbers in re.findall(r"docs/algorithms\.md, (?:sections? )?([\d., and]*\d)", text)
        for number in re.findall(r"\d(?:\.\d)?", numbers)
    ]
    assert len(cited) >= 10
    assert not [(path, number) for path, number in cited if number not in sections]


def test_every_file_that_a_page_names_exists() -> None:
    pages = [(path, text) for path, text in sources() if path.endswith(".md") and path != "docs/LOG.md"]
    # A path with a folder, in backticks, whose first folder is ours.
    ours = {p.name for p in ROOT.iterdir() if p.is_dir()} - {"build", "traces"}
    missing = [
        f"{page}: {name}"
        for page, text in pages
        # A recipe's "New file `NAME`" is one to be made.
        for name in re.findall(r"(?<!New file )`([\w.-]+/[\w./-]+\.(?:py|toml|md|sh|yml))`", text)
        if name.partition("/")[0] in ours and not (ROOT / name).exists()
    ]
    assert not missing


def test_no_conflict_of_a_merge_is_left() -> None:
    marks = re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE)
    assert not [path for path, text in sources() if marks.search(text)]


def test_nothing_speaks_of_a_plan_that_readers_do_not_have() -> None:
    pages = [
        path for path, text in sources() if path.endswith(".md") and re.search(r"\bthe plan\b", text, re.IGNORECASE)
    ]
    assert pages in ([], ["docs/compose.md"])  # there the plan is what is mounted into a container
