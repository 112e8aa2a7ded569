"""The inputs of a model: the one place that says what they are and how the images of requests become them.

The engine, the GPU's buckets, TensorRT's profile, the rules for model files and both protocols ask `Inputs`. A new kind
of input is a `ModelInput` more in `Inputs.of`; the queue carries the `Draw` of any model.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganserve.v1 import generation_pb2 as pb

Feeds = dict[str, NDArray[Any]]  # by the input's name: [n, ...]

LATENT, LABEL = "latent", "label"


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One input of a model: [n, *shape] for n images.

    Without values from the caller, an image's values follow from its seed. `of_seeds` returns them for some seeds. If
    it is None, they are drawn: standard normal numbers of NumPy's RandomState (MT19937) with that seed, times
    truncation.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()
    of_seeds: Callable[[NDArray[np.uint32]], NDArray[Any]] | None = None

    @property
    def drawn(self) -> bool:
        """Whether the values are drawn, and truncation scales them."""
        return self.of_seeds is None


@dataclass(slots=True)  # not frozen, which would double the time to create one
class Draw:
    """The images to make: their seeds, and the inputs that the seeds do not give."""

    count: int
    seeds: NDArray[np.uint32] | None  # [count]; None: `inputs` has them all
    inputs: dict[str, NDArray[Any]]  # by name: [count, ...]; latents are already scaled by truncation
    truncation: float

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The label of each image; None for an unconditional model."""
        return self.inputs.get(LABEL)

    def part(self, start: int, stop: int) -> "Draw":
        """Return the draw for images `start` to `stop` (exclusive)."""
        seeds = None if self.seeds is None else self.seeds[start:stop]
        inputs = {name: rows[start:stop] for name, rows in self.inputs.items()}
        return Draw(stop - start, seeds, inputs, self.truncation)


def images_in(feeds: Feeds) -> int:
    """Return the number of images in a batch."""
    return len(next(iter(feeds.values())))


class Inputs:
    """The inputs of one model, in order."""

    def __init__(self, inputs: Iterable[ModelInput], classes: int = 0) -> None:
        """Take the inputs, and the number of classes; 0: the model takes no labels."""
        self._inputs, self._classes = {each.name: each for each in inputs}, classes
        self._not_drawn = [(each.name, each.of_seeds) for each in self if each.of_seeds is not None]
        self._of_thread = threading.local()

    @classmethod
    def of(cls, card: pb.ModelCard) -> "Inputs":
        """Return the inputs of the model with this card."""
        inputs = [ModelInput(LATENT, np.dtype(np.float32), (card.latent_dim,))]
        if classes := len(card.class_names):
            label = ModelInput(LABEL, np.dtype(np.int64), of_seeds=lambda seeds: (seeds % classes).astype(np.int64))
            inputs.append(label)
        return cls(inputs, classes)

    def __iter__(self) -> Iterator[ModelInput]:
        """Yield each input."""
        return iter(self._inputs.values())

    def complete(self, inputs: dict[str, NDArray[Any]], seeds: NDArray[np.uint32]) -> None:
        """Add the values that follow from the seeds, of the inputs that are neither drawn nor there."""
        for name, of_seeds in self._not_drawn:
            if name not in inputs:
                inputs[name] = of_seeds(seeds)

    def probes(self, seeds: NDArray[np.uint32]) -> Draw:
        """Return the draw of these seeds alone."""
        inputs: dict[str, NDArray[Any]] = {}
        self.complete(inputs, seeds)
        return Draw(len(seeds), seeds, inputs, 1.0)

    def golden(self, images: Sequence[pb.GoldenImage]) -> Draw:
        """Return the draw of golden images.

        Raises:
            ValueError: the model has no such class.
        """
        draw = self.probes(np.array([each.seed for each in images], np.uint32))
        if self._classes:
            labels = np.array([each.label for each in images], np.int64)
            if labels.max() >= self._classes:
                raise ValueError(f"a golden image has label {labels.max()}; the card names {self._classes} classes")
            draw.inputs[LABEL] = labels
        return draw

    def timed(self, count: int) -> Draw:
        """Return the draw of images to time: of the last class, which a model of fewer classes fails to make."""
        return self.probes(np.full(count, max(0, self._classes - 1), np.uint32))

    def feeds(self, draws: list[Draw]) -> Feeds:
        """Return the inputs for one batch of all draws, in order."""
        feeds: Feeds = {}
        for name, each in self._inputs.items():
            if each.drawn:
                feeds[name] = self._drawn(each, draws)
            elif len(draws) == 1:
                feeds[name] = draws[0].inputs[name]
            else:
                feeds[name] = np.concatenate([draw.inputs[name] for draw in draws])
        return feeds

    def shapes(self, count: int) -> str:
        """Return the shapes of a batch, as TensorRT's profiles take them: "latent:8x100,label:8"."""
        return ",".join(f"{each.name}:{'x'.join(map(str, (count, *each.shape)))}" for each in self)

    def mismatch(self, found: Mapping[str, tuple[str, list[Any]]]) -> str:
        """Return what is wrong with the inputs of a file, or nothing.

        Args:
            found: onnxruntime's type and shape of each input, by name.
        """
        wanted = {each.name: (_ONNX_TYPES[each.dtype.name], 1 + len(each.shape)) for each in self}
        ranks = {name: (kind, len(shape)) for name, (kind, shape) in found.items()}
        if ranks != wanted:
            return (
                f"according to its card, the model's inputs must be {wanted} (name: type, number of dimensions); they "
                f"are {ranks}"
            )
        for name, (_, shape) in found.items():
            if isinstance(shape[0], int):
                return (
                    f"the first dimension of the input {name} is fixed at {shape[0]}; it is the number of images, "
                    "and must be dynamic: export the model with a dynamic batch dimension"
                )
            if (values := self._inputs[name].shape) != tuple(shape[1:]):
                return (
                    f"according to its card, the model takes {name}s of {_size(values)}; the shape of its input is "
                    f"{shape}"
                )
        return ""

    def _drawn(self, wanted: ModelInput, draws: list[Draw]) -> NDArray[Any]:
        rows = np.empty((sum(draw.count for draw in draws), *wanted.shape), wanted.dtype)
        # Reseeding a generator takes 5 µs an image, creating one takes 94 µs; the numbers are the same.
        random = getattr(self._of_thread, "random", None)
        if random is None:
            random = self._of_thread.random = np.random.RandomState(0)
        seed, standard_normal, size = random.seed, random.standard_normal, wanted.shape
        row = 0
        for draw in draws:
            first, row = row, row + draw.count
            given = draw.inputs.get(wanted.name)
            if given is not None or draw.seeds is None:
                rows[first:row] = given
                continue
            for index, number in enumerate(draw.seeds.tolist(), first):
                seed(number)
                rows[index] = standard_normal(size)
            if draw.truncation != 1.0:
                rows[first:row] *= np.float32(draw.truncation)
        return rows


_ONNX_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


def _size(shape: tuple[int, ...]) -> str:
    return f"{'x'.join(map(str, shape))} values" if shape else "one value"
