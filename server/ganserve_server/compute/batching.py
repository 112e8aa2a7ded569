"""Decides how the images of a batch are computed, so that an image has the same bytes alone and in any batch.

onnxruntime's CPU kernels add the same numbers in another order, or use another approximation, depending on where a
value lies in memory. `tests/server/test_batching.py` compares the operators that generators use; these differ:

- A sum over the channels of [n, channels, height, width], as in PixelNorm, takes another path if n is 1.
- A sum of values that are adjacent in memory, and some functions of single values, process 8 or 16 values at once. If
  the number of values of an image is no multiple of 16, the result depends on the image's place in the batch. With
  several threads, it also depends on where each thread's part begins.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from ganserve_server.compute.inputs import Feeds, images_in

if TYPE_CHECKING:  # importing pydantic takes longer than checking a model
    from ganserve_server.settings import ServerSettings

Compute = Callable[[Feeds], NDArray[np.uint8]]

_VECTOR = 16  # float32 values in the largest vector register, AVX-512's
_SUMS = {"ReduceMean", "ReduceSum"}
_FUNCTIONS = {
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Sin", "Sinh", "Tan"),
    *(
        "Celu",
        "Elu",
        "Gelu",
        "GroupNormalization",
        "InstanceNormalization",
        "Log",
        "LogSoftmax",
        "Mish",
        "Pow",
        "Selu",
        "Softplus",
    ),
}
_LOOPS = {"Loop", "Scan", "SequenceMap"}
# Operators whose time depends on values although their shapes do not: RoiAlign takes as many samples as a box has
# pixels. All others of the standard were looked through up to this opset; a float that is almost 0 costs up to a
# hundred times as much as others, which is bounded.
_UNPREDICTABLE, _OPSET = {"RoiAlign"}, 27
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_KEPT_TYPES = (onnx.TensorProto.INT64, onnx.TensorProto.FLOAT)
_MOST_VALUES = 1024  # of a constant that shape inference needs; larger ones are weights


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a batch on the CPU may have and take."""

    images: int = 64
    memory_bytes: int = 256 << 20  # of one batch; one image may take more
    seconds: float = 6.0  # of one batch; at most half of it for one image on an idle core


def batch_limits(settings: "ServerSettings") -> BatchLimits:
    """Return the limits' part of the settings."""
    return BatchLimits(settings.max_batch_size, settings.batch_memory_mib << 20, settings.batch_timeout_s)


class Batching(Enum):
    """How a batch is computed. The value is what the log says."""

    TOGETHER = "together"
    PAIRS = "together, a lone image as two"
    SINGLES = "one by one"

    def run(self, compute: Compute, feeds: Feeds) -> NDArray[np.uint8]:
        """Compute the images of a batch: [n, height, width, channels]."""
        if self is Batching.TOGETHER:
            return compute(feeds)
        count = images_in(feeds)
        if self is Batching.SINGLES:
            if count == 1:
                return compute(feeds)
            rows = range(count)
            return np.concatenate(
                [compute({name: each[row : row + 1] for name, each in feeds.items()}) for row in rows]
            )
        if count > 1:
            return compute(feeds)
        return compute({name: each.repeat(2, axis=0) for name, each in feeds.items()})[:1]

    @property
    def stricter(self) -> "Batching | None":
        """The next way to compute a batch that depends less on the other images; None if there is none."""
        ways = list(Batching)
        return ways[ways.index(self) + 1] if self is not ways[-1] else None

    def padding(self, count: int) -> int:
        """Return how many images are made and discarded in a batch of `count`."""
        return int(self is Batching.PAIRS and count == 1)


class Decision(NamedTuple):
    """How to compute a batch, and why."""

    batching: Batching
    batching_operator: str  # the first operator that needs this; empty: none needs anything
    one_thread_operator: str  # the first operator whose bytes differ with several threads; empty: none


