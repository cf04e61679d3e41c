"""Find the large model of a recording by its fingerprint, and call it synchronously."""

from functools import lru_cache
from pathlib import Path

from cloud_verifier.backends.in_process import engine_of
from cloud_verifier.wiring import LargeModel
from fedhlm.decoding.models import load_model
from fedhlm.errors import ModelError
from fedhlm_zoo.shipped import model_folder


def large_model(folder: Path | None = None) -> LargeModel | None:
    """Load the model of `folder`, or the shipped one; None if nothing is shipped or its libraries are absent.

    Raises:
        ModelError: `folder` is given and cannot be used.
    """
    try:
        return _loaded(folder or model_folder("", "llm"))
    except (ModelError, ModuleNotFoundError):
        if folder is not None:
            raise
        return None


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> LargeModel:
    decoder = load_model(folder, threads=0)
    return LargeModel.of(decoder, engine_of(decoder))
