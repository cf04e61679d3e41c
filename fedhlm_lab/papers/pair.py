"""The pair of models of an experiment, as sources of laws and as parts of a fleet."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fedhlm.decoding.models import LoadedModel, load_model
from fedhlm.decoding.sampling import NOISE
from fedhlm.errors import FedhlmError, ModelError
from fedhlm.peers.context_keys import load_projection
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import Fingerprint
from fedhlm_lab.papers.laws import DecoderLaws, LawModel
from fedhlm_lab.sim.shipped import shipped_pair
from fedhlm_lab.sim.world import Pair
from fedhlm_zoo.shipped import model_folder


class LabPair(NamedTuple):
    """Both models, their fingerprints (SLM, LLM), the text of a token, and the pair as a fleet of the simulator has it.

    `fleet` takes the `paces` of the models, a `tally` of the LLM's calls, and its pace by `batches`.
    """

    small: LawModel
    large: LawModel
    fingerprints: tuple[Fingerprint, Fingerprint]
    word: Callable[[int], str]
    fleet: Callable[..., Pair]
    decoder: LoadedModel | None = None
    large_decoder: LoadedModel | None = None
    llm_folder: Path | None = None


def folder_pair(slm: str = "", llm: str = "", *, threads: int = 1) -> LabPair:
    """Open two models, each a folder or a GGUF file; empty: the shipped ones.

    Raises:
        ModelError: a model cannot be used, or their tokenizers differ.
    """
    folders: tuple[Path, Path] = (model_folder(slm, "slm"), model_folder(llm, "llm"))
    small, large = (load_model(folder, threads=threads) for folder in folders)
    projection = load_projection(folders[0], small.info.hidden_size)
    prints = [fingerprint_of(*d.vocabulary, noise=NOISE, model=d.info.label) for d in (small, large)]
    if prints[0].tokenizer != prints[1].tokenizer:
        raise ModelError(f"--slm and --llm must have one tokenizer (got {prints[0].model} and {prints[1].model})")
    return LabPair(
        DecoderLaws(small, projection, stepwise=True),
        DecoderLaws(large),
        (prints[0], prints[1]),
        lambda token: str(small.tokenizer.decode([token])),
        partial(shipped_pair, *folders, threads=threads),
        small,
        large,
        folders[1],
    )


def decoder_of(pair: LabPair) -> LoadedModel:
    """The SLM's decoder, whose tokenizer makes the prompts.

    Raises:
        FedhlmError: the pair has none, because its models are toys.
    """
    if pair.decoder is None:
        raise FedhlmError("prompts must be made by a pair of model folders (got toy models)")
    return pair.decoder
