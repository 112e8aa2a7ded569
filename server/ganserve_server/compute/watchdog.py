"""Ends runs of models that take too long, from a thread of its own.

A thread publishes its run in its slot. The watchdog looks at all slots several times a second: a run costs its thread
one object and two assignments, and no timer. Past its limit, a run is asked to end by onnxruntime's
`RunOptions.terminate`, which onnxruntime reads between two nodes, also those in a Loop: an endless Loop ends within a
millisecond, but a single long MatMul does not. A thread whose run does not end is stuck: nothing can end it.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field

import onnxruntime

_PERIOD_S = 0.1
# The most that counts from one look to the next: else the process stood still (SIGSTOP, a machine that is moved), and
# its runs with it.
_LONGEST_STEP_S = 1.0
LATE_PART = 0.1  # of the limit, after which a run is late
_GRACE_S = 1.0  # from the request to end until a run counts as stuck


class RunTooLong(Exception):  # noqa: N818
    """A run took longer than its limit and was ended."""


@dataclass(slots=True, eq=False)
class Run:
    """One run of a model, or several runs one after the other that make one batch."""

    limit_s: float
    _: KW_ONLY
    started: float = math.inf  # by time.monotonic; infinite: not yet
    options: onnxruntime.RunOptions | None = None  # None: nothing can end the run
    ended_at: float = math.inf  # when the run was asked to end, by time.monotonic
    late: bool = False  # it has taken a tenth of its limit
    stuck: bool = False

    @property
    def overdue(self) -> bool:
        """Whether the run was asked to end."""
        return self.ended_at < math.inf

    def end(self) -> None:
        """Ask the run to end: this one and all later ones with its options fail."""
        if not self.overdue:
            self.ended_at = time.monotonic()
            if self.options is not None:
                self.options.terminate = True


@dataclass(slots=True, eq=False)
class Slot:
    """Where a thread publishes its run; the watchdog's thread calls each function once for a run."""

    on_overdue: Callable[[Run], object] = lambda _: None
    on_stuck: Callable[[Run], object] = lambda _: None
    on_late: Callable[[Run], object] = lambda _: None
    run: Run | None = None


@dataclass(slots=True)
class Watchdog:
    """Looks at the runs of all threads of the process."""

    _slots: set[Slot] = field(default_factory=set)
    _added: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None

    def add(self, slot: Slot) -> None:
        """Watch a thread's runs from now on."""
        with self._added:
            self._slots.add(slot)
            self._added.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()

    def remove(self, slot: Slot) -> None:
        """Stop watching a thread."""
        with self._added:
            self._slots.discard(slot)

    def _watch(self) -> None:
        looked = time.monotonic()
        while True:
            with self._added:
                while not self._slots:
                    self._added.wait()
                    looked = time.monotonic()
                slots = list(self._slots)
            now = time.monotonic()
            pause = max(0.0, now - looked - _LONGEST_STEP_S)
            looked = now
            for slot in slots:
                run = slot.run
                if run is None:
                    continue
                run.started += pause
                run.ended_at += pause
                if not run.late and now - run.started > run.limit_s * LATE_PART:
                    run.late = True
                    slot.on_late(run)
                if now - run.started <= run.limit_s:
                    continue
                if not run.overdue:
                    slot.on_overdue(run)  # first, because the run may end, and be reported, at once
                    run.end()
                elif not run.stuck and now - run.ended_at > _GRACE_S:
                    run.stuck = True
                    slot.on_stuck(run)
            time.sleep(_PERIOD_S)


WATCHDOG = Watchdog()


@contextlib.contextmanager
def limited(limit_s: float, *, waits: bool = False) -> Iterator[Run]:
    """Limit a run of this thread.

    Args:
        limit_s: how long it may take.
        waits: whether it waits before it starts; it then records the time of its start.

    Raises:
        RunTooLong: it was ended.
    """
    started = math.inf if waits else time.monotonic()
    run = Run(limit_s, started=started, options=onnxruntime.RunOptions())
    slot = Slot(run=run)
    WATCHDOG.add(slot)
    try:
        yield run
    except Exception as error:  # onnxruntime's exceptions have no common root
        if run.overdue:
            raise RunTooLong(f"it did not end within {limit_s:g} s") from error
        raise
    finally:
        WATCHDOG.remove(slot)
