"""The models shipped with an installation: where they are, and settings that name them.

Parts do not search for models: whoever starts a part gives it a folder. An image may carry one of the two models, or
none.
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
    """Return the configured model folder, or the shipped one if none is configured.

    Raises:
        ModelError: nothing is configured and this installation carries no models.
    """
    if configured:
        return Path(configured)
    folder = ARTEFACTS / shipped
    if not folder.is_dir():
        raise ModelError(f"this installation carries no {shipped}: give a model folder made by 'fedhlm models export'")
    return folder


def shipped_draft(llm: str) -> Path | None:
    """The draft model that ships for a packaged LLM (`fedhlm_zoo.fetching`), if there is one."""
    file = ARTEFACTS / f"{llm}-draft" / f"{llm}-draft.gguf"
    return file if file.is_file() else None


def with_agent_model(loaded: Loaded) -> Loaded:
    """The same settings, with the shipped SLM if `agent.model` is empty.

    Raises:
        ModelError: see `model_folder`.
    """
    agent = replace(loaded.config.agent, model=loaded.config.agent.model or str(model_folder("", "slm")))
    return dataclasses.replace(loaded, config=replace(loaded.config, agent=agent))


def with_cloud_model(loaded: Loaded) -> Loaded:
    """The same settings, with the shipped LLM if `cloud.model` is empty, and then the shipped SLM beside it.

    Raises:
        ModelError: see `model_folder`.
    """
    cloud, beside = loaded.config.cloud, ARTEFACTS / "slm"
    if not cloud.model and not cloud.draft_model and beside.is_dir():
        cloud = replace(cloud, draft_model=str(beside))
    cloud = replace(cloud, model=cloud.model or str(model_folder("", "llm")))
    return dataclasses.replace(loaded, config=replace(loaded.config, cloud=cloud))
