"""News items as prompts: 200 written for this project, or a file of the user's. Needs neither torch nor onnx.

A file has one JSON object a line with the keys title, text and topic; blank lines are skipped.
"""

from importlib import resources
from pathlib import Path
from typing import Final, Literal

import msgspec

from fedhlm.errors import DataMissing
from fedhlm_zoo.corpus import Article

ITEMS_FILE: Final = "news_items.jsonl"


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a prompt file."""

    title: str
    text: str
    topic: Literal["World", "Sports", "Business", "Technology"]


_decoder: Final = msgspec.json.Decoder(Item)


def load_items(path: str | Path | None = None) -> tuple[Article, ...]:
    """Read news items; None returns the 200 that ship with the project, the topics in turn.

    Raises:
        DataMissing: the file cannot be read, a line is not an item (its number is given), or there is none.
    """
    source = Path(path) if path is not None else resources.files("fedhlm_zoo") / "data" / ITEMS_FILE
    try:
        lines = source.read_bytes().splitlines()
    except OSError as exc:
        raise DataMissing(f"prompt file must be readable (got {str(source)!r}: {exc.strerror})") from exc
    items = tuple(_parse(line, source.name, number) for number, line in enumerate(lines, start=1) if line.strip())
    if not items:
        raise DataMissing(f"prompt file {str(source)!r} must be one JSON object a line (it is empty)")
    return items


def _parse(line: bytes, name: str, number: int) -> Article:
    try:
        item = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise DataMissing(f"{name} line {number} must be a news item with title, text and topic (got {exc})") from exc
    if not item.title.strip():
        raise DataMissing(f"{name} line {number} has an empty title: the title is the prompt")
    return Article(item.title.strip(), item.text.strip(), item.topic)
