"""Contact sheets, and interpolations between latents."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

from ganserve_trainer.files import replace_atomically


def save_contact_sheet(images: Tensor, columns: int, path: Path, names: Sequence[str] = ()) -> None:
    """Write images in -1…1, [n, channels, height, width], as one PNG, row by row, with a name before each row.

    Transparent pixels become white.
    """
    images = images.float().cpu()
    if images.shape[1] == 4:
        images = torch.lerp(torch.ones_like(images[:, :3]), images[:, :3], (images[:, 3:] + 1) / 2)
    grid = make_grid(images, nrow=columns, normalize=True, value_range=(-1, 1))
    with replace_atomically(path) as file:
        if names:
            _named(to_pil_image(grid), names).save(file, format="png")
        else:
            save_image(grid, file, format="png")


def _named(sheet: Image.Image, names: Sequence[str]) -> Image.Image:
    """Add a column with the name of each row, cut to 20 characters."""
    row = sheet.height / len(names)
    font = ImageFont.load_default(min(max(row / 3, 8), row))
    short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
    margin = math.ceil(max(font.getlength(name) for name in short)) + 4
    wide = Image.new("RGB", (margin + sheet.width, sheet.height))
    wide.paste(sheet, (margin, 0))
    draw = ImageDraw.Draw(wide)
    for index, name in enumerate(short):
        draw.text((2, (index + 0.5) * row), name, "white", font, anchor="lm")
    return wide


def save_interpolations(
    generate: Callable[[Tensor, Tensor | None], Tensor],
    latent_dim: int,
    path: Path,
    *,
    label: Tensor | None = None,
    rows: int = 10,
    columns: int = 12,
    seed: int = 0,
) -> None:
    """Write spherical interpolations from one latent to another, one per row.

    Args:
        generate: the generator: maps latents [n, latent_dim] and labels [n], or None, to images in -1…1.
        latent_dim: the number of values in a latent.
        path: the path of the PNG.
        label: the class of each row, [rows], which then determines the number of rows; None for an unconditional
            generator.
        rows: the number of interpolations.
        columns: the number of images in an interpolation, including both ends.
        seed: the seed of the ends, which are drawn on the CPU.
    """
    rows = rows if label is None else len(label)
    start, end = torch.randn(2, rows, 1, latent_dim, generator=torch.Generator().manual_seed(seed))
    latent = slerp(start, end, torch.linspace(0, 1, columns)[:, None]).flatten(0, 1)
    if label is not None:
        latent = latent.to(label.device)
    with torch.no_grad():
        images = generate(latent, None if label is None else label.repeat_interleave(columns))
    save_contact_sheet(images, columns, path)


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Interpolate from `start` to `end`, [..., latent_dim], along the great circle (White, 2016).

    Share 0 is `start`, and share 1 is `end`.

    A straight line would pass through latents shorter than any that the generator was trained on.
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1).clamp(-1, 1)[..., None]
    angle = cosine.acos()
    # sin(x)/sin(angle), without dividing zero by zero if both ends point in the same direction.
    parallel = angle.sin() < 1e-6
    divisor = torch.where(parallel, 1.0, angle.sin())
    return torch.where(
        parallel,
        torch.lerp(start, end, share.expand_as(cosine + share)),
        ((1 - share) * angle).sin() / divisor * start + (share * angle).sin() / divisor * end,
    )
