"""Discriminators: `image [n, channels, height, width] (, label [n]) -> logit [n]`, high for real.

A discriminator without classes takes no label.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.networks.architecture import channel_widths, class_count, product, start_and_doublings
from ganserve_trainer.networks.layers import (
    LEAK,
    FlattenPixels,
    FromImage,
    MinibatchDiscrimination,
    MinibatchStdDev,
    ProgressiveDiscriminator,
    SelfAttention,
)
from ganserve_trainer.settings import MINIBATCH_GROUPS, Settings
from ganserve_trainer.wrap import one_hot


class Discriminator(nn.Module):
    """A trunk from images to features, and a head from features to a logit.

    A conditional discriminator gets the label as additional image channels, one for each class (Mirza & Osindero,
    2014), or as the projection of its features on an embedding of the label (Miyato & Koyama, 2018).
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, embedding: nn.Module | None, label_channels: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.embedding = embedding
        self.label_channels = label_channels

    def features(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the features of images, [n, f]: the last layer before the logit."""
        if self.label_channels:
            assert label is not None
            planes = one_hot(label, self.label_channels, image.dtype)[:, :, None, None].expand(-1, -1, *image.shape[2:])
            image = torch.cat([image, planes], dim=1).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.trunk(image)
        return features

    def judge(self, features: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the logits [n] for features, high for real."""
        logit: Tensor = self.head(features).squeeze(1)
        if self.embedding is not None:
            assert label is not None
            logit = logit + (features * self.embedding(label)).sum(1)
        return logit.float()

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the logits [n] for images, high for real."""
        return self.judge(self.features(image, label), label)

    def grow_to(self, images_seen: int) -> None:
        """Set a progressive discriminator's resolution for the number of images seen."""
        if isinstance(self.trunk, ProgressiveDiscriminator):
            self.trunk.grow_to(images_seen)


def build_discriminator(settings: Settings, spec: ImageSpec) -> Discriminator:
    """Build the discriminator of the settings, with initial weights.

    Raises:
        TrainerError: as `build_generator`.
    """
    classes = class_count(settings, spec)
    label_channels = classes if settings.conditioning == "label-channels" else 0
    channels = spec.channels + label_channels
    width = settings.discriminator_width or settings.width
    group = MINIBATCH_GROUPS[settings.minibatch]
    trunk: nn.Module
    if settings.architecture == "mlp":
        trunk, features = _mlp_trunk(channels * spec.height * spec.width, width, settings)
    else:
        start, doublings = start_and_doublings(spec)
        if settings.architecture == "dcgan":
            trunk, features = _dcgan_trunk(channels, start, channel_widths(width, doublings), settings)
        else:
            assert settings.minibatch != "discrimination"
            widths = channel_widths(width, doublings + 1)[::-1]
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


def lower_layers(discriminator: Discriminator, count: int) -> set[str]:
    """Return the names of the weights in the lowest layers of the trunk that have any: those to freeze (FreezeD).

    Raises:
        TrainerError: the trunk has no more than `count` such layers.
    """
    layers = [name for name, layer in discriminator.trunk.named_children() if list(layer.parameters())]
    if count and count >= len(layers):
        raise TrainerError(
            f"freeze_discriminator is {count}, but the discriminator has {len(layers)} layers: freeze fewer than that"
        )
    prefixes = tuple(f"trunk.{name}." for name in layers[:count])
    return {name for name, _ in discriminator.named_parameters() if name.startswith(prefixes)}


def _mlp_trunk(inputs: int, width: int, settings: Settings) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = [nn.Flatten()]
    for outputs in (8 * width, 4 * width):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(LEAK), *_dropout(settings)]
        inputs = outputs
    return _with_minibatch_layer(layers, inputs, settings)


def _dcgan_trunk(
    channels: int, start: tuple[int, int], widths: list[int], settings: Settings
) -> tuple[nn.Sequential, int]:
    """Build strided convolutions that each halve the size, then a hidden dense layer, with PyTorch's initial weights.

    With DCGAN's small initial weights, a discriminator without BatchNorm is almost blind to the label at first.
    """
    layers: list[nn.Module] = []
    for index, outputs in enumerate(widths):
        layers += [
            nn.Conv2d(channels, outputs, 4, stride=2, padding=1) if index else FromImage(channels, outputs),
            nn.LeakyReLU(LEAK),
            *_dropout(settings),
        ]
        if settings.attention and index == 0:
            layers.append(SelfAttention(outputs))
        channels = outputs
    if settings.minibatch == "stddev":
        layers.append(MinibatchStdDev(MINIBATCH_GROUPS["stddev"]))
        channels += 1
    layers.append(FlattenPixels())
    features = product((channels, *start))
    if settings.dense_width:
        layers += [nn.Linear(features, settings.dense_width), nn.LeakyReLU(LEAK), *_dropout(settings)]
        features = settings.dense_width
    if settings.minibatch == "discrimination":
        return _with_minibatch_layer(layers, features, settings)
    return nn.Sequential(*layers), features


def _with_minibatch_layer(layers: list[nn.Module], features: int, settings: Settings) -> tuple[nn.Sequential, int]:
    """Append the minibatch layer of the settings to a trunk with features [n, f]; return the trunk and its features."""
    group = MINIBATCH_GROUPS[settings.minibatch]
    if settings.minibatch == "stddev":
        return nn.Sequential(*layers, MinibatchStdDev(group)), features + 1
    if settings.minibatch == "discrimination":
        layer = MinibatchDiscrimination(features, group)
        return nn.Sequential(*layers, layer), features + layer.kernels
    return nn.Sequential(*layers), features


def _dropout(settings: Settings) -> list[nn.Module]:
    return [nn.Dropout(settings.dropout)] if settings.dropout else []
