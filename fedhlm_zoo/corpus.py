"""Training and benchmark text: AG News articles with topics, and unlabelled news documents.

An article becomes one document: its title and text on separate lines, then the line ``Topic: NAME``. Data are read
from a folder the user has, or from the Hugging Face hub; nothing here ships with the project.
"""

import csv
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from fedhlm.errors import DataMissing

TOPICS: Final = ("World", "Sports", "Business", "Technology")
TOPIC_LINE: Final = "\nTopic:"
HUB_ID: Final = "fancyzhx/ag_news"
NEWS_FILES: Final = ("bbc_news", "abc_news_au", "onestopenglish_adv", "ieer_newswire", "reuters_c50", "reuters21578")


class Article(NamedTuple):
    """One labelled news item; `title` is empty where the source had none."""

    title: str
    text: str
    topic: str

    @property
    def body(self) -> str:
        """Title and text, each on a line of its own."""
        return f"{self.title}\n{self.text}" if self.title else self.text

    @property
    def document(self) -> str:
        """The whole training document, topic line included."""
        return f"{self.body}{TOPIC_LINE} {self.topic}"


def find_data(path: str | Path | None) -> Path | None:
    """Return the data folder (with ``ag_news/`` or its CSV files): the argument, FEDHLM_DATA or ``./data``."""
    candidates: list[str | Path | None] = [path] if path else [os.environ.get("FEDHLM_DATA"), "data"]
    for candidate in (c for c in candidates if c):
        folder = Path(candidate)
        if (folder / "ag_news").is_dir():
            return folder
        if any((folder / f"{split}.csv{end}").is_file() for split in ("train", "test") for end in (".gz", "")):
            return folder.parent if folder.name == "ag_news" else folder
    if path:
        raise DataMissing(f"data folder {str(path)!r} has no ag_news/ folder and no train.csv(.gz) or test.csv(.gz)")
    return None


def load_ag_news(split: str, path: str | Path | None = None) -> list[Article]:
    """Read AG News.

    Args:
        split: ``train`` or ``test``.
        path: folder with ``ag_news/{split}.csv.gz`` (class, title, description; no header); None looks in
            FEDHLM_DATA and ``./data``, then asks the Hugging Face hub.

    Raises:
        DataMissing: nothing found; the message names every place tried.
    """
    if split not in ("train", "test"):
        raise DataMissing(f"split must be 'train' or 'test' (got {split!r})")
    folder = find_data(path)
    if folder is None:
        return _load_from_hub(split)
    for name in (f"ag_news/{split}.csv.gz", f"ag_news/{split}.csv", f"{split}.csv.gz", f"{split}.csv"):
        if (folder / name).is_file():
            return list(_read_csv(folder / name))
    raise DataMissing(f"no {split}.csv.gz or {split}.csv under {str(folder)!r} or its ag_news/")


def _read_csv(path: Path) -> Iterator[Article]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.reader(file), start=1):
            if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
                raise DataMissing(f"line {line} of {path.name} must be class 1..4, title, description (got {row!r})")
            yield Article(row[1].strip(), row[2].strip(), TOPICS[int(row[0]) - 1])


def _load_from_hub(split: str) -> list[Article]:
    where = f"tried FEDHLM_DATA, ./data and the hub dataset {HUB_ID}"
    try:
        from datasets import load_dataset
    except ImportError as exc:
        raise DataMissing(f"no AG News found ({where}): give --data FOLDER, or install 'datasets' for the hub") from exc
    try:
        rows = load_dataset(HUB_ID, split=split)
    except Exception as exc:  # the hub client raises many unrelated types when offline
        raise DataMissing(f"no AG News found ({where}): give --data FOLDER; the hub said: {exc}") from exc
    return [Article("", str(row["text"]).strip(), TOPICS[int(row["label"])]) for row in rows]


def load_news(path: str | Path | None = None, files: tuple[str, ...] = NEWS_FILES) -> list[str]:
    """Read the unlabelled news documents (a blank line between documents, one paragraph a line); empty if absent."""
    folder = find_data(path)
    documents: list[str] = []
    for name in files:
        file_path = folder / "news_text" / f"{name}.txt.gz" if folder else None
        if file_path is not None and file_path.is_file():
            with gzip.open(file_path, "rt", encoding="utf-8") as file:
                documents += [d.strip() for d in file.read().split("\n\n") if d.strip()]
    return documents
