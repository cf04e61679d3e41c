"""Where pairs of models are: those that `fedhlm models pair` made, and those of a packaged LLM and its shipped draft."""

from pathlib import Path
from typing import Final

import msgspec

from fedhlm.errors import ConfigError
from fedhlm.process.files import replacing
from fedhlm_zoo.fetching import PACKAGED, fetch, models_folder
from fedhlm_zoo.shipped import shipped_draft

PAIR_FILE: Final = "pair.toml"
SHIPPED_FILE: Final = "shipped.toml"  # of a packaged LLM and its draft; written anew whenever it is asked for


def pair_file(named: str) -> Path:
    """The configuration of a pair: a folder that `fedhlm models pair` wrote, the name of one among the user's models, or
    that of a packaged LLM with a shipped draft, which is fetched.

    Raises:
        ConfigError: there is none.
        FedhlmError: the packaged LLM cannot be fetched.
    """
    for folder in (Path(named), models_folder() / named):
        if (folder / PAIR_FILE).is_file():
            return folder / PAIR_FILE
    draft = shipped_draft(named) if named in PACKAGED else None
    if draft is None:
        ready = ", ".join(name for name in sorted(PACKAGED) if shipped_draft(name))
        expected = "a folder made by 'fedhlm models pair', or the name of one of yours"
        raise ConfigError("--pair", named, f"{expected}, or {ready}" if ready else expected)
    return _shipped_file(named, draft)


def default_out(llm: str) -> Path:
    """Where a pair of an LLM is put: a folder of its name among the user's models."""
    return models_folder() / Path(llm).stem


def models_toml(slm: str, llm: str, preset: str, *, told: str) -> list[str]:
    """The lines of a configuration that names both models and a preset; `told` is its comment."""
    return [
        f"# {told}",
        f"preset = {quoted(preset)}",
        "",
        "[agent]",
        f"model = {quoted(slm)}",
        "",
        "[cloud]",
        f"model = {quoted(llm)}",
        f"draft_model = {quoted(slm)}",
        "",
    ]


def quoted(value: str | int) -> str:
    """A value of TOML."""
    return msgspec.json.encode(value).decode()


def _shipped_file(llm: str, draft: Path) -> Path:
    model, _ = fetch(llm)
    path = default_out(llm) / SHIPPED_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    told = f"{llm} and the draft model that ships for it"
    with replacing(path) as file:
        file.write("\n".join(models_toml(str(draft), str(model), "exact", told=told)).encode())
    return path
