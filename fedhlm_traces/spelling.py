"""Token ids as people read them: the text, where the tokenizer that made them is at hand, else the number."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fedhlm.decoding.decoder import TOKENIZER_FILE, tokenizer_digest
from fedhlm.errors import ModelError, TraceError
from fedhlm_zoo.shipped import model_folder

Spell = Callable[[int], str]


class Spelling(NamedTuple):
    """A tokenizer's digest (`Fingerprint.tokenizer`), and the text of a single token."""

    digest: str
    text: Spell


@lru_cache(maxsize=4)
def spelling_of(folder: Path) -> Spelling:
    """The spelling of a model's tokenizer.

    Raises:
        ModelError: the folder has no tokenizer.json.
        TraceError: what it has is none.
        ModuleNotFoundError: the library that reads it is absent.
    """
    digest = tokenizer_digest(folder)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as exc:  # the library raises nothing narrower
        raise TraceError(f"{folder / TOKENIZER_FILE} is no tokenizer: {exc}") from exc
    return Spelling(
        digest, lru_cache(maxsize=65_536)(lambda token: str(tokenizer.decode([token], skip_special_tokens=False)))
    )


def by_number(token: int) -> str:
    """A token whose text nobody knows."""
    return f"id {token}"


def speller(tokenizer: str) -> Spell:
    """Spells the ids of the tokenizer with this digest by the shipped one; by number where they are another's."""
    try:
        shipped = spelling_of(model_folder("", "slm"))
    except (ModelError, ModuleNotFoundError):
        return by_number
    return (lambda token: repr(shipped.text(token))) if shipped.digest == tokenizer else by_number
