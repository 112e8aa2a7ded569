"""Gives an ONNX graph the inputs and the output of a served model, for any number of images.

Many exporters fix the number of images: in the inputs' shapes, or in a Reshape. The ways of `Way` are tried in
turn until one makes the original's images.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ganserve_trainer.importing.looking import Further, Images, Input, Inputs
from ganserve_trainer.importing.onnx_file import integer_constants, nodes_of
from ganserve_trainer.wrap import TO_GREY_LEVELS

_PREFIX = "model/"  # of the original's names, some of which may be those of a served model


class Way(Enum):
    """How the graph makes several images. The value is for the user."""

    AS_IT_IS = ""
    RESHAPES = "each Reshape to a fixed number of images now takes any number"
    ONE_BY_ONE = "the graph works for one image only, and is now repeated for each (Scan)"


def served(model: onnx.ModelProto, inputs: Inputs, images: Images, way: Way) -> onnx.ModelProto:
    """Return a graph with the inputs `latent` and, with classes, `label`, and the output `image`, without a card."""
    if way is Way.RESHAPES:
        model = _with_free_reshapes(model, inputs)
    graph = onnx.compose.add_prefix(model, _PREFIX).graph
    raw = _PREFIX + images.name
    outer = _Nodes("served/")
    if way is Way.ONE_BY_ONE:
        each = _Nodes("each/")
        names = _feed(each, inputs, each.prefix, 1)
        outer.constants = each.constants
        _feed_all(outer, inputs)
        body = helper.make_graph(
            _needed([*each.nodes, *graph.node], raw),
            "one_image",
            [helper.make_tensor_value_info(name, *kind) for name, kind in names.items()],
            [helper.make_tensor_value_info(raw, images.type, None)],
        )
        scanned = [name.removeprefix(each.prefix) for name in names]
        raw = outer.add("Scan", *scanned, body=body, num_scan_inputs=len(scanned))
    else:
        _feed(outer, inputs, "", -1)
        _feed_all(outer, inputs)
        outer.nodes.extend(graph.node)
    _finish(outer, images, raw)
    nodes = _needed(outer.nodes, "image")
    used = _names_used(nodes)
    rewritten = helper.make_graph(
        nodes,
        "generator",
        [
            *(
                helper.make_tensor_value_info(name, kind, ["N", *shape])
                for name, (kind, shape) in _served_inputs(inputs).items()
            ),
            *(helper.make_tensor_value_info(each.served, TensorProto.FLOAT, []) for each in _scalars(inputs)),
        ],
        [
            helper.make_tensor_value_info(
                "image", TensorProto.UINT8, ["N", images.height, images.width, images.channels]
            )
        ],
        [tensor for tensor in (*outer.constants, *graph.initializer) if tensor.name in used],
        sparse_initializer=[each for each in graph.sparse_initializer if each.values.name in used],
    )
    return helper.make_model(
        rewritten, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name=model.producer_name
    )


def _served_inputs(inputs: Inputs) -> dict[str, tuple[int, list[int]]]:
    """Return type and shape, of one image, of each input of the served model that has a row for each image."""
    found: dict[str, tuple[int, list[int]]] = {"latent": (TensorProto.FLOAT, [inputs.latent_dim])}
    if inputs.label is not None:
        found["label"] = (TensorProto.INT64, [])
    for each in inputs.further:
        if each.served and each.input.batched:
            values = inputs.served.values(np.zeros(1, np.int64))[each.served]
            found[each.served] = (TensorProto.FLOAT, list(values.shape[1:]))
    return found


def _scalars(inputs: Inputs) -> list[Further]:
    """Return the inputs that have one value for all images."""
    return [each for each in inputs.further if each.served and not each.input.batched]


class _Nodes:
    """Nodes and constants of a graph, with names of their own."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        output = output or f"{self.prefix}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, values: Any, kind: Any) -> str:
        """Add a constant; return its name."""
        name = f"{self.prefix}constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, kind), name))
        return name


