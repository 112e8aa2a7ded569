"""What the trainer and the server agree on about model cards, beyond their messages."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Of a card as GetModel answers it. The default limit of gRPC clients for a message is 4 MiB.
MAX_CARD_BYTES = 1 << 20
# With that many thumbnails of random pixels, a card has three quarters of MAX_CARD_BYTES.
MAX_GOLDEN_IMAGES = 64
_LONGEST_SIDE = 64  # pixels of a thumbnail


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pixels of an image, [height, width, channels], that its golden image shows.

    They are every k-th pixel of every k-th row, from the first on; k is the smallest odd number for which no side has
    more than 64. An image that has no larger side is its own thumbnail.

    A sample instead of means, which hide errors that cancel out: if the two columns of each pair are swapped, no mean
    of 8x8 pixels changes. An odd number, because an even one would never meet the odd columns, where a layer that
    doubles the size may be wrong.
    """
    step = -(-max(pixels.shape[:2]) // _LONGEST_SIDE) | 1
    return pixels[::step, ::step]


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode an image, [height, width, channels], without metadata."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG", optimize=True)
    return file.getvalue()
