"""Quantised models stay near the original, get smaller, and keep block invariance where it is promised."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedhlm.decoding.decoder import Decoder, DecoderInput, load_info
from fedhlm.errors import ModelError

onnx = pytest.importorskip("onnx", reason="edits graphs with onnx")
pytest.importorskip("torch", reason="makes its models with torch")

from fedhlm_zoo import tiny  # noqa: E402
from fedhlm_zoo.graph import array_of  # noqa: E402
from fedhlm_zoo.quantise import MODES, quantise, quantise_rows  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

Exported = Callable[[str], tuple[Path, Path]]
IDS = [int(i) for i in np.random.default_rng(8).integers(0, tiny.VOCAB_SIZE, 48)]


def laws(decoder: Decoder, *, block: int) -> NDArray[np.float64]:
    """Log-laws of IDS, computed `block` tokens at a time; (48, V)."""
    cache, rows = decoder.empty_cache(), []
    for begin in range(0, len(IDS), block):
        result = decoder.forward([DecoderInput(cache, IDS[begin : begin + block])])[0]
        cache = result.cache
        rows.append(result.logits)
    logits = np.concatenate(rows).astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    return np.asarray(logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True)))


def weight_bytes(folder: Path) -> int:
    return sum(array_of(t).nbytes for t in onnx.load(str(folder / "model.onnx")).graph.initializer)


def total_variation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(0.5 * np.abs(np.exp(a) - np.exp(b)).sum(axis=1).mean())


# Mean total variation to fp32, and weight bytes relative to fp32 with the tied table stored once.
LIMITS = {"int8-dynamic": (0.08, 0.4), "weights-int8": (0.04, 0.36), "weights-fp16": (0.004, 0.52)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", sorted(tiny.ARCHITECTURES))
def test_a_quantised_model_is_smaller_and_near(exported: Exported, tmp_path: Path, kind: str, mode: str) -> None:
    folder = exported(kind)[1]
    done = quantise(folder, tmp_path / "out", mode)
    assert load_info(tmp_path / "out") == done.info
    assert done.info.quantisation == mode
    distance_limit, size_limit = LIMITS[mode]
    assert weight_bytes(tmp_path / "out") <= size_limit * weight_bytes(folder)
    near = laws(Decoder.load(tmp_path / "out"), block=48)
    distance = total_variation(near, laws(Decoder.load(folder), block=48))
    assert 0 < distance < distance_limit


@pytest.mark.parametrize("mode", ["weights-int8", "weights-fp16"])
def test_compact_weights_keep_block_invariance(exported: Exported, tmp_path: Path, mode: str) -> None:
    quantise(exported("llama")[1], tmp_path / "out", mode)
    decoder = Decoder.load(tmp_path / "out")
    together = laws(decoder, block=48)
    for block in (1, 8):
        assert np.abs(laws(decoder, block=block) - together).max() < 1e-4


def test_the_hidden_state_survives_quantisation(exported: Exported, tmp_path: Path) -> None:
    folder = exported("llama")[1]
    plain = Decoder.load(folder)
    expected = plain.forward([DecoderInput(plain.empty_cache(), IDS)])[0].hidden
    for mode in MODES:
        quantise(folder, tmp_path / mode, mode)
        decoder = Decoder.load(tmp_path / mode)
        hidden = decoder.forward([DecoderInput(decoder.empty_cache(), IDS)])[0].hidden
        assert hidden is not None
        assert expected is not None
        cosine = (hidden * expected).sum() / np.linalg.norm(hidden) / np.linalg.norm(expected)
        assert cosine > 0.99


def test_rows_are_rounded_to_the_nearest_step() -> None:
    weight = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    weight[3] = 0.0
    values, scales = quantise_rows(weight, 127)
    assert np.abs(values * scales - weight).max() <= scales.max() / 2 * 1.0001
    assert np.abs(values[[i for i in range(20) if i != 3]]).max(axis=1).tolist() == [127] * 19
    assert not values[3].any()


def test_unusable_requests_are_refused(exported: Exported, tmp_path: Path) -> None:
    folder = exported("llama")[1]
    with pytest.raises(ModelError, match="must be one of int8-dynamic.*'int3'"):
        quantise(folder, tmp_path / "out", "int3")
    with pytest.raises(ModelError, match="must be another folder"):
        quantise(folder, folder, "weights-fp16")
    quantise(folder, tmp_path / "half", "weights-fp16")
    with pytest.raises(ModelError, match="must be fp32 .*'weights-fp16'"):
        quantise(tmp_path / "half", tmp_path / "out", "weights-int8")
    with pytest.raises(ModelError, match="does not exist"):
        quantise(tmp_path / "nowhere", tmp_path / "out", "weights-int8")
