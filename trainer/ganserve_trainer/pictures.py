"""What a run shows: contact sheets and the curve of its losses."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from torch import Tensor
from torchvision.utils import make_grid, save_image

from ganserve_trainer.checkpoints import replace_atomically


def save_contact_sheet(images: Tensor, columns: int, path: Path) -> None:
    """Write images in -1…1, [n, channels, height, width], as one PNG, row by row."""
    grid = make_grid(images.float().cpu(), nrow=columns, normalize=True, value_range=(-1, 1))
    with replace_atomically(path) as file:
        save_image(grid, file, format="png")


def save_loss_curve(losses: list[tuple[int, float, float]], path: Path) -> None:
    """Write the two losses over images seen as a PNG."""
    images_seen, discriminator, generator = zip(*losses, strict=True) if losses else ((), (), ())
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(images_seen, discriminator, label="discriminator", linewidth=0.8)
    axes.plot(images_seen, generator, label="generator", linewidth=0.8)
    axes.set_xlabel("images seen")
    axes.set_ylabel("loss")
    axes.legend()
    with replace_atomically(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
