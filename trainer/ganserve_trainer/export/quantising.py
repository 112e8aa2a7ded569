"""Rewrites a generator's graph to compute in int8 (static scales, standard operators only), for CPUs.

Activations become uint8, and weights become int8 with one scale for each output channel. The graph has QuantizeLinear
and DequantizeLinear around each layer, the form that onnxruntime fuses when it loads the file. The scales are
constants, from images of fixed seeds: dynamic quantisation would use one scale for a whole batch, so an image would
depend on the other images in its batch.

The layer that reads the latent stays in fp32, because a caller's own latents may have any magnitude. A transposed
convolution that makes the image also stays in fp32, because its rounding would be visible.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ganserve_trainer.errors import TrainerError

_Feeds = dict[str, NDArray[Any]]


def to_int8(model: onnx.ModelProto, calibration: Iterable[_Feeds]) -> onnx.ModelProto:
    """Return the model with its dense and transposed convolutional layers in int8.

    Args:
        model: a generator as PyTorch exports it, with the shapes of its nodes' outputs.
        calibration: inputs of the model, which determine the scales.

    Raises:
        TrainerError: the model has no such layer besides the first and the last.
    """
    graph = _Graph(model)
    dense = [node for node in graph.nodes("Gemm") if graph.has_constants(node)][1:]
    doubling = [node for node in graph.nodes("ConvTranspose") if graph.doubles(node)]
    if not dense and not doubling:
        raise TrainerError(
            "this model has no layer to compute in int8: int8 is for the dense and the transposed convolutional "
            "layers of mlp and dcgan, except the first and the last one; use --precision fp16 or fp32"
        )
    inputs = [node.input[0] for node in (*dense, *doubling)]
    grown = [relu.output[0] for node in doubling for relu in graph.consumers(node)]
    ranges = _ranges(model, {*inputs, *grown}, calibration)
    for node in dense:
        graph.quantise_dense(node, ranges)
    for node in doubling:
        graph.quantise_doubling(node, ranges)
    graph.shorten_the_end()
    return graph.result()


def _ranges(model: onnx.ModelProto, names: set[str], calibration: Iterable[_Feeds]) -> dict[str, tuple[float, float]]:
    """Run the model; return the smallest and the largest value of each of the named tensors."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    ranges = dict.fromkeys(names, (0.0, 0.0))  # each range includes zero, because padding is zero
    for feeds in calibration:
        for name, values in zip(sorted(names), session.run(sorted(names), feeds), strict=True):
            low, high = ranges[name]
            ranges[name] = min(low, float(values.min())), max(high, float(values.max()))
    return ranges


