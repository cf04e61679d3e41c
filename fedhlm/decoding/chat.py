"""How a model writes a conversation: its chat template, and the control tokens that the template knows by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from fedhlm.decoding.decoder import CHAT_TEMPLATE_FILE
from fedhlm.decoding.gguf import SUFFIX, Gguf, read_gguf
from fedhlm.decoding.hub import TOKENIZER_CONFIG_FILE
from fedhlm.errors import ModelError

_NAMED: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class ChatSource(NamedTuple):
    """A Jinja template, and the text of each control token that it knows by name, such as bos_token."""

    template: str
    special: Mapping[str, str]


class TurnIds(NamedTuple):
    """The ids that a template writes around the turns of a conversation: before a user's first turn, between it and the
    answer, and between an answer and the user's next turn."""

    opening: tuple[int, ...]
    answer: tuple[int, ...]
    question: tuple[int, ...]


def chat_of(model: Path) -> ChatSource | None:
    """Read the template of a model folder or a GGUF file; None if it has none.

    Raises:
        ModelError: a file cannot be used.
    """
    return _of_gguf(read_gguf(model)) if model.suffix.lower() == SUFFIX else _of_folder(model)


def _of_folder(folder: Path) -> ChatSource | None:
    path = folder / TOKENIZER_CONFIG_FILE
    try:
        config = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} must be a JSON object (got {exc})") from exc
    alone = folder / CHAT_TEMPLATE_FILE
    source = alone.read_text("utf-8") if alone.exists() else _default_of(config.get("chat_template"))
    if source is None:
        return None
    special = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
    return ChatSource(source, {name: value for name, value in special.items() if value is not None})


def _of_gguf(gguf: Gguf) -> ChatSource | None:
    source = gguf.get("tokenizer.chat_template", str)
    if source is None:
        return None
    texts = gguf.get("tokenizer.ggml.tokens", list, [])
    ids = {name: gguf.get(f"tokenizer.ggml.{key}_token_id", int) for name, key in _NAMED.items()}
    return ChatSource(source, {name: texts[i] for name, i in ids.items() if i is not None and i < len(texts)})


def _default_of(templates: object) -> str | None:
    if isinstance(templates, list):  # several templates by name
        named = {t.get("name"): t.get("template") for t in templates if isinstance(t, dict)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else None


def _content(token: object) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
