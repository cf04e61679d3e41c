"""The models that come with an installation: where they are, and a configuration that names them.

Parts do not look for models: whoever starts a part hands it a folder. An image may carry one of the two, or none.
"""

import dataclasses
from pathlib import Path
from typing import Final, Literal

from msgspec.structs import replace

from fedhlm.config import Loaded
from fedhlm.errors import ModelError

Model = Literal["slm", "llm"]

ARTEFACTS: Final = Path(__file__).with_name("artefacts")


def model_folder(configured: str, shipped: Model) -> Path:
    """The configured model folder, or the shipped one when none is.

    Raises:
        ModelError: nothing is configured and this installation carries no models.
    """
    if configured:
        return Path(configured)
    folder = ARTEFACTS / shipped
    if not folder.is_dir():
        raise ModelError(f"this installation carries no {shipped}: give a model folder made by 'fedhlm models export'")
    return folder


def with_agent_model(loaded: Loaded) -> Loaded:
    """The same settings, with the shipped SLM where `agent.model` is empty.

    Raises:
        ModelError: see `model_folder`.
    """
    agent = replace(loaded.config.agent, model=str(model_folder(loaded.config.agent.model, "slm")))
    return dataclasses.replace(loaded, config=replace(loaded.config, agent=agent))


def with_cloud_model(loaded: Loaded) -> Loaded:
    """The same settings, with the shipped LLM where `cloud.model` is empty.

    Raises:
        ModelError: see `model_folder`.
    """
    cloud = replace(loaded.config.cloud, model=str(model_folder(loaded.config.cloud.model, "llm")))
    return dataclasses.replace(loaded, config=replace(loaded.config, cloud=cloud))
