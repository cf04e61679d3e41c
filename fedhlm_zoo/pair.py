"""Two models made ready to work together: exported and quantised where that is needed, compared, and with a projection.

What is finished in a folder is kept, so a call that was stopped goes on.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import msgspec

from fedhlm.decoding.decoder import INFO_FILE
from fedhlm.decoding.models import backend_of, load_model, tokenizer_at
from fedhlm.errors import ConfigError, FedhlmError, ModelError
from fedhlm.peers.context_keys import DIMS, projection_file
from fedhlm.process.files import replacing
from fedhlm.progress import progress
from fedhlm_zoo.evaluate import RANKS, Agreement, EngineModel, agreement_after
from fedhlm_zoo.projection import fit, write_projection

AGREEMENT_FILE: Final = "agreement.json"
MODELS_FILE: Final = "models.json"
WEIGHTS: Final = (".gguf", ".onnx", ".data", ".safetensors", ".bin")  # suffixes of files with a model's weights
COPIES: Final = 3  # of a model that are in its folder at once while it is exported and quantised


def check_tokenizers(small: Path, large: Path) -> None:
    """Check that the ids of both models mean the same.

    Raises:
        ModelError: they do not, or a model has no tokenizer that can be used.
    """
    ours, theirs = tokenizer_at(small)[1], tokenizer_at(large)[1]
    if ours != theirs:
        raise ModelError(
            f"{small} must have the tokenizer of {large} (got {ours.size} and {theirs.size} ids, or other meanings of "
            "them): name the LLM's in agent.target_tokenizer, or make a draft model with 'fedhlm models distil'"
        )


def check_room(out: Path, *models: Path) -> None:
    """Make the folder `out`, and check that the models to export fit into it.

    Raises:
        ConfigError: they do not, or `out` is no folder that can be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError("--out", str(out), "a folder, or the name of a new one", why=exc.strerror or "") from exc
    folders = [model for model in models if backend_of(str(model)) == "transformers"]
    needed = COPIES * sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    if (free := shutil.disk_usage(out).free) < needed:
        raise ConfigError(
            "--out", str(out), f"a folder with {needed / 1e6:,.0f} MB of free space", why=f"it has {free / 1e6:,.0f} MB"
        )


def check_begun(out: Path, small: Path, large: Path) -> None:
    """Note in the folder `out` which two models it is made of, so that what is finished there is kept for them alone.

    Raises:
        ConfigError: it was begun with other models, or their weights have changed since.
    """
    held = msgspec.json.encode([_weights_of(small), _weights_of(large)])
    path = out / MODELS_FILE
    if path.is_file():
        if path.read_bytes() != held:
            raise ConfigError("--out", str(out), f"a new folder, or one begun with {small} and {large} as they are now")
        return
    with replacing(path) as file:
        file.write(held)


def _weights_of(model: Path) -> list[tuple[str, int, int]]:
    """Path, bytes and time of change in nanoseconds of each file that holds weights of a model."""
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    found = [(str(file.resolve()), file.stat()) for file in files if file.suffix in WEIGHTS]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


def made_ready(model: Path, folder: Path, mode: str, texts: Sequence[str]) -> Path:
    """Export and quantise a Hugging Face folder into `folder`, unless that is done; any other model is taken as it is.

    Raises:
        ModelError: it cannot be exported.
        FedhlmError: `folder` cannot be written.
    """
    if backend_of(str(model)) != "transformers":
        return model
    if (folder / INFO_FILE).is_file():
        return folder
    from fedhlm_zoo.export import export
    from fedhlm_zoo.release import quantised

    try:
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
            whole, made = Path(aside) / "fp32", Path(aside) / "made"
            export(model, whole, name=model.name)
            quantised(whole, made, mode, texts)
            made.rename(folder)
    except OSError as exc:
        raise FedhlmError(f"{folder} cannot be written: {exc.strerror or exc}") from exc
    return folder


def fit_keys(small: Path, texts: Sequence[str]) -> str:
    """Fit the projection of an SLM unless it has one. Return what came of it, in words."""
    if projection_file(small).exists():
        return "was there"
    decoder = load_model(small, drafting=True)
    if decoder.info.hidden_size < DIMS:
        return f"none: the hidden size of {decoder.info.hidden_size} is below {DIMS}"
    encoded = decoder.tokenizer.encode_batch(list(texts), add_special_tokens=False)
    with progress("texts read", len(encoded)) as ended:
        projection = fit(decoder, [[*decoder.info.eos_ids[:1], *e.ids] for e in encoded], ended=ended)
    write_projection(small, projection)
    return f"fitted on {len(encoded)} texts"


def compared(
    small: Path, large: Path, out: Path, prompts: list[list[int]], *, tokens: int, temperature: float
) -> Agreement:
    """Measure how often both models draw the same token, once for a folder `out`, prompts and numbers.

    Raises:
        ModelError: a model cannot be used.
    """
    key = [str(small), str(large), prompts, tokens, temperature, RANKS]
    path = out / AGREEMENT_FILE
    if path.is_file():
        held = msgspec.json.decode(path.read_bytes())
        if held["of"] == key:
            return msgspec.convert(held["figures"], Agreement)
    found = agreement_after(
        EngineModel(small, drafting=True), EngineModel(large), prompts, tokens=tokens, temperature=temperature
    )
    with replacing(path) as file:
        file.write(msgspec.json.encode({"of": key, "figures": found}) + b"\n")
    return found
