"""What a server tells about its models."""

import operator
from dataclasses import dataclass, field
from typing import Any

from ganserve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class QualityMetric:
    """One measured figure of a model, and how it was measured.

    >>> client.model("cdcgan-mnist").metrics[0].name
    'label_accuracy'
    """

    name: str
    value: float
    method: str


@dataclass(frozen=True, slots=True)
class Model:
    """One version of a model, as its card describes it. `card` holds all of the card, with JSON's types.

    >>> model = client.model("cdcgan-fashion-mnist")
    >>> model.label("Sneaker"), model.dataset
    (7, 'fashion-mnist')
    """

    name: str
    version: int
    versions: tuple[int, ...]  # all that the server has, ascending
    digest: str
    provider: str
    architecture: str
    dataset: str
    latent_dim: int
    height: int
    width: int
    channels: int
    class_names: tuple[str, ...]  # empty for an unconditional model
    metrics: tuple[QualityMetric, ...]
    card: dict[str, Any] = field(repr=False)

    @property
    def conditional(self) -> bool:
        """Whether images have labels."""
        return bool(self.class_names)

    def label(self, name: str | int) -> int:
        """Return the index of a class, given its index or its name.

        Raises:
            InvalidRequestError: the model has no such class.
        """
        if isinstance(name, str):
            if name in self.class_names:
                return self.class_names.index(name)
        elif 0 <= name < len(self.class_names):
            return operator.index(name)
        raise InvalidRequestError(f"model {self.name} has no class {name!r}; it has {', '.join(self.class_names)}")
