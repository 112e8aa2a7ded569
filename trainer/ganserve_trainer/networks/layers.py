"""Layers that PyTorch lacks: minibatch layers of discriminators, attention, and progressive growing."""

import itertools
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAK = 0.2  # LeakyReLU's negative slope (Radford et al., 2015)
_FEW_CHANNELS = 3


class FromImage(nn.Conv2d):
    """The convolution next to the image: has 4x4 kernels, and halves the size.

    If the image needs a gradient, it computes on blocks of 2x2 pixels: the CPU's kernels (oneDNN) are slow at gradients
    of one or three channels.
    """

    def __init__(self, image_channels: int, outputs: int) -> None:
        super().__init__(image_channels, outputs, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, c, h, w] to [n, outputs, h/2, w/2]."""
        if x.device.type != "cpu" or not x.requires_grad or self.in_channels > _FEW_CHANNELS:
            return super().forward(x)
        return F.conv2d(F.pixel_unshuffle(x, 2), _blocks(self.weight), self.bias, padding=1)


class ToImage(nn.ConvTranspose2d):
    """The transposed convolution next to the image: doubles the size. In training, computes on blocks, as FromImage."""

    def __init__(self, inputs: int, image_channels: int) -> None:
        super().__init__(inputs, image_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map [n, inputs, h, w] to [n, c, 2h, 2w]."""
        if x.device.type != "cpu" or not self.training or self.out_channels > _FEW_CHANNELS:
            return super().forward(x, output_size)
        assert self.bias is not None
        return F.pixel_shuffle(F.conv_transpose2d(x, _blocks(self.weight), padding=1), 2) + self.bias.view(-1, 1, 1)


def _blocks(weight: Tensor) -> Tensor:
    """Convert kernels of 4x4 pixels and stride 2 to kernels of 3x3 blocks: [a, c, 4, 4] to [a, 4c, 3, 3]."""
    return F.pixel_unshuffle(F.pad(weight, (1, 1, 1, 1)), 2)


class FlattenPixels(nn.Module):
    """Flattens [n, c, h, w] pixel by pixel, the memory order of convolutions (channels last), so that nothing moves."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, c, h, w] to [n, h·w·c]."""
        return x.permute(0, 2, 3, 1).flatten(1)


class UnflattenPixels(nn.Module):
    """The inverse of FlattenPixels."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape  # channels, height, width

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, h·w·c] to [n, c, h, w]."""
        channels, height, width = self.shape
        pixels: Tensor = x.unflatten(1, (height, width, channels))
        return pixels.permute(0, 3, 1, 2)

    def channels_first(self, features: Tensor) -> Tensor:
        """Reorder features [h·w·c, …] for nn.Unflatten."""
        channels, height, width = self.shape
        ordered: Tensor = features.unflatten(0, (height, width, channels)).movedim(2, 0)
        return ordered.flatten(0, 2)


class MinibatchStdDev(nn.Module):
    """Appends a channel with the standard deviation of the images' group (Karras et al., 2018, section 3).

    Groups are consecutive, so that real and generated images of one pass are never in the same group.
    """

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, c, …] to [n, c + 1, …]; n is a multiple of the group's size."""
        groups = x.float().unflatten(0, (-1, self.group))
        spread = (groups.var(1, unbiased=False) + 1e-8).sqrt().flatten(1).mean(1)
        one = spread.repeat_interleave(self.group).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return torch.cat([x, one.expand(-1, 1, *x.shape[2:])], dim=1)


class MinibatchDiscrimination(nn.Module):
    """Appends how near each image is to the rest of its group, by learnt features (Salimans et al., 2016, eq. 2)."""

    def __init__(self, inputs: int, group: int, kernels: int = 32, kernel_size: int = 5) -> None:
        super().__init__()
        self.group = group
        self.project = nn.Linear(inputs, kernels * kernel_size, bias=False)
        nn.init.normal_(self.project.weight, 0.0, 0.02)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, f] to [n, f + kernels]; n is a multiple of the group's size."""
        rows = self.project(x).float().unflatten(1, (self.kernels, -1)).unflatten(0, (-1, self.group))
        distance = (rows.unsqueeze(1) - rows.unsqueeze(2)).abs().sum(-1)  # [groups, group, group, kernels]
        nearness = torch.exp(-distance).sum(2) - 1  # without the image itself
        return torch.cat([x, nearness.flatten(0, 1).to(x.dtype)], dim=1)


class SelfAttention(nn.Module):
    """Attention of every position to every other (SAGAN, Zhang et al., 2019, section 3). Starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, max(channels // 2, 1), 1, bias=False)
        self.out = nn.Conv2d(max(channels // 2, 1), channels, 1, bias=False)
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, c, h, w] to the same shape."""
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        attention = torch.softmax(query.transpose(1, 2) @ key, dim=-1)  # [n, positions, positions]
        seen = (value @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])
        result: Tensor = x + self.strength * self.out(seen)
        return result


