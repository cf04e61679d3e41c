"""Quantise a model folder: int8 arithmetic for the SLM, compact weights with fp32 arithmetic for the LLM.

Every mode stores a tied embedding once. Only ``int8-dynamic`` makes logits depend on how tokens are cut into blocks,
because its activation scale covers all tokens of a call.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fedhlm.decoding.decoder import GRAPH_FILE, INFO_FILE, ModelInfo, load_info
from fedhlm.decoding.vocabulary import TOKENIZER_FILE
from fedhlm.errors import ModelError
from fedhlm.progress import progress
from fedhlm_zoo import graph
from fedhlm_zoo.info import copy_chat_files, graph_bytes, write_info

Mode = Literal["int8-dynamic", "weights-int8", "weights-fp16"]
MODES: Final[tuple[str, ...]] = get_args(Mode)
# Seven bits: on x86 without VNNI the sum of two u8 x s8 products must fit 16 bits.
DYNAMIC_LEVELS: Final = 63
LEVELS: Final = 127
# The input of an MLP's last product has outliers that one scale for all channels cannot hold. Quantising it costs a
# trained 2.6 M model three points of agreement with itself, more than all other products together.
WIDE_RANGE: Final = ("mlp/down_proj", "mlp/c_proj", "mlp/fc2", "mlp/fc_out", "dense_4h_to_h")

# From a matrix, its name, and whether its rows are its outputs or entries (`graph.by_rows`): constants that store it,
# and the nodes that rebuild it under its own name.
Rebuild = Callable[[NDArray[Any], str, bool], tuple[dict[str, NDArray[Any]], list[onnx.NodeProto]]]


class Quantised(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a quantisation; sizes are those of graph and weights."""

    mode: str
    before_bytes: int
    after_bytes: int
    info: ModelInfo


def quantise(folder: Path, out: Path, mode: str) -> Quantised:
    """Quantise the fp32 model in `folder` into ``out/``.

    Args:
        folder: a model folder made by `fedhlm_zoo.export`.
        out: another folder; made when absent.
        mode: ``int8-dynamic`` (int8 products, activations quantised at run time;
            embeddings and the last product of each MLP as in ``weights-int8``), ``weights-int8`` (weights stored
            as int8 with a scale per output of a product and per entry of a table, computed in fp32),
            ``weights-fp16`` (weights stored as fp16).

    Raises:
        ModelError: unknown mode, `folder` is no fp32 model folder, or `out` is `folder`.
    """
    if mode not in MODES:
        raise ModelError(f"quantisation mode must be one of {', '.join(MODES)} (got {mode!r})")
    info = load_info(folder)
    if info.quantisation != "fp32":
        raise ModelError(f"quantisation in {folder / INFO_FILE} must be fp32 (got {info.quantisation!r})")
    if out.resolve() == folder.resolve():
        raise ModelError(f"target must be another folder than the source (got {str(out)!r} for both)")
    with progress(f"quantising {folder}"):
        model = _MODES[mode](onnx.load(str(folder / GRAPH_FILE)))
        out.mkdir(parents=True, exist_ok=True)
        graph.save_graph(model, out / GRAPH_FILE)
    shutil.copyfile(folder / TOKENIZER_FILE, out / TOKENIZER_FILE)
    copy_chat_files(folder, out)
    written = write_info(out, msgspec.structs.replace(info, quantisation=mode))
    return Quantised(mode=mode, before_bytes=graph_bytes(info), after_bytes=graph_bytes(written), info=written)


def _dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    tied = _tied_table(model)
    excluded = [n.name for n in model.graph.node if any(part in n.name for part in WIDE_RANGE)]
    if tied:
        excluded.append(graph.find_head(model).node.name)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        graph.save_graph(model, source)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            extra_options={"MatMulConstBOnly": True},
        )
        quantised = onnx.load(str(target))
    del quantised.graph.value_info[:]  # inferred types, which the shared table makes wrong
    if tied:
        _share_int8_table(quantised, tied)
    return _compact(_as_int8)(quantised)


def _tied_table(model: onnx.ModelProto) -> str | None:
    return next((str(n.input[0]) for n in model.graph.node if n.name == graph.TIED_HEAD), None)