def _feed(nodes: _Nodes, inputs: Inputs, prefix: str, batch: int) -> dict[str, tuple[int, list[int]]]:
    """Add the nodes from a served model's inputs, with this prefix, to the original's; return types and shapes.

    Args:
        nodes: takes the nodes.
        inputs: the original's inputs.
        prefix: of the names of the served model's inputs.
        batch: the first size of the original's inputs; -1 is any.
    """

    def hand_over(name: str, wanted: Input, kind: int) -> None:
        _hand_over(nodes, name, wanted, kind, [batch, *wanted.shape])

    given = {prefix + name: kind for name, kind in _served_inputs(inputs).items()}
    hand_over(prefix + "latent", inputs.latent, TensorProto.FLOAT)
    for each in inputs.further:
        if each.served and each.input.batched:
            hand_over(prefix + each.served, each.input, TensorProto.FLOAT)
    if inputs.label is not None and inputs.one_hot:
        depth, values = nodes.constant(inputs.classes, np.int64), nodes.constant([0, 1], np.float32)
        index = nodes.add("Reshape", prefix + "label", nodes.constant([batch], np.int64))  # OneHot takes no scalar
        hand_over(nodes.add("OneHot", index, depth, values), inputs.label, TensorProto.FLOAT)
    elif inputs.label is not None:
        hand_over(prefix + "label", inputs.label, TensorProto.INT64)
    return given


def _feed_all(nodes: _Nodes, inputs: Inputs) -> None:
    """Add what is the same for all images."""
    for each in inputs.further:
        if isinstance(each.meaning, np.ndarray):
            nodes.add("Identity", nodes.constant(each.meaning, each.meaning.dtype), output=_PREFIX + each.input.name)
        elif not each.input.batched:
            _hand_over(nodes, each.served, each.input, TensorProto.FLOAT, each.input.shape)


def _hand_over(nodes: _Nodes, name: str, wanted: Input, kind: int, shape: Sequence[int]) -> None:
    name = nodes.add("Reshape", name, nodes.constant(shape, np.int64))
    if kind != wanted.type:
        name = nodes.add("Cast", name, to=wanted.type)
    nodes.add("Identity", name, output=_PREFIX + wanted.name)


def _finish(nodes: _Nodes, images: Images, raw: str) -> None:
    """Add the nodes from the original's output to `image`."""
    made = nodes.add("Reshape", raw, nodes.constant([-1, *images.shape], np.int64))
    if images.type != TensorProto.UINT8:
        made = nodes.add("Cast", made, to=TensorProto.FLOAT)
        offset, factor = TO_GREY_LEVELS[images.values]
        if offset:
            made = nodes.add("Add", made, nodes.constant(offset, np.float32))
        if factor != 1:
            made = nodes.add("Mul", made, nodes.constant(factor, np.float32))
        made = nodes.add("Round", made)
        made = nodes.add("Clip", made, nodes.constant(0, np.float32), nodes.constant(255, np.float32))
        made = nodes.add("Cast", made, to=TensorProto.UINT8)
    if images.layout == "NCHW":
        made = nodes.add("Transpose", made, perm=[0, 2, 3, 1])
    nodes.add("Identity", made, output="image")


def _names_used(nodes: list[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes_of(nodes) for name in node.input}


def _needed(nodes: list[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """Return the nodes that an output needs; other outputs' nodes would only make the file larger."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= _names_used([node])
    return kept[::-1]


def _with_free_reshapes(model: onnx.ModelProto, inputs: Inputs) -> onnx.ModelProto:
    """Return a copy in which each Reshape to `inputs.batch` images takes any number of them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    shapes = _shapes(model, inputs)
    constants = integer_constants(graph)
    for index, node in enumerate(graph.node):
        wanted = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        if wanted is None or not len(wanted) or wanted[0] != inputs.batch:
            continue
        rest = shapes.get(node.output[0], wanted.tolist())[1:]
        if all(size > 0 for size in rest):
            name = f"reshape{index}/any"
            graph.initializer.append(numpy_helper.from_array(np.array([-1, *rest], np.int64), name))
            node.input[1] = name
    return copy


def _shapes(model: onnx.ModelProto, inputs: Inputs) -> dict[str, list[int]]:
    """Return the shapes of the graph's values for `inputs.batch` images; 0 is unknown."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for first in value.type.tensor_type.shape.dim[:1]:
            first.dim_value = first.dim_value or inputs.batch
    del fixed.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    return {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in inferred.graph.value_info
    }
