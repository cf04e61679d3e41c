"""Show token ids as text if their tokenizer is available, else as numbers."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fedhlm.decoding.vocabulary import TOKENIZER_FILE, vocabulary_of
from fedhlm.errors import ModelError, TraceError
from fedhlm_zoo.shipped import model_folder

Spell = Callable[[int], str]


class Spelling(NamedTuple):
    """A tokenizer's digest (`Fingerprint.tokenizer`), and a function from a token id to its text."""

    digest: str
    text: Spell


@lru_cache(maxsize=4)
def spelling_of(folder: Path) -> Spelling:
    """Load the spelling of a model's tokenizer.

    Raises:
        ModelError: the folder has no tokenizer.json.
        TraceError: what it has is none.
        ModuleNotFoundError: the library that reads it is absent.
    """
    digest = vocabulary_of(folder).digest
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as exc:  # the library raises a plain Exception
        raise TraceError(f"{folder / TOKENIZER_FILE} must be a tokenizer ({exc})") from exc
    return Spelling(
        digest, lru_cache(maxsize=65_536)(lambda token: str(tokenizer.decode([token], skip_special_tokens=False)))
    )


def by_number(token: int) -> str:
    """Show a token as its number."""
    return f"id {token}"


def speller(tokenizer: str) -> Spell:
    """Return a speller: the shipped tokenizer if its digest is this one, else numbers."""
    try:
        shipped = spelling_of(model_folder("", "slm"))
    except (ModelError, ModuleNotFoundError):
        return by_number
    return (lambda token: repr(shipped.text(token))) if shipped.digest == tokenizer else by_number
