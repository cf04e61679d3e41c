"""Models as a user names them: a folder, a GGUF file, a packaged model, or the id of one on the Hugging Face hub."""

import re
from pathlib import Path
from typing import Final

from fedhlm.errors import ModelError
from fedhlm.progress import progress
from fedhlm_zoo.fetching import PACKAGED, fetch

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED: Final = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def local_model(name: str) -> Path:
    """The folder or file of a model, which is fetched if it is a packaged one or one of the hub.

    Raises:
        ModelError: there is no such model, or the hub does not give it.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in PACKAGED:
        return fetch(name)[0]
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "~")) or path.suffix.lower() == ".gguf":
        known = ", ".join(sorted(PACKAGED))
        raise ModelError(f"model must be a folder, a GGUF file, a hub id or one of {known} (got {name!r})")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as exc:
        raise ModelError(f"model {name!r} of the hub needs the extra: pip install 'fedhlm[models]'") from exc
    try:
        with progress(f"fetching {name}"):
            return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except (OSError, ValueError) as exc:
        reason = str(exc).strip().splitlines()[0]
        raise ModelError(f"model {name!r} is no local path, and cannot be fetched from the hub: {reason}") from exc
