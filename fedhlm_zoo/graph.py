"""Edit exported ONNX graphs: find the output head, expose the hidden state, store tied tables once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fedhlm.decoding.decoder import HIDDEN_OUTPUT
from fedhlm.errors import ModelError

# A protobuf message ends at 2 GiB; larger weights go to a separate file.
EXTERNAL_ABOVE_BYTES: Final = 1_500_000_000
TIED_HEAD: Final = "tied_head"


class Head(NamedTuple):
    """The matrix product that makes the logits: its node, its input, and its (hidden_size, vocab_size) weight."""

    node: onnx.NodeProto
    hidden: str
    weight: str


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph, with external data beside it if it is too large for one file."""
    path.unlink(missing_ok=True)
    data = path.with_name(f"{path.name}_data")
    data.unlink(missing_ok=True)
    if model.ByteSize() > EXTERNAL_ABOVE_BYTES:
        onnx.save(model, str(path), save_as_external_data=True, location=data.name)
    else:
        onnx.save(model, str(path))


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The graph's constants by name."""
    return {i.name: i for i in model.graph.initializer}


def array_of(tensor: onnx.TensorProto) -> NDArray[Any]:
    """The values of a constant."""
    values: NDArray[Any] = numpy_helper.to_array(tensor)
    return values


def find_head(model: onnx.ModelProto) -> Head:
    """Walk back from ``logits``, over scaling, capping and casts, to the product with the vocabulary matrix.

    Raises:
        ModelError: the logits do not come from one matrix product of a constant.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {i.name for i in model.graph.initializer}
    constants |= {o for n in model.graph.node if n.op_type == "Constant" for o in n.output}
    value = "logits"
    while value in producers:
        node = producers[value]
        inputs = [i for i in node.input if i and i not in constants]
        if node.op_type == "MatMul" and node.input[1] in constants:
            return Head(node, node.input[0], node.input[1])
        if node.op_type == "MatMul" and producers[node.input[1]].op_type == "Transpose":
            return Head(node, node.input[0], node.input[1])
        if len(inputs) != 1:
            break
        value = inputs[0]
    raise ModelError("the exported graph has no output head: logits should come from a product with a constant matrix")


def expose_hidden(model: onnx.ModelProto) -> None:
    """Give the graph an output ``hidden``, the input of its output head: (batch, length, hidden_size)."""
    head = find_head(model)
    width = array_of(initializers(model)[head.weight]).shape[0]
    model.graph.node.append(helper.make_node("Identity", [head.hidden], [HIDDEN_OUTPUT], name="hidden_state"))
    shape = ["batch_size", "sequence_length", width]
    model.graph.output.append(helper.make_tensor_value_info(HIDDEN_OUTPUT, onnx.TensorProto.FLOAT, shape))


def tied_table(model: onnx.ModelProto) -> str | None:
    """Name of the embedding table that equals the transposed head weight, if the source model ties the two."""
    constants = initializers(model)
    weight = find_head(model).weight
    if weight not in constants:
        return None
    head = array_of(constants[weight])  # (hidden_size, vocab_size)
    for node in lookups(model):
        table = array_of(constants[node.input[0]])
        if table.shape == head.shape[::-1] and np.array_equal(table, head.T):
            return str(node.input[0])
    return None


def lookups(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes that look up rows in a constant table of floats."""
    constants = initializers(model)
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in constants and len(constants[node.input[0]].dims) == 2:
            yield node


def by_rows(model: onnx.ModelProto, name: str) -> bool:
    """Whether a matrix holds one output or entry a row: a table, or a weight (outputs, inputs). Else it is a column."""
    for node in model.graph.node:
        if name in node.input:
            if node.op_type == "Gemm":
                return any(a.name == "transB" and a.i == 1 for a in node.attribute)
            if node.op_type in ("Gather", "Transpose"):
                return True
    return False


def share_tied_head(model: onnx.ModelProto) -> None:
    """Store a tied embedding once: the head reads the table through a Transpose, folded on loading."""
    table = tied_table(model)
    if table is None:
        return
    head = find_head(model)
    insert_before(model, head.node, helper.make_node("Transpose", [table], [TIED_HEAD], name=TIED_HEAD, perm=[1, 0]))
    head.node.input[1] = TIED_HEAD
    drop_unused(model)


def insert_before(model: onnx.ModelProto, anchor: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
    """Insert nodes before `anchor`, so that the graph stays in topological order."""
    at = next(i for i, node in enumerate(model.graph.node) if node is anchor or node == anchor)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(at + offset, node)


def replace(model: onnx.ModelProto, old: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
    """Replace `old` by nodes."""
    insert_before(model, old, *nodes)
    model.graph.node.remove(old)


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove constants that no node reads."""
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [t for t in model.graph.initializer if t.name not in used]:
        model.graph.initializer.remove(tensor)
