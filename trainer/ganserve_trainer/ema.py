"""The exponential moving average of a generator: what is evaluated and exported."""

import copy

import torch
from torch import nn


class EMA:
    """Averages a generator's weights over training (Yazıcı et al., 2018), with a half-life counted in images.

    The half-life grows with training at first, to at most `half_life_images` (Karras et al., 2020, ADA's ramp-up of
    0.05), so that the random start is soon forgotten.
    """

    _RAMP_UP = 0.05

    def __init__(self, network: nn.Module, half_life_images: int) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._half_life_images = half_life_images

    @torch.no_grad()
    def update(self, network: nn.Module, batch_size: int, images_seen: int) -> None:
        """Move the average towards `network`, which has been trained on `batch_size` more images."""
        half_life = min(self._half_life_images, self._RAMP_UP * images_seen)
        weight = 1 - 0.5 ** (batch_size / max(half_life, 1e-8))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), weight)
        # Copied, not averaged: BatchNorm's running statistics are already an average.
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
