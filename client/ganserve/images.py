"""The images of one call: pixels and everything needed to make them again."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP = 2  # pixels between the images of a sheet
_EXIF_IMAGE_DESCRIPTION = 0x010E


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch:
    """Images with their seeds and labels, and the model that made them.

    `pixels` is uint8, [count, height, width, channels]; `seeds` is None for images of your own latents, `labels` for
    those of an unconditional model. `queue_s` and `compute_s` are the server's seconds.
    """

    pixels: NDArray[np.uint8]
    seeds: tuple[int, ...] | None
    labels: tuple[int, ...] | None
    model: str
    version: int
    digest: str
    provider: str
    truncation: float
    queue_s: float
    compute_s: float

    def __len__(self) -> int:
        return len(self.pixels)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.pixels, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        count, height, width, channels = self.pixels.shape
        return f"<ImageBatch {count} of {height}x{width}x{channels} by {self.model} version {self.version}>"

    def pil(self) -> list["Image"]:
        """Return the images as PIL images, grey ("L") or colour ("RGB")."""
        from PIL import Image

        return [Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels) for pixels in self.pixels]

    def save(self, pattern: str | Path) -> list[Path]:
        """Write one file an image; its ending decides the format. The file says how to make it again.

        Args:
            pattern: a path with {index}, {seed}, {label} or {model}, such as "out/{label}-{seed}.png".

        Raises:
            ValueError: the pattern gives two images the same name, or asks for a seed or label that is not there.
        """
        paths = [Path(self._file_name(str(pattern), index)) for index in range(len(self))]
        if len(set(paths)) < len(paths):
            raise ValueError(f"{str(pattern)!r} gives two images one name; put {{index}} or {{seed}} into it")
        for index, (path, image) in enumerate(zip(paths, self.pil(), strict=True)):
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(image, path, self._identity(index))
        return paths

    def sheet(self, columns: int | None = None, *, row_names: Sequence[str] = (), scale: int = 1) -> "Image":
        """Lay the images out in one picture, row by row.

        Args:
            columns: images a row; None makes it nearly square.
            row_names: what to write in front of each row.
            scale: enlarges every pixel to a square of scale x scale.
        """
        from PIL import Image, ImageDraw, ImageFont

        count, height, width, channels = self.pixels.shape
        columns = columns or math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        height, width = height * scale, width * scale
        font = ImageFont.load_default(max(10, min(height // 2, 24)))
        margin = math.ceil(max((font.getlength(name) for name in row_names), default=-8)) + 8
        size = (margin + columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
        sheet = Image.new("L" if channels == 1 else "RGB", size)
        for index, image in enumerate(self.pil()):
            row, column = divmod(index, columns)
            place = (margin + column * (width + _GAP), row * (height + _GAP))
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
        draw = ImageDraw.Draw(sheet)
        for row, name in enumerate(row_names):
            middle = row * (height + _GAP) + height / 2
            draw.text((margin - 6, middle), name, fill="white", font=font, anchor="rm")
        return sheet

    def _file_name(self, pattern: str, index: int) -> str:
        values: dict[str, Any] = {"index": index, "model": self.model, "version": self.version}
        if self.seeds is not None:
            values["seed"] = self.seeds[index]
        if self.labels is not None:
            values["label"] = self.labels[index]
        try:
            return pattern.format_map(values)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            names = ", ".join(f"{{{name}}}" for name in values)
            raise ValueError(f"{pattern!r} cannot be filled in; these images have {names}") from error

    def _identity(self, index: int) -> str:
        return json.dumps(
            {
                "model": self.model,
                "version": self.version,
                "digest": self.digest,
                "seed": None if self.seeds is None else self.seeds[index],
                "label": None if self.labels is None else self.labels[index],
                "truncation": self.truncation,
            }
        )


def concatenate(batches: Sequence[ImageBatch]) -> ImageBatch:
    """Join the chunks of one stream."""
    first = batches[0]
    return ImageBatch(
        pixels=np.concatenate([batch.pixels for batch in batches]),
        seeds=None if first.seeds is None else tuple(seed for batch in batches for seed in batch.seeds or ()),
        labels=None if first.labels is None else tuple(label for batch in batches for label in batch.labels or ()),
        model=first.model,
        version=first.version,
        digest=first.digest,
        provider=first.provider,
        truncation=first.truncation,
        queue_s=first.queue_s,
        compute_s=sum(batch.compute_s for batch in batches),
    )


def _save(image: "Image", path: Path, identity: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if path.suffix.lower() == ".png":
        info = PngInfo()
        info.add_text("ganserve", identity)
        image.save(path, pnginfo=info)
    elif path.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        exif = Image.Exif()
        exif[_EXIF_IMAGE_DESCRIPTION] = identity
        quality: dict[str, Any] = {"lossless": True} if path.suffix.lower() == ".webp" else {"quality": 95}
        image.save(path, exif=exif, **quality)
    else:
        image.save(path)
