"""What a data set says of its images to the networks, and a run to its checkpoints, its report and its model card."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What a data set's images are: their shape and their classes."""

    channels: int
    height: int
    width: int
    class_names: tuple[str, ...]
