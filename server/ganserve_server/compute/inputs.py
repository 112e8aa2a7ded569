"""The inputs of a model: the one place that says what they are and how the images of requests become them.

The engine, the GPU's buckets, TensorRT's profile, the rules for model files and both protocols ask `Inputs`. A new kind
of input is a `ModelInput` more in `Inputs.of`; the queue carries the `Draw` of any model.
"""

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganserve._distributions import DISTRIBUTIONS
from ganserve.v1 import generation_pb2 as pb

Feeds = dict[str, NDArray[Any]]  # by the input's name: [n, ...]

LATENT, LABEL, ATTRIBUTES, TRUNCATION = "latent", "label", "attributes", "truncation"
_FLOAT, _INDEX = np.dtype(np.float32), np.dtype(np.int64)
_MAX_VALUES = (
    1 << 23
)  # random numbers for one image: noise for every layer of a generator of 1024 pixels is a third of it
_MAX_ATTRIBUTES, _MAX_NAME = 256, 64
_MAX_NAMES = 32 << 10  # bytes of all names as JSON: a JPEG's metadata, which has them, holds 64 KiB
# Names of other kinds of inputs, and the Open Inference Protocol's seed.
_NOT_OF_LATENTS = {LABEL, ATTRIBUTES, TRUNCATION, "seed"}


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One input of a model: [n, *shape] for n images.

    Without values from the caller, an image's values follow from its seed. `of_seeds` returns them for some seeds. If
    it is None, they are drawn: `draw` returns random numbers of one image from a RandomState (MT19937) with that seed.
    An input with a default seed has the numbers of that seed instead, for all images.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()
    of_seeds: Callable[[NDArray[np.uint32]], NDArray[Any]] | None = None
    draw: Callable[[np.random.RandomState, tuple[int, ...]], NDArray[np.float64]] = DISTRIBUTIONS["normal"]
    default_seed: int | None = None
    one_hot: int = 0  # the number of classes, if the file takes a label as [n, classes] float32

    @property
    def drawn(self) -> bool:
        """Whether the values are drawn."""
        return self.of_seeds is None

    @property
    def follows(self) -> bool:
        """Whether the values are drawn from the image's own seed."""
        return self.drawn and self.default_seed is None

    @property
    def in_file(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The type of the values in the file, and their shape for one image."""
        return (_FLOAT, (self.one_hot,)) if self.one_hot else (self.dtype, self.shape)


@dataclass(slots=True)  # not frozen, which would double the time to create one
class Draw:
    """The images to make: their seeds, and the inputs that the seeds do not give."""

    count: int
    seeds: NDArray[np.uint32] | None  # [count]; None: `inputs` has them all
    inputs: dict[str, NDArray[Any]]  # by name: [count, ...]; latents are already scaled by truncation
    truncation: float
    input_seeds: Mapping[str, int] | None = None  # by name: of latents that do not follow from `seeds`

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The label of each image; None for an unconditional model."""
        return self.inputs.get(LABEL)

    def part(self, start: int, stop: int) -> "Draw":
        """Return the draw for images `start` to `stop` (exclusive)."""
        seeds = None if self.seeds is None else self.seeds[start:stop]
        inputs = {name: rows[start:stop] for name, rows in self.inputs.items()}
        return Draw(stop - start, seeds, inputs, self.truncation, self.input_seeds)


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of an input or an output of a file."""

    dtype: str  # as NumPy calls it
    shape: tuple[int | str, ...]  # with the name of each dynamic dimension

    def __str__(self) -> str:
        """Return, for example, "float32 [N, 16]"."""
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]" if self.shape else f"{self.dtype} without dimensions"


def images_in(feeds: Feeds) -> int:
    """Return the number of images in a batch."""
    return len(next(iter(feeds.values())))


class Inputs:
    """The inputs of one model, in order.

    Attributes:
        attributes: the attributes by name, in the order of their values in the input `attributes`.
        truncation: what truncation does.
        random_values: how many random numbers an image needs.
        settable: whether a request can set more than seeds, labels and truncation.
        scalar_truncation: whether the file takes one truncation for a whole batch.
    """

    def __init__(
        self,
        inputs: Iterable[ModelInput],
        classes: int = 0,
        *,
        attributes: Sequence[pb.Attribute] = (),
        truncation: pb.TruncationInput | None = None,
    ) -> None:
        """Take the inputs.

        Args:
            inputs: all inputs but the truncation.
            classes: the number of classes; 0: the model takes no labels.
            attributes: what the input `attributes` has, if there is one.
            truncation: the truncation, if it is an input.
        """
        self._inputs, self._classes = {each.name: each for each in inputs}, classes
        # By name: reading the names from protobuf for each image would take most of the time of an answer.
        self.attributes = {each.name: each for each in attributes}
        self._not_drawn = [(each.name, each.of_seeds) for each in self if each.of_seeds is not None]
        self._drawn = [each for each in self if each.drawn]
        self._default_values: dict[str, NDArray[np.float32]] = {}  # of the latents with a default seed
        self.random_values = sum(math.prod(each.shape) for each in self._drawn)
        self.settable = bool(attributes) or len(self._drawn) > 1
        self.truncation = pb.TRUNCATION_EFFECT_LATENT if truncation is None else pb.TRUNCATION_EFFECT_INPUT
        self.scalar_truncation = truncation is not None and truncation.scalar
        self._of_thread = threading.local()

    @classmethod
    def of(cls, card: pb.ModelCard) -> "Inputs":
        """Return the inputs of the model with this card, which must have no `input_problems`."""
        classes = len(card.class_names)
        listed = list(card.inputs)
        if not listed:  # the first edition
            listed.append(pb.ModelInput(name=LATENT, latent=pb.LatentInput()))
            if classes:
                listed.append(pb.ModelInput(name=LABEL, label=pb.LabelInput()))
        inputs: list[ModelInput] = []
        attributes: Sequence[pb.Attribute] = ()
        truncation = None
        for each in listed:
            kind = each.WhichOneof("kind")
            if kind == "latent":
                inputs.append(_latent(each, card.latent_dim))
            elif kind == "label":
                one_hot = classes if each.label.one_hot else 0
                inputs.append(ModelInput(LABEL, _INDEX, of_seeds=_classes_in_turn(classes), one_hot=one_hot))
            elif kind == "attributes":
                attributes = each.attributes.attributes
                # Adding 0 turns -0.0 into 0.0, as in a request's values: they are equal, but not the same to a model.
                defaults = np.array([one.default_value for one in attributes], np.float32) + np.float32(0)
                inputs.append(ModelInput(ATTRIBUTES, _FLOAT, defaults.shape, of_seeds=_always(defaults)))
            else:
                truncation = each.truncation
        made = cls(inputs, classes, attributes=attributes, truncation=truncation)
        if truncation is None and listed[0].latent.distribution == pb.DISTRIBUTION_SPHERE:
            made.truncation = pb.TRUNCATION_EFFECT_NONE
        return made

    def __iter__(self) -> Iterator[ModelInput]:
        """Yield each input but the truncation."""
        return iter(self._inputs.values())

    def seeds(self, given: Mapping[str, int] | None) -> dict[str, int]:
        """Return the seed of each latent that does not follow from the image's seed.

        Args:
            given: the seeds of the request.
        """
        known = {each.name: (given or {}).get(each.name, each.default_seed) for each in self._drawn}
        return {name: seed for name, seed in known.items() if seed is not None}

    def complete(self, inputs: dict[str, NDArray[Any]], seeds: NDArray[np.uint32]) -> None:
        """Add the values that follow from the seeds, of the inputs that are neither drawn nor there."""
        for name, of_seeds in self._not_drawn:
            if name not in inputs:
                inputs[name] = of_seeds(seeds)

    def default_attributes(self, count: int) -> NDArray[np.float32]:
        """Return the attributes of images whose request sets none, [count, attributes]."""
        values: NDArray[np.float32] = dict(self._not_drawn)[ATTRIBUTES](np.zeros(count, np.uint32))
        return values

    def probes(self, seeds: NDArray[np.uint32], truncation: float = 1.0) -> Draw:
        """Return the draw of these seeds alone."""
        inputs: dict[str, NDArray[Any]] = {}
        self.complete(inputs, seeds)
        return Draw(len(seeds), seeds, inputs, truncation)

    def varied(self, count: int, truncation: float) -> Draw:
        """Return the draw of seeds from 0 on, with the default, the smallest and the largest attributes in turn."""
        draw = self.probes(np.arange(count, dtype=np.uint32), truncation)
        if self.attributes:
            ranges = np.array([attribute_range(each) for each in self.attributes.values()], np.float32)
            draw.inputs[ATTRIBUTES][1::3], draw.inputs[ATTRIBUTES][2::3] = ranges.T
        return draw

    def golden(self, images: Sequence[pb.GoldenImage]) -> Draw:
        """Return the draw of golden images; the model must have their classes."""
        draw = self.probes(np.array([each.seed for each in images], np.uint32))
        if self._classes:
            draw.inputs[LABEL] = np.array([each.label for each in images], np.int64)
        return draw

    def timed(self, count: int) -> Draw:
        """Return the draw of images to time: of the last class, which a model of fewer classes fails to make."""
        return self.probes(np.full(count, max(0, self._classes - 1), np.uint32))

    def feeds(self, draws: list[Draw]) -> Feeds:
        """Return the inputs for one batch of all draws, in order."""
        count = sum(draw.count for draw in draws)
        feeds: Feeds = {each.name: np.empty((count, *each.shape), each.dtype) for each in self._drawn}
        self._fill(feeds, draws)
        for name, _ in self._not_drawn:
            rows = [draw.inputs[name] for draw in draws]
            feeds[name] = rows[0] if len(rows) == 1 else np.concatenate(rows)
            if classes := self._inputs[name].one_hot:
                labels, feeds[name] = feeds[name], np.zeros((count, classes), np.float32)
                feeds[name][np.arange(count), labels] = 1
        if self.truncation == pb.TRUNCATION_EFFECT_INPUT:
            feeds[TRUNCATION] = np.repeat(
                np.array([draw.truncation for draw in draws], np.float32), [draw.count for draw in draws]
            )
        return feeds

    def parts(self, feeds: Feeds) -> Iterator[Feeds]:
        """Yield the parts of a batch that the file can compute in one run: those with the same scalar truncation."""
        rows = feeds[TRUNCATION]
        edges = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]
        for start, stop in itertools.pairwise(edges):
            yield {name: rows[start:stop] for name, rows in feeds.items()}

    def for_file(self, feeds: Feeds) -> Feeds:
        """Return the inputs of one run, with the shapes of the file."""
        if self.scalar_truncation:
            return {**feeds, TRUNCATION: feeds[TRUNCATION][0, ...]}
        return feeds

    def scale(self, truncation: float) -> float:
        """Return the factor on the latents."""
        return truncation if self.truncation == pb.TRUNCATION_EFFECT_LATENT else 1.0

    def shapes(self, count: int) -> str:
        """Return the shapes of a batch, as TensorRT's profiles take them: "latent:8x100,label:8"."""
        return ",".join(
            f"{name}:{'x'.join(map(str, (count, *shape)))}"
            for name, (_, shape) in self._in_file().items()
            if shape is not None
        )

    def mismatches(self, found: Mapping[str, TensorType]) -> list[str]:
        """Return what is wrong with the inputs of a file.

        Args:
            found: the type of each input, by name.
        """
        wanted = {
            name: TensorType(dtype.name, () if shape is None else ("N", *shape))
            for name, (dtype, shape) in self._in_file().items()
        }
        wrong = [
            f"the file has no input {name}; according to the model card it must have it, {kind}: rename or add the "
            "input, or change the card" + (" (only models with labels have class_names)" if name == LABEL else "")
            for name, kind in wanted.items()
            if name not in found
        ]
        for name, kind in found.items():
            if name not in wanted:
                todo = (
                    "name the classes in class_names of the model card"
                    if name == LABEL
                    else f"make it a constant of the graph, or list all inputs in the card{_listing(name, kind)}"
                )
                wrong.append(f"the file has the input {name}, {kind}, which the model card does not describe: {todo}")
            elif hints := self._hints(name, kind, wanted[name]):
                wrong.append(
                    f"the input {name} is {kind}; according to the model card it must be {wanted[name]}: "
                    f"{'; '.join(hints)}"
                )
        return wrong

    def _hints(self, name: str, found: TensorType, wanted: TensorType) -> list[str]:
        """Return what to do so that an input of a file has the wanted type; nothing if it has."""
        one_hot = TensorType("float32", (*found.shape[:1], self._classes))
        if name == LABEL and found == one_hot and wanted.dtype == "int64":
            return ['for a one-hot label, list the inputs in the model card, with `"label": {"oneHot": true}`']
        hints = []
        if found.dtype != wanted.dtype:
            hints.append(f"make the input {wanted.dtype}, and cast it inside the model")
        if found.shape and wanted.shape and isinstance(found.shape[0], int):
            hints.append(
                f"the first dimension is fixed at {found.shape[0]}, but it is the number of images, and must be "
                "dynamic: export the model with a dynamic batch dimension"
            )
        if any(isinstance(size, str) for size in found.shape[1:]):
            hints.append("only the first dimension may be dynamic: export the model with fixed sizes for the others")
        elif bool(found.shape) != bool(wanted.shape) or found.shape[1:] != wanted.shape[1:]:
            if name == LATENT and len(found.shape) == 2:
                hints.append(f"change the model, or latent_dim in its card ({found.shape[1]} for this file)")
            else:
                listing = _listing(name, found) if name in (each.name for each in self._drawn) else ""
                hints.append(f"change the model, or list its inputs in the card{listing}")
        return hints

    def _in_file(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...] | None]]:
        """Return the type and the shape for one image of each input of the file; None: it has no dimensions."""
        wanted: dict[str, tuple[np.dtype[Any], tuple[int, ...] | None]] = {each.name: each.in_file for each in self}
        if self.truncation == pb.TRUNCATION_EFFECT_INPUT:
            wanted[TRUNCATION] = (_FLOAT, None if self.scalar_truncation else ())
        return wanted

    def _fill(self, feeds: Feeds, draws: list[Draw]) -> None:
        """Fill the rows of all images in the inputs that are drawn."""
        # Reseeding a generator takes 5 µs an image, creating one takes 94 µs; the numbers are the same.
        random = getattr(self._of_thread, "random", None)
        if random is None:
            random = self._of_thread.random = np.random.RandomState(0)
        seed, drawn = random.seed, [(each.name, each, feeds[each.name]) for each in self._drawn]
        first = 0
        for draw in draws:
            stop = first + draw.count
            following = []
            for name, each, rows in drawn:
                values = draw.inputs.get(name)
                if values is None and (each.default_seed is not None or draw.input_seeds is not None):
                    values = self._of_input_seed(each, draw, random)
                if values is None:
                    following.append((each.draw, each.shape, rows))
                else:
                    rows[first:stop] = values
            if following:
                assert draw.seeds is not None, "a draw without seeds has all values that follow from them"
                for index, number in enumerate(draw.seeds.tolist(), first):
                    seed(number)
                    for numbers, shape, rows in following:
                        rows[index] = numbers(random, shape)
                if draw.truncation != 1 and (factor := self.scale(draw.truncation)) != 1:
                    for _, _, rows in following:
                        rows[first:stop] *= np.float32(factor)
            first = stop

    def _of_input_seed(self, each: ModelInput, draw: Draw, random: np.random.RandomState) -> NDArray[np.float32] | None:
        """Return the values that all images of a draw have; None if they follow from the images' seeds."""
        number = (draw.input_seeds or {}).get(each.name)
        if number is None and each.default_seed is None:
            return None
        if number is None and each.name in self._default_values:
            return self._default_values[each.name]
        random.seed(each.default_seed if number is None else number)
        values = each.draw(random, each.shape).astype(np.float32)
        if number is None:
            self._default_values[each.name] = values
        return values * np.float32(self.scale(draw.truncation)) if each.follows else values


