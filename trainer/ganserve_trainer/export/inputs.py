"""The inputs of an exported module: how its card describes them, and their values for seeds, as servers make them.

`export_module` takes them by the name of the argument of `forward`: a `Latent`, whose name for the first one is
`latent`, a `Label` called `label`, `Attributes` called `attributes`, and a `Truncation` called `truncation`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from ganserve._distributions import DISTRIBUTIONS
from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.errors import TrainerError

Values = dict[str, NDArray[Any]]  # by the input's name: [n, ...]

_VARIED_TRUNCATION = 0.7
_GOLDEN_RATIO = 0.618  # its multiples are spread over 0 to 1


@dataclass(frozen=True)
class Latent:
    """Random numbers, float32 [n, *shape].

    Attributes:
        shape: the shape for one image.
        distribution: "normal", "uniform" (-1 to 1), "sphere" (of radius √n for n numbers) or "truncated_normal" (-2 to
            2), from NumPy's RandomState with the image's seed.
        default_seed: a seed for all images, unless a request gives another one: noise that does not change from image
            to image.
    """

    shape: tuple[int, ...]
    distribution: str = "normal"
    default_seed: int | None = None


@dataclass(frozen=True)
class Label:
    """The class, int64 [n]; or, one-hot, float32 [n, classes]."""

    one_hot: bool = False


@dataclass(frozen=True)
class Attribute:
    """A property of images that requests can set, from `minimum` to `maximum`; if `binary`, one of the two."""

    name: str
    minimum: float = 0.0
    maximum: float = 1.0
    default: float = 0.0
    binary: bool = False


@dataclass(frozen=True)
class Attributes:
    """The attributes, float32 [n, number of attributes], in this order."""

    attributes: tuple[Attribute, ...]


@dataclass(frozen=True)
class Truncation:
    """The truncation, 0 to 2, float32 [n]; or, scalar, float32 without dimensions, for a whole batch."""

    scalar: bool = False


Input = Latent | Label | Attributes | Truncation


class Inputs:
    """All inputs of a module, in order."""

    def __init__(self, listed: Mapping[str, Input], classes: int) -> None:
        """Take the inputs by name, and the number of classes.

        Raises:
            TrainerError: a server would not know them.
        """
        self._listed, self.classes = dict(listed), classes
        first, latent = next(iter(self._listed.items()), ("", None))
        if first != "latent" or not isinstance(latent, Latent) or latent.default_seed is not None:
            raise TrainerError(
                f"the first input is {first!r}; it must be 'latent', a Latent without a default seed, from which the "
                "seed of an image makes the image"
            )
        for name, each in self._listed.items():
            kind = type(each).__name__
            if not isinstance(each, Latent) and name != kind.lower():
                raise TrainerError(f"the input {name!r} is a {kind}: call it {kind.lower()!r}")
            if isinstance(each, Latent) and each.distribution not in DISTRIBUTIONS:
                raise TrainerError(
                    f"the distribution of {name!r} is {each.distribution!r}; it must be one of "
                    f"{', '.join(DISTRIBUTIONS)}"
                )
        if ("label" in self._listed) != (classes > 0):
            raise TrainerError("give class_names if, and only if, there is an input 'label'")
        self.latent_dim = int(np.prod(latent.shape))

    @classmethod
    def plain(cls, latent_dim: int, classes: int) -> "Inputs":
        """Return `latent`, normal, float32 [n, latent_dim], and, if there are classes, `label`, int64 [n]."""
        label: dict[str, Input] = {"label": Label()} if classes else {}
        return cls({"latent": Latent((latent_dim,)), **label}, classes)

    def __iter__(self) -> Any:
        """Yield each name."""
        return iter(self._listed)

    @property
    def is_plain(self) -> bool:
        """Whether a card needs no list of them."""
        latent = self._listed["latent"]
        plain: dict[str, Input] = {"latent": Latent((self.latent_dim,)), "label": Label()}
        return latent == plain["latent"] and all(plain.get(name) == each for name, each in self._listed.items())

    def of_card(self) -> list[pb.ModelInput]:
        """Return the list in the card."""
        if self.is_plain:
            return []
        return [_of_card(name, each) for name, each in self._listed.items()]

    def dynamic(self, batch: Any) -> dict[str, dict[int, Any]]:
        """Return the dynamic dimensions of each input: the first one, which is that of the images."""
        return {name: {} if each == Truncation(scalar=True) else {0: batch} for name, each in self._listed.items()}

    def values(self, seeds: NDArray[np.int64], *, varied: bool = False) -> Values:
        """Return the values for some seeds, with attributes and truncation as in the card, or varied.

        The class of a seed is the seed modulo the number of classes.
        """
        values = {
            name: np.empty((len(seeds), *each.shape), np.float32)
            for name, each in self._listed.items()
            if isinstance(each, Latent)
        }
        for row, seed in enumerate(seeds):
            random = np.random.RandomState(seed)
            for name, rows in values.items():
                latent = self._listed[name]
                assert isinstance(latent, Latent)
                stream = random if latent.default_seed is None else np.random.RandomState(latent.default_seed)
                rows[row] = DISTRIBUTIONS[latent.distribution](stream, latent.shape)
        made: Values = dict(values)
        for name, each in self._listed.items():
            if isinstance(each, Label):
                labels = np.asarray(seeds % self.classes, np.int64)
                made[name] = (labels[:, None] == np.arange(self.classes)).astype(np.float32) if each.one_hot else labels
            elif isinstance(each, Attributes):
                columns = [_attribute(one, seeds, varied=varied) for one in each.attributes]
                made[name] = np.stack(columns, 1).astype(np.float32)
            elif isinstance(each, Truncation):
                one = np.float32(_VARIED_TRUNCATION if varied else 1)
                made[name] = np.array(one) if each.scalar else np.full(len(seeds), one)
        return made


def tensors(values: Values) -> dict[str, Tensor]:
    """Return values for torch."""
    return {name: torch.from_numpy(each) for name, each in values.items()}


def run_session(session: onnxruntime.InferenceSession, values: Values) -> NDArray[np.uint8]:
    """Make images, [n, height, width, channels]."""
    pixels: NDArray[np.uint8] = session.run(["image"], values)[0]
    return pixels


def part(values: Values, start: int, stop: int) -> Values:
    """Return the values of images `start` to `stop` (exclusive)."""
    return {name: each[start:stop] if each.ndim else each for name, each in values.items()}


def _attribute(attribute: Attribute, seeds: NDArray[np.int64], *, varied: bool) -> NDArray[Any]:
    if not varied:
        return np.full(len(seeds), attribute.default)
    share = seeds * _GOLDEN_RATIO % 1
    share = np.round(share) if attribute.binary else share
    return attribute.minimum + (attribute.maximum - attribute.minimum) * share


def _of_card(name: str, each: Input) -> pb.ModelInput:
    if isinstance(each, Latent):
        distribution = f"DISTRIBUTION_{each.distribution.upper()}"
        latent = pb.LatentInput(shape=each.shape, distribution=distribution, default_seed=each.default_seed)
        return pb.ModelInput(name=name, latent=latent)
    if isinstance(each, Label):
        return pb.ModelInput(name=name, label=pb.LabelInput(one_hot=each.one_hot))
    if isinstance(each, Truncation):
        return pb.ModelInput(name=name, truncation=pb.TruncationInput(scalar=each.scalar))
    attributes = [
        pb.Attribute(
            name=one.name,
            minimum=one.minimum,
            maximum=one.maximum,
            default_value=one.default,
            binary=one.binary,
        )
        for one in each.attributes
    ]
    return pb.ModelInput(name=name, attributes=pb.AttributesInput(attributes=attributes))
