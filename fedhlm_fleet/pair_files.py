"""Where the pairs are that `fedhlm models pair` made."""

from pathlib import Path
from typing import Final

from fedhlm.errors import ConfigError
from fedhlm_zoo.fetching import models_folder

PAIR_FILE: Final = "pair.toml"


def pair_file(named: str) -> Path:
    """The configuration of a pair: a folder that `fedhlm models pair` wrote, or the name of one among the user's models.

    Raises:
        ConfigError: there is none.
    """
    for folder in (Path(named), models_folder() / named):
        if (folder / PAIR_FILE).is_file():
            return folder / PAIR_FILE
    raise ConfigError("--pair", named, "a folder made by 'fedhlm models pair', or the name of one of yours")


def default_out(llm: str) -> Path:
    """Where a pair of an LLM is put: a folder of its name among the user's models."""
    return models_folder() / Path(llm).stem
