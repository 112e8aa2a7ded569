"""The settings of a training run, and the presets that fill them in."""

import dataclasses
from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what a run makes. Counts are in images shown to the discriminator.

    The optimiser's defaults are DCGAN's (Radford et al., 2015): Adam with a learning rate of 2e-4 and beta1 0.5.
    """

    preset: str
    architecture: Literal["mlp", "dcgan"]
    conditional: bool
    dataset: str = "mnist"
    latent_dim: int = 100
    width: int = 64  # channels of the generator's last hidden layer; the layer before has twice as many
    images: int = 1_200_000
    batch_size: int = 64
    learning_rate: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    dropout: float = 0.3
    ema_half_life_images: int = 20_000
    precision: Precision = "auto"
    seed: int = 0
    sample_every_images: int = 60_000


PRESETS = {
    "mlp": Settings("mlp", "mlp", conditional=False),
    "dcgan": Settings("dcgan", "dcgan", conditional=False, latent_dim=64),
    "cdcgan": Settings("cdcgan", "dcgan", conditional=True, latent_dim=64),
}
