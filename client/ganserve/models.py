"""What a server tells about its models."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class QualityMetric:
    """One measured figure of a model, and how it was measured."""

    name: str
    value: float
    method: str


@dataclass(frozen=True, slots=True)
class Model:
    """One version of a model, as its card describes it. `card` holds all of the card, with JSON's types."""

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
