"""Publishes a generator that was trained elsewhere: any torch module, as a version in a model repository.

python examples/bring_a_generator.py --repository models --name blobs
ganserve-server --models models

Needs torch (pip install '.[trainer]'). Replace `Generator` by your own network, and pass its weights with --weights.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export import export_module

LATENT_DIM = 32
CLASS_NAMES = ("red", "green", "blue")


class Generator(nn.Module):
    """A placeholder for your network: latents [n, 32] and labels [n] to images [n, 3, 16, 16] from -1 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(len(CLASS_NAMES), LATENT_DIM)
        self.layers = nn.Sequential(
            *(nn.Linear(LATENT_DIM, 32 * 4 * 4), nn.ReLU(), nn.Unflatten(1, (32, 4, 4))),
            *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()),
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        images: Tensor = self.layers(z * self.classes(y))
        return images


class Served(nn.Module):
    """The network with the inputs and the output that a server expects; all of it becomes part of the file."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:  # without classes: forward(self, latent)
        images = self.generator(latent, label)
        grey_levels = torch.round((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return grey_levels.permute(0, 2, 3, 1)  # [n, height, width, channels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("models"))
    parser.add_argument("--name", default="blobs", help="name of the model; each export is its next version")
    parser.add_argument("--weights", type=Path, help="a state_dict written by torch.save; default: random weights")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = Generator()
    if options.weights:
        generator.load_state_dict(torch.load(options.weights, map_location="cpu", weights_only=True))
    try:
        file = export_module(
            Served(generator), options.repository, options.name, latent_dim=LATENT_DIM, class_names=CLASS_NAMES
        )
    except TrainerError as error:
        raise SystemExit(f"error: {error}") from error
    print(file)


if __name__ == "__main__":
    main()
