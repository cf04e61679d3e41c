"""What the files of a Hugging Face model say about its texts: how they are cut into tokens, begin and end."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedhlm.decoding.vocabulary import TOKENIZER_FILE
from fedhlm.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"


def open_tokenizer(folder: Path) -> "Tokenizer":
    """Open the folder's ``tokenizer.json``.

    Raises:
        ModelError: the file is missing, or is no tokenizer.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ModelError(f"{path} is missing: it says what the ids of the model mean")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the tokenizers package raises bare Exception
        raise ModelError(f"{path} is not a tokenizer: {exc}") from exc
    # A prompt is text: the name of a control token in it must not become that control token.
    tokenizer.encode_special_tokens = True
    return tokenizer


def begin_id(folder: Path, configured: int | None) -> int | None:
    """The id that begins every text for the tokenizer in `folder`; None if a text begins with its own first token.

    ``add_bos_token`` in ``tokenizer_config.json`` decides. Without it, the id is what the tokenizer itself puts before
    a text. That a model's configuration names a begin-of-text id does not mean that the model was trained to see it.

    Args:
        folder: holds ``tokenizer.json`` and, where the model has one, ``tokenizer_config.json``.
        configured: the begin-of-text id in the model's configuration, for a tokenizer that adds one and names none.

    Raises:
        ModelError: a file cannot be read, the begin-of-text token is unknown, or more than one token begins a text.
    """
    tokenizer, config = open_tokenizer(folder), _object_in(folder / TOKENIZER_CONFIG_FILE)
    adds = config.get("add_bos_token")
    if adds is True:
        named = config.get("bos_token")
        text = named.get("content") if isinstance(named, dict) else named
        found = configured if text is None else tokenizer.token_to_id(str(text))
        if found is None:
            raise ModelError(
                f"bos_token of {folder / TOKENIZER_CONFIG_FILE} must be a token of {TOKENIZER_FILE}, "
                f"because add_bos_token is true (got {text!r})"
            )
        return found
    return None if adds is False else _added_before(tokenizer, folder / TOKENIZER_FILE)


def _added_before(tokenizer: "Tokenizer", path: Path) -> int | None:
    """The id that the tokenizer puts before a text."""
    encoded = tokenizer.encode("a", add_special_tokens=True)
    added = list(encoded.special_tokens_mask)
    before = encoded.ids[: added.index(0)] if 0 in added else []
    if len(before) > 1:
        raise ModelError(f"tokens that {path} puts before a text must be at most one (got the ids {before})")
    return before[0] if before else None


def end_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a text. Chat models often name the end of an answer in their generation's configuration only.

    Raises:
        ModelError: a file is not JSON, or no file names an id.
    """
    given = [_object_in(folder / name).get("eos_token_id") for name in (CONFIG_FILE, GENERATION_FILE)]
    flat = [token for eos in given for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)]
    if not flat:
        named = _object_in(folder / TOKENIZER_CONFIG_FILE).get("eos_token")
        text = named.get("content") if isinstance(named, dict) else named
        found = None if text is None else open_tokenizer(folder).token_to_id(str(text))
        if found is None:
            raise ModelError(
                f"{folder} must say which id ends a text: eos_token_id in {CONFIG_FILE} or {GENERATION_FILE}, or "
                f"eos_token in {TOKENIZER_CONFIG_FILE}"
            )
        flat = [found]
    return tuple(dict.fromkeys(flat))


def configured_begin(folder: Path) -> int | None:
    """The id that begins every text, as `begin_id` finds it with what ``config.json`` names.

    Raises:
        ModelError: as `begin_id`.
    """
    named = _object_in(folder / CONFIG_FILE).get("bos_token_id")
    return begin_id(folder, named if isinstance(named, int) else None)


def _object_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} must be a JSON object ({exc})") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{path} must be a JSON object (got {type(config).__name__})")
    return config
