"""Write and summarise ``model.json``, the description in every model folder."""

import json
import shutil
from pathlib import Path
from typing import Final

import msgspec

from fedhlm.decoding.chat import chat_of
from fedhlm.decoding.decoder import (
    CHAT_FILES,
    GRAPH_FILE,
    INFO_FILE,
    FileInfo,
    ModelInfo,
    file_digest,
)
from fedhlm.decoding.hub import TOKENIZER_CONFIG_FILE
from fedhlm.decoding.models import backend_of, described
from fedhlm.decoding.vocabulary import TOKENIZER_FILE

GRAPH_DATA_FILE: Final = f"{GRAPH_FILE}_data"


def list_files(folder: Path) -> dict[str, FileInfo]:
    """Size and digest of the model's files in `folder` (graph, external data, tokenizer)."""
    present = [folder / n for n in (GRAPH_FILE, GRAPH_DATA_FILE, TOKENIZER_FILE) if (folder / n).is_file()]
    return {p.name: FileInfo(p.stat().st_size, file_digest(p)) for p in present}


def copy_chat_files(source: Path, target: Path, *, begins: bool = False) -> None:
    """Copy the files that say how a conversation is written, as far as `source` has them.

    Args:
        source: a model folder or a GGUF file, of which the files are made.
        target: a model folder.
        begins: whether a begin-of-text token precedes every text of a GGUF file.

    Raises:
        ModelError: the GGUF file cannot be used.
    """
    if source.is_file():
        chat = chat_of(source)
        config = {"add_bos_token": begins, **({"chat_template": chat.template, **chat.special} if chat else {})}
        (target / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return
    for name in CHAT_FILES:
        if (source / name).is_file() and source != target:
            shutil.copyfile(source / name, target / name)


def write_info(folder: Path, info: ModelInfo) -> ModelInfo:
    """Write ``model.json`` for the files now in `folder`; return what was written."""
    written = msgspec.structs.replace(info, files=list_files(folder))
    (folder / INFO_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(written), indent=2) + b"\n")
    return written


def graph_bytes(info: ModelInfo) -> int:
    """Bytes of the graph with its weights."""
    return sum(f.bytes for name, f in info.files.items() if name != TOKENIZER_FILE)


def summary(model: Path) -> dict[str, str]:
    """Summarise a model, label by label.

    Raises:
        ModelError: it cannot be used.
    """
    info, _ = described(model)
    number_bytes = 2 if backend_of(str(model)) == "llama-cpp" else 4
    return {
        "name": info.name,
        "architecture": info.architecture,
        "parameters": f"{info.parameters / 1e6:.2f} M",
        "quantisation": info.quantisation,
        "vocabulary": str(info.vocab_size),
        "context": f"{info.context} tokens",
        "layers": f"{info.layers} ({info.kv_heads} key/value heads of {info.head_dim}, hidden size {info.hidden_size})",
        "graph": f"{graph_bytes(info) / 1e6:.2f} MB",
        "cache": f"{2 * number_bytes * info.layers * info.kv_heads * info.head_dim} bytes per token",
    }
