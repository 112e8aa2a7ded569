"""The shape and the classes of a data set's images, for networks, checkpoints, reports and model cards."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """The shape and the classes of a data set's images."""

    channels: int
    height: int
    width: int
    class_names: tuple[str, ...]