def _share_int8_table(model: onnx.ModelProto, table: str) -> None:
    """Let the embedding and the head of a tied model read one int8 table with a scale per vocabulary entry."""
    values, scales = quantise_rows(graph.array_of(graph.initializers(model)[table]), DYNAMIC_LEVELS)
    model.graph.initializer.append(numpy_helper.from_array(values, "table_int8"))
    model.graph.initializer.append(numpy_helper.from_array(scales, "table_scale"))  # (vocab_size, 1)
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(scales[:, 0]), "head_scale"))
    for node in [n for n in graph.lookups(model) if n.input[0] == table]:
        ids, result = node.input[1], node.output[0]
        graph.replace(
            model,
            node,
            helper.make_node("Gather", ["table_int8", ids], ["row_int8"], name="table_rows"),
            helper.make_node("Cast", ["row_int8"], ["row_float"], name="table_cast", to=onnx.TensorProto.FLOAT),
            helper.make_node("Gather", ["table_scale", ids], ["row_scale"], name="table_scales"),
            helper.make_node("Mul", ["row_float", "row_scale"], [result], name="table_mul"),
        )
    head = graph.find_head(model)
    transpose = next(n for n in model.graph.node if n.name == graph.TIED_HEAD)
    transpose.input[0] = "table_int8"
    quantised = ["hidden_int8", "hidden_scale", "hidden_zero"]
    graph.replace(
        model,
        head.node,
        helper.make_node("DynamicQuantizeLinear", [head.hidden], quantised, name="head_quantise"),
        helper.make_node(
            "MatMulInteger", ["hidden_int8", head.weight, "hidden_zero"], ["logits_int32"], name="head_product"
        ),
        helper.make_node("Cast", ["logits_int32"], ["logits_unscaled"], name="head_cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["hidden_scale", "head_scale"], ["logits_scale"], name="head_scale_product"),
        helper.make_node("Mul", ["logits_unscaled", "logits_scale"], [head.node.output[0]], name="head_scaled"),
    )
    graph.drop_unused(model)


def quantise_rows(weight: NDArray[Any], levels: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round each row of `weight` (rows, columns) to `levels` steps on either side of zero.

    Returns:
        int8 values (rows, columns) and scales (rows, 1) float32; their product is near `weight`.
    """
    peak = np.abs(weight).max(axis=1, keepdims=True)
    scales = (np.where(peak > 0, peak, 1.0) / levels).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def _compact(rebuild: Rebuild) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """A mode that stores every matrix compactly, with nodes that rebuild it in fp32.

    The nodes read constants only, so onnxruntime folds them once on loading. The products then run in fp32, as fast
    and as block-invariant as before.
    """

    def run(model: onnx.ModelProto) -> onnx.ModelProto:
        for tensor in list(model.graph.initializer):
            if len(tensor.dims) != 2 or tensor.data_type != onnx.TensorProto.FLOAT or 1 in tensor.dims:
                continue
            constants, nodes = rebuild(graph.array_of(tensor), tensor.name, graph.by_rows(model, tensor.name))
            model.graph.initializer.remove(tensor)
            model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
            for node in reversed(nodes):
                model.graph.node.insert(0, node)
        return model

    return run


def _as_fp16(weight: NDArray[Any], name: str, _: bool) -> tuple[dict[str, NDArray[Any]], list[onnx.NodeProto]]:
    node = helper.make_node("Cast", [f"{name}_fp16"], [name], name=f"{name}_cast", to=onnx.TensorProto.FLOAT)
    return {f"{name}_fp16": weight.astype(np.float16)}, [node]


def _as_int8(weight: NDArray[Any], name: str, by_rows: bool) -> tuple[dict[str, NDArray[Any]], list[onnx.NodeProto]]:
    values, scales = quantise_rows(weight if by_rows else weight.T, LEVELS)
    constants: dict[str, NDArray[Any]] = {
        f"{name}_int8": values if by_rows else np.ascontiguousarray(values.T),
        f"{name}_scale": scales if by_rows else np.ascontiguousarray(scales.T),
    }
    cast = helper.make_node(
        "Cast", [f"{name}_int8"], [f"{name}_unscaled"], name=f"{name}_cast", to=onnx.TensorProto.FLOAT
    )
    return constants, [cast, helper.make_node("Mul", [f"{name}_unscaled", f"{name}_scale"], [name], name=f"{name}_mul")]


_MODES: Final[dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]]] = {
    "int8-dynamic": _dynamic,
    "weights-int8": _compact(_as_int8),
    "weights-fp16": _compact(_as_fp16),
}
