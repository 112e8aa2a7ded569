"""Notices an event loop that stands still.

Each event loop of the server beats: twice a second, a callback of the loop writes the time. A thread of the same
process watches it (`Heart`). The supervisor watches the loops of its workers in the same way (`Standstill`), by the
times that they write to the scoreboard.
"""

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

_log = logging.getLogger(__name__)

INTERVAL_S = 0.5  # between beats, and between looks at them
STUCK_STATUS = 3  # exit status of a process that ends because its event loop is stuck
_WINDOW_S = 60.0
_LOG_TIMEOUT_S = 1.0
_MOST_FRAMES = 30  # of a thread


class Standstill:
    """Measures for how long a beat has not changed.

    Only time in which the observer runs counts. An observer that could not run for a while itself (its process was
    stopped, the machine is overloaded) cannot tell whether the other one could, so a gap between two looks counts as
    two intervals at most.

    Attributes:
        seconds: for how long the beat has not changed.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._beat = 0
        self._looked = self._window = time.monotonic()
        self._longest = self._longest_before = 0.0

    def look(self, beat: int) -> float:
        """Compare a beat with the one at the last look; return `seconds`. A beat of 0 means that the loop has none."""
        now = time.monotonic()
        gap_s = min(now - self._looked, 2 * INTERVAL_S)
        self.seconds = self.seconds + gap_s if beat == self._beat else 0.0
        self._beat, self._looked = beat, now
        if now - self._window >= _WINDOW_S:
            self._window, self._longest_before, self._longest = now, self._longest, 0.0
        if beat:
            self._longest = max(self._longest, self.seconds)
        return self.seconds

    @property
    def longest_s(self) -> float:
        """The most that `seconds` was in the last one to two minutes, while there were beats."""
        return max(self._longest, self._longest_before)


class Heart:
    """Beats in the running event loop, from now until `close`, and watches the beats in a thread.

    If the loop stands still for half the limit, the thread logs the stacks of all threads, and `why_stuck` has a text.

    Args:
        limit_s: how long the loop may stand still.
        on_beat: called in the loop at each beat, with its time in nanoseconds by time.monotonic_ns.
        ends_process: whether to end the process with STUCK_STATUS at the limit; False: the supervisor does it.
    """

    def __init__(self, limit_s: float, on_beat: Callable[[int], None], *, ends_process: bool) -> None:
        self._limit_s, self._on_beat, self._ends_process = limit_s, on_beat, ends_process
        self._loop = asyncio.get_running_loop()
        self.standstill = Standstill()
        self._closed = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="heart", daemon=True)
        self._thread.start()

    def why_stuck(self) -> str:
        """Return the answer to liveness probes; an empty text: the loop runs."""
        seconds = self.standstill.seconds
        return f"the event loop has stood still for {seconds:.1f} s" if seconds >= self._limit_s / 2 else ""

    def close(self) -> None:
        """Stop beating and watching."""
        self._closed.set()
        self._next.cancel()
        self._thread.join()

    def _beat(self) -> None:
        self._next = self._loop.call_later(INTERVAL_S, self._beat)
        self._last = time.monotonic_ns()
        self._on_beat(self._last)

    def _watch(self) -> None:
        logged_s = 0.0
        while not self._closed.wait(INTERVAL_S):
            seconds = self.standstill.look(self._last)
            if logged_s and not seconds:
                _log.warning("the event loop runs again", extra={"stood_still_s": round(logged_s, 1)})
                logged_s = 0.0
            elif seconds >= self._limit_s and self._ends_process:
                _write("the event loop is stuck; the process ends", seconds=round(seconds, 1), status=STUCK_STATUS)
                os._exit(STUCK_STATUS)
            elif logged_s:
                logged_s = seconds
            elif seconds >= self._limit_s / 2:
                logged_s = seconds
                _write("the event loop stands still", seconds=round(seconds, 1), stacks=_stacks())


def _write(event: str, **extra: object) -> None:
    """Log an error; give up after a while, because a loop that stands still while it logs holds the log's lock."""

    def write() -> None:
        _log.error(event, extra=extra)
        for handler in logging.getLogger().handlers:
            handler.flush()

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(_LOG_TIMEOUT_S)


def _stacks() -> str:
    """Return what each thread does, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            stack = "".join(traceback.format_stack(frame, limit=_MOST_FRAMES))
            parts.append(f"{names.get(ident, ident)}:\n{stack}")
    return "\n".join(parts)
