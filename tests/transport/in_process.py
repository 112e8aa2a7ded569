"""An event loop that a test steps, and a transport without a socket: the server's side of a connection, in process."""

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.wire import Frame

_MAX_TURNS = 100_000
_HEAD_BYTES = 9


class SteppedLoop(asyncio.SelectorEventLoop):
    """Runs only while a test says so, by a clock that only the test moves."""

    def __init__(self) -> None:
        self._now, self._more = 0.0, False
        super().__init__()
        self.longest_turn_s = 0.0  # of a core
        self.unexpected: list[str] = []  # exceptions that escaped from callbacks
        self.set_exception_handler(lambda _, context: self.unexpected.append(_told(context)))

    def time(self) -> float:
        """Return the test's time."""
        return self._now

    def call_soon(self, *args: Any, **keywords: Any) -> asyncio.Handle:
        """Remember that there is more to run."""
        self._more = True
        return super().call_soon(*args, **keywords)

    def run_in_executor(  # type: ignore[override]
        self, executor: object, function: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """Call here what is meant for a thread: it takes its turn, always the same one."""
        future = self.create_future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def settle(self) -> None:
        """Run all that can run now, and what that starts."""
        for _ in range(_MAX_TURNS):
            self._more = False
            self.stop()  # documented: called before `run_forever`, one turn runs
            started = time.thread_time()
            self.run_forever()
            self.longest_turn_s = max(self.longest_turn_s, time.thread_time() - started)
            if not self._more:
                return
        raise AssertionError("the loop never becomes idle")

    def run(self, function: Callable[..., object], *args: object) -> None:
        """Call a function in the loop, then settle."""
        self.call_soon(function, *args)
        self.settle()

    def advance(self, seconds: float) -> None:
        """Let time pass, and run what was due."""
        self._now += seconds
        self.settle()

    def timers(self) -> list[asyncio.TimerHandle]:
        """Return what is still to run at a time."""
        return [timer for timer in vars(self)["_scheduled"] if not timer.cancelled()]

    def cancel_and_close(self) -> None:
        """Cancel what runs, and close the loop."""
        for task in asyncio.all_tasks(self):
            task.cancel()
        self.settle()
        self.close()


def _told(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return f"{context.get('message')}\n{''.join(traceback.format_exception(error)) if error else ''}"


class _Socket:
    def setsockopt(self, *_: object) -> None:
        """Take an option."""


class FakeTransport(asyncio.Transport):
    """Keeps what the server writes, and treats the protocol as asyncio's transports of sockets do.

    Args:
        loop: runs the protocol.
        protocol: the server's side.
        high_water: bytes in the buffer above which writing pauses, if fewer than the protocol asks for.
        half_closes: whether one direction can be closed alone; TLS cannot.
    """

    def __init__(
        self, loop: SteppedLoop, protocol: asyncio.Protocol, *, high_water: int = 1 << 30, half_closes: bool = True
    ) -> None:
        super().__init__({"socket": _Socket(), "peername": ("127.0.0.1", 9)})
        self._loop, self._protocol = loop, protocol
        self._least_high_water, self._half_closes = high_water, half_closes
        self._high_water = self._low_water = 0
        self.set_write_buffer_limits()
        self._reading = True  # the server reads
        self._inbound: list[bytes] = []  # sent to a server that does not
        self._unread = 0
        self.peer_reads = True
        self.paused = False  # the protocol was told to pause writing
        self.closing = self.eof_written = self.lost = False
        self.written = bytearray()  # that the test has not taken yet

    # What the test calls, in the loop.

    def deliver(self, data: bytes) -> None:
        """Send to the server."""
        if self._reading and not self._inbound and not self.closing:
            self._protocol.data_received(data)
        elif not self.closing:
            self._inbound.append(data)

    def read(self, size: int | None = None) -> None:
        """Let the peer read some of what is in the buffer and no more; None: all, and what comes."""
        self.peer_reads = size is None
        self._unread -= self._unread if size is None else min(size, self._unread)
        if self.paused and self._unread <= self._low_water:
            self.paused = False
            self._protocol.resume_writing()
        if self.closing and not self._unread:
            self._lose(None)

    def leave(self, error: Exception | None = None) -> None:
        """End the connection as the peer does."""
        self.closing = True
        self._lose(error)

    def end(self) -> None:
        """Close the peer's direction."""
        if not self.closing and not self._protocol.eof_received():
            self.close()

    # What the protocol calls.

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the server's side."""
        return self._protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set when writing pauses, and when it resumes."""
        self._high_water = min(self._least_high_water, 64 << 10 if high is None else high)
        self._low_water = self._high_water // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        """Return how many bytes the peer has not read."""
        return self._unread

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep what is sent to the peer."""
        if self.eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self.lost or not data:
            return
        self.written += data
        if not self.peer_reads:
            self._unread += len(data)
        if self._unread > self._high_water and not self.paused:
            self.paused = True
            self._protocol.pause_writing()

    def pause_reading(self) -> None:
        """Keep what the peer sends."""
        self._reading = False

    def resume_reading(self) -> None:
        """Hand on what the peer sends."""
        if not self._reading and not self.closing:
            self._reading = True
            self._loop.call_soon(self._deliver_inbound)

    def is_reading(self) -> bool:
        """Say whether the server reads."""
        return self._reading and not self.closing

    def can_write_eof(self) -> bool:
        """Say whether one direction can be closed alone."""
        return self._half_closes

    def write_eof(self) -> None:
        """Close the server's direction."""
        self.eof_written = True

    def is_closing(self) -> bool:
        """Say whether the connection ends."""
        return self.closing

    def close(self) -> None:
        """End the connection once the peer has read all."""
        if not self.closing:
            self.closing = True
            if not self._unread:
                self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        """End the connection."""
        self.closing = True
        self._loop.call_soon(self._lose, None)

    def _lose(self, error: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            self._unread = 0
            self._inbound.clear()
            self._protocol.connection_lost(error)

    def _deliver_inbound(self) -> None:
        while self._inbound and self.is_reading():
            self._protocol.data_received(self._inbound.pop(0))


def take_frames(data: bytearray) -> Iterator[Frame]:
    """Take the complete frames out of what a side has written."""
    position = 0
    while len(data) - position >= _HEAD_BYTES:
        end = position + _HEAD_BYTES + int.from_bytes(data[position : position + 3], "big")
        if end > len(data):
            break
        stream = int.from_bytes(data[position + 5 : position + _HEAD_BYTES], "big")
        yield Frame(data[position + 3], data[position + 4], stream, bytes(data[position + _HEAD_BYTES : end]))
        position = end
    del data[:position]


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(message)s"))
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it, with its stack."""
        self.texts.append(self.format(record))


@contextmanager
def logged_errors() -> Iterator[list[str]]:
    """Collect what the server logs at level ERROR or above, each with its stack."""
    handler, logger = _Errors(), logging.getLogger("ganserve_server")
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
