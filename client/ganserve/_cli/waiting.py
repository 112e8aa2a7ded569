"""Reports a running command's progress, and what it waits for, on standard error.

On a terminal, this is a line that changes. In a pipe, it is one line, and only if the wait for a server takes long.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

_SOON_S = 3.0  # a shorter wait is not worth a line; the SDK gives up an address that never answered after this time
_log = logging.getLogger("ganserve")


class _Teller(logging.Handler):
    """Shows the SDK's log lines about waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Callable[[str], None] | None = None  # shows a text beside the progress bar; "" for none
        self._status: Status | None = None
        self._reported = False

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "waiting_s"):
            return
        waiting_s: float | None = record.waiting_s
        text = "" if waiting_s is None else " ".join(record.getMessage().split())
        with suppress(OSError):  # the report is optional
            if self.bar is not None:
                self.bar(text)
            elif sys.stderr is not None and sys.stderr.isatty():
                self._show(text)
            elif sys.stderr is not None and waiting_s is not None and waiting_s >= _SOON_S and not self._reported:
                self._reported = True
                print(f"ganserve: {text}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the text."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _show(self, text: str) -> None:
        console = Console(stderr=True)
        shown = Text(text)
        shown.truncate(console.width - 2, overflow="ellipsis")  # beside the spinner, on one line
        if not text:
            self.clear()
        elif self._status is None:
            self._status = Status(shown, console=console)
            self._status.start()
        else:
            self._status.update(shown)


_teller = _Teller()


@contextmanager
def reporting() -> Iterator[None]:
    """Report what the command waits for."""
    _log.setLevel(logging.DEBUG)  # each try: a terminal shows how long is left
    _log.addHandler(_teller)
    try:
        yield
    finally:
        _log.removeHandler(_teller)
        _teller.clear()


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; yield a function that takes the number of further items done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda more: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[waiting]}", markup=False), console=console) as bar:
        task = bar.add_task(what, total=total, completed=done, waiting="")
        _teller.bar = lambda text: bar.update(task, waiting=text)
        try:
            yield lambda more: bar.advance(task, more)
        finally:
            _teller.bar = None
