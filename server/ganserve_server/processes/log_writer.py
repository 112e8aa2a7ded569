"""Writes the log to standard error in a thread of its own, so that no other thread waits for who reads it."""

import logging
import os
import queue
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

_log = logging.getLogger(__name__)

MAX_LINES, MAX_BYTES = 4096, 1 << 20  # in the queue
# Between writes. A line cost 53 µs of CPU time when the event loop wrote it and 62 µs when each line woke the thread;
# with this pause it costs 52 µs.
_PAUSE_S = 0.002
TIMEOUT_S = 1.0  # for lines to be written before the process ends
_UNREAD = "standard error was not read"


class LogWriter(logging.Handler):
    """Queues lines for a daemon thread, which writes them to standard error.

    When the queue is full, it drops lines until the thread has written those that wait, and then logs how many it
    dropped. It does the same with lines that cannot be written, for example because the disk is full.

    A write has whole lines. Processes that share a pipe do not mix lines of up to 4096 bytes (PIPE_BUF); they may mix
    longer ones while the pipe is full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0  # lines
        self._file, self._encoding = sys.stderr.fileno(), sys.stderr.encoding
        # Lines, and functions that the thread calls when it has written all lines before.
        self._queue: queue.SimpleQueue[bytes | Callable[[], None]] = queue.SimpleQueue()
        # The lock of the handler protects all of these except the second ones, which only the thread changes.
        self._lines_queued = self._lines_taken = 0
        self._bytes_queued = self._bytes_taken = 0
        self._dropping = self._ended = False
        self._unreported = 0
        self._count: Callable[[int], None] = lambda lines: None
        self._reason, self._torn = _UNREAD, False  # of the thread
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def count_dropped(self, count: Callable[[int], None]) -> None:
        """Call a function with the number of lines dropped so far, and with each further number."""
        with self._lock:
            self._count = count
            count(self.dropped)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, or drop it."""
        if self._ended:
            return
        if self._dropping:
            self._drop(1)
            return
        try:
            text = self.format(record)
        except Exception:  # an error in the code that logs; logging's own handlers print it, too
            text = traceback.format_exc()
        self._put(text)

    def flush(self) -> None:
        """Wait until all lines so far are written or dropped, or for a time."""
        self.wait()

    def wait(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Wait until all lines so far are written or dropped; return whether they are."""
        done = threading.Event()

        def finish() -> None:
            self._write(b"", 0)
            done.set()

        self._queue.put(finish)
        return done.wait(timeout_s)

    @contextmanager
    def last_line(self) -> Iterator[None]:
        """Ignore what any thread logs after this block."""
        with self._lock:
            yield
            self._ended = True

    @property
    def _lock(self) -> AbstractContextManager[Any]:
        assert self.lock is not None
        return self.lock

    def _put(self, text: str) -> None:
        line = self._encode(text)
        lines = self._lines_queued - self._lines_taken
        if lines >= MAX_LINES or self._bytes_queued - self._bytes_taken + len(line) > MAX_BYTES:
            self._dropping = True
            self._drop(1)
            self._queue.put(self._resume)
            return
        self._lines_queued += 1
        self._bytes_queued += len(line)
        self._queue.put(line)

    def _drop(self, lines: int) -> None:
        self.dropped += lines
        self._unreported += lines
        self._count(lines)

    def _run(self) -> None:
        while True:
            waiting = [self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get())
            lines: list[bytes] = []
            for item in waiting:
                if isinstance(item, bytes):
                    if sum(map(len, lines)) + len(item) > select.PIPE_BUF:
                        self._write_queued(lines)
                        lines = []
                    lines.append(item)
                else:
                    self._write_queued(lines)
                    lines = []
                    item()
            self._write_queued(lines)
            time.sleep(_PAUSE_S)

    def _write_queued(self, lines: list[bytes]) -> None:
        content = b"".join(lines)
        self._write(content, len(lines))
        self._lines_taken += len(lines)
        self._bytes_taken += len(content)

    def _resume(self) -> None:
        self._dropping = False
        self._write(b"", 0)

    def _write(self, content: bytes, lines: int) -> None:
        """Write lines, after the number of dropped ones that was not logged yet."""
        unreported = 0 if self._dropping else self._unreported
        try:
            if unreported:
                fields = {"count": unreported, "reason": self._reason}
                record = _log.makeRecord(_log.name, logging.WARNING, "", 0, "log lines dropped", (), None, extra=fields)
                self._write_all(self._encode(self.format(record)))
                self._reason = _UNREAD
                with self._lock:
                    self._unreported -= unreported
            self._write_all(content)
        except OSError as error:
            self._reason = error.strerror or str(error)
            with self._lock:
                self._drop(lines)

    def _write_all(self, content: bytes) -> None:
        """Write lines, on a line of their own if an error cut off the last one."""
        rest = memoryview(b"\n" + content if self._torn else content)
        while rest:
            try:
                rest = rest[os.write(self._file, rest) :]
            except BlockingIOError:  # another process with this file has made it non-blocking
                poller = select.poll()
                poller.register(self._file, select.POLLOUT)
                poller.poll()
            else:
                self._torn = len(rest) > 0

    def _encode(self, text: str) -> bytes:
        return f"{text}\n".encode(self._encoding, "backslashreplace")


def log_what_python_prints() -> None:
    """Log warnings, and exceptions that end a thread or occur in a finalizer, which Python prints to standard error."""

    def thread_ended(given: threading.ExceptHookArgs) -> None:
        if not isinstance(given.exc_value, SystemExit):
            name = given.thread.name if given.thread else None
            _log.error("a thread ended", exc_info=given.exc_value, extra={"thread": name})

    def ignored(given: "sys.UnraisableHookArgs") -> None:
        _log.error("an exception was ignored", exc_info=given.exc_value, extra={"place": repr(given.object)})

    logging.captureWarnings(True)
    threading.excepthook, sys.unraisablehook = thread_ended, ignored
