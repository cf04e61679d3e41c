"""Train the byte-level BPE tokenizer that both models of a pair share, and read how a tokenizer begins a text."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fedhlm.decoding.decoder import TOKENIZER_CONFIG_FILE
from fedhlm.decoding.vocabulary import TOKENIZER_FILE
from fedhlm.errors import ModelError
from fedhlm.progress import progress

END_OF_TEXT: Final = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` entries; id 0 is the end-of-text token.

    Any text round-trips exactly.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with progress("training the tokenizer"):
        tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which says that a text begins with end-of-text."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


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
    tokenizer, config = _tokenizer_in(folder), _config_in(folder)
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


def _added_before(tokenizer: Tokenizer, path: Path) -> int | None:
    """The id that the tokenizer puts before a text."""
    encoded = tokenizer.encode("a", add_special_tokens=True)
    added = list(encoded.special_tokens_mask)
    before = encoded.ids[: added.index(0)] if 0 in added else []
    if len(before) > 1:
        raise ModelError(f"tokens that {path} puts before a text must be at most one (got the ids {before})")
    return before[0] if before else None


def _tokenizer_in(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as exc:  # the tokenizers package raises bare Exception
        raise ModelError(f"{folder / TOKENIZER_FILE} is not a tokenizer: {exc}") from exc


def _config_in(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG_FILE
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} must be a JSON object ({exc})") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{path} must be a JSON object (got {type(config).__name__})")
    return config
