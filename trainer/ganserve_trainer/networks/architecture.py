"""The common part of an architecture's two networks: classes, sizes and widths."""

import torch
from torch import nn

from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.settings import Settings

_LARGEST_START = 7  # the most pixels on the shorter side with which a convolutional generator begins
_MOST_WIDTHS = 8  # a convolutional layer has at most `width` times this many channels


def class_count(settings: Settings, spec: ImageSpec) -> int:
    """Return the number of classes, or of clusters that replace them, for both networks; 0 if there are neither.

    Raises:
        TrainerError: the network is conditional, but the data set has no classes.
    """
    if settings.conditional and not spec.class_names:
        raise TrainerError(
            "a conditional network needs classes, but the data set has none: use --no-conditional, or sort the "
            "images into one sub-folder for each class"
        )
    return len(spec.class_names) if settings.conditional else settings.clusters


def start_and_doublings(spec: ImageSpec) -> tuple[tuple[int, int], int]:
    """Return the size with which a convolutional generator begins, and the number of doublings, at least two.

    Raises:
        TrainerError: the images' size does not allow two doublings.
    """
    height, width, doublings = spec.height, spec.width, 0
    while height % 2 == width % 2 == 0 and (doublings < 2 or min(height, width) > _LARGEST_START):
        height, width, doublings = height // 2, width // 2, doublings + 1
    if doublings < 2 or min(height, width) < 1:
        raise TrainerError(
            "the sides of the images of a convolutional network must be multiples of 4; these are "
            f"{spec.height}x{spec.width}: use --image-size {max(4, round(spec.height / 4) * 4)}, or --preset mlp"
        )
    return (height, width), doublings


def channel_widths(width: int, count: int) -> list[int]:
    """Return the channels of `count` layers, from the image inwards: each has twice as many as the one before it."""
    return [width * min(2**layer, _MOST_WIDTHS) for layer in range(count)]


def product(shape: tuple[int, ...]) -> int:
    """Return the number of values of a tensor of this shape."""
    return int(torch.Size(shape).numel())


def parameter_count(network: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
