"""Writes image files and contact sheets. The metadata of a file says how to make its image again."""

import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ganserve._formats import ENCODED
from ganserve.v1 import generation_pb2 as pb

_SHEET_GAP = 2  # pixels

Identity = Mapping[str, Any]  # values of JSON


def encode(pixels: NDArray[np.uint8], encoding: pb.Encoding, identity: Identity | None) -> bytes:
    """Encode one image, [height, width, channels], as a file; without metadata if `identity` is None."""
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    file, image_format = io.BytesIO(), ENCODED[encoding]
    text = None if identity is None else json.dumps(identity, ensure_ascii=True)
    image.save(file, image_format.name, **image_format.arguments(text))
    return file.getvalue()


def sheet_size(count: int, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of the contact sheet of `count` images."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    return rows * (height + _SHEET_GAP) - _SHEET_GAP, columns * (width + _SHEET_GAP) - _SHEET_GAP


def contact_sheet(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Arrange images, [n, height, width, channels], row by row in one nearly square image.

    The background is black; with four channels, it is transparent.
    """
    count, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, height + _SHEET_GAP, width + _SHEET_GAP, channels), np.uint8)
    cells[:count, :height, :width] = pixels
    sheet = cells.reshape(rows, columns, height + _SHEET_GAP, width + _SHEET_GAP, channels).swapaxes(1, 2)
    whole = sheet.reshape(rows * (height + _SHEET_GAP), columns * (width + _SHEET_GAP), channels)
    return np.ascontiguousarray(whole[:-_SHEET_GAP, :-_SHEET_GAP])
