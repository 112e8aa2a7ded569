"""Generators and discriminators. A generator ends in tanh, a discriminator in one logit an image.

Generators are `latent [n, latent_dim] (, label [n]) -> image [n, channels, height, width]` in -1…1;
discriminators are `image (, label) -> logit [n]`. The number of classes is 0 for an unconditional network, which takes
no label.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.networks.layers import (
    FlattenPixels,
    FromImage,
    MinibatchDiscrimination,
    MinibatchStdDev,
    ProgressiveDiscriminator,
    ProgressiveGenerator,
    SelfAttention,
    ToImage,
    UnflattenPixels,
)
from ganserve_trainer.settings import MINIBATCH_GROUPS, Settings

_LEAK = 0.2  # LeakyReLU's negative slope (Radford et al., 2015)
_LARGEST_START = 7  # pixels a side that a convolutional generator begins with
_MOST_WIDTHS = 8  # a convolutional layer has at most this many times `width` channels


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What a data set's images are: their shape and their classes."""

    channels: int
    height: int
    width: int
    class_names: tuple[str, ...]


class Generator(nn.Module):
    """Layers over the latent, joined with the one-hot label if it is conditional.

    One with clusters takes no label: the latent's first value decides the cluster, which is joined in its place.
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
        """Tell the cluster of each latent, int64 [n]: between which bounds its first value lies."""
        return (latent[:, :1] > self.bounds).sum(1)

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Make images in -1…1, [n, channels, height, width]."""
        if self.clustered:
            label = self.cluster(latent)
        if label is not None:
            latent = torch.cat([latent, one_hot(label, self.classes, latent)], dim=1)
        image: Tensor = self.layers(latent)
        return image

    def grow_to(self, images_seen: int) -> None:
        """Set the resolution that a progressive generator has after so many images; others have only one."""
        if isinstance(self.layers, ProgressiveGenerator):
            self.layers.grow_to(images_seen)


class Discriminator(nn.Module):
    """A trunk from images to features, and a head from features to a logit.

    A conditional one sees the label as one more image channel a class (Mirza & Osindero, 2014), or as the projection
    of its features on an embedding of the label (Miyato & Koyama, 2018).
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, embedding: nn.Module | None, label_channels: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.embedding = embedding
        self.label_channels = label_channels

    def features(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the last layer before the logit, [n, f]."""
        if self.label_channels:
            assert label is not None
            planes = one_hot(label, self.label_channels, image)[:, :, None, None].expand(-1, -1, *image.shape[2:])
            image = torch.cat([image, planes], dim=1).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.trunk(image)
        return features

    def judge(self, features: Tensor, label: Tensor | None = None) -> Tensor:
        """Judge by the features; [n] logits, high for real."""
        logit: Tensor = self.head(features).squeeze(1)
        if self.embedding is not None:
            assert label is not None
            logit = logit + (features * self.embedding(label)).sum(1)
        return logit.float()

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Judge images; [n] logits, high for real."""
        return self.judge(self.features(image, label), label)

    def grow_to(self, images_seen: int) -> None:
        """Set the resolution that a progressive discriminator has after so many images."""
        if isinstance(self.trunk, ProgressiveDiscriminator):
            self.trunk.grow_to(images_seen)


def one_hot(label: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return the labels as one-hot rows, [n, classes], with the type and the device of `like`."""
    return torch.eye(classes, dtype=like.dtype, device=like.device)[label]


def build_generator(settings: Settings, spec: ImageSpec) -> Generator:
    """Build the generator that the settings name, with fresh weights.

    Raises:
        TrainerError: the architecture cannot make images of that shape, or there are no classes to condition on.
    """
    classes = _classes(settings, spec)
    inputs = settings.latent_dim + classes
    layers: nn.Module
    if settings.architecture == "mlp":
        layers = _mlp_generator(inputs, settings.width, spec)
    else:
        start, doublings = _doublings(spec)
        if settings.architecture == "dcgan":
            widths = _widths(settings.width, doublings)
            layers = _dcgan_generator(inputs, start, widths[::-1], spec.channels, settings)
            layers.apply(_dcgan_weights)
        else:
            widths = _widths(settings.width, doublings + 1)
            layers = ProgressiveGenerator(inputs, start, widths[::-1], spec.channels, settings.growth_images)
    return Generator(layers, classes, clustered=settings.clusters > 0)


