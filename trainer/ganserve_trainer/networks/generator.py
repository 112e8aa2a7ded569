"""Generators: `latent [n, latent_dim] (, label [n]) -> image [n, channels, height, width]` in -1…1, by a final tanh.

A generator without classes takes no label.
"""

import itertools

import torch
from torch import Tensor, nn

from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.networks.architecture import channel_widths, class_count, product, start_and_doublings
from ganserve_trainer.networks.layers import LEAK, ProgressiveGenerator, SelfAttention, ToImage, UnflattenPixels
from ganserve_trainer.settings import Settings
from ganserve_trainer.wrap import one_hot, to_image


class Generator(nn.Module):
    """Layers on the latent, which a conditional generator concatenates with the one-hot label.

    A generator with clusters takes no label: the latent's first value decides the cluster, which replaces the label.
    """

    bounds: Tensor

    def __init__(self, layers: nn.Module, classes: int, *, clustered: bool = False) -> None:
        super().__init__()
        self.layers = layers
        self.classes = classes
        self.clustered = clustered
        if clustered:
            self.register_buffer("bounds", torch.zeros(classes - 1))

    def cluster(self, latent: Tensor) -> Tensor:
        """Return the cluster of each latent, int64 [n]: the interval between bounds that holds its first value."""
        return (latent[:, :1] > self.bounds).sum(1)

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Make images in -1…1, [n, channels, height, width]."""
        if self.clustered:
            label = self.cluster(latent)
        if label is not None:
            latent = torch.cat([latent, one_hot(label, self.classes, latent.dtype)], dim=1)
        image: Tensor = self.layers(latent)
        return image

    def grow_to(self, images_seen: int) -> None:
        """Set a progressive generator's resolution for the number of images seen; other generators have only one."""
        if isinstance(self.layers, ProgressiveGenerator):
            self.layers.grow_to(images_seen)


class UInt8Generator(nn.Module):
    """A generator whose images are uint8 [n, height, width, channels], as the server returns them."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Map tanh's -1…1 to 0…255, rounded half to even."""
        return to_image(self.generator(latent, label))


def build_generator(settings: Settings, spec: ImageSpec) -> Generator:
    """Build the generator of the settings, with initial weights.

    Raises:
        TrainerError: the architecture cannot make images of this shape, or there are no classes to condition on.
    """
    classes = class_count(settings, spec)
    inputs = settings.latent_dim + classes
    layers: nn.Module
    if settings.architecture == "mlp":
        layers = _mlp_generator(inputs, settings.width, spec)
    else:
        start, doublings = start_and_doublings(spec)
        if settings.architecture == "dcgan":
            widths = channel_widths(settings.width, doublings)
            layers = _dcgan_generator(inputs, start, widths[::-1], spec.channels, settings)
            layers.apply(_dcgan_weights)
        else:
            widths = channel_widths(settings.width, doublings + 1)
            layers = ProgressiveGenerator(inputs, start, widths[::-1], spec.channels, settings.growth_images)
    return Generator(layers, classes, clustered=settings.clusters > 0)


def _mlp_generator(inputs: int, width: int, spec: ImageSpec) -> nn.Sequential:
    layers: list[nn.Module] = []
    for outputs in (4 * width, 8 * width, 16 * width):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU(LEAK)]
        inputs = outputs
    shape = (spec.channels, spec.height, spec.width)
    return nn.Sequential(*layers, nn.Linear(inputs, product(shape)), nn.Tanh(), nn.Unflatten(1, shape))


def _dcgan_generator(
    inputs: int, start: tuple[int, int], widths: list[int], image_channels: int, settings: Settings
) -> nn.Sequential:
    """Build a hidden dense layer, a dense layer to a few pixels, and transposed convolutions that double the size."""
    first = (widths[0], start[0], start[1])
    layers: list[nn.Module] = []
    if settings.dense_width:
        layers += [
            nn.Linear(inputs, settings.dense_width, bias=False),
            nn.BatchNorm1d(settings.dense_width),
            nn.ReLU(),
        ]
        inputs = settings.dense_width
    layers += [
        nn.Linear(inputs, product(first), bias=False),
        nn.BatchNorm1d(product(first)),
        nn.ReLU(),
        UnflattenPixels(first),
    ]
    for before, here in itertools.pairwise(widths):
        layers += [
            nn.ConvTranspose2d(before, here, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(here),
            nn.ReLU(),
        ]
    if settings.attention:
        layers.append(SelfAttention(widths[-1]))
    return nn.Sequential(*layers, ToImage(widths[-1], image_channels), nn.Tanh())


def _dcgan_weights(layer: nn.Module) -> None:
    """Draw convolutions from N(0, 0.02) and BatchNorm's scales from N(1, 0.02) (Radford et al., 2015)."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
