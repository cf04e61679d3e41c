"""Tiny randomly initialised models of several architectures, to try every command without a download.

They use a byte tokenizer: each byte has its own id after the end-of-text id 0, so any text round-trips.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fedhlm.errors import ConfigError
from fedhlm_zoo.tokenizer import END_OF_TEXT, save_tokenizer

VOCAB_SIZE: Final = 257
PADDED_ROWS: Final = 272  # of the embedding table of a family that pads it, as Qwen2.5 does
CONTEXT: Final = 96


def byte_tokenizer() -> Tokenizer:
    """End-of-text and the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {symbol: i for i, symbol in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def make_tiny(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a two-layer model of one of ARCHITECTURES, with its tokenizer, as a Hugging Face directory.

    Raises:
        ConfigError: unknown `kind`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if kind not in ARCHITECTURES:
        raise ConfigError("kind", kind, f"one of {', '.join(ARCHITECTURES)}")
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(ARCHITECTURES[kind]()).save_pretrained(folder)
    save_tokenizer(byte_tokenizer(), folder)
    return folder


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(tie_word_embeddings=True, num_key_value_heads=4, **_SHAPE, **_IDS)


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(tie_word_embeddings=False, num_key_value_heads=2, **_SHAPE, **_IDS | {"vocab_size": PADDED_ROWS})


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, initializer_range=0.3, **_IDS)


_IDS: Final[dict[str, Any]] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0}
# The wide initial range makes laws far from uniform, so that a wrong mask or position shows in the logits.
_SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}
ARCHITECTURES: Final[dict[str, Callable[[], Any]]] = {"llama": _llama, "gpt2": _gpt2, "qwen2": _qwen2}
