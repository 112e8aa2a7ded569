"""Finds out what a generator's inputs and output mean: by names, types, shapes, and by the images that it makes.

Whatever `Wishes` sets is not guessed. The generator runs with one image at a time, or with as many as its file fixes,
because a file may be right for no other number.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.importing.onnx_file import integer_constants, nodes_of
from ganserve_trainer.importing.source import Arrays, Layout, Source, Wishes, numpy_type, one_line
from ganserve_trainer.model_file import CARD_KEY, latents
from ganserve_trainer.wrap import ValueRange, to_bytes

SAMPLES = 16
_LABEL = re.compile(r"label|class|cond|target|categor|one_?hot|^[cy]$|[_.][cy]$", re.IGNORECASE)
_IMAGE = re.compile(r"image|img|rgb|sample|fake", re.IGNORECASE)
LARGEST_LATENT = 8192
_MOST_CLASSES = 1 << 15
_INTEGERS = {onnx.TensorProto.INT32, onnx.TensorProto.INT64}
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
WRAPPER_ADVICE = "docs/bring-a-generator.md shows how to wrap such a generator"


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the graph."""

    name: str
    type: int  # ONNX's
    shape: tuple[int, ...]  # of one image

    def values(self, rows: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return rows as this input takes them: [n, *shape]."""
        return rows.reshape(len(rows), *self.shape).astype(numpy_type(self.type))

    def __str__(self) -> str:
        sizes = ", ".join(map(str, ("N", *self.shape)))
        return f"{self.name!r}, {numpy_type(self.type)} [{sizes}]"


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs that a seed and a label determine."""

    latent: Input
    label: Input | None
    classes: int  # 0: there is no label
    one_hot: bool
    batch: int  # how many images the original makes at once

    @property
    def latent_dim(self) -> int:
        """The number of values in a latent."""
        return math.prod(self.latent.shape)

    def run(self, source: Source, latent: NDArray[np.float32], label: NDArray[np.int64]) -> Arrays:
        """Run the original, `batch` images at a time; return its outputs, [n, ...] each.

        Args:
            source: the original.
            latent: [n, latent_dim].
            label: [n]; not used without classes.

        Raises:
            TrainerError: it fails.
        """
        feeds = {self.latent.name: self.latent.values(latent)}
        if self.label is not None:
            feeds[self.label.name] = self.label.values(np.eye(self.classes)[label] if self.one_hot else label)
        made: list[Arrays] = []
        for start in range(0, len(latent), self.batch):
            # The last batch is filled with its last image.
            rows = np.minimum(np.arange(start, start + self.batch), len(latent) - 1)
            try:
                made.append(source.run({name: values[rows] for name, values in feeds.items()}))
            except Exception as error:  # onnxruntime's and torch's exceptions have no common root
                raise TrainerError(f"the generator fails when it runs: {one_line(error)}") from error
        names = [name for name, values in made[0].items() if values.shape[:1] == (self.batch,)]
        return {name: np.concatenate([each[name] for each in made])[: len(latent)] for name in names}


@dataclass(frozen=True, slots=True)
class Images:
    """What an output of the graph means."""

    name: str
    type: int  # ONNX's
    layout: Layout
    height: int
    width: int
    channels: int
    values: ValueRange = "byte"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image in its layout."""
        sizes = (self.height, self.width)
        return (self.channels, *sizes) if self.layout == "NCHW" else (*sizes, self.channels)

    def pixels(self, raw: NDArray[np.generic]) -> NDArray[np.uint8]:
        """Return the images of an output as they will be served: uint8 [n, height, width, channels]."""
        images = torch.from_numpy(np.ascontiguousarray(raw, np.float32).reshape(len(raw), *self.shape))
        pixels: NDArray[np.uint8] = to_bytes(images, self.values).numpy()
        return pixels.transpose(0, 2, 3, 1) if self.layout == "NCHW" else pixels


def sample(inputs: Inputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the latents and the labels of the images that an import looks at, [n, latent_dim] and [n]."""
    seeds = np.arange(SAMPLES)
    return latents(seeds, inputs.latent_dim), seeds % max(1, inputs.classes)


def look_at_inputs(source: Source) -> Inputs:
    """Find the latent and the label.

    Raises:
        TrainerError: an input is neither, or something cannot be guessed.
    """
    wishes = source.wishes
    latent_value, label_value = _choose_inputs(source.model.graph, wishes)
    latent_type, (batch, *latent_sizes) = _type_and_sizes(latent_value)
    if latent_type not in _FLOATS:
        raise TrainerError(f"the latent {latent_value.name!r} is {numpy_type(latent_type)}; it must be a float input")
    label, classes = None, 0
    if label_value is not None:
        label_type, (label_batch, *label_sizes) = _type_and_sizes(label_value)
        batch = batch or label_batch
        if None in label_sizes and wishes.class_names and label_sizes.count(None) == 1:
            known = math.prod(size for size in label_sizes if size)
            label_sizes = [size or len(wishes.class_names) // known for size in label_sizes]
        if None in label_sizes:
            raise TrainerError("the number of classes is not in the file; add --classes, their names or their number")
        label = Input(label_value.name, label_type, tuple(size or 0 for size in label_sizes))
        classes = math.prod(label.shape)
    one_hot = classes > 1
    shapes = list(_latent_shapes(source.model.graph, latent_sizes, wishes.latent_dim))
    for shape in shapes:
        inputs = Inputs(Input(latent_value.name, latent_type, shape), label, classes, one_hot, batch or 1)
        if len(shapes) == 1 or _runs(source, inputs, 0):
            break
    else:
        raise TrainerError(
            f"the size of the latent {latent_value.name!r} is not in the file; add --latent-dim, its number of values"
        )
    if label is None:
        if wishes.class_names:
            raise TrainerError(f"--classes is set, but the generator has no label: its inputs are {inputs.latent}")
        return inputs
    if not one_hot:
        found = len(wishes.class_names) or _class_count(source, inputs)
        inputs = dataclasses.replace(inputs, classes=found)
    if wishes.class_names and len(wishes.class_names) != inputs.classes:
        raise TrainerError(f"--classes names {len(wishes.class_names)} classes; the label {label} has {inputs.classes}")
    return inputs


def class_names(source: Source, inputs: Inputs) -> tuple[str, ...]:
    """Return the names of the classes: as set, as in a card in the file, or their numbers."""
    if source.wishes.class_names:
        return source.wishes.class_names
    for entry in source.model.metadata_props:
        if entry.key == CARD_KEY and len(named := _names_in(entry.value)) == inputs.classes:
            return named
    return tuple(map(str, range(inputs.classes)))


def look_at_images(outputs: Arrays, wishes: Wishes) -> Images:
    """Find the output with the images, their layout and their range.

    Raises:
        TrainerError: no output has images, or something cannot be guessed.
    """
    images = choose_output(outputs, wishes)
    return dataclasses.replace(images, values=_range(outputs[images.name], wishes.values))


def choose_output(outputs: Arrays, wishes: Wishes) -> Images:
    """Find the output with the images, and their layout.

    Raises:
        TrainerError: no output has images.
    """
    found = {name: each for name, values in outputs.items() if (each := as_images(name, values, wishes.layout))}
    shown = ", ".join(f"{name!r} {values.dtype} {list(values.shape[1:])}" for name, values in outputs.items())
    if wishes.output is not None and wishes.output not in found:
        raise TrainerError(f"{wishes.output!r} is not an output with images; the outputs of an image are {shown}")
    if not found:
        raise TrainerError(
            f"no output has images of 1 or 3 channels; the outputs of an image are {shown or 'not one for each latent'}"
        )
    if wishes.output is not None:
        return found[wishes.output]
    return max(found.values(), key=lambda images: (bool(_IMAGE.search(images.name)), math.prod(images.shape)))


def _choose_inputs(graph: onnx.GraphProto, wishes: Wishes) -> tuple[onnx.ValueInfoProto, onnx.ValueInfoProto | None]:
    inputs = {value.name: value for value in graph.input}
    shown = ", ".join(_described(value) for value in inputs.values()) or "none"
    latent, label = wishes.latent_input, wishes.label_input
    for name in (latent, label):
        if name is not None and name not in inputs:
            raise TrainerError(f"there is no input {name!r}; the inputs are {shown}")
    rest = [name for name in inputs if name not in (latent, label)]
    if label is None and (latent is not None or len(rest) > 1):
        labels = [name for name in rest if _is_label(inputs[name])]
        label = labels[0] if len(labels) == 1 else None
    rest = [name for name in rest if name != label]
    if latent is None and len(rest) == 1:
        latent = rest.pop()
    if latent is None or latent in rest or any(name not in (latent, label) for name in inputs):
        raise TrainerError(
            f"the inputs are {shown}; a served model has a latent and, if it is conditional, a label. If they are "
            "among these inputs, name them by --latent-input and --label-input; make every other input constant in "
            f"the model: {WRAPPER_ADVICE}"
        )
    return inputs[latent], inputs[label] if label is not None else None


def _is_label(value: onnx.ValueInfoProto) -> bool:
    kind, (_, *sizes) = _type_and_sizes(value)
    return kind in _INTEGERS or bool(_LABEL.search(value.name)) or all(size == 1 for size in sizes)


def _type_and_sizes(value: onnx.ValueInfoProto) -> tuple[int, list[int | None]]:
    """Return ONNX's type of an input, and its sizes, the first of which is the batch's; None is not fixed."""
    tensor = value.type.tensor_type
    if not tensor.shape.dim:
        raise TrainerError(
            f"the file gives no shape for the input {value.name!r}; it must be [N, ...], for N images: export the "
            "model again with a batch dimension"
        )
    return tensor.elem_type, [size.dim_value if size.dim_value > 0 else None for size in tensor.shape.dim]


def _described(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = ", ".join(str(size.dim_value or size.dim_param or "?") for size in tensor.shape.dim)
    return f"{value.name!r} {onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{sizes}]"


def _latent_shapes(
    graph: onnx.GraphProto, sizes: list[int | None], latent_dim: int | None
) -> Iterable[tuple[int, ...]]:
    """Yield the shapes that one latent may have."""
    known = math.prod(size for size in sizes if size)
    if None not in sizes:
        if latent_dim not in (None, known):
            raise TrainerError(f"--latent-dim is {latent_dim}; the latent of this model has {known} values")
        candidates = {known}
    elif sizes.count(None) > 1:
        candidates = set()
    elif latent_dim is not None:
        candidates = {latent_dim}
    else:
        candidates = {size * known for tensor in graph.initializer for size in tensor.dims if size <= LARGEST_LATENT}
    for candidate in sorted(candidates):
        yield tuple(candidate // known if size is None else size for size in sizes)


def _runs(source: Source, inputs: Inputs, label: int) -> bool:
    try:
        made = inputs.run(source, np.zeros((1, inputs.latent_dim), np.float32), np.array([label]))
    except TrainerError:
        return False
    return bool(made)


def _class_count(source: Source, inputs: Inputs) -> int:
    """Return how many labels the original accepts."""
    works, fails = 0, 1
    while _runs(source, inputs, fails):
        works, fails = fails, 2 * fails
        if fails > _MOST_CLASSES:
            break
    else:
        while fails - works > 1:
            middle = (works + fails) // 2
            works, fails = (middle, fails) if _runs(source, inputs, middle) else (works, middle)
        return fails
    for entry in source.model.metadata_props:
        if entry.key == CARD_KEY and (named := _names_in(entry.value)):
            return len(named)
    constants = integer_constants(source.model.graph)
    depths = [node.input[1] for node in nodes_of(source.model.graph.node) if node.op_type == "OneHot"]
    if len(depths) == 1 and depths[0] in constants:
        return int(constants[depths[0]].item())
    raise TrainerError("the number of classes is not in the file; add --classes, their names or their number")


def _names_in(card: str) -> tuple[str, ...]:
    try:
        names = json.loads(card).get("classNames", ())
    except (ValueError, AttributeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def as_images(name: str, values: NDArray[np.generic], wanted: Layout | None) -> Images | None:
    """Return what an output is, if it has images; [n, height, width] and [n, values] have no channels of their own."""
    layout: Layout
    match values.shape[1:]:
        case (first, second, third) if wanted or first in (1, 3) or third in (1, 3):
            # Where both ends may be the channels, images are more often square.
            last = third in (1, 3) and (first not in (1, 3) or (first == second and second != third))
            layout = wanted or ("NHWC" if last else "NCHW")
            channels, height, width = (first, second, third) if layout == "NCHW" else (third, first, second)
        case (height, width):
            layout, channels = "NHWC", 1
        case (size,) if (found := _square(size)) is not None:
            channels, height, width = found
            layout = wanted or "NCHW"
        case _:
            return None
    if channels not in (1, 3):
        return None
    return Images(name, onnx.helper.np_dtype_to_tensor_dtype(values.dtype), layout, height, width, channels)


def _square(size: int) -> tuple[int, int, int] | None:
    """Return channels, height and width of a square image of this many values."""
    for channels in (1, 3):
        side = math.isqrt(size // channels)
        if side > 1 and channels * side * side == size:
            return channels, side, side
    return None


def _range(images: NDArray[np.generic], wanted: ValueRange | None) -> ValueRange:
    if images.dtype == np.uint8:
        return "byte"
    values = images.astype(np.float32)
    if not np.isfinite(values).all():
        raise TrainerError("the generator makes values that are not finite; its weights are damaged, or do not fit")
    low, high = float(values.min()), float(values.max())
    if wanted is not None:
        return wanted
    if high > 8 and low > -0.2 * high:
        return "byte"
    if low >= 0 and high <= 1.01:
        return "sigmoid"
    if -8 <= low < 0 and high <= 8:
        return "tanh"
    raise TrainerError(
        f"the images have values from {low:.3g} to {high:.3g}, which is no usual range; add --range tanh (-1 to 1), "
        "sigmoid (0 to 1) or byte (0 to 255)"
    )
