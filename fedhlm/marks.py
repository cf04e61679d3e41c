"""Pages with generated parts, each between `<!-- NAME -->` and `<!-- end of NAME -->`."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path


def rewritten(page: str, parts: Mapping[str, str]) -> str:
    """Return a page with the text of each part between its marks. A part without marks on the page is left out."""
    for name, text in parts.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        page = marks.sub(lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page)  # type: ignore[misc]
    return page


def rewrite(paths: Iterable[str], parts: Mapping[str, str]) -> None:
    """Write the text of each part into the pages at `paths`, in place."""
    for path in map(Path, paths):
        path.write_text(rewritten(path.read_text("utf-8"), parts), "utf-8")


def cell(text: str) -> str:
    """Return a text as it stands in a cell of a Markdown table."""
    return text.replace("|", "\\|")
