"""Three generators with random weights, to compare speed between machines and between servers.

mlp28      100-256-512-1024-784, 28x28 grey
cdcgan28   110-256x7x7-128-1, conditional, 28x28 grey
dcgan64    the generator of DCGAN's paper with 64 channels next to the image, 64x64 RGB
"""

import tempfile
from pathlib import Path

import torch

from ganserve_trainer.data.datasets import Dataset
from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.export.publish import export
from ganserve_trainer.settings import from_preset
from ganserve_trainer.train.checkpoints import Checkpoint, save_checkpoint
from ganserve_trainer.train.run import Run

_SHAPES = {
    "mlp28": ("mlp", {"width": 64, "latent_dim": 100}, ImageSpec(1, 28, 28, ())),
    "cdcgan28": (
        "cdcgan",
        {"width": 128, "latent_dim": 100, "dense_width": 0},
        ImageSpec(1, 28, 28, tuple("0123456789")),
    ),
    "dcgan64": ("dcgan", {"width": 64, "latent_dim": 100, "dense_width": 0}, ImageSpec(3, 64, 64, ())),
}
NAMES = tuple(_SHAPES)


def checkpoint_of(name: str) -> Checkpoint:
    """Return the checkpoint of one of the three models, with its initial weights."""
    preset, changes, spec = _SHAPES[name]
    settings = from_preset(preset, {**changes, "batch_size": 2, "precision": "fp32"})
    images = torch.zeros(2, spec.channels, spec.height, spec.width, dtype=torch.uint8)
    dataset = Dataset(name, images, torch.zeros(2, dtype=torch.int64), spec)
    return Run(settings, dataset, torch.device("cpu")).checkpoint()


def publish(repository: Path) -> None:
    """Publish all three models, as the trainer publishes any model."""
    for name in NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            save_checkpoint(checkpoint_of(name), Path(scratch))
            export(Path(scratch), repository, name)
