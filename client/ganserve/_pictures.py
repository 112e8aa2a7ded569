"""Writes pictures as files: images, sheets and animations, with their provenance as metadata."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageDraw, ImageFont

from ganserve import _formats
from ganserve.errors import InvalidRequestError
from ganserve.provenance import Provenance

_GAP = 2  # pixels between the images of a sheet
SHORTEST_FRAME_MS = 20  # browsers show shorter frames for 100 ms
LONGEST_FRAME_MS = 655_350  # a GIF counts hundredths of a second in 16 bits


class Sheet(Image.Image):
    """A PIL image of several images, which `save` writes with its provenance. A modified copy has no provenance."""

    @classmethod
    def of(cls, image: Image.Image, provenance: Provenance) -> "Sheet":
        """Make a sheet from an image and its provenance."""
        sheet = cls()
        sheet.__setstate__(image.__getstate__())
        # Pillow keeps the text chunks of a PNG that it has read here.
        sheet.info[_formats.PNG_KEYWORD] = provenance.to_json()
        return sheet

    def save(
        self,
        fp: str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes],
        format: str | None = None,
        *,
        provenance: bool = True,
        **params: Any,
    ) -> None:
        """Write the sheet as PIL.Image.Image.save does; by default, JPEG has quality 95 and WebP is lossless.

        Args:
            fp: a path or an open file.
            format: Pillow's name of the format; None takes the format of the path's extension.
            provenance: whether to write how to make the images again, into PNG, JPEG, WebP, GIF and TIFF.
            params: parameters of Pillow's writer of the format. Your own metadata replaces the provenance.

        Raises:
            ValueError: no format with this extension can be written, or it has no alpha and the sheet has.
            OSError: the file can't be written.
        """
        if isinstance(fp, str | bytes | os.PathLike):
            format = format or format_of(os.fsdecode(fp))
        arguments = _formats.arguments(format or "", self, self.info[_formats.PNG_KEYWORD] if provenance else None)
        super().save(fp, format, **{**arguments, **params})


def format_of(name: str) -> str:
    """Return Pillow's name of the format of a file name, or of an extension alone.

    Raises:
        ValueError: no format that can be written has this extension.
    """
    ending = os.path.splitext(name)[1] or name
    pillow_format = Image.registered_extensions().get(ending.lower())
    if pillow_format not in Image.SAVE:
        raise InvalidRequestError(
            f"{name!r} does not have the extension of a picture; the known extensions are "
            f"{', '.join(_formats.EXTENSIONS)} and, without provenance in the file, the others that Pillow writes"
        )
    return pillow_format


def write(image: Image.Image, target: Path | IO[bytes], provenance: Provenance | None, kind: str | None) -> None:
    """Write one image in the format `kind`, or in the format of the path's extension. Creates missing folders.

    Raises:
        ValueError: the format cannot be written, or has no alpha and the image has.
    """
    pillow_format = _format(target, kind)
    arguments = _formats.arguments(pillow_format, image, None if provenance is None else provenance.to_json())
    image.save(_opened(target), pillow_format, **arguments)


def lay_out(images: Sequence[Image.Image], columns: int, row_names: Sequence[str], scale: int) -> Image.Image:
    """Arrange images of the same size and mode in one image, row by row; see ImageBatch.sheet."""
    width, height, columns = images[0].width * scale, images[0].height * scale, min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(max(10, min(height // 2, 24)))
    margin = math.ceil(max((font.getlength(name) for name in row_names), default=-8)) + 8
    size = (margin + columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
    sheet = Image.new(images[0].mode, size)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(enlarge(image, scale), (margin + column * (width + _GAP), row * (height + _GAP)))
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_names):
        middle = row * (height + _GAP) + height / 2
        draw.text((margin - 6, middle), name, fill="white", font=font, anchor="rm")
    return sheet


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """Enlarge every pixel to a square of scale x scale."""
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def animate(
    frames: Sequence[Image.Image],
    target: Path | IO[bytes],
    kind: str | None,
    frame_ms: int,
    scale: int,
    provenance: Provenance | None,
) -> None:
    """Write an animation that loops forever; see ImageBatch.gif.

    Raises:
        ValueError: the format is neither GIF nor WebP, or lacks the alpha of the frames, or the frames are too short.
    """
    if kind is None and isinstance(target, Path):
        pillow_format, wrong = (
            target.suffix.removeprefix("."),
            f"{str(target)!r} must end in {_formats.ANIMATED_EXTENSIONS}",
        )
    else:
        pillow_format, wrong = (
            str(kind),
            f"format is {kind!r}; it must be {_formats.in_words(_formats.ANIMATED)}",
        )
    if (pillow_format := pillow_format.upper()) not in _formats.ANIMATED:
        raise InvalidRequestError(wrong)
    text = None if provenance is None else provenance.to_json()
    arguments = _formats.arguments(pillow_format, frames[0], text, _formats.ANIMATED)
    if pillow_format == "GIF":
        frames = [_to_palette(frame) for frame in frames]
    first, *rest = (enlarge(frame, scale) for frame in frames)
    file = _opened(target)
    first.save(file, pillow_format, save_all=True, append_images=rest, duration=frame_ms, loop=0, **arguments)


def _format(target: Path | IO[bytes], kind: str | None) -> str:
    if kind is None and isinstance(target, Path):
        return format_of(str(target))
    Image.init()  # otherwise Pillow knows only the formats that it has used
    if (kind or "").upper() not in Image.SAVE:
        raise InvalidRequestError(
            f"format is {kind!r}; it must be {', '.join(_formats.FORMATS)}, or another that Pillow writes"
        )
    return str(kind).upper()


def _opened(target: Path | IO[bytes]) -> Path | IO[bytes]:
    """Create the folders of a path; return the path, or a file that is already open."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    elif not hasattr(target, "write"):
        raise TypeError(f"give a path or a file that is open for writing, not a {type(target).__name__}")
    return target


def _to_palette(image: Image.Image) -> Image.Image:
    """Reduce a colour image to the 256 colours of a GIF frame; a grey image has at most 256 levels anyway.

    Each frame has its own palette, refined by k-means, without dithering. On smooth 64x64 pictures this has 31.0 dB;
    Pillow's default has 28.1 dB, one palette for all frames 27.8 dB, and one palette with dithering, which would
    flicker, 26.3 dB.
    """
    if image.mode == "L":
        return image
    return image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