def batching_of(model: onnx.ModelProto) -> Decision:
    """Decide by the operators of a model and the shapes of their inputs."""
    values = _Values(model)
    chosen, operator, one_thread = Batching.TOGETHER, "", ""
    for node, outermost in nodes_in(model):
        if node.op_type not in _SUMS | _FUNCTIONS or (outermost and not values.depends(node)):
            continue
        if node.op_type == "Pow" and values.is_square(node.input[1]):
            continue  # a product, which is rounded in one way only
        if not outermost:
            return Decision(Batching.SINGLES, f"{node.op_type} in a function or a branch", node.op_type)
        batching, exact = (_of_sum if node.op_type in _SUMS else _of_function)(values, node)
        one_thread = one_thread or ("" if exact else node.op_type)
        if batching is not Batching.TOGETHER and chosen is not batching and chosen is not Batching.SINGLES:
            chosen, operator = batching, node.op_type
    return Decision(chosen, operator, one_thread)


def has_loops(model: onnx.ModelProto) -> bool:
    """Return whether a model may run a node any number of times."""
    return any(node.op_type in _LOOPS for node, _ in nodes_in(model))


class Shapes:
    """Finds out whether the time of a batch depends on the values of its inputs, of a model whose weights are gone."""

    def __init__(self, model: onnx.ModelProto) -> None:
        control = any(attribute.type in _GRAPHS for node in model.graph.node for attribute in node.attribute)
        unpredictable = any(node.op_type in _UNPREDICTABLE for node in model.graph.node)
        unknown = control or unpredictable or model.functions or model.graph.sparse_initializer
        self._may_be = not unknown and max((each.version for each in model.opset_import), default=0) <= _OPSET
        self._light = light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        if not self._may_be:
            return
        # Without the shapes that the file states for values in between, which may be wrong.
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in weights]
        light.graph.name = "light"
        light.graph.input.extend(inputs)
        self._inputs = list(light.graph.input)
        for tensor in model.graph.initializer:
            self._add(tensor, tensor.name)
        for node in model.graph.node:
            value = node.attribute[0] if node.op_type == "Constant" and node.attribute else None
            if value is not None and value.name == "value" and math.prod(value.t.dims) > _MOST_VALUES:
                self._add(value.t, node.output[0])
            else:
                light.graph.node.append(node)
        for output in model.graph.output:
            kind = output.type.tensor_type.elem_type
            light.graph.output.append(onnx.helper.make_tensor_value_info(output.name, kind, None))

    def _add(self, tensor: onnx.TensorProto, name: str) -> None:
        """Add a constant: its values if it is small, which shapes may depend on, and else its shape."""
        if math.prod(tensor.dims) <= _MOST_VALUES:
            self._light.graph.initializer.add().CopyFrom(tensor)
            self._light.graph.initializer[-1].name = name
        else:
            self._light.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))

    def predictable_images(self, most: int) -> int:
        """Return up to which size, `most` or less, a batch takes a time that does not depend on the values.

        That is so if there is no control flow, and the shapes of all values follow from the number of images. Each
        number is tried, because a shape may depend on values for some numbers of images only.
        """
        count = 0
        while self._may_be and count < most and self._all_known(count + 1):
            count += 1
        return count

    def _all_known(self, count: int) -> bool:
        """Return whether all shapes of a batch follow from the number of images."""
        for value in self._inputs:
            if value.type.tensor_type.shape.dim:
                value.type.tensor_type.shape.dim[0].dim_value = count
        try:
            graph = onnx.shape_inference.infer_shapes(self._light, data_prop=True).graph
        except Exception:  # it has no exception of its own
            return False
        kinds = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
        return all(
            name in kinds
            and kinds[name].HasField("shape")
            and all(each.HasField("dim_value") for each in kinds[name].shape.dim)
            for node in graph.node
            for name in node.output
            if name
        )


def _of_function(values: "_Values", node: onnx.NodeProto) -> tuple[Batching, bool]:
    shape = values.of_images(node.input[0])
    aligned = shape is not None and math.prod(shape) % _VECTOR == 0
    return Batching.TOGETHER if aligned else Batching.SINGLES, False


