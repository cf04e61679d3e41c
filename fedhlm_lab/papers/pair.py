"""The pair of models of an experiment, as sources of laws and as parts of a fleet."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from fedhlm.decoding.models import LoadedModel, load_model
from fedhlm.decoding.sampling import NOISE
from fedhlm.errors import FedhlmError, ModelError
from fedhlm.peers.context_keys import load_projection
from fedhlm.progress import progress
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import Fingerprint
from fedhlm_lab.papers.experiment import PacedExperiment
from fedhlm_lab.papers.laws import DecoderLaws, LawModel
from fedhlm_lab.sim.pace import measured
from fedhlm_lab.sim.shipped import shipped_pair
from fedhlm_lab.sim.world import Pair
from fedhlm_zoo.shipped import model_folder

Paced = TypeVar("Paced", bound=PacedExperiment)


class LabPair(NamedTuple):
    """Both models, their fingerprints (SLM, LLM), the text of a token, and the pair as a fleet of the simulator has it.

    `fleet` takes the `paces` of the models, a `tally` of the LLM's calls, and its pace by `batches`. `own` says that a
    model is not the shipped one, whose times stand in the experiments' files.
    """

    small: LawModel
    large: LawModel
    fingerprints: tuple[Fingerprint, Fingerprint]
    word: Callable[[int], str]
    fleet: Callable[..., Pair]
    decoder: LoadedModel | None = None
    large_decoder: LoadedModel | None = None
    llm_folder: Path | None = None
    own: bool = False


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
        bool(slm or llm),
    )


def paced(experiment: Paced, pair: LabPair, given: Collection[str] = ()) -> Paced:
    """The experiment with the compute times of the pair on this machine; those in the file are the shipped models'.

    Parameters that are `given` stay.
    """
    if not pair.own or pair.decoder is None or pair.large_decoder is None:
        return experiment
    with progress("measuring steps and blocks"):
        device, large = measured(pair.decoder), measured(pair.large_decoder)
    times = {"device_s": tuple(device), "beside_s": tuple(device), "large_s": tuple(large)}
    return replace(experiment, **{name: pace for name, pace in times.items() if name not in given})


def decoder_of(pair: LabPair) -> LoadedModel:
    """The SLM's decoder, whose tokenizer makes the prompts.

    Raises:
        FedhlmError: the pair has none, because its models are toys.
    """
    if pair.decoder is None:
        raise FedhlmError("prompts must be made by a pair of model folders (got toy models)")
    return pair.decoder
