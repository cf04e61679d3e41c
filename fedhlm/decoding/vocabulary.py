"""What the ids of a tokenizer mean, so that two models can tell whether they speak of the same tokens.

Two files of one tokenizer may differ in their bytes, and the embedding tables of one family may be padded to different
numbers of rows. Neither changes what an id means.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from fedhlm.errors import ModelError

TOKENIZER_FILE: Final = "tokenizer.json"
_BYTES: Final = {"add_prefix_space": True, "trim_offsets": True, "type": "ByteLevel", "use_regex": True}


class Vocabulary(NamedTuple):
    """The ids of a tokenizer: 0 to `size` - 1, and 16 hex digits that are equal where all ids mean the same."""

    digest: str
    size: int


def vocabulary_of(folder: Path) -> Vocabulary:
    """Read the vocabulary of the folder's ``tokenizer.json``.

    The digest covers the text of each id and the decoder that joins them, and not how a text is cut into tokens: only
    ids travel.

    Raises:
        ModelError: the file cannot be read, or is no tokenizer.
    """
    path = folder / TOKENIZER_FILE
    try:
        return vocabulary_in(path.read_bytes(), path)
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc.strerror}") from exc


def vocabulary_in(tokenizer: str | bytes, path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer that is written as JSON, and that stands in or was made of the file `path`.

    Raises:
        ModelError: it is no tokenizer.
    """
    try:
        document = json.loads(tokenizer)
        entries = _entries(document)
        decoder = document.get("decoder")
        meaning = [_BYTES if _is_bytes(decoder) else decoder, sorted(entries.items())]
        canonical = json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as exc:
        raise ModelError(f"{path} must be a tokenizer of the tokenizers library ({exc})") from exc
    return Vocabulary(hashlib.sha256(canonical).hexdigest()[:16], max(entries) + 1)


def _is_bytes(decoder: Any) -> bool:
    """Whether a decoder reads tokens as bytes; its options concern the way from text to tokens."""
    return isinstance(decoder, dict) and decoder.get("type") == _BYTES["type"]


def _entries(document: Any) -> dict[int, str]:
    """The text of each id. Unigram models list theirs in order, the others name each one's id."""
    vocab = document["model"]["vocab"]
    texts = vocab if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}
    entries = {int(number): str(text) for text, number in texts.items()}
    entries |= {int(token["id"]): str(token["content"]) for token in document.get("added_tokens") or ()}
    if not entries or min(entries) < 0:
        raise ValueError("it has no tokens")
    return entries
