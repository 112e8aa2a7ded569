"""When a run's files are due by time: after the first minute, and then at intervals."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

_FIRST_S = 60.0
# Writing takes at most this share of the time: a checkpoint that takes 2 minutes is written every 40 minutes at most.
_SHARE = 0.05


class Clock:
    """Is due after a minute, and then every `minutes`, or less often if writing takes long; 0 minutes is never."""

    def __init__(self, minutes: float) -> None:
        self._every_s = 60 * minutes
        self._next = time.monotonic() + min(_FIRST_S, self._every_s)

    def is_due(self) -> bool:
        """Return whether the time has come."""
        return self._every_s > 0 and time.monotonic() >= self._next

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write the file in this context; the next one is due an interval later."""
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._next = ended + max(self._every_s, (ended - started) / _SHARE)
