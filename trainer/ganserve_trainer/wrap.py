"""Building blocks for wrappers: what generators of other projects need to be served.

A served generator takes `latent`, float32 [n, latent_dim], normally distributed, and, if it is conditional, `label`,
int64 [n]; it returns uint8 [n, height, width, channels]. `Served` gives any module these inputs, and the functions
convert what goes in and what comes out. Published by `ganserve_trainer.export.export_module`:

    served = wrap.Served(generator, lambda g, latent: wrap.to_image(g(wrap.as_map(latent))))
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

# What float values mean: from -1 to 1, from 0 to 1, or from 0 to 255.
ValueRange = Literal["tanh", "sigmoid", "byte"]
TO_GREY_LEVELS: dict[ValueRange, tuple[float, float]] = {  # added first, then multiplied
    "tanh": (1.0, 127.5),
    "sigmoid": (0.0, 255.0),
    "byte": (0.0, 1.0),
}


class Served(nn.Module):
    """A generator with the inputs and the output of a served model."""

    def __init__(self, generator: nn.Module, make: Callable[..., Tensor]) -> None:
        """Take the generator and how to call it.

        Args:
            generator: any module; its weights become part of the file.
            make: called as `make(generator, latent)`, or `make(generator, latent, label)` for a conditional model, and
                with further inputs by their names; returns the images, uint8 [n, height, width, channels].
        """
        super().__init__()
        self.generator = generator
        self.make = make

    def forward(self, latent: Tensor, label: Tensor | None = None, **others: Tensor) -> Tensor:
        """Make images, uint8 [n, height, width, channels], from latents [n, latent_dim], labels [n] and others."""
        given = (latent,) if label is None else (latent, label)
        return self.make(self.generator, *given, **others)


def as_map(latent: Tensor) -> Tensor:
    """Return latents [n, d] as feature maps of one pixel, [n, d, 1, 1], the input of a convolutional generator."""
    return latent[:, :, None, None]


def uniform(latent: Tensor) -> Tensor:
    """Turn normally distributed latents into uniformly distributed ones, from -1 to 1, of the same shape."""
    return torch.erf(latent * 0.5**0.5)


def one_hot(label: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return labels, int64 [n], as one-hot rows, [n, classes]."""
    return torch.eye(classes, dtype=dtype, device=label.device)[label]


def truncate(w: Tensor, mean: Tensor, psi: float | Tensor) -> Tensor:
    """Move the outputs of a mapping network towards their mean (Karras et al., 2019).

    Args:
        w: [n, w_dim], or [n, layers, w_dim].
        mean: [w_dim], such as StyleGAN's `mapping.w_avg`.
        psi: 1 changes nothing, 0 gives the mean; for all images, or [n], as the input `truncation` has it.
    """
    if isinstance(psi, Tensor):
        psi = psi.reshape(-1, *(1 for _ in w.shape[1:]))
    return mean + (w - mean) * psi


def to_bytes(images: Tensor, values: ValueRange = "tanh") -> Tensor:
    """Turn float images of any shape into grey levels, uint8, rounded half to even and clipped to 0…255.

    Args:
        images: the images.
        values: `tanh` for values from -1 to 1, `sigmoid` for 0 to 1, `byte` for 0 to 255.
    """
    offset, factor = TO_GREY_LEVELS[values]
    return torch.round((images + offset) * factor).clamp(0, 255).to(torch.uint8)


def channels_last(images: Tensor) -> Tensor:
    """Turn images [n, channels, height, width] into [n, height, width, channels]."""
    return images.permute(0, 2, 3, 1).contiguous()


def to_image(images: Tensor, values: ValueRange = "tanh") -> Tensor:
    """Turn float images [n, channels, height, width] into uint8 [n, height, width, channels]; see `to_bytes`."""
    return channels_last(to_bytes(images, values))


def grey_to_rgb(images: Tensor) -> Tensor:
    """Repeat the channel of grey images [n, height, width, 1], which gives [n, height, width, 3]."""
    return images.expand(-1, -1, -1, 3)
