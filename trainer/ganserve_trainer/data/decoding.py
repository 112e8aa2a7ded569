"""Decodes images to pixels, uint8 [channels, height, width], all by the same rules.

An image is turned as its EXIF data say. Transparent pixels get the background, unless four channels are asked for.
Palettes and CMYK become RGB. Values of more than 8 bits are scaled by the range of the whole data set. Of an animation,
the first picture is taken. AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF and WebP are read.
"""

import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from ganserve_trainer.data.sources import Item
from ganserve_trainer.errors import TrainerError

Image.init()  # here, rather than in the first decoding thread
# An explicit list: Pillow would pass EPS to Ghostscript, and mistakes many other files for TGA images.
_READ: tuple[str, ...] = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_FORMATS = [name for name in _READ if name in Image.OPEN]  # AVIF: from Pillow 11.3
_AT_ONCE = 16  # images for each task of a thread: one image for each would cost a fifth of the time

Result = TypeVar("Result")
# The smallest and the largest value in the images of more than 8 bits, and whether some are floating-point numbers.
ValueRange = tuple[float, float, bool]


class _UnknownRangeError(Exception):
    """The image has more than 8 bits, and `Conversion.value_range` is not known yet."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What becomes of an image's pixels."""

    image_size: int | None
    channels: int | None  # None: 1 for a grey picture, otherwise 3
    background: tuple[int, int, int]
    value_range: ValueRange | None = None


def colour(name: str) -> tuple[int, int, int]:
    """Return the red, green and blue of a colour's name.

    Raises:
        TrainerError: there is no such colour.
    """
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise TrainerError(f"background is {name!r}; it must be a colour, such as white, black or #a0c0ff") from error


def decode_all(items: Sequence[Item], how: Conversion) -> Iterator[NDArray[np.uint8] | str | None]:
    """Decode in threads (Pillow releases the GIL), a few at a time.

    Yields:
        For each item, in order: its pixels; or why it cannot be read; or None if `value_range` is needed first.
    """
    return _in_threads(lambda item: _decode(item, how), items)


def find_range(items: Sequence[Item]) -> ValueRange:
    """Return the range of the values in the images of more than 8 bits; 0 counts as one of the values."""
    low, high, fractions = 0.0, 0.0, False
    for found in _in_threads(_range_of, items):
        if found is not None:
            low, high, fractions = min(low, found[0]), max(high, found[1]), fractions or found[2]
    return low, high, fractions


def scaling(value_range: ValueRange) -> tuple[float, float, str]:
    """Return how values become 0 to 255: offset and factor, (value - offset) * factor, and a description."""
    low, high, fractions = value_range
    if low >= -1 and high <= 1 and high > 0:
        return (-1.0, 127.5, "values of -1 to 1") if low else (0.0, 255.0, "values of 0 to 1")
    if fractions and (low < 0 or high > 255):
        return low, 255 / (high - low), f"values of {low:g} to {high:g}"
    bits = max(int(high - low).bit_length(), 8)
    return low, 2.0 ** (8 - bits), f"values of {low:g} to {high:g}, as {bits} bits"


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    threads = len(os.sched_getaffinity(0))
    waiting: deque[Future[list[Result]]] = deque()

    def several(some: Sequence[Item]) -> list[Result]:
        return [work(item) for item in some]

    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's warnings about pictures that it reads anyway
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for start in range(0, len(items), _AT_ONCE):
                waiting.append(pool.submit(several, items[start : start + _AT_ONCE]))
                if len(waiting) > threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _range_of(item: Item) -> ValueRange | None:
    try:
        content = item.read()
        if isinstance(content, bytes):
            with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
                if not opened.mode.startswith("I"):
                    return None
                content = np.asarray(opened)
        if content.dtype in (np.uint8, np.bool_):
            return None
        low, high = content.min().item(), content.max().item()
    except Exception:  # decoding says why
        return None
    return (low, high, content.dtype.kind == "f") if np.isfinite((low, high)).all() else None


def _decode(item: Item, how: Conversion) -> NDArray[np.uint8] | str | None:
    try:
        content = item.read()
        if isinstance(content, bytes):
            return _decode_file(content, how)
        return _pixels(_of_array(content, how), how)
    except _UnknownRangeError:
        return None
    except UnidentifiedImageError:
        return "not an image, or of an unsupported format"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"{error}; make it smaller first, for example by: magick {item.name} -resize 4096x4096 {item.name}"
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _decode_file(content: bytes, how: Conversion) -> NDArray[np.uint8]:
    if not content:
        raise ValueError("empty")
    size = how.image_size
    with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
        if size is not None:
            opened.draft(None, (2 * size, 2 * size))  # JPEG: decode at a reduced resolution
        deep_colour = opened.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in opened.tile)
        if opened.mode.startswith("I") and how.value_range is None:
            raise _UnknownRangeError
        picture = ImageOps.exif_transpose(opened)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if deep_colour and 0 < int(np.asarray(picture.convert("RGB")).max()) < 16:
        raise ValueError(
            "its 16-bit colours use at most 12 bits, and Pillow reads the upper 8 only: convert it to 8 bits"
        )
    if picture.mode.startswith("I"):  # Pillow's own conversion would clip to 0…255
        picture = Image.fromarray(_scaled(np.asarray(picture), how))
    return _pixels(picture, how)


def _of_array(array: NDArray[Any], how: Conversion) -> Image.Image:
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        if how.value_range is None:
            raise _UnknownRangeError
        if not np.isfinite(array).all():
            raise ValueError("some of its values are not finite")
        array = _scaled(array, how)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _scaled(values: NDArray[Any], how: Conversion) -> NDArray[np.uint8]:
    assert how.value_range is not None
    offset, factor, _ = scaling(how.value_range)
    return ((values.astype(np.float64) - offset) * factor).clip(0, 255).astype(np.uint8)


def _pixels(picture: Image.Image, how: Conversion) -> NDArray[np.uint8]:
    """Convert to the wanted channels and size."""
    if how.channels == 4:
        picture = picture.convert("RGBA")
    else:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, how.background), picture)
        picture = picture.convert("L" if how.channels == 1 or picture.mode in ("L", "1") else "RGB")
    if how.image_size is not None:
        picture = ImageOps.fit(picture, (how.image_size, how.image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    if pixels.ndim == 2:
        pixels = pixels[None] if how.channels != 3 else np.repeat(pixels[None], 3, 0)
        return np.ascontiguousarray(pixels)
    if how.channels == 4:  # invisible colours are arbitrary, and resizing makes them black
        pixels = np.where(pixels[:, :, 3:] == 0, np.array([*how.background, 0], np.uint8), pixels)
    pixels = pixels.transpose(2, 0, 1)
    grey = how.channels is None and (pixels == pixels[:1]).all()
    return np.ascontiguousarray(pixels[:1] if grey else pixels)
