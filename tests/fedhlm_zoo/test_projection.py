"""A fitted projection whitens the hidden states it was fitted on, and is part of the model folder it was written to."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedhlm.decoding.decoder import Decoder, DecoderInput, load_info
from fedhlm.errors import ModelError
from fedhlm.peers.context_keys import DIMS, PROJECTION_FILE, Projection, load_projection
from fedhlm_zoo import projection as module
from fedhlm_zoo.projection import EIGENVALUE_FLOOR, fit, main, sequences_of, write_projection
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder


class Fake:
    """Gives every id a hidden state of its own."""

    def __init__(self, hidden: NDArray[np.float32] | None, width: int, context: int = 8) -> None:
        self.info = SimpleNamespace(name="fake", hidden_size=width, context=context)
        self._hidden = hidden

    def empty_cache(self) -> None:
        return None

    def forward(self, requests: list[DecoderInput]) -> list[Any]:
        assert all(len(r.ids) <= self.info.context for r in requests)
        return [SimpleNamespace(hidden=None if self._hidden is None else self._hidden[list(r.ids)]) for r in requests]


def states(rows: int = 400, width: int = 6) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((width, width)) @ np.diag([3.0, 2.0, 1.0, 0.5, 0.25, 0.1])
    return (rng.standard_normal((rows, width)) @ mixing.T + 5.0).astype(np.float32)


def fitted(hidden: NDArray[np.float32] | None, sequences: list[list[int]], dims: int) -> Projection:
    decoder: Any = Fake(hidden, 6 if hidden is None else hidden.shape[1])
    return fit(decoder, sequences, dims=dims)


def in_sequences(rows: int) -> list[list[int]]:
    return [list(range(b, min(rows, b + 8))) for b in range(0, rows, 8)]


def test_the_fitted_space_is_white() -> None:
    hidden = states()
    projection = fitted(hidden, [*in_sequences(len(hidden)), []], 4)
    projected = (hidden.astype(np.float64) - projection.mean) @ projection.matrix
    np.testing.assert_allclose(projected.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(np.cov(projected.T, bias=True), np.eye(4), atol=1e-3)


def test_the_directions_of_largest_variance_are_kept() -> None:
    hidden = states()
    projection = fitted(hidden, in_sequences(len(hidden)), 3)
    directions, _ = np.linalg.qr(projection.matrix.astype(np.float64))
    centred = hidden.astype(np.float64) - hidden.mean(axis=0, dtype=np.float64)
    kept = ((centred @ directions) ** 2).sum() / len(hidden)
    largest = np.sort(np.linalg.eigvalsh(np.cov(centred.T, bias=True)))[-3:].sum()
    assert kept == pytest.approx(largest, rel=1e-5)


def test_directions_without_variance_are_not_blown_up() -> None:
    hidden = states()
    hidden[:, 3:] = 1.0
    projection = fitted(hidden, in_sequences(len(hidden)), 5)
    largest = np.linalg.eigvalsh(np.cov(hidden.T.astype(np.float64), bias=True))[-1]
    scales = np.linalg.norm(projection.matrix, axis=0)
    assert np.isfinite(projection.matrix).all()
    assert scales.max() == pytest.approx(1.0 / np.sqrt(EIGENVALUE_FLOOR * largest), rel=1e-3)


def test_a_fit_does_not_depend_on_how_the_text_is_cut() -> None:
    hidden = states()
    one, two = (fitted(hidden, s, 4) for s in (in_sequences(400), [[i] for i in reversed(range(400))]))
    np.testing.assert_allclose(one.matrix, two.matrix, atol=1e-4)
    np.testing.assert_allclose(one.mean, two.mean, atol=1e-5)


def test_sequences_beyond_the_context_are_cut() -> None:
    hidden = states()
    long = [list(range(b, b + 100)) for b in range(0, 400, 100)]
    np.testing.assert_array_equal(fitted(hidden, long, 4).matrix, fitted(hidden, [ids[:8] for ids in long], 4).matrix)


def test_what_cannot_be_fitted_is_named() -> None:
    for hidden, sequences, dims, message in (
        (None, [[0]], 2, "gives no hidden state"),
        (states(), [[0, 1]], 2, "must be more than 2"),
        (states(), [], 2, "got 0"),
        (states(), [[0, 1]], 7, "must be at least 7"),
        (np.ones((50, 6), np.float32), [[i] for i in range(50)], 2, "all hidden states are equal"),
    ):
        with pytest.raises(ModelError, match=message):
            fitted(hidden, sequences, dims)


@pytest.fixture
def slm(tmp_path: Path) -> Path:
    """A copy of the shipped SLM."""
    folder = tmp_path / "slm"
    shutil.copytree(model_folder("", "slm"), folder)
    return folder


def test_a_written_projection_is_listed_checked_and_loaded(slm: Path) -> None:
    before = load_info(slm)
    projection = Projection.fallback(before.hidden_size)
    entry = write_projection(slm, projection)
    after = load_info(slm)
    assert after.files == {**before.files, PROJECTION_FILE: entry}
    assert load_projection(slm, after.hidden_size).digest == projection.digest
    data = bytearray((slm / PROJECTION_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (slm / PROJECTION_FILE).write_bytes(data)
    with pytest.raises(ModelError, match="has changed"):
        load_info(slm)


def test_the_command_fits_on_a_file_of_items(
    slm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = load_items()
    texts = tmp_path / "items.jsonl"
    texts.write_text("".join(f'{{"title": "{a.title[:9]}", "text": "", "topic": "World"}}\n' for a in shipped[:40]))
    before = load_projection(slm, load_info(slm).hidden_size).digest
    assert main([str(slm), "--texts", str(texts)]) == 0
    assert "fitted on 40 articles" in capsys.readouterr().out
    assert load_projection(slm, load_info(slm).hidden_size).digest != before
    decoder = Decoder.load(slm)
    assert all(ids[0] in decoder.info.eos_ids for ids in sequences_of(decoder, shipped[:3]))
    seen: list[int] = []

    def count(_: Decoder, sequences: list[list[int]], **_options: object) -> Projection:
        seen.append(len(sequences))
        return Projection.fallback(192)

    monkeypatch.setattr(module, "fit", count)
    assert main([str(slm)]) == 0
    assert seen == [200]


def test_the_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_shipped_projection_whitens_news_it_has_not_seen() -> None:
    folder = model_folder("", "slm")
    decoder = Decoder.load(folder)
    projection = load_projection(folder, decoder.info.hidden_size)
    ids = sequences_of(decoder, load_items()[:60])
    hidden = [decoder.forward([DecoderInput(decoder.empty_cache(), i)])[0].hidden for i in ids]
    rows = np.concatenate([h for h in hidden if h is not None])
    spread = np.std((rows - projection.mean) @ projection.matrix, axis=0)
    assert projection.dims == DIMS
    assert 0.5 < spread.min() <= spread.max() < 2.0
