"""The formats of image files, in one table. The SDK and the server write and read files by it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Exif, Image
from PIL.PngImagePlugin import PngInfo

from ganserve.errors import InvalidRequestError

PNG_KEYWORD = "ganserve"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of the pixels, by the number of channels that a model may make
# Pixels on each side of a model's image. With four channels, it then has at most 64 MiB, as much as an answer may have.
LARGEST_SIDE = 4096
_EXIF_IMAGE_DESCRIPTION = 0x010E
_Z_RLE = 3  # of zlib
_LARGEST = 2**31 - 1  # Pillow's limit where the format has none


def _png_text(text: str) -> dict[str, Any]:
    info = PngInfo()
    info.add_text(PNG_KEYWORD, text)
    return {"pnginfo": info}


def _exif(text: str) -> dict[str, Any]:
    exif = Exif()
    exif[_EXIF_IMAGE_DESCRIPTION] = text
    return {"exif": exif}


def _comment(text: str) -> dict[str, Any]:
    return {"comment": text}


def in_words(names: Iterable[str], last: str = "or") -> str:
    """Return names as words: "PNG, JPEG or WEBP"."""
    *most, end = names
    return f"{', '.join(most)} {last} {end}" if most else end


@dataclass(frozen=True)
class ImageFormat:
    """A format of image files whose metadata can hold provenance.

    `metadata` returns the arguments with which Pillow's writer adds a text of ASCII characters to the file. `encoding`
    is the value of the RPCs if the server writes the format, and None if only the SDK does.
    """

    name: str  # Pillow's name
    extensions: tuple[str, ...]  # the usual one first
    media_type: str
    metadata: Callable[[str], dict[str, Any]]
    lossless: bool = True  # with `options`, in grey and in colour
    alpha: bool = True  # it keeps four channels
    longest_side: int = _LARGEST  # pixels that Pillow writes and reads
    options: Mapping[str, Any] = field(default_factory=dict)  # of Pillow's writer
    animated: bool = False  # the SDK writes animations in it
    encoding: int | None = None  # of ganserve.v1.Encoding

    def arguments(self, text: str | None) -> dict[str, Any]:
        """Return the arguments for Pillow's writer; with `text` as metadata, unless it is None."""
        return {**self.options, **(self.metadata(text) if text is not None else {})}


FORMATS = {
    each.name: each
    for each in (
        ImageFormat(
            "PNG",
            (".png",),
            "image/png",
            metadata=_png_text,
            # A third to a seventh of the time of Pillow's default, in files of about the same size.
            options={"compress_level": 1, "compress_type": _Z_RLE},
            encoding=2,
        ),
        ImageFormat(
            "JPEG",
            (".jpg", ".jpeg"),
            "image/jpeg",
            metadata=_exif,
            lossless=False,
            alpha=False,
            longest_side=65_500,
            options={"quality": 95},
            encoding=3,
        ),
        ImageFormat(
            "WEBP",
            (".webp",),
            "image/webp",
            metadata=_exif,
            longest_side=16_383,
            # `exact` keeps the colour of transparent pixels. `quality` is effort here: a third to a seventh of the time
            # of Pillow's default, in files that are up to a fifth larger.
            options={"lossless": True, "exact": True, "method": 1, "quality": 20},
            animated=True,
            encoding=4,
        ),
        ImageFormat(
            "GIF",
            (".gif",),
            "image/gif",
            metadata=_comment,
            lossless=False,
            alpha=False,  # a pixel is transparent or not
            longest_side=65_535,
            animated=True,
        ),
        ImageFormat("TIFF", (".tif", ".tiff"), "image/tiff", metadata=_exif),
    )
}
EXTENSIONS = tuple(extension for each in FORMATS.values() for extension in each.extensions)
ANIMATED = {each.name: each for each in FORMATS.values() if each.animated}
ENCODED = {each.encoding: each for each in FORMATS.values() if each.encoding is not None}  # what the server writes
ENCODED_NAMES = tuple(each.name for each in ENCODED.values())
ANIMATED_EXTENSIONS = in_words(each.extensions[0] for each in ANIMATED.values())


def without_alpha(name: str, channels: int, known: Mapping[Any, ImageFormat] = FORMATS) -> str:
    """Return why a format cannot hold images of so many channels, and which of the known ones can; "" if it can."""
    image_format = FORMATS.get(name.upper())
    if channels != 4 or image_format is None or image_format.alpha:
        return ""
    able = in_words(each.name for each in known.values() if each.alpha)
    return f"a {image_format.name} file has no alpha channel, and these images have one; use {able}"


def arguments(name: str, image: Image, text: str | None, known: Mapping[Any, ImageFormat] = FORMATS) -> dict[str, Any]:
    """Return the arguments for Pillow's writer of any format; one that is not in the table has no metadata.

    Raises:
        ValueError: the image has alpha, and the format has not; the text names those of `known` that have.
    """
    if why := without_alpha(name, len(image.getbands()), known):
        raise InvalidRequestError(why)
    image_format = FORMATS.get(name.upper())
    return {} if image_format is None else image_format.arguments(text)


def read_metadata(image: Image) -> tuple[str, str] | None:
    """Return where in an opened file the text is, and the text; None if there is none."""
    places = {
        f"PNG text chunk {PNG_KEYWORD!r}": image.info.get(PNG_KEYWORD),
        "EXIF ImageDescription": image.getexif().get(_EXIF_IMAGE_DESCRIPTION),
        "GIF comment": image.info.get("comment") if image.format == "GIF" else None,
    }
    for place, text in places.items():
        if isinstance(text, bytes):
            return place, text.decode("ascii", "replace")
        if isinstance(text, str):
            return place, str(text)
    return None
