"""Small GGUF files: a random decoder of the llama family with the tokenizer of the shipped models."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedhlm_zoo.shipped import model_folder

ALIGNMENT: Final = 32
WIDTH: Final = 64
HEADS: Final = 4
KV_HEADS: Final = 2
LAYERS: Final = 2
INNER: Final = 96
CONTEXT: Final = 1024
TEMPLATE: Final = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}{% endfor %}{{ eos_token }}"


def shipped_tokenizer() -> Any:
    """The shipped tokenizer.json."""
    return json.loads((model_folder("", "slm") / "tokenizer.json").read_bytes())


def metadata_of_shipped(**others: Any) -> dict[str, Any]:
    """The metadata of a small model with the shipped tokenizer; `others` by key, with two underscores for a dot."""
    document = shipped_tokenizer()
    vocabulary = document["model"]["vocab"] | {t["content"]: t["id"] for t in document["added_tokens"]}
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {t["content"] for t in document["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 0,
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3 if text in special else 1 for text in texts],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    return metadata | {key.replace("__", "."): value for key, value in others.items()}


def tensors_of(rows: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights of a model with `rows` rows in its embedding table."""
    rng = np.random.default_rng(seed)

    def matrix(out: int, into: int) -> NDArray[np.float32]:
        drawn: NDArray[np.float32] = (rng.standard_normal((out, into)) / np.sqrt(into)).astype(np.float32)
        return drawn

    ones = np.ones(WIDTH, np.float32)
    kv = WIDTH // HEADS * KV_HEADS
    tensors = {"token_embd.weight": 3.0 * matrix(rows, WIDTH), "output_norm.weight": ones}
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.{name}.weight": value
            for name, value in {
                "attn_norm": ones,
                "attn_q": matrix(WIDTH, WIDTH),
                "attn_k": matrix(kv, WIDTH),
                "attn_v": matrix(kv, WIDTH),
                "attn_output": matrix(WIDTH, WIDTH),
                "ffn_norm": ones,
                "ffn_gate": matrix(INNER, WIDTH),
                "ffn_up": matrix(INNER, WIDTH),
                "ffn_down": matrix(WIDTH, INNER),
            }.items()
        }
    return tensors


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(value: Any) -> tuple[int, bytes]:
    """The number of a value's type, and its bytes."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _text(value)
    if value and isinstance(value[0], int):  # signed in arrays, as llama.cpp wants the types of tokens
        return 9, struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)
    kinds = [_kind(item) for item in value]
    inner = kinds[0][0] if kinds else 4
    return 9, struct.pack("<IQ", inner, len(kinds)) + b"".join(data for _, data in kinds)


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> Path:
    """Write a file of version 3 with float32 weights."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = _kind(value)
        head += _text(key) + struct.pack("<I", kind) + data
    weights = b""
    for name, array in tensors.items():
        shape = array.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(weights))
        weights += array.tobytes()
        weights += bytes(-len(weights) % ALIGNMENT)
    head += bytes(-len(head) % ALIGNMENT)
    path.write_bytes(head + weights)
    return path


def tiny_gguf(path: Path, **others: Any) -> Path:
    """Write a small random model."""
    metadata = metadata_of_shipped(**others)
    return write_gguf(path, metadata, tensors_of(len(metadata["tokenizer.ggml.tokens"])))
