"""Texts of the user's own, to measure models on. Needs neither torch nor onnx.

A file of the name `*.jsonl` has one JSON object a line, with the text in its key `text` and, if there is one, a title in
`title`. Any other file is plain text, with blank lines between one text and the next.
"""

import re
from pathlib import Path
from typing import Final

import msgspec

from fedhlm.errors import DataMissing

_BETWEEN: Final = re.compile(r"\n\s*\n")


class _Line(msgspec.Struct, frozen=True):
    text: str
    title: str = ""


_decoder: Final = msgspec.json.Decoder(_Line)


def load_texts(path: Path) -> list[str]:
    """Read the texts of a file; empty ones are left out.

    Raises:
        DataMissing: the file cannot be read or has no text, or a line is no object with a text (its number is given).
    """
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise DataMissing(f"file of texts must be readable (got {str(path)!r}: {why})") from exc
    if path.suffix == ".jsonl":
        lines = enumerate(content.splitlines(), start=1)
        texts = [_text_of(line, path.name, number) for number, line in lines if line.strip()]
    else:
        texts = _BETWEEN.split(content)
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise DataMissing(f"file of texts must have at least one text (got none in {str(path)!r})")
    return found


def _text_of(line: str, name: str, number: int) -> str:
    try:
        item = _decoder.decode(line)
    except msgspec.DecodeError as exc:
        raise DataMissing(f"{name} line {number} must be a JSON object with a text (got {exc})") from exc
    return f"{item.title}\n{item.text}" if item.title else item.text
