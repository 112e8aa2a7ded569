"""Image files: PNG, JPEG and WebP. The metadata of a file says how to make its image again."""

import io
import json
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ganserve.v1 import generation_pb2 as pb

# A PNG text chunk has a keyword; JPEG and WebP carry the same JSON as EXIF's ImageDescription.
IDENTITY_KEY = "ganserve"
_EXIF_IMAGE_DESCRIPTION = 0x010E
_SHEET_GAP = 2  # pixels

# The limits of the formats and of Pillow's encoders.
MAX_SIDE = {pb.ENCODING_PNG: 2**16, pb.ENCODING_JPEG: 65_500, pb.ENCODING_WEBP: 16_383}  # pixels

Identity = Mapping[str, str | int | float | list[int] | None]


def encode(pixels: NDArray[np.uint8], encoding: pb.Encoding, identity: Identity | None) -> bytes:
    """Encode one image, [height, width, channels], as a file; without metadata if `identity` is None."""
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    text = None if identity is None else json.dumps(identity, ensure_ascii=True)
    if encoding == pb.ENCODING_PNG:
        info = PngInfo()
        if text is not None:
            info.add_text(IDENTITY_KEY, text)
        image.save(file, "PNG", pnginfo=info)
        return file.getvalue()
    exif = Image.Exif()
    if text is not None:
        exif[_EXIF_IMAGE_DESCRIPTION] = text
    if encoding == pb.ENCODING_JPEG:
        image.save(file, "JPEG", quality=95, exif=exif)
    else:
        image.save(file, "WEBP", lossless=True, exif=exif)
    return file.getvalue()


def sheet_size(count: int, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of the contact sheet of `count` images."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    return rows * (height + _SHEET_GAP) - _SHEET_GAP, columns * (width + _SHEET_GAP) - _SHEET_GAP


def contact_sheet(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Arrange images, [n, height, width, channels], row by row in one nearly square image with a black background."""
    count, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, height + _SHEET_GAP, width + _SHEET_GAP, channels), np.uint8)
    cells[:count, :height, :width] = pixels
    sheet = cells.reshape(rows, columns, height + _SHEET_GAP, width + _SHEET_GAP, channels).swapaxes(1, 2)
    whole = sheet.reshape(rows * (height + _SHEET_GAP), columns * (width + _SHEET_GAP), channels)
    return np.ascontiguousarray(whole[:-_SHEET_GAP, :-_SHEET_GAP])