def build_discriminator(settings: Settings, spec: ImageSpec) -> Discriminator:
    """Build the discriminator that the settings name, with fresh weights.

    Raises:
        TrainerError: as `build_generator`.
    """
    classes = _classes(settings, spec)
    label_channels = classes if settings.conditioning == "label-channels" else 0
    channels = spec.channels + label_channels
    width = settings.discriminator_width or settings.width
    group = MINIBATCH_GROUPS[settings.minibatch]
    trunk: nn.Module
    if settings.architecture == "mlp":
        trunk, features = _mlp_trunk(channels * spec.height * spec.width, width, settings)
    else:
        start, doublings = _doublings(spec)
        if settings.architecture == "dcgan":
            trunk, features = _dcgan_trunk(channels, start, _widths(width, doublings), settings)
        else:
            assert settings.minibatch != "discrimination"
            widths = _widths(width, doublings + 1)[::-1]
            trunk = ProgressiveDiscriminator(channels, start, widths, settings.growth_images, settings.minibatch, group)
            features = trunk.features
    embedding = None
    if classes and not label_channels:
        embedding = nn.Embedding(classes, features)
        nn.init.normal_(embedding.weight, 0.0, features**-0.5)
    discriminator = Discriminator(trunk, nn.Linear(features, 1), embedding, label_channels)
    if settings.spectral_norm:
        for layer in list(discriminator.modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
                spectral_norm(layer)
    return discriminator


def _classes(settings: Settings, spec: ImageSpec) -> int:
    if settings.conditional and not spec.class_names:
        raise TrainerError(
            "a conditional network needs classes, and the data set has none: take --no-conditional, "
            "or sort the images into one sub-folder a class"
        )
    return len(spec.class_names) if settings.conditional else settings.clusters


def _doublings(spec: ImageSpec) -> tuple[tuple[int, int], int]:
    """Return the size that a convolutional generator begins with, and how often it doubles it (at least twice)."""
    height, width, doublings = spec.height, spec.width, 0
    while height % 2 == width % 2 == 0 and (doublings < 2 or min(height, width) > _LARGEST_START):
        height, width, doublings = height // 2, width // 2, doublings + 1
    if doublings < 2 or min(height, width) < 1:
        raise TrainerError(
            f"a convolutional network makes images whose sides are multiples of 4; these are "
            f"{spec.height}x{spec.width}: take --image-size {max(4, round(spec.height / 4) * 4)}, or --preset mlp"
        )
    return (height, width), doublings


def _widths(width: int, count: int) -> list[int]:
    """Return the channels of `count` layers, the one next to the image first, each with twice as many as the last."""
    return [width * min(2**layer, _MOST_WIDTHS) for layer in range(count)]


def _mlp_generator(inputs: int, width: int, spec: ImageSpec) -> nn.Sequential:
    layers: list[nn.Module] = []
    for outputs in (4 * width, 8 * width, 16 * width):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU(_LEAK)]
        inputs = outputs
    shape = (spec.channels, spec.height, spec.width)
    return nn.Sequential(*layers, nn.Linear(inputs, _product(shape)), nn.Tanh(), nn.Unflatten(1, shape))


def _mlp_trunk(inputs: int, width: int, settings: Settings) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = [nn.Flatten()]
    for outputs in (8 * width, 4 * width):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(_LEAK), *_dropout(settings)]
        inputs = outputs
    return _with_minibatch_layer(layers, inputs, settings)


def _dcgan_generator(
    inputs: int, start: tuple[int, int], widths: list[int], image_channels: int, settings: Settings
) -> nn.Sequential:
    """A hidden dense layer, dense to a few pixels, then transposed convolutions that each double the size."""
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
        nn.Linear(inputs, _product(first), bias=False),
        nn.BatchNorm1d(_product(first)),
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


def _dcgan_trunk(
    channels: int, start: tuple[int, int], widths: list[int], settings: Settings
) -> tuple[nn.Sequential, int]:
    """Strided convolutions that each halve the size, then a hidden dense layer; PyTorch's own first weights.

    DCGAN's small ones leave a discriminator without BatchNorm almost blind to the label at first.
    """
    layers: list[nn.Module] = []
    for index, outputs in enumerate(widths):
        layers += [
            nn.Conv2d(channels, outputs, 4, stride=2, padding=1) if index else FromImage(channels, outputs),
            nn.LeakyReLU(_LEAK),
            *_dropout(settings),
        ]
        if settings.attention and index == 0:
            layers.append(SelfAttention(outputs))
        channels = outputs
    if settings.minibatch == "stddev":
        layers.append(MinibatchStdDev(MINIBATCH_GROUPS["stddev"]))
        channels += 1
    layers.append(FlattenPixels())
    features = _product((channels, *start))
    if settings.dense_width:
        layers += [nn.Linear(features, settings.dense_width), nn.LeakyReLU(_LEAK), *_dropout(settings)]
        features = settings.dense_width
    if settings.minibatch == "discrimination":
        return _with_minibatch_layer(layers, features, settings)
    return nn.Sequential(*layers), features


def _with_minibatch_layer(layers: list[nn.Module], features: int, settings: Settings) -> tuple[nn.Sequential, int]:
    """Close a trunk whose features are [n, f] with what the settings name."""
    group = MINIBATCH_GROUPS[settings.minibatch]
    if settings.minibatch == "stddev":
        return nn.Sequential(*layers, MinibatchStdDev(group)), features + 1
    if settings.minibatch == "discrimination":
        layer = MinibatchDiscrimination(features, group)
        return nn.Sequential(*layers, layer), features + layer.kernels
    return nn.Sequential(*layers), features


def _dropout(settings: Settings) -> list[nn.Module]:
    return [nn.Dropout(settings.dropout)] if settings.dropout else []


def _dcgan_weights(layer: nn.Module) -> None:
    """Draw convolutions from N(0, 0.02) and BatchNorm's scales from N(1, 0.02) (Radford et al., 2015)."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


def _product(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def parameter_count(network: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
