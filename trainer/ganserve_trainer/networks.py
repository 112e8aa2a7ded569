"""Generators and discriminators. A generator ends in tanh, a discriminator in one logit an image.

Generators are `latent [n, latent_dim] (, label [n]) -> image [n, channels, height, width]` in -1…1;
discriminators are `image (, label) -> logit [n]`. The number of classes is 0 for an unconditional network, which takes
no label.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.settings import Settings

_LEAK = 0.2  # LeakyReLU's negative slope (Radford et al., 2015)


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What a data set's images are: their shape and their classes."""

    channels: int
    height: int
    width: int
    class_names: tuple[str, ...]


class Generator(nn.Module):
    """A stack of layers over the latent, joined with the one-hot label if it is conditional."""

    def __init__(self, layers: nn.Sequential, classes: int) -> None:
        super().__init__()
        self.layers = layers
        self.classes = classes

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Make images in -1…1, [n, channels, height, width]."""
        if label is not None:
            latent = torch.cat([latent, one_hot(label, self.classes, latent)], dim=1)
        image: Tensor = self.layers(latent)
        return image


class Discriminator(nn.Module):
    """A stack of layers over the image, with one more channel a class if it is conditional (Mirza & Osindero, 2014)."""

    def __init__(self, layers: nn.Sequential, classes: int) -> None:
        super().__init__()
        self.layers = layers
        self.classes = classes

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Judge images; [n] logits, high for real."""
        if label is not None:
            planes = one_hot(label, self.classes, image)[:, :, None, None].expand(-1, -1, *image.shape[2:])
            image = torch.cat([image, planes], dim=1).contiguous(memory_format=torch.channels_last)
        logit: Tensor = self.layers(image)
        return logit.squeeze(1)


def one_hot(label: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return the labels as one-hot rows, [n, classes], with the type and the device of `like`."""
    return torch.eye(classes, dtype=like.dtype, device=like.device)[label]


def build_generator(settings: Settings, spec: ImageSpec) -> Generator:
    """Build the generator that the settings name, with fresh weights.

    Raises:
        TrainerError: the architecture cannot make images of that shape.
    """
    classes = len(spec.class_names) if settings.conditional else 0
    inputs = settings.latent_dim + classes
    if settings.architecture == "mlp":
        layers = _mlp_generator(inputs, spec)
    else:
        layers = _dcgan_generator(inputs, settings.width, spec)
        layers.apply(_dcgan_weights)
    return Generator(layers, classes)


def build_discriminator(settings: Settings, spec: ImageSpec) -> Discriminator:
    """Build the discriminator that the settings name, with fresh weights."""
    classes = len(spec.class_names) if settings.conditional else 0
    channels = spec.channels + classes
    if settings.architecture == "mlp":
        layers = _mlp_discriminator(channels * spec.height * spec.width, settings.dropout)
    else:
        layers = _dcgan_discriminator(channels, settings.width, settings.dropout, spec)
        layers.apply(_dcgan_weights)
    return Discriminator(layers, classes)


def _mlp_generator(inputs: int, spec: ImageSpec) -> nn.Sequential:
    layers: list[nn.Module] = []
    for outputs in (256, 512, 1024):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU(_LEAK)]
        inputs = outputs
    shape = (spec.channels, spec.height, spec.width)
    return nn.Sequential(*layers, nn.Linear(inputs, _product(shape)), nn.Tanh(), nn.Unflatten(1, shape))


def _mlp_discriminator(inputs: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for outputs in (512, 256):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(_LEAK), nn.Dropout(dropout)]
        inputs = outputs
    return nn.Sequential(*layers, nn.Linear(inputs, 1))


def _dcgan_generator(inputs: int, width: int, spec: ImageSpec) -> nn.Sequential:
    """Dense to a quarter of the size, then two transposed convolutions that double it."""
    if spec.height % 4 or spec.width % 4:
        raise TrainerError(
            f"dcgan makes images whose sides are multiples of 4; these are {spec.height}x{spec.width}; use --preset mlp"
        )
    start = (2 * width, spec.height // 4, spec.width // 4)
    return nn.Sequential(
        nn.Linear(inputs, _product(start), bias=False),
        nn.BatchNorm1d(_product(start)),
        nn.ReLU(),
        nn.Unflatten(1, start),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, spec.channels, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def _dcgan_discriminator(channels: int, width: int, dropout: float, spec: ImageSpec) -> nn.Sequential:
    """Two strided convolutions, each of which halves the size, and a dense layer."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, stride=2, padding=1),
        nn.LeakyReLU(_LEAK),
        nn.Dropout(dropout),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.LeakyReLU(_LEAK),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(2 * width * (spec.height // 4) * (spec.width // 4), 1),
    )


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
