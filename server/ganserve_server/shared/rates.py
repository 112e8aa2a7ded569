"""How many images each token may ask for per second, counted in memory that all worker processes share.

The algorithm is GCRA, the generic cell rate algorithm (ITU-T I.371). It keeps a number for each token: the theoretical
arrival time, when the rate has covered all images that were requested so far.
"""

import mmap
import time

MAX_TOKENS = 1000  # in a tokens file
_SLOTS = 4 * MAX_TOKENS  # tokens that were removed since the start keep their slots
_CELL_BYTES = 8
_MAX_NS = 2**63 - 1  # in a cell
RATES_BYTES = _SLOTS * 2 * _CELL_BYTES


class SharedRates:
    """The theoretical arrival time of each token, in nanoseconds of the monotonic clock.

    A slot has two cells: a tag, which identifies the token, and the time. If workers change the same slot in the same
    microsecond, one change may be lost, and a few more images are allowed.

    Args:
        descriptor: memory of RATES_BYTES; -1: memory of this process alone.
    """

    def __init__(self, descriptor: int = -1) -> None:
        self._cells = memoryview(mmap.mmap(descriptor, RATES_BYTES)).cast("q")

    def slot(self, sha256: str) -> int:
        """Find the slot of a token by its hash, or take a free one for it."""
        tag = int(sha256[:15], 16) or 1
        for step in range(_SLOTS):
            cell = (tag + step) % _SLOTS * 2
            if self._cells[cell] in (0, tag):
                self._cells[cell] = tag
                return cell + 1
        return tag % _SLOTS * 2 + 1  # shared with another token, after thousands of tokens, until a restart

    def take(self, slot: int, images: int, images_per_s: float, burst: float) -> float:
        """Count images and return 0, or count nothing and return the seconds until the rate allows them.

        A request for more images than the burst is allowed; later requests wait until the rate has covered it.
        """
        now = time.monotonic_ns()
        unused = now - int(burst / images_per_s * 1e9)
        arrival = max(self._cells[slot] or unused, unused)
        early_ns = arrival + int(min(images, burst) / images_per_s * 1e9) - now
        if early_ns > 0:
            return early_ns / 1e9
        self._cells[slot] = min(arrival + int(images / images_per_s * 1e9), _MAX_NS)
        return 0.0
