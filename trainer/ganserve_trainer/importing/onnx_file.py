"""Reads ONNX files: brings the weights inside, raises old opsets, and rejects what no server may run."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ganserve_trainer.errors import TrainerError, one_line
from ganserve_trainer.export.graph import strip_exporter_notes
from ganserve_trainer.importing.source import Arrays, Source, Wishes
from ganserve_trainer.model_file import load_session

_OLDEST_OPSET = 11  # the first with Round, and with Clip's limits as inputs
_MOST_SIZES = 8  # of a shape
_STANDARD_DOMAINS = {"", "ai.onnx"}
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
_OPSET_ADVICE = "export it again with opset 18"


def read_onnx(path: Path, wishes: Wishes) -> Source:
    """Read an ONNX file of any maker.

    Raises:
        TrainerError: the file is damaged, or has operators that no server may run.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's and onnx's errors have no common root
        raise TrainerError(
            f"{path} is not an ONNX file, is truncated, or lacks the files with its weights (external data), which "
            f"must be beside it: {one_line(error)}"
        ) from error
    return source_of(model, wishes)


def source_of(model: onnx.ModelProto, wishes: Wishes) -> Source:
    """Prepare a graph, and open it.

    Raises:
        TrainerError: onnxruntime cannot open it, or it has operators that no server may run.
    """
    maker = f"{model.producer_name} {model.producer_version}".strip() or "an unknown program"
    notes = [f"ONNX of {maker}, opset {_opset(model)}"]
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in weights]  # old files repeat the weights there
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 8)
    _check_operators(model)
    if _opset(model) < _OLDEST_OPSET:
        model = _raised(model)
        notes.append(f"raised to opset {_OLDEST_OPSET}")
    strip_exporter_notes(model)
    try:
        session = load_session(model.SerializeToString(), quiet=True)
    except Exception as error:  # onnxruntime's exceptions have no common root
        raise TrainerError(f"onnxruntime cannot open the model: {one_line(error)}; {_OPSET_ADVICE}") from error
    names = [each.name for each in model.graph.output]

    def run(feeds: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, feeds), strict=True))

    parameters = sum(
        numpy_helper.to_array(tensor).size
        for tensor in model.graph.initializer
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    )
    return Source(model, run, wishes, parameters, tuple(notes))


def nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes and those of their inner graphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from nodes_of(graph.node)


def integer_constants(graph: onnx.GraphProto) -> dict[str, NDArray[np.int64]]:
    """Return the small int64 constants of a graph by name, which may be shapes or numbers of classes."""
    found = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT64 and math.prod(tensor.dims) <= _MOST_SIZES
    }
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            if node.attribute[0].t.data_type == onnx.TensorProto.INT64:
                found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Constant" and node.attribute[0].name in ("value_int", "value_ints"):
            found[node.output[0]] = np.array(helper.get_attribute_value(node.attribute[0]), np.int64)
    return found


def _opset(model: onnx.ModelProto) -> int:
    return max((each.version for each in model.opset_import if each.domain in _STANDARD_DOMAINS), default=0)


def _check_operators(model: onnx.ModelProto) -> None:
    for node in nodes_of(model.graph.node):
        if node.domain not in _STANDARD_DOMAINS:
            raise TrainerError(
                f"the model uses {node.op_type} of the domain {node.domain!r}; a server runs standard ONNX operators "
                "only: export it again without onnxruntime's optimiser and without custom operators"
            )
        if node.op_type in _RANDOM:
            raise TrainerError(
                f"the model draws random numbers ({node.op_type} {node.name!r}), so that a seed would not determine "
                "its image: export it again with constant noise (StyleGAN: noise_mode='const') and without dropout"
            )
        training = any(each.name == "training_mode" and each.i for each in node.attribute)
        if node.op_type == "BatchNormalization" and (training or len(node.output) > 1):
            raise TrainerError(
                f"BatchNormalization {node.name!r} is in training mode: it takes means over the batch, so that an "
                "image would depend on the others: export the model again in evaluation mode, after model.eval()"
            )


def _raised(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.version_converter.convert_version(model, _OLDEST_OPSET)
    except Exception as error:  # it raises RuntimeError, and its own
        raise TrainerError(
            f"opset {_opset(model)} cannot be raised to {_OLDEST_OPSET}: {one_line(error)}; {_OPSET_ADVICE}"
        ) from error