class _Graph:
    """A model's graph during the rewriting: queries about its nodes, and changes to them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        graph = model.graph
        self._nodes = list(graph.node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._shapes = {
            info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in graph.value_info
        }
        self._quantised: dict[str, str] = {}  # name of a float tensor -> name of its quantised and dequantised form

    def nodes(self, kind: str) -> list[onnx.NodeProto]:
        return [node for node in self._nodes if node.op_type == kind]

    def has_constants(self, node: onnx.NodeProto) -> bool:
        return all(name in self._constants for name in node.input[1:])

    def consumers(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [other for other in self._nodes if node.output[0] in other.input]

    def doubles(self, node: onnx.NodeProto) -> bool:
        """Return whether a node is a transposed convolution of 4x4 pixels that doubles the size, followed by a ReLU."""
        asked = {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [1, 1, 1, 1]}
        given = {entry.name: list(entry.ints) for entry in node.attribute}
        return (
            self.has_constants(node)
            and all(given.get(name) == value for name, value in asked.items())
            and [other.op_type for other in self.consumers(node)] == ["Relu"]
        )

    def quantise_dense(self, node: onnx.NodeProto, ranges: dict[str, tuple[float, float]]) -> None:
        """Replace y = x·Wᵀ + b with its int8 form; y stays float."""
        name, x, weight, bias = node.output[0], node.input[0], self._value(node.input[1]), self._bias(node)
        transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
        before: list[onnx.NodeProto] = []
        inputs = self._layer_inputs(before, name, x, ranges[x], weight if transposed else weight.T, bias)
        self._replace([node], [*before, helper.make_node("Gemm", inputs, [name], name=f"{name}_int8", transB=1)])

    def quantise_doubling(self, node: onnx.NodeProto, ranges: dict[str, tuple[float, float]]) -> None:
        """Replace a transposed convolution and its ReLU with their int8 form.

        ConvTranspose itself can't be quantised. But each 2x2 window of the input determines 2x2 pixels of the output.
        So the node equals a convolution with 2x2 kernels to four times the channels. The channels are then rearranged
        to pixels (channels last, so that whole pixels move), and the outermost pixels, which lie outside the image, are
        cut off.
        """
        name, x, (relu,) = node.output[0], node.input[0], self.consumers(node)
        kernels = self._value(node.input[1])  # [inputs, outputs, 4, 4]
        outputs = kernels.shape[1]
        _, _, height, width = self._shapes[name]
        # A kernel's row is 2·(1 - row in the window) + row in the output's 2x2 block; likewise for its columns.
        windows = kernels.reshape(-1, outputs, 2, 2, 2, 2)[:, :, ::-1, :, ::-1]
        weight = windows.transpose(3, 5, 1, 0, 2, 4).reshape(4 * outputs, -1, 2, 2)
        new: list[onnx.NodeProto] = []
        inputs = self._layer_inputs(new, name, x, ranges[x], weight, np.tile(self._bias(node), 4))
        scale = self._scale(relu.output[0], ranges[relu.output[0]])

        def add(kind: str, *inputs: str, **attributes: Any) -> str:
            made = f"{name}.{len(new)}"
            new.append(helper.make_node(kind, inputs, [made], name=made, **attributes))
            return made

        grown = add("Relu", add("Conv", *inputs, kernel_shape=[2, 2], pads=[1, 1, 1, 1]))
        pixels = add("Transpose", add("QuantizeLinear", grown, *scale), perm=[0, 2, 3, 1])
        rows = self._integers(f"{name}.rows", 0, height // 2 + 1, width // 2 + 1, 2, 2 * outputs)
        laid = add("Transpose", add("Reshape", pixels, rows), perm=[0, 1, 3, 2, 4])
        whole = add("Reshape", laid, self._integers(f"{name}.whole", 0, height + 2, width + 2, outputs))
        first, last = (self._integers(f"{name}.{end}", end, end) for end in (1, -1))
        axes = self._integers(f"{name}.axes", 1, 2)
        inner = add("Transpose", add("Slice", whole, first, last, axes), perm=[0, 3, 1, 2])
        new.append(helper.make_node("DequantizeLinear", [inner, *scale], [relu.output[0]], name=relu.output[0]))
        self._quantised[relu.output[0]] = relu.output[0]
        self._replace([node, relu], new)

    def shorten_the_end(self) -> None:
        """Replace the final scaling, rounding, clipping and cast to uint8 with one QuantizeLinear."""
        makers = {node.output[0]: node for node in self._nodes}
        for cast in self.nodes("Cast"):
            chain = [cast]
            for kind in ("Clip", "Round", "Mul"):
                before = makers.get(chain[0].input[0])
                if before is None or before.op_type != kind:
                    break
                chain.insert(0, before)
            else:
                name, (x, factor) = cast.output[0], chain[0].input
                scale = self._constant(f"{name}_scale", np.float32(1) / self._value(factor).astype(np.float32))
                inputs = [x, scale, self._constant(f"{name}_zero", np.uint8(0))]
                self._replace(chain, [helper.make_node("QuantizeLinear", inputs, [name], name=f"{name}_grey")])

    def result(self) -> onnx.ModelProto:
        """Return the model, without unused constants and shapes."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        used = {name for node in self._nodes for name in node.input}
        made = {name for node in self._nodes for name in node.output}
        for field in ("node", "initializer", "value_info"):
            model.graph.ClearField(field)
        model.graph.node.extend(self._nodes)
        model.graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in used)
        model.graph.value_info.extend(info for info in self._model.graph.value_info if info.name in made)
        return model

    def _layer_inputs(
        self,
        before: list[onnx.NodeProto],
        name: str,
        x: str,
        limits: tuple[float, float],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> list[str]:
        """Add nodes that quantise a layer's input, weights and bias to `before`; return the layer's three inputs.

        The first axis of the weights is that of the output channels.
        """
        scale_names = self._scale(x, limits)
        if x not in self._quantised:
            self._quantised[x] = f"{x}_in_int8"
            before.append(helper.make_node("QuantizeLinear", [x, *scale_names], [f"{x}_uint8"], name=f"{x}_uint8"))
            before.append(
                helper.make_node(
                    "DequantizeLinear", [f"{x}_uint8", *scale_names], [self._quantised[x]], name=self._quantised[x]
                )
            )
        flat = np.abs(weight.reshape(len(weight), -1)).max(1)
        scale = (np.where(flat > 0, flat, 1) / 127).astype(np.float32)
        whole = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
        bias_scale = scale * self._value(scale_names[0])
        parts = {
            "weight": (whole, scale),
            "bias": (np.rint(bias / bias_scale).astype(np.int32), bias_scale.astype(np.float32)),
        }
        inputs = [self._quantised[x]]
        for part, (values, scales) in parts.items():
            own = f"{name}_{part}"
            names = [
                self._constant(f"{own}_values", values),
                self._constant(f"{own}_scale", scales),
                self._constant(f"{own}_zero", np.zeros(len(values), values.dtype)),
            ]
            before.append(helper.make_node("DequantizeLinear", names, [own], name=own, axis=0))
            inputs.append(own)
        return inputs

    def _scale(self, x: str, limits: tuple[float, float]) -> tuple[str, str]:
        """Add the scale and the zero point of a uint8 tensor; return their names."""
        low, high = limits
        step = np.float32((high - low) / 255 or 1)
        return self._constant(f"{x}_scale", step), self._constant(f"{x}_zero", np.uint8(np.rint(-low / step)))

    def _value(self, name: str) -> NDArray[Any]:
        value: NDArray[Any] = numpy_helper.to_array(self._constants[name])
        return value

    def _bias(self, node: onnx.NodeProto) -> NDArray[np.float32]:
        if len(node.input) > 2:
            return self._value(node.input[2])
        weight = self._value(node.input[1])
        return np.zeros(weight.shape[1] if node.op_type == "ConvTranspose" else weight.shape[0], np.float32)

    def _constant(self, name: str, value: Any) -> str:
        self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _integers(self, name: str, *values: int) -> str:
        return self._constant(name, np.array(values, np.int64))

    def _replace(self, old: list[onnx.NodeProto], new: list[onnx.NodeProto]) -> None:
        place = self._nodes.index(old[0])
        self._nodes[place : place + 1] = new
        for node in old[1:]:
            self._nodes.remove(node)
