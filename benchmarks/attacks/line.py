"""A misused connection: writes as fast as the server allows, reads or not, and notices when the server cuts it."""

import select
import socket
import struct
import time
from collections.abc import Callable

from tests.wire import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
)

ERRORS = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
]
MAX_WINDOW = 2**31 - 1
DEFAULT_WINDOW = 65535
MOST_BYTES = 1 << 30  # the most that one connection sends
_CHUNK = 64 << 10
_FRAME = 16384
_POLL_MS = 50


class Cut(Exception):  # noqa: N818
    """The server has ended the connection; the text has the error."""


class RuleBroken(Exception):  # noqa: N818
    """The server has broken a rule of the protocol; the text says which."""


class Over(Exception):  # noqa: N818
    """The attack's time is over."""


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in values.items()))


class Line:
    """One connection.

    Args:
        end: the time by time.monotonic from which every method raises `Over`.
        of: the number of connections of the attack.
        greets: whether to send the preface, and SETTINGS with `values`.
        reads: whether to read and acknowledge the server's data.
        receive_buffer: bytes that the kernel receives for a peer that does not read; 0: the default.
        granted: bytes that the server may send on the connection beyond the first 65,535.
    """

    def __init__(
        self,
        address: str,
        end: float,
        *,
        of: int = 1,
        greets: bool = True,
        values: dict[int, int] | None = None,
        reads: bool = True,
        receive_buffer: int = 0,
        granted: int = MAX_WINDOW - DEFAULT_WINDOW,
    ) -> None:
        self.end, self.of, self._reads, self._greets = end, of, reads, greets
        self.sent = self.received = 0  # bytes; bytes of DATA
        self.pongs = 0
        self.live: set[int] = set()  # open streams
        self._next_id = 1
        self._out, self._rest = bytearray(), b""
        self._window = self._stream_window = DEFAULT_WINDOW
        self._used: dict[int, int] = {}  # of the streams' windows
        self._error = "closed"
        host, _, port = address.rpartition(":")
        self.socket = socket.socket()
        try:
            if receive_buffer:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.settimeout(max(0.01, min(5.0, end - time.monotonic())))
            self.socket.connect((host, int(port)))
            self.socket.setblocking(False)
        except OSError:
            self.socket.close()
            raise
        self._poll = select.poll()
        if greets:
            self.write(PREFACE + settings(values or {}))
            if granted:
                self.write(frame(WINDOW_UPDATE, 0, 0, granted.to_bytes(4, "big")))

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def leave(self) -> None:
        """Close with a TCP reset, which leaves no port in TIME_WAIT."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # Writing.

    def write(self, data: bytes) -> None:
        """Buffer data, to send with later data or before the next wait."""
        self._out += data
        if len(self._out) >= _CHUNK:
            self.flush()

    def flush(self) -> None:
        """Send all buffered data."""
        while self._out:
            self._step(_POLL_MS)

    def new_id(self) -> int:
        self._next_id += 2
        return self._next_id - 2

    def open(self, block: bytes, flags: int = END_HEADERS, *, size: int = _FRAME) -> int:
        """Open a stream with a header block, in frames of `size` bytes."""
        stream = self.new_id()
        self.live.add(stream)
        if len(block) <= size:
            self.write(frame(HEADERS, flags, stream, block))
            return stream
        self.write(frame(HEADERS, flags & ~END_HEADERS, stream, block[:size]))
        for start in range(size, len(block), size):
            last = start + size >= len(block)
            self.write(frame(CONTINUATION, END_HEADERS if last else 0, stream, block[start : start + size]))
        return stream

    def data(self, stream: int, payload: bytes, flags: int = 0) -> None:
        """Send a part of a body as the server's windows allow: ignoring them is no attack, but gets cut off."""
        for start in range(0, max(1, len(payload)), _FRAME):
            part = payload[start : start + _FRAME]
            while min(self._window, self._stream_window - self._used.get(stream, 0)) < len(part):
                self.flush()
                self._step(_POLL_MS)
                if stream not in self.live:
                    return
            self._window -= len(part)
            self._used[stream] = self._used.get(stream, 0) + len(part)
            last = start + _FRAME >= len(payload)
            self.write(frame(DATA, flags if last else flags & ~END_STREAM, stream, part))

    def call(self, block: bytes, body: bytes) -> int:
        """Make a whole call."""
        stream = self.open(block)
        self.data(stream, body, END_STREAM)
        return stream

    # Waiting.

    def wait(self, seconds: float) -> None:
        """Send all buffered data, and wait."""
        self.flush()
        self.until(lambda: False, seconds)

    def until(self, happened: Callable[[], bool], seconds: float = 1e9) -> None:
        """Wait until `happened` returns true because of the server's data, at most for `seconds`."""
        self.flush()
        until = time.monotonic() + seconds
        while not happened() and (left := until - time.monotonic()) > 0:
            self._step(min(_POLL_MS, 1000 * left))

    def hold(self) -> None:
        """Wait until the end of the attack."""
        self.wait(1e9)

    def read_up(self) -> None:
        """Wait until the server has read all sent data."""
        wanted = self.pongs + 1
        self.write(frame(PING, 0, 0, bytes(8)))
        self.until(lambda: self.pongs >= wanted)

    def keep_open(self, count: int, start: Callable[[], object], *, at_once: int = MAX_WINDOW) -> None:
        """Keep `count` streams open until the end; replace each one that the server ends, 20 ms later."""
        while True:
            for _ in range(min(at_once, count - len(self.live))):
                start()
            self.wait(0.02)

    def _step(self, milliseconds: float) -> None:
        """Wait until the connection can be written or read, at most `milliseconds`; then write and read."""
        if time.monotonic() >= self.end or self.sent > MOST_BYTES:
            raise Over
        wanted = select.POLLRDHUP | (select.POLLOUT if self._out else 0) | (select.POLLIN if self._reads else 0)
        self._poll.register(self.socket, wanted)
        for _, seen in self._poll.poll(milliseconds):
            self.on_event(seen)

    def on_event(self, seen: int) -> None:
        """Read or write, as the kernel reports."""
        try:
            if seen & select.POLLIN and self._reads:
                self._read()
            elif seen & (select.POLLRDHUP | select.POLLHUP | select.POLLERR):
                raise Cut(self._error)
            if seen & select.POLLOUT:
                sent = self.socket.send(self._out)
                self.sent += sent
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Cut(self._error) from error

    # Reading.

    def _read(self) -> None:
        data = self.socket.recv(1 << 18)
        if not data:
            raise Cut(self._error)
        if not self._greets:
            return
        data, position = self._rest + data, 0
        while len(data) - position >= 9:
            end = position + 9 + int.from_bytes(data[position : position + 3], "big")
            if end > len(data):
                break
            kind, flags, stream = struct.unpack_from(">BBI", data, position + 3)
            self._on_frame(kind, flags, stream, data[position + 9 : end])
            position = end
        self._rest = data[position:]

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            self.received += len(payload)
        elif kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if not stream:
                self._window += more
            elif stream in self._used:
                self._used[stream] -= more
        elif kind == SETTINGS and not flags & ACK:
            values = dict(struct.iter_unpack(">HI", payload))
            self._stream_window = values.get(INITIAL_WINDOW_SIZE, self._stream_window)
            self._out += frame(SETTINGS, ACK, 0)
        elif kind == PING and flags & ACK:
            self.pongs += 1
        elif kind == PING:
            self._out += frame(PING, ACK, 0, payload)
        elif kind == GOAWAY:
            code = int.from_bytes(payload[4:8], "big")
            self._error = ERRORS[code] if code < len(ERRORS) else str(code)
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self.live.discard(stream)
            self._used.pop(stream, None)