class _EqualizedConv(nn.Module):
    """A convolution whose weights start as N(0, 1) and are scaled on use (Karras et al., 2018, section 4.1)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = (2 / (inputs * kernel_size**2)) ** 0.5
        self.padding = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class _EqualizedLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = (2 / inputs) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class _PixelNorm(nn.Module):
    """Normalises the channels of each position to a mean square of 1 (Karras et al., 2018, section 4.2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def growth_after(images_seen: int, growth_images: int, levels: int) -> float:
    """Return the growth of a progressive network: k at resolution k, from 0 on, and a fraction while the next fades in.

    The first resolution is trained for `growth_images` images. Then each next resolution fades in for the same number,
    and is trained for the same number (Karras et al., 2018, appendix A.1).
    """
    phase = max(images_seen / growth_images - 1, 0.0)
    level = int(phase // 2)
    return min(level + min(phase - 2 * level, 1.0), levels - 1.0)


class ProgressiveGenerator(nn.Module):
    """A generator that begins at the size `start` and doubles it (PGGAN, Karras et al., 2018).

    Its images always have the full size: at a lower resolution, the pixels are repeated.
    """

    def __init__(
        self, inputs: int, start: tuple[int, int], widths: list[int], image_channels: int, growth_images: int
    ) -> None:
        super().__init__()
        first = _EqualizedLinear(inputs, widths[0] * start[0] * start[1])
        shape = nn.Unflatten(1, (widths[0], *start))
        self.blocks = nn.ModuleList(
            [nn.Sequential(_PixelNorm(), first, shape, *_conv(widths[0], widths[0]), _PixelNorm())]
        )
        for before, here in itertools.pairwise(widths):
            doubled = (nn.Upsample(scale_factor=2), *_conv(before, here), _PixelNorm())
            self.blocks.append(nn.Sequential(*doubled, *_conv(here, here), _PixelNorm()))
        self.to_image = nn.ModuleList([_EqualizedConv(width, image_channels, 1) for width in widths])
        self.growth_images = growth_images
        self.growth = 0.0

    def grow_to(self, images_seen: int) -> None:
        """Set the resolution for this number of images seen."""
        self.growth = growth_after(images_seen, self.growth_images, len(self.blocks))

    def full_size_after(self) -> int:
        """Return the number of images after which the last resolution has faded in."""
        return 2 * self.growth_images * (len(self.blocks) - 1)

    def doublings_left(self) -> int:
        """Return how often the current resolution must still double, without one that is fading in."""
        return len(self.blocks) - 1 - int(self.growth)

    def forward(self, latent: Tensor) -> Tensor:
        """Make images in -1…1 of the full size."""
        level, fade = int(self.growth), self.growth % 1
        x = latent
        for block in self.blocks[: level + 1]:
            x = block(x)
        image = self.to_image[level](x)
        if fade:
            finer = self.to_image[level + 1](self.blocks[level + 1](x))
            image = torch.lerp(_repeat(image, 1), finer, fade)
            level += 1
        return torch.tanh(_repeat(image, len(self.blocks) - 1 - level))


class ProgressiveDiscriminator(nn.Module):
    """The mirror of ProgressiveGenerator: averages full-size images down to its resolution; returns features."""

    def __init__(
        self,
        image_channels: int,
        start: tuple[int, int],
        widths: list[int],
        growth_images: int,
        minibatch: Literal["none", "stddev"],
        group: int,
    ) -> None:
        super().__init__()
        self.features = widths[0]
        extra = 1 if minibatch == "stddev" else 0
        self.last = nn.Sequential(
            *([MinibatchStdDev(group)] if extra else []),
            *_conv(widths[0] + extra, widths[0]),
            nn.Flatten(),
            _EqualizedLinear(widths[0] * start[0] * start[1], self.features),
            nn.LeakyReLU(LEAK),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*_conv(here, here), *_conv(here, coarser), nn.AvgPool2d(2))
            for coarser, here in itertools.pairwise(widths)
        )
        self.from_image = nn.ModuleList(
            nn.Sequential(_EqualizedConv(image_channels, width, 1), nn.LeakyReLU(LEAK)) for width in widths
        )
        self.growth_images = growth_images
        self.growth = 0.0

    def grow_to(self, images_seen: int) -> None:
        """Set the resolution for this number of images seen."""
        self.growth = growth_after(images_seen, self.growth_images, len(self.from_image))

    def forward(self, image: Tensor) -> Tensor:
        """Map images [n, c, h, w] to features [n, f]."""
        level, fade = int(self.growth), self.growth % 1
        top = len(self.blocks)
        coarse = _average(image, top - level)
        x = self.from_image[level](coarse)
        if fade:
            finer = self.blocks[level](self.from_image[level + 1](_average(image, top - level - 1)))
            x = torch.lerp(x, finer, fade)
        for block in reversed(self.blocks[:level]):
            x = block(x)
        features: Tensor = self.last(x)
        return features


def _conv(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return _EqualizedConv(inputs, outputs, 3), nn.LeakyReLU(LEAK)


def _repeat(image: Tensor, doublings: int) -> Tensor:
    return F.interpolate(image, scale_factor=2**doublings) if doublings else image


def _average(image: Tensor, halvings: int) -> Tensor:
    return F.avg_pool2d(image, 2**halvings) if halvings else image
