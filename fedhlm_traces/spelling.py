"""Show token ids as text if their tokenizer is available, else as numbers."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fedhlm.decoding.models import tokenizer_at
from fedhlm.errors import ModelError
from fedhlm_zoo.shipped import model_folder

Spell = Callable[[int], str]


class Spelling(NamedTuple):
    """A tokenizer's digest (`Fingerprint.tokenizer`), and a function from a token id to its text."""

    digest: str
    text: Spell


@lru_cache(maxsize=4)
def spelling_of(model: Path) -> Spelling:
    """Load the spelling of a model's tokenizer.

    Raises:
        ModelError: it has none that can be used.
        ModuleNotFoundError: the library that reads it is absent.
    """
    tokenizer, vocabulary = tokenizer_at(model)
    return Spelling(
        vocabulary.digest,
        lru_cache(maxsize=65_536)(lambda token: str(tokenizer.decode([token], skip_special_tokens=False))),
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
