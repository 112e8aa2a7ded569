"""Differentiable augmentation of the real and generated images for a discriminator (DiffAugment, Zhao et al., 2020)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(images: Tensor, names: tuple[str, ...]) -> Tensor:
    """Apply the named augmentations to images [n, c, h, w] in -1…1, with torch's global random state."""
    for name in names:
        images = _AUGMENTATIONS[name](images)
    return images


def _color(images: Tensor) -> Tensor:
    """Add -0.5…0.5 to the brightness, multiply the saturation by 0…2 and the contrast by 0.5…1.5, for each image.

    Transparency, the fourth channel, stays.
    """
    if images.shape[1] == 4:
        return torch.cat([_color(images[:, :3]), images[:, 3:]], 1)
    images = images + (_uniform(images) - 0.5)
    mean = images.mean(1, keepdim=True)
    images = (images - mean) * (_uniform(images) * 2) + mean
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (_uniform(images) + 0.5) + mean


def _translation(images: Tensor) -> Tensor:
    """Shift each image by up to an eighth of each side; the uncovered pixels are black."""
    n, _, height, width = images.shape
    reach_y, reach_x = max(height // 8, 1), max(width // 8, 1)
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y), value=-1.0)
    row = torch.randint(2 * reach_y + 1, (n, 1), device=images.device) + torch.arange(height, device=images.device)
    column = torch.randint(2 * reach_x + 1, (n, 1), device=images.device) + torch.arange(width, device=images.device)
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def _cutout(images: Tensor) -> Tensor:
    """Blank a rectangle of half of each side, at a random place in each image; it may lie partly outside."""
    n, _, height, width = images.shape
    hole_y, hole_x = height // 2, width // 2
    top = torch.randint(height + 1 - hole_y % 2, (n, 1), device=images.device) - hole_y // 2
    left = torch.randint(width + 1 - hole_x % 2, (n, 1), device=images.device) - hole_x // 2
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside_y = (y >= top) & (y < top + hole_y)
    inside_x = (x >= left) & (x < left + hole_x)
    hole = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    return images.masked_fill(hole, 0.0)


def _uniform(images: Tensor) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device)


_AUGMENTATIONS = {"color": _color, "translation": _translation, "cutout": _cutout}
