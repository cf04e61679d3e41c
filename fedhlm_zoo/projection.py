"""Fit the projection from a model's last hidden states to context keys: mean and whitening PCA over real text.

``python -m fedhlm_zoo.projection MODEL [--texts FILE.jsonl | --articles N [--data FOLDER]]`` writes the projection
into a model folder and lists it in the folder's ``model.json``, or writes it beside a GGUF file.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.decoder import INFO_FILE, DecoderInput, FileInfo, file_digest, load_info
from fedhlm.decoding.models import LoadedModel, load_model
from fedhlm.errors import FedhlmError, ModelError
from fedhlm.peers.context_keys import DIMS, Projection, projection_file
from fedhlm.progress import progress
from fedhlm_zoo.corpus import Article, load_ag_news
from fedhlm_zoo.evaluate import sample
from fedhlm_zoo.prompts import load_items

log = logging.getLogger(__name__)

# Directions with less variance than this share of the largest are noise, which whitening must not amplify.
EIGENVALUE_FLOOR: Final = 1e-3


def fit(
    decoder: LoadedModel,
    sequences: Iterable[Sequence[int]],
    *,
    dims: int = DIMS,
    ended: Callable[[], object] = lambda: None,
) -> Projection:
    """Mean and whitening matrix of the hidden states at every position of the id sequences.

    They keep the `dims` directions of largest variance, each divided by its standard deviation. Eigenvalues are
    floored at EIGENVALUE_FLOOR of the largest. Sequences longer than the context are cut, empty ones skipped. `ended` is
    called for each.

    Raises:
        ModelError: the graph gives no hidden state, is narrower than `dims`, or there are not more positions than `dims`.
    """
    width = decoder.info.hidden_size
    if width < dims:
        raise ModelError(
            f"hidden size of {decoder.info.name} must be at least {dims} for {dims} dimensions (got {width})"
        )
    count, total, squares = 0, np.zeros(width), np.zeros((width, width))
    for ids in sequences:
        ended()
        if not ids:
            continue
        result = decoder.forward([DecoderInput(decoder.empty_cache(), ids[: decoder.info.context])])[0]
        if result.hidden is None:
            raise ModelError(f"{decoder.info.name} gives no hidden state: export it with 'fedhlm models export'")
        rows = result.hidden.astype(np.float64)  # (ids, width)
        count += len(rows)
        total += rows.sum(axis=0)
        squares += rows.T @ rows
    if count <= dims:
        raise ModelError(f"positions to fit a projection on must be more than {dims} (got {count})")
    mean = total / count  # (width,)
    return Projection(mean.astype(np.float32), _whitening(squares / count - np.outer(mean, mean), dims))


def _whitening(covariance: NDArray[np.float64], dims: int) -> NDArray[np.float32]:
    values, vectors = np.linalg.eigh(covariance)  # ascending
    values, vectors = values[::-1][:dims], vectors[:, ::-1][:, :dims]  # (dims,), (width, dims)
    if not values[0] > 0.0:
        raise ModelError("all hidden states are equal: nothing to fit a projection on")
    # An eigenvector's sign is arbitrary; the largest entry is made positive, so that a fit can be repeated.
    vectors = vectors * np.sign(vectors[np.argmax(np.abs(vectors), axis=0), np.arange(dims)])
    scaled: NDArray[np.float64] = vectors / np.sqrt(np.maximum(values, EIGENVALUE_FLOOR * values[0]))
    return scaled.astype(np.float32)


def sequences_of(decoder: LoadedModel, articles: Sequence[Article]) -> list[list[int]]:
    """Ids of title and text as the model was trained on them, the end-of-text id first."""
    start = list(decoder.info.eos_ids[:1])
    encoded = decoder.tokenizer.encode_batch([a.body for a in articles], add_special_tokens=False)
    return [[*start, *e.ids] for e in encoded]


def write_projection(model: Path, projection: Projection) -> FileInfo:
    """Write the projection of a model, list it in the ``model.json`` of a folder, and return the entry."""
    if model.is_file():
        path = projection.save(model)
        return FileInfo(path.stat().st_size, file_digest(path))
    folder, info = model, load_info(model)
    path = projection.save(folder)
    entry = FileInfo(path.stat().st_size, file_digest(path))
    listed = msgspec.structs.replace(info, files={**info.files, path.name: entry})
    (folder / INFO_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(listed), indent=2) + b"\n")
    return entry


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fedhlm_zoo.projection", description="Fit a model's key space.")
    parser.add_argument("model", type=Path, help="model folder or GGUF file")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--texts", type=Path, help="file of news items; default: the items that ship with the project")
    text.add_argument("--articles", type=int, help="this many titled articles of the AG News train split instead")
    parser.add_argument("--data", type=Path, help="folder with ag_news/")
    given = parser.parse_args(arguments)
    try:
        decoder = load_model(given.model, drafting=True)
        articles: Sequence[Article]
        if given.articles is None:
            articles = load_items(given.texts)
        else:
            articles = sample([a for a in load_ag_news("train", given.data) if a.title], given.articles)
        with progress("texts read", len(articles)) as ended:
            fitted = fit(decoder, sequences_of(decoder, articles), ended=ended)
        entry = write_projection(given.model, fitted)
    except FedhlmError as exc:
        sys.stderr.write(f"{exc}\n")
        return 2
    sys.stdout.write(f"{projection_file(given.model)}: {entry.bytes} bytes, fitted on {len(articles)} articles\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