def _listing(name: str, found: TensorType) -> str:
    """Return how a card lists an input of a file that takes random numbers; nothing if it cannot take them."""
    if found.dtype != "float32" or not found.shape or not all(isinstance(size, int) for size in found.shape[1:]):
        return ""
    shape = ", ".join(map(str, found.shape[1:]))
    return f' (`inputs`), random numbers as {{"name": "{name}", "latent": {{"shape": [{shape}]}}}}'


def _latent(listed: pb.ModelInput, latent_dim: int) -> ModelInput:
    latent = listed.latent
    seed = latent.default_seed if latent.HasField("default_seed") else None
    name = pb.Distribution.Name(latent.distribution or pb.DISTRIBUTION_NORMAL).removeprefix("DISTRIBUTION_").lower()
    return ModelInput(
        listed.name,
        _FLOAT,
        tuple(latent.shape) or (latent_dim,),
        draw=DISTRIBUTIONS[name],
        default_seed=seed,
    )


def _classes_in_turn(classes: int) -> Callable[[NDArray[np.uint32]], NDArray[np.int64]]:
    return lambda seeds: (seeds % classes).astype(np.int64)


def _always(values: NDArray[np.float32]) -> Callable[[NDArray[np.uint32]], NDArray[np.float32]]:
    return lambda seeds: np.tile(values, (len(seeds), 1))


