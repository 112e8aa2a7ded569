"""Finds out what a generator's inputs and output mean: by names, types, shapes, and by the images that it makes.

`roles` says what each input is. Whatever `Wishes` sets is not guessed. The generator runs with one image at a time, or
with as many as its file fixes, because a file may be right for no other number.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from ganserve_trainer.errors import TrainerError, one_line
from ganserve_trainer.export.inputs import Attribute, Attributes, Label, Latent, Truncation, Values
from ganserve_trainer.export.inputs import Inputs as ServedInputs
from ganserve_trainer.importing.onnx_file import integer_constants, nodes_of
from ganserve_trainer.importing.roles import Role, roles, type_and_sizes
from ganserve_trainer.importing.source import Arrays, Layout, Source, Wishes, numpy_type
from ganserve_trainer.model_file import CARD_KEY
from ganserve_trainer.wrap import ValueRange, to_bytes

_IMAGE = re.compile(r"image|img|rgb|sample|fake", re.IGNORECASE)
LARGEST_LATENT = 8192
_LONGEST_NAME = 64
_TAKEN = {"latent", "label", "attributes", "truncation", "seed"}
_MOST_CLASSES = 1 << 15
WRAPPER_ADVICE = "docs/bring-a-generator.md shows how to wrap such a generator"


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the graph."""

    name: str
    type: int  # ONNX's
    shape: tuple[int, ...]  # of one image; if not batched, of all
    batched: bool = True

    def values(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return rows as this input takes them: [n, *shape], or *shape if it is not batched."""
        return rows.reshape((*([len(rows)] if self.batched else []), *self.shape)).astype(numpy_type(self.type))

    def __str__(self) -> str:
        sizes = ", ".join(map(str, (*(["N"] if self.batched else []), *self.shape)))
        return f"{self.name!r}, {numpy_type(self.type)} [{sizes}]"


@dataclass(frozen=True, slots=True)
class Further:
    """An input beside the latent and the label."""

    input: Input
    served: str  # its name in the served model; empty for a constant
    meaning: Latent | Attributes | Truncation | NDArray[Any]  # an array is a constant, of the input's own shape
    reason: str

    @property
    def described(self) -> str:
        """What it is, for the user."""
        if isinstance(self.meaning, np.ndarray):
            return f"constant {self.meaning.flat[0]:g}" if self.meaning.size == 1 else "constant"
        kind = type(self.meaning).__name__.lower()
        if isinstance(self.meaning, Latent):
            kind = (
                f"latent {self.served!r}, {self.meaning.distribution}" if self.meaning.default_seed is None else "noise"
            )
        return kind


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a generator."""

    latent: Input
    label: Input | None
    classes: int  # 0: there is no label
    one_hot: bool
    batch: int  # how many images the original makes at once
    distribution: str = "normal"  # of the latent
    further: tuple[Further, ...] = ()

    @property
    def latent_dim(self) -> int:
        """The number of values in a latent."""
        return math.prod(self.latent.shape)

    @property
    def served(self) -> ServedInputs:
        """The inputs of the served model, in which the latent is a vector and the label an index."""
        listed: dict[str, Latent | Label | Attributes | Truncation] = {
            "latent": Latent((self.latent_dim,), self.distribution)
        }
        listed |= {"label": Label()} if self.label is not None else {}
        listed |= {each.served: each.meaning for each in self.further if not isinstance(each.meaning, np.ndarray)}
        return ServedInputs(listed, max(self.classes, 1) if self.label is not None else 0)

    def run(self, source: Source, values: Values) -> Arrays:
        """Run the original, `batch` images at a time; return its outputs, [n, ...] each.

        Args:
            source: the original.
            values: of the served model's inputs.

        Raises:
            TrainerError: it fails.
        """
        count = len(values["latent"])
        rows_of = {self.latent: values["latent"]}
        if self.label is not None:
            rows_of[self.label] = np.eye(self.classes)[values["label"]] if self.one_hot else values["label"]
        fixed = {}
        for each in self.further:
            if isinstance(each.meaning, np.ndarray):
                fixed[each.input.name] = each.meaning
            elif each.input.batched:
                rows_of[each.input] = values[each.served]
            else:
                fixed[each.input.name] = each.input.values(values[each.served])
        feeds = {each.name: each.values(rows) for each, rows in rows_of.items()}
        made: list[Arrays] = []
        for start in range(0, count, self.batch):
            # The last batch is filled with its last image.
            rows = np.minimum(np.arange(start, start + self.batch), count - 1)
            try:
                made.append(source.run({name: values[rows] for name, values in feeds.items()} | fixed))
            except Exception as error:  # onnxruntime's and torch's exceptions have no common root
                raise TrainerError(f"the generator fails when it runs: {one_line(error)}") from error
        names = [name for name, values in made[0].items() if values.shape[:1] == (self.batch,)]
        return {name: np.concatenate([each[name] for each in made])[:count] for name in names}


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


def look_at_inputs(source: Source) -> Inputs:
    """Find out what each input is.

    Raises:
        TrainerError: that of an input cannot be guessed.
    """
    wishes = source.wishes
    known = roles(source.model.graph, wishes.roles)
    by_role = {role: value for value, role in known if role.kind in ("latent", "label") and not role.further}
    first, latent_value = next((role, value) for role, value in by_role.items() if role.kind == "latent")
    label_value = next((value for role, value in by_role.items() if role.kind == "label"), None)
    latent_type, (batch, *latent_sizes) = type_and_sizes(latent_value)
    label, classes = None, 0
    if label_value is not None:
        label_type, (label_batch, *label_sizes) = type_and_sizes(label_value)
        batch = batch or label_batch
        if None in label_sizes and wishes.class_names and label_sizes.count(None) == 1:
            known_size = math.prod(size for size in label_sizes if size)
            label_sizes = [size or len(wishes.class_names) // known_size for size in label_sizes]
        if None in label_sizes:
            raise TrainerError("the number of classes is not in the file; add --classes, their names or their number")
        label = Input(label_value.name, label_type, tuple(size or 0 for size in label_sizes))
        classes = math.prod(label.shape)
    one_hot = classes > 1
    further = _further(known, batch)
    shapes = list(_latent_shapes(source.model.graph, latent_sizes, wishes.latent_dim))
    for shape in shapes:
        latent = Input(latent_value.name, latent_type, shape)
        inputs = Inputs(latent, label, classes, one_hot, batch or 1, first.detail or "normal", further)
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


def _further(known: list[tuple[onnx.ValueInfoProto, Role]], batch: int | None) -> tuple[Further, ...]:
    """Return the inputs beside the latent and the label; `batch` is the number of images, if the file fixes it."""
    found = []
    for value, role in known:
        if not role.further:
            continue
        kind, sizes = type_and_sizes(value)
        # What has one row for any number of images is for all of them.
        batched = bool(sizes) and (sizes[0] is None or sizes[0] == batch)
        shape = sizes[1:] if batched else sizes
        if role.kind == "constant":
            constant = np.full([size or batch or 1 for size in sizes], float(role.detail))
            found.append(_constant(value.name, kind, constant, role.reason))
            continue
        known_shape = tuple(size for size in shape if size)
        if len(known_shape) < len(shape):
            raise TrainerError(
                f"the size of the input {value.name!r} is not in the file: its shape is {sizes}; export the model with "
                f"a fixed size, or make it constant: --input {value.name}=constant:0"
            )
        given = Input(value.name, kind, known_shape, batched)
        if role.kind == "truncation":
            found.append(Further(given, "truncation", Truncation(scalar=not batched), role.reason))
        elif not batched:
            noise = np.random.RandomState(0).standard_normal(known_shape)
            found.append(_constant(value.name, kind, noise, f"{role.reason}; the same for all images, of seed 0"))
        elif role.kind == "attributes":
            names = (
                role.detail.split(",") if role.detail else [f"{value.name}{n}" for n in range(math.prod(known_shape))]
            )
            if len(names) != math.prod(known_shape):
                raise TrainerError(
                    f"--input names {len(names)} attributes of {value.name!r}, which has {math.prod(known_shape)}"
                )
            found.append(Further(given, "attributes", Attributes(tuple(map(Attribute, names))), role.reason))
        elif role.kind == "noise":
            found.append(Further(given, _served_name(value.name), Latent(known_shape, default_seed=0), role.reason))
        else:
            distribution = role.detail or "normal"
            found.append(Further(given, _served_name(value.name), Latent(known_shape, distribution), role.reason))
    return tuple(found)


def _constant(name: str, kind: int, values: NDArray[Any], reason: str) -> Further:
    fixed = values.astype(numpy_type(kind))
    return Further(Input(name, kind, fixed.shape, batched=False), "", fixed, reason)


def _served_name(name: str) -> str:
    """Return a name that a further latent may have."""
    name = re.sub(r"[^!-<>-~]", "_", name)[-_LONGEST_NAME:] or "input"
    return f"{name}_" if name in _TAKEN else name


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
        made = inputs.run(source, inputs.served.values(np.zeros(1, np.int64)) | {"label": np.array([label])})
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
