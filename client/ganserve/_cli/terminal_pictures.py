"""Pictures drawn with characters: two pixels for each, in colour if the terminal has colours, else in five shades."""

import sys

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style

_UPPER_HALF = "▀"
_SHADES = " ░▒▓█"
_ASCII_SHADES = " .+#@"


class TerminalPicture:
    """A picture, uint8 [height, width] or [height, width, 3]. A character is one pixel wide and two pixels high."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        coloured = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
        odd = len(coloured) % 2
        self._pixels = np.pad(coloured, ((0, odd), (0, 0), (0, 0)))  # [even height, width, 3]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        upper, lower = self._pixels[::2], self._pixels[1::2]
        if console.color_system is None:
            try:
                _SHADES.encode(sys.stdout.encoding or "ascii")
                shades = _SHADES
            except UnicodeEncodeError:
                shades = _ASCII_SHADES
            levels = (upper.astype(np.float64) + lower).mean(axis=2) / 2
            for row in np.rint(levels / 255 * (len(shades) - 1)).astype(int):
                yield Segment("".join(shades[level] for level in row))
                yield Segment.line()
            return
        for above, below in zip(upper, lower, strict=True):
            for top, bottom in zip(above.tolist(), below.tolist(), strict=True):
                yield Segment(_UPPER_HALF, Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom)))
            yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = self._pixels.shape[1]
        return Measurement(width, width)
