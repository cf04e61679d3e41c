"""The large model beside a recording: found by its fingerprint, called without waiting."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from cloud_verifier.backends.onnx import engine_of
from cloud_verifier.engine import Engine
from fedhlm.decoding.decoder import Decoder
from fedhlm.decoding.sampling import NOISE
from fedhlm.errors import ModelError
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import Fingerprint
from fedhlm_zoo.shipped import model_folder


class Large(NamedTuple):
    """A model that can verify: its engine, and what sessions need to know of it."""

    engine: Engine
    fingerprint: Fingerprint
    eos_ids: frozenset[int]
    context: int


def large_model(folder: Path | None = None) -> Large | None:
    """The model of `folder`, or the shipped one; None where nothing is shipped or its libraries are absent.

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
def _loaded(folder: Path) -> Large:
    decoder = Decoder.load(folder, threads=0)
    info = decoder.info
    fingerprint = fingerprint_of(decoder.tokenizer_digest, info.vocab_size, noise=NOISE, model=info.name)
    return Large(engine_of(decoder), fingerprint, frozenset(info.eos_ids), info.context)
