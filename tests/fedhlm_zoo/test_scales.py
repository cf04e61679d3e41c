"""Every number of a matrix that is stored as int8 is near, measured on the scale of its own output. Needs no torch."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from fedhlm.decoding.decoder import ModelInfo

onnx = pytest.importorskip("onnx", reason="edits graphs with onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from fedhlm_zoo.graph import TIED_HEAD, array_of, initializers, save_graph  # noqa: E402
from fedhlm_zoo.info import write_info  # noqa: E402
from fedhlm_zoo.quantise import quantise  # noqa: E402

ENTRIES, WIDTH, INNER = 40, 12, 30
# Whether an output is a row. The table is long and narrow, `up` wide, `down` long, and `gemm` lies transposed.
BY_ROWS: Final = {"table": True, "up": False, "down": False, "gemm": True, "positions": True}
SHAPES: Final = {
    "table": (ENTRIES, WIDTH),
    "up": (WIDTH, INNER),
    "down": (INNER, WIDTH),
    "gemm": (WIDTH, WIDTH),
    "positions": (8, WIDTH),
}


def matrices() -> dict[str, NDArray[np.float32]]:
    """A random matrix of each kind, whose outputs differ a hundredfold in size."""
    rng, made = np.random.default_rng(4), {}
    for name, shape in SHAPES.items():
        weight = rng.normal(size=shape)
        sizes = rng.permutation(np.geomspace(0.01, 1, shape[0 if BY_ROWS[name] else 1]))
        made[name] = (weight * (sizes[:, None] if BY_ROWS[name] else sizes)).astype(np.float32)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with an embedding, an MLP, and a head that is tied to the embedding."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"], name="embedded"),
        helper.make_node("Gather", ["positions", "places"], ["place"], name="place"),
        helper.make_node("Add", ["embedded", "place"], ["first"], name="first"),
        helper.make_node("Gemm", ["first", "gemm"], ["second"], name="gemm_node", transB=1),
        helper.make_node("MatMul", ["second", "up"], ["raised"], name="/mlp/up_proj/MatMul"),
        helper.make_node("Relu", ["raised"], ["kept"], name="relu"),
        helper.make_node("MatMul", ["kept", "down"], ["hidden_state"], name="/mlp/down_proj/MatMul"),
        helper.make_node("Transpose", ["table"], [TIED_HEAD], name=TIED_HEAD, perm=[1, 0]),
        helper.make_node("MatMul", ["hidden_state", TIED_HEAD], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["length"]) for name in ("ids", "places")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["length", ENTRIES])],
        [numpy_helper.from_array(weight, name) for name, weight in matrices().items()],
    )
    made = tmp_path / "fp32"
    made.mkdir()
    save_graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), made / "model.onnx")
    (made / "tokenizer.json").write_text("{}")
    info = ModelInfo(
        name="tiny",
        architecture="none",
        vocab_size=ENTRIES,
        context=8,
        layers=1,
        kv_heads=1,
        head_dim=WIDTH,
        hidden_size=WIDTH,
        eos_ids=(),
        bos_id=None,
        parameters=1,
        quantisation="fp32",
        files={},
    )
    write_info(made, info)
    return made


def logits_of(folder: Path) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.arange(8, dtype=np.int64)
    result: list[Any] = session.run(["logits"], {"ids": ids * 5, "places": ids})
    return np.asarray(result[0])


def stored_matrix(folder: Path, name: str) -> NDArray[np.float32]:
    """The matrix as it was stored, having checked that each number is within half a step of its output's scale."""
    stored, weight = initializers(onnx.load(str(folder / "model.onnx"))), matrices()[name]
    near = array_of(stored[f"{name}_int8"]).astype(np.float32) * array_of(stored[f"{name}_scale"])
    peaks = np.abs(weight).max(axis=1 if BY_ROWS[name] else 0, keepdims=True)
    assert (np.abs(near - weight) <= peaks / 254 * 1.001).all(), name
    return np.asarray(near)


def test_a_number_is_off_by_half_a_step_of_its_own_output_at_most(folder: Path, tmp_path: Path) -> None:
    quantise(folder, tmp_path / "out", "weights-int8")
    near = {name: stored_matrix(tmp_path / "out", name) for name in SHAPES}
    ids = np.arange(8)
    first = near["table"][ids * 5] + near["positions"]
    expected = np.maximum(first @ near["gemm"].T @ near["up"], 0) @ near["down"] @ near["table"].T
    np.testing.assert_allclose(logits_of(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)


def test_so_are_the_matrices_that_int8_dynamic_leaves_to_fp32(folder: Path, tmp_path: Path) -> None:
    quantise(folder, tmp_path / "out", "int8-dynamic")
    for name in ("down", "positions"):
        stored_matrix(tmp_path / "out", name)
    assert np.isfinite(logits_of(tmp_path / "out")).all()
