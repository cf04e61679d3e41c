"""The tokenizer of a model without its weights: what a device must know of an LLM in whose ids it drafts."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from fedhlm.decoding.decoder import INFO_FILE, read_info
from fedhlm.decoding.gguf import read_gguf
from fedhlm.decoding.gguf_tokenizer import spoken_in
from fedhlm.decoding.hub import configured_begin, end_ids, open_tokenizer
from fedhlm.decoding.llama import listen
from fedhlm.decoding.models import backend_of
from fedhlm.decoding.vocabulary import Vocabulary, vocabulary_of
from fedhlm.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TARGET_KEY: Final = "agent.target_tokenizer"


class Spoken(NamedTuple):
    """How a model cuts texts, what its ids mean, and the ids that begin (None: none does) and end its texts."""

    tokenizer: "Tokenizer"
    vocabulary: Vocabulary
    bos_id: int | None
    eos_ids: tuple[int, ...]


def spoken_at(model: Path) -> Spoken:
    """Read the tokenizer of a model folder or GGUF file. Weights are not read, and a folder may lack them.

    Raises:
        ModelError: it has no tokenizer that can be used, or does not say which ids end a text.
    """
    if backend_of(str(model)) == "llama-cpp":
        return _of_gguf(model)
    tokenizer, vocabulary = open_tokenizer(model), vocabulary_of(model)
    if (model / INFO_FILE).is_file():
        info = read_info(model)
        return Spoken(tokenizer, vocabulary, info.bos_id, info.eos_ids)
    return Spoken(tokenizer, vocabulary, configured_begin(model), end_ids(model))


def configured_target(value: str) -> Spoken:
    """Read the tokenizer that `agent.target_tokenizer` names.

    Raises:
        ConfigError: it cannot be used.
    """
    return configured_tokenizer(value, key=TARGET_KEY, whose="the cloud's model")


def configured_tokenizer(value: str, *, key: str, whose: str) -> Spoken:
    """Read the tokenizer that a setting names.

    Raises:
        ConfigError: it cannot be used; the error says whose tokenizer is expected.
    """
    expected = f"a folder or GGUF file with the tokenizer of {whose}"
    if not value:
        raise ConfigError(key, value, expected)
    try:
        return spoken_at(Path(value))
    except ModelError as exc:
        raise ConfigError(key, value, expected, why=str(exc)) from exc


def _of_gguf(path: Path) -> Spoken:
    """Only llama.cpp itself knows all ids that end its texts."""
    tokenizer, vocabulary = spoken_in(read_gguf(path))
    try:
        import llama_cpp
    except ModuleNotFoundError as exc:
        raise ModelError(
            f"tokenizer of {str(path)!r} needs llama_cpp, which is not installed: pip install 'fedhlm[llama]'"
        ) from exc
    said = listen(llama_cpp)
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    pointer = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
    if not pointer:
        raise ModelError(f"the tokenizer of {path} cannot be loaded by llama.cpp: {' '.join(said)}")
    try:
        found = llama_cpp.llama_model_get_vocab(pointer)
        begins = llama_cpp.llama_vocab_get_add_bos(found)
        ends = tuple(token for token in range(vocabulary.size) if llama_cpp.llama_vocab_is_eog(found, token))
        return Spoken(tokenizer, vocabulary, int(llama_cpp.llama_vocab_bos(found)) if begins else None, ends)
    finally:
        llama_cpp.llama_model_free(pointer)
