"""The exponential moving average of a generator, which is evaluated and exported."""

import copy

import torch
from torch import Tensor

from ganserve_trainer.networks.generator import Generator
from ganserve_trainer.train.weights import Weights


class EMA:
    """Averages a generator's weights over training (Yazıcı et al., 2018), with a half-life counted in images.

    The half-life grows with training, to at most `half_life_images`: it is `warm_up` times the images seen, so that the
    initial weights decay fast (the ramp-up of Karras et al., 2020, ADA, which uses 0.05). 0 means no warm-up.
    """

    def __init__(self, network: Generator, half_life_images: int, warm_up: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._parameters: list[Tensor] = list(self.network.parameters())
        self._buffers = list(self.network.buffers())
        self._half_life_images = half_life_images
        self._warm_up = warm_up

    @torch.no_grad()
    def update(self, weights: Weights, batch_size: int, images_seen: int) -> None:
        """Move the average towards the weights, which were trained on `batch_size` more images."""
        half_life = float(self._half_life_images)
        if self._warm_up:
            half_life = min(half_life, self._warm_up * images_seen)
        weight = 1 - 0.5 ** (batch_size / max(half_life, 1e-8))
        torch._foreach_lerp_(self._parameters, list(weights.masters.values()), weight)
        if self._buffers:
            # Copied, not averaged: BatchNorm's running statistics are already an average.
            torch._foreach_copy_(self._buffers, weights.buffers)
