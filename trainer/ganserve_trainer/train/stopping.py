"""What reaches a run from outside: signals, and a terminal that is gone."""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Signals:
    """What the signals of a process ask of its run."""

    def __init__(self) -> None:
        self.stop = threading.Event()  # save the run and end it
        self.save = threading.Event()  # save the run and go on


@contextmanager
def caught_signals() -> Iterator[Signals]:
    """Have SIGINT, SIGTERM and SIGHUP end the run with a checkpoint, and SIGUSR1 save one.

    A second SIGINT or SIGTERM has its usual effect. A second SIGHUP has none, because a closed terminal sends two: the
    kernel's and the shell's. SIGHUP stays ignored where it was ignored at the start, as by nohup. SIGUSR1 is what Slurm
    sends before it ends a job (--signal=USR1@120).
    """
    asked = Signals()
    previous: dict[int, Any] = {}

    def stop(number: int, _frame: object) -> None:
        asked.stop.set()
        if number != signal.SIGHUP:
            signal.signal(number, previous[number])

    def save(_number: int, _frame: object) -> None:
        asked.save.set()

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGHUP: stop, signal.SIGUSR1: save}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        del handlers[signal.SIGHUP]
    for number, handler in handlers.items():
        previous[number] = signal.signal(number, handler)
    try:
        yield asked
    finally:
        for caught, before in previous.items():
            signal.signal(caught, before)


def outlive_terminal() -> None:
    """Drop what this process prints once nobody can read it: after `| head` has ended, or the terminal is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, so that no file of the run does
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _Outliving(stream))


class _Outliving:
    """A stream that goes to /dev/null when a write to it fails."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