def input_problems(card: pb.ModelCard) -> Iterator[str]:
    """Yield the rules that the inputs which a card lists break: it contradicts itself, or this server knows no such."""
    listed = card.inputs
    if not listed:
        if card.latent_dim > _MAX_VALUES:
            yield f"the model card gives latent_dim {card.latent_dim:,}; at most {_MAX_VALUES:,} are allowed"
        return
    names = [each.name for each in listed]
    if len(set(names)) < len(names):
        yield f"the model card lists an input twice: {', '.join(names)}"
    values = 0
    for each in listed:
        kind = each.WhichOneof("kind")
        if kind is None:
            yield (
                f"the model card says nothing that this server knows about the input {each.name!r}: give it one of "
                "latent, label, attributes and truncation, or update the server"
            )
        elif kind == "latent":
            yield from _name_problems("latent", each.name)
            if each.name in _NOT_OF_LATENTS:
                yield f"the model card calls a latent {each.name!r}: give it another name"
            shape = tuple(each.latent.shape) or (card.latent_dim,)
            values += math.prod(shape)
            if not 0 < math.prod(shape) <= values <= _MAX_VALUES:
                yield (
                    f"the model card gives the input {each.name!r} the shape {list(shape)}; the latents of an image "
                    f"must have 1 to {_MAX_VALUES} values in total"
                )
            if each.latent.distribution not in pb.Distribution.values():
                yield f"this server does not know the distribution of the input {each.name!r}: update it"
        elif each.name != kind:
            yield f"the model card calls the input of {kind} {each.name!r}; its name must be {kind!r}"
        elif kind == "attributes":
            yield from _attribute_problems(each.attributes.attributes)
    names_of_attributes = [one.name for each in listed for one in each.attributes.attributes]
    if (size := len(json.dumps(names + names_of_attributes))) > _MAX_NAMES:
        yield (
            f"the names of the model card's inputs and attributes have {size} bytes as JSON; at most {_MAX_NAMES} are "
            "allowed, because the metadata of image files has them: shorten them"
        )
    if names[0] != LATENT or listed[0].latent.HasField("default_seed"):
        yield (
            f"the first input of the model card is {names[0]!r}; it must be the latent, called 'latent', without a "
            "default seed"
        )
    first = math.prod(listed[0].latent.shape or [card.latent_dim])
    if first != card.latent_dim:
        yield f"the input latent has {first} values; the model card's latent_dim is {card.latent_dim}"
    if (LABEL in names) != bool(card.class_names):
        yield "a model card has class names if, and only if, it lists the input label"