def _of_sum(values: "_Values", node: onnx.NodeProto) -> tuple[Batching, bool]:
    shape, axes = values.of_images(node.input[0]), values.axes(node)
    if shape is None or axes is None:
        return Batching.SINGLES, False
    rank = len(shape) + 1
    reduced = {axis % rank for axis in axes} or set(range(rank))
    sizes = [(size, axis in reduced) for axis, size in enumerate(shape, 1) if size > 1 or axis not in reduced]
    if not any(is_reduced for _, is_reduced in sizes):
        return Batching.TOGETHER, True
    # The values at the end of each row that are all summed up, or all kept.
    last = math.prod(size for size, _ in itertools.takewhile(lambda each: each[1] is sizes[-1][1], reversed(sizes)))
    aligned = last % _VECTOR == 0
    if sizes[-1][1]:
        return Batching.TOGETHER if aligned else Batching.SINGLES, aligned
    return Batching.PAIRS, aligned


class _Values:
    """What is known of the values of a graph without running it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        light.functions.extend(model.functions)
        graph = light.graph
        graph.name = "light"
        graph.node.extend(model.graph.node)
        graph.input.extend(model.graph.input)
        graph.output.extend(model.graph.output)
        graph.value_info.extend(model.graph.value_info)
        given = {value.name for value in graph.input}
        self._constants: dict[str, NDArray[Any]] = {}
        for tensor in model.graph.initializer:
            if math.prod(tensor.dims) <= _MOST_VALUES:
                graph.initializer.append(tensor)
                if tensor.data_type in _KEPT_TYPES:
                    self._constants[tensor.name] = numpy_helper.to_array(tensor)
            elif tensor.name not in given:
                graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                if node.attribute[0].t.data_type in _KEPT_TYPES:
                    self._constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value_ints":
                self._constants[node.output[0]] = np.array(node.attribute[0].ints, np.int64)
        try:
            graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
        except Exception:  # it has no exception of its own; then no shape is known, which is safe
            graph = light.graph
        self._types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
        weights = {tensor.name for tensor in model.graph.initializer}
        self._of_request = {value.name for value in model.graph.input} - weights
        for node in model.graph.node:  # in topological order
            if any(name in self._of_request for name in node.input) or any(
                attribute.type in _GRAPHS for attribute in node.attribute
            ):
                self._of_request.update(node.output)

    def depends(self, node: onnx.NodeProto) -> bool:
        """Return whether a node's input depends on the request, and is not made of integers."""
        kind = self._types[node.input[0]].elem_type if node.input[0] in self._types else 0
        whole = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
        return node.input[0] in self._of_request and kind not in whole

    def is_square(self, exponent: str) -> bool:
        """Return whether a power with this exponent is a square."""
        found = self._constants.get(exponent)
        return found is not None and found.size == 1 and found.item() == 2

    def of_images(self, name: str) -> list[int] | None:
        """Return a value's shape without its first dimension, the images; None if it is unknown or has no such one."""
        if name not in self._types or not self._types[name].HasField("shape"):
            return None
        dimensions = list(self._types[name].shape.dim)
        others = dimensions[1:]
        if not dimensions or dimensions[0].HasField("dim_value") or not all(one.dim_value > 0 for one in others):
            return None
        return [one.dim_value for one in others]

    def axes(self, node: onnx.NodeProto) -> list[int] | None:
        """Return the axes of a sum, none for all of them; None if they are unknown."""
        if len(node.input) > 1 and node.input[1]:
            found = self._constants.get(node.input[1])
            return None if found is None else [int(axis) for axis in found.reshape(-1)]
        return next((list(each.ints) for each in node.attribute if each.name == "axes"), [])


def nodes_in(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """Yield each node, and whether it is in the outermost graph."""
    for node in model.graph.node:
        yield node, True
        for graph in _graphs(node):
            for inner in _inner(graph.node):
                yield inner, False
    for function in model.functions:
        for node in _inner(function.node):
            yield node, False


def _inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in _graphs(node):
            yield from _inner(graph.node)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs
