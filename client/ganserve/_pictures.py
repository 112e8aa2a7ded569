"""Pictures as files: sheets and animations, with their provenance as metadata."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ganserve.provenance import EXIF_IMAGE_DESCRIPTION, PNG_KEYWORD, Provenance

_GAP = 2  # pixels between the images of a sheet
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff")
WITH_PROVENANCE = ("PNG", "JPEG", "WEBP", "GIF", "TIFF")  # Pillow's names of the formats that have a place for it
_SHORTEST_FRAME_MS = 20  # browsers show shorter frames for 100 ms


class Sheet(Image.Image):
    """A PIL image of several images, which `save` writes with its provenance. A changed copy of it has none."""

    @classmethod
    def of(cls, image: Image.Image, provenance: Provenance) -> "Sheet":
        """Make one of an image."""
        sheet = cls()
        sheet.__setstate__(image.__getstate__())
        # Where pillow keeps the text of a PNG that it has read.
        sheet.info[PNG_KEYWORD] = provenance.to_json()
        return sheet

    def save(
        self,
        fp: str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes],
        format: str | None = None,
        *,
        provenance: bool = True,
        **params: Any,
    ) -> None:
        """Write it as PIL.Image.Image.save does, JPEG in quality 95 and WebP lossless unless asked otherwise.

        Args:
            fp: a path or an open file.
            format: None takes the path's ending.
            provenance: writes how to make these images again, into PNG, JPEG, WebP, GIF and TIFF.
            params: of pillow's writer of the format. Metadata of your own in them replaces the provenance.

        Raises:
            ValueError: the ending is of no format that can be written.
            OSError: the file can't be written.
        """
        ending = ""
        if isinstance(fp, str | bytes | os.PathLike):
            ending = os.path.splitext(os.fsdecode(fp))[1]
            format = format or format_of(os.fsdecode(fp))
        arguments = _arguments(format or ending, self.info[PNG_KEYWORD] if provenance else None)
        super().save(fp, format, **{**arguments, **params})


def format_of(name: str) -> str:
    """Return Pillow's name of the format that a file name, or an ending alone, is of.

    Raises:
        ValueError: it is of none that can be written.
    """
    ending = os.path.splitext(name)[1] or name
    pillow_format = Image.registered_extensions().get(ending.lower())
    if pillow_format not in Image.SAVE:
        raise ValueError(
            f"{name!r} ends like no picture; the known endings are {', '.join(ENDINGS)} and, without provenance in the "
            "file, the others that Pillow writes"
        )
    return pillow_format


def write(image: Image.Image, target: Path | IO[bytes], provenance: Provenance | None, kind: str | None) -> None:
    """Write one image as `kind`, or as a path's ending says. Missing folders are made.

    Raises:
        ValueError: it is of no format that can be written.
    """
    pillow_format = _format(target, kind)
    arguments = _arguments(pillow_format, None if provenance is None else provenance.to_json())
    image.save(_opened(target), pillow_format, **arguments)


def lay_out(images: Sequence[Image.Image], columns: int, row_names: Sequence[str], scale: int) -> Image.Image:
    """Put images of one size and mode into one, row by row, on black; see ImageBatch.sheet."""
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
    """Make every pixel a square of scale x scale."""
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def animate(
    frames: Sequence[Image.Image],
    target: Path | IO[bytes],
    kind: str | None,
    frame_ms: int,
    scale: int,
    provenance: Provenance | None,
) -> None:
    """Write an endless animation; see ImageBatch.gif.

    Raises:
        ValueError: it would neither be a GIF nor WebP, or the frames are too short.
    """
    if kind is None and isinstance(target, Path):
        pillow_format, wrong = target.suffix.removeprefix("."), f"{str(target)!r} must end in .gif or .webp"
    else:
        pillow_format, wrong = str(kind), f"format is {kind!r}; it must be GIF or WEBP"
    if (pillow_format := pillow_format.upper()) not in ("GIF", "WEBP"):
        raise ValueError(wrong)
    if frame_ms < _SHORTEST_FRAME_MS:
        raise ValueError(f"frame_ms is {frame_ms}; browsers show nothing for less than {_SHORTEST_FRAME_MS} ms")
    if pillow_format == "GIF":
        frames = [_to_palette(frame) for frame in frames]
    first, *rest = (enlarge(frame, scale) for frame in frames)
    arguments = _arguments(pillow_format, None if provenance is None else provenance.to_json())
    file = _opened(target)
    first.save(file, pillow_format, save_all=True, append_images=rest, duration=frame_ms, loop=0, **arguments)


def _format(target: Path | IO[bytes], kind: str | None) -> str:
    if kind is None and isinstance(target, Path):
        return format_of(str(target))
    Image.init()  # else only the formats that have been used are known
    if (kind or "").upper() not in Image.SAVE:
        raise ValueError(f"format is {kind!r}; it must be PNG, JPEG, WEBP, or another that Pillow writes")
    return str(kind).upper()


def _opened(target: Path | IO[bytes]) -> Path | IO[bytes]:
    """Make the folders of a path."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    elif not hasattr(target, "write"):
        raise TypeError(f"a path or a file that is open for writing is wanted, not a {type(target).__name__}")
    return target


def _to_palette(image: Image.Image) -> Image.Image:
    """Give a colour image the 256 colours a GIF frame has; grey has no more.

    A palette a frame, refined by k-means, without dithering: on smooth 64x64 pictures 31.0 dB, where pillow's own
    choice has 28.1, one palette for all frames 27.8, and that with dithering, which would flicker, 26.3.
    """
    if image.mode == "L":
        return image
    return image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)


def _arguments(format_or_ending: str, text: str | None) -> dict[str, Any]:
    """Return what pillow's writer of this format is to be told: the quality, and the text as metadata."""
    arguments: dict[str, Any] = {}
    kind = format_or_ending.lower().removeprefix(".")
    if kind in ("jpg", "jpeg"):
        arguments["quality"] = 95
    elif kind == "webp":
        arguments["lossless"] = True
    if text is None:
        return arguments
    if kind == "png":
        arguments["pnginfo"] = PngInfo()
        arguments["pnginfo"].add_text(PNG_KEYWORD, text)
    elif kind in ("jpg", "jpeg", "webp", "tif", "tiff"):
        arguments["exif"] = Image.Exif()
        arguments["exif"][EXIF_IMAGE_DESCRIPTION] = text
    elif kind == "gif":
        arguments["comment"] = text
    return arguments
