"""Token ids as people read them: the text, where the tokenizer that made them is at hand, else the number."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from fedhlm.decoder import TOKENIZER_FILE, tokenizer_digest
from fedhlm.errors import ModelError
from fedhlm.serve import model_folder

Spell = Callable[[int], str]


def by_number(token: int) -> str:
    """A token whose text nobody knows."""
    return f"id {token}"


def speller(tokenizer: str, folder: Path | None = None) -> Spell:
    """Spells the ids of the tokenizer with this digest, from `folder` or the shipped model; by number where it is another's.

    Raises:
        ModelError: `folder` is given and holds no such tokenizer.
    """
    try:
        place = folder or model_folder("", "slm")
        found = tokenizer_digest(place)
        if found != tokenizer:
            raise ModelError(f"{place} has tokenizer {found}: {tokenizer} expected")
        from tokenizers import Tokenizer
    except (ModelError, ModuleNotFoundError):
        if folder is not None:
            raise
        return by_number
    words = Tokenizer.from_file(str(place / TOKENIZER_FILE))

    @lru_cache(maxsize=65_536)
    def spell(token: int) -> str:
        return repr(words.decode([token], skip_special_tokens=False))

    return spell