def _attribute_problems(attributes: Sequence[pb.Attribute]) -> Iterator[str]:
    names = [each.name for each in attributes]
    if not 0 < len(names) <= _MAX_ATTRIBUTES or len(set(names)) < len(names):
        yield f"a model card must list 1 to {_MAX_ATTRIBUTES} attributes with different names: {len(names)}"
    for each in attributes:
        yield from _name_problems("attribute", each.name)
        low, high = attribute_range(each)
        if not (math.isfinite(low) and math.isfinite(high) and low < high and low <= each.default_value <= high):
            yield (
                f"the attribute {each.name!r} of the model card has the range {low:g} to {high:g} and the default "
                f"{each.default_value:g}: the minimum must be below the maximum, and the default between them"
            )
        elif each.binary and each.default_value not in (low, high):
            yield f"the attribute {each.name!r} is binary, but its default is neither {low:g} nor {high:g}"


def _name_problems(kind: str, name: str) -> Iterator[str]:
    """Yield what is wrong with a name that requests, flags of the command line and the metadata of files have."""
    if not (name.isprintable() and 0 < len(name) <= _MAX_NAME) or "=" in name:
        yield (
            f"the model card has the {kind} {name[:_MAX_NAME]!r}; a name must have 1 to {_MAX_NAME} printable "
            "characters, and no '='"
        )


def attribute_range(attribute: pb.Attribute) -> tuple[float, float]:
    """Return the smallest and the largest value of an attribute."""
    return attribute.minimum, attribute.maximum if attribute.minimum or attribute.maximum else 1.0
