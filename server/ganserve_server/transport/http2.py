"""The server side of HTTP/2 over asyncio: frames, compressed headers, flow control, and the bounds of each.

Calls that arrive in one packet are read together, answered together, and written in one packet.

The module implements RFC 9113 except push and priorities, which gRPC does not use. All memory and work that a peer
causes is bounded: `limits` has the numbers, `pools` counts bytes, `turns` shares time, and the buckets below limit the
rate of costly frames. An error on a stream ends that stream. Repeated errors that no correct client makes end the
connection.
"""

import asyncio
import contextlib
import fcntl
import itertools
import logging
import re
import socket
import struct
import sys
import termios
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from hpack import Decoder, HPACKError, OversizedHeaderListError

from ganserve_server.transport.flow import MAX_WINDOW, Flow, Overflow, SendFlow
from ganserve_server.transport.internals import CountingHeaderTable, set_read_bytes, transport_below_tls
from ganserve_server.transport.limits import MAX_HEADER_LIST_BYTES, Limits
from ganserve_server.transport.pools import Bucket, Holding, Pool
from ganserve_server.transport.turns import LoopTurns

_log = logging.getLogger(__name__)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT = range(5)
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = range(5, 10)
ENHANCE_YOUR_CALM = 11
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = range(1, 6)
_MAX_HEADER_LIST_SIZE = 6

_HEAD = struct.Struct(">BHBBI")  # length (high byte, rest), type, flags, stream
_SETTING = struct.Struct(">HI")
_FRAME_SIZE = 16384  # RFC 9113's minimum and default, for both directions: larger frames gained nothing measurable
# Header blocks up to this size are decoded even if they are refused, so that the table stays correct: proxies forward
# up to 64 KiB. A larger block ends the connection.
MAX_BLOCK_BYTES = 64 << 10
_MAX_DECODED_BYTES = 128 << 10
MAX_CONTINUATIONS = 128
_DEFAULT_WINDOW = 65535
_CLOSE_TIMEOUT_S = 5.0
_CALM_CLOSE_TIMEOUT_S = 0.5  # for a peer that sends too much, from which nothing more is read
_FLUSH_BYTES = 256 << 10  # written at once, so that memory stays small and the peer can begin to read
_TLS_FLUSH_BYTES = 48 << 10  # OpenSSL's buffer stays as large as the largest write
MAX_CONTROL_BYTES = 64 << 10  # acknowledgements and resets that the peer causes and does not read
_MAX_PEER_FRAME = 64 << 10
READ_BYTES = 32 << 10  # at once; asyncio's own 256 KiB would be kept while a connection waits for its turn
_CACHED_BLOCKS = 8
_CACHED_BLOCK_BYTES, _CACHED_BLOCK_FIELDS = 512, 16
_GRANT_AFTER = 16384  # consumed bytes before a WINDOW_UPDATE: one for each message would cost more than the message
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))  # seconds, seconds, tries
# How long streams are accepted that the peer opened before it read the first GOAWAY: after its answer to the PING that
# follows the GOAWAY, and without an answer.
_GOAWAY_GRACE_S, GOAWAY_TIMEOUT_S = 0.1, 2.0
_NO_MORE, _GOODBYE = b"no more!", b"goodbye!"  # payloads of the PINGs after the first GOAWAY, and before the end
_KEPT_CLOSED = 128  # streams that this side reset, whose late frames are no error
_KEPT_SKIPPED = 16
_FRAMES_A_TURN = 64
_RESET_AT_ONCE = 16
# How often a peer may do each of the following: at once, and per second in the long run.
# Streams that it opens and resets: 700 callers with deadlines of 50 ms reset 14,000 while a server stalls for 1 s.
RESETS = (16_000, 400)
VIOLATIONS = (100, 1)  # errors of a stream, which no correct client makes
SETTINGS_FRAMES = (1000, 10)  # each may change the windows of all streams
IDLE_FRAMES = (10_000, 1000)  # PING, PRIORITY, empty DATA, frames of unknown types and of closed streams
# Bytes of header blocks that are decoded for a peer that has not sent a valid token, if tokens are required.
STRANGE_BYTES = (256 << 10, 256 << 10)

FIELD_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")  # RFC 9110's token, in lower case
BAD_VALUE = re.compile(rb"[\0\r\n]")

Fields = list[tuple[bytes, bytes]]
HeadT = TypeVar("HeadT")


class _ConnectionFailed(Exception):  # noqa: N818
    """The peer broke a rule, and the connection ends."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Encode one frame."""
    return _frame_head(kind, flags, stream, len(payload)) + payload


def _frame_head(kind: int, flags: int, stream: int, size: int) -> bytes:
    """Encode the header of a frame with `size` bytes."""
    return _HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream)


def literal(name: bytes, value: bytes) -> bytes:
    """Encode a header field without the dynamic table and without Huffman coding (RFC 7541, 6.2.2)."""
    return b"\x00" + _integer(len(name)) + name + _integer(len(value)) + value


def _integer(value: int) -> bytes:
    """Encode an integer with a prefix of 7 bits (RFC 7541, 5.1)."""
    if value < 127:
        return bytes((value,))
    out, value = bytearray((127,)), value - 127
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


class Stream(Flow):
    """One request and its answer. A subclass implements the `on_` methods, which receive the request.

    `Connection.send` sends the answer.
    """

    __slots__ = ("_drained", "complete", "ended", "owed", "receive_window", "remote_ended")

    def __init__(self, stream_id: int) -> None:
        super().__init__(stream_id)
        self.receive_window = 0
        self.owed = 0  # consumed bytes that the peer has no WINDOW_UPDATE for yet
        self.remote_ended = False
        self.complete = False  # all of its answer was passed to `Connection.send`
        self.ended = False  # nothing more is sent
        self._drained: asyncio.Future[None] | None = None

    def on_data(self, data: bytes, *, last: bool) -> bool:
        """Receive a part of the request's body; `on_end` follows the last. Return whether to call `read_on`."""
        raise NotImplementedError

    def read_on(self) -> bool:
        """Process received data until the connection's turn ends; return whether there is more to do."""
        raise NotImplementedError

    def on_end(self) -> None:
        """Handle the end of the body."""
        raise NotImplementedError

    def on_incomplete(self) -> None:
        """Handle a body that is not complete in the turn of its headers."""

    def on_reset(self) -> None:
        """Handle the reset of the stream or the loss of the connection; nothing can be sent."""
        raise NotImplementedError

    def on_evicted(self) -> None:
        """End the stream: the peer did not read the answer, which is dropped."""
        raise NotImplementedError

    @property
    def key(self) -> object:
        """The key of its share of the memory for answers."""
        raise NotImplementedError

    @property
    def pending_bytes(self) -> int:
        """Bytes of the answer that wait for the peer."""
        return self.left

    def sent(self) -> None:
        """Wake the tasks that wait in `drained`: the pending bytes are sent, or never will be."""
        if self._drained is not None:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None

    async def drained(self) -> None:
        """Wait until nothing is pending or the stream has ended, such as when the peer reads nothing in time."""
        if self.holding is not None and not self.ended:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)  # others may wait, too


class Connection(asyncio.Protocol, Generic[HeadT]):
    """One connection with a peer.

    Args:
        read_head: converts a request's fields to the head that `open_stream` gets; heads of repeated blocks are cached.
            Raises ValueError if the request is malformed (RFC 9113, 8.1.1).
        open_stream: called with the connection, a stream's id and its head; returns the stream, or None to refuse it.
        limits: of streams, and of times.
        answers: the pool that counts the bytes that wait for this peer.
        turns: shares the loop's time.
        trusted: whether headers are decoded without a rate limit.
        on_made: called when the connection is made.
        on_lost: called when the connection has ended.
    """

    def __init__(
        self,
        *,
        read_head: Callable[[Fields], HeadT],
        open_stream: "Callable[[Connection[HeadT], int, HeadT], Stream | None]",
        limits: Limits,
        answers: Pool,
        turns: LoopTurns,
        trusted: bool,
        on_made: "Callable[[Connection[HeadT]], None]",
        on_lost: "Callable[[Connection[HeadT]], None]",
        on_failed: "Callable[[Connection[HeadT], str, str], None]" = lambda *_: None,
    ) -> None:
        self._read_head, self._open_stream = read_head, open_stream
        self._on_made, self._on_lost, self._on_failed = on_made, on_lost, on_failed
        self._limits = limits
        # Room for the largest message with its prefix, and for earlier bytes that have no WINDOW_UPDATE yet.
        self._stream_window = limits.max_request_bytes + _GRANT_AFTER + 5
        self._loop = asyncio.get_running_loop()
        # Reading.
        self._decoder = Decoder(_MAX_DECODED_BYTES)
        self._table = self._decoder.header_table = CountingHeaderTable()
        self._heads: dict[bytes, HeadT] = {}
        self._heads_of = 0  # the table's changes when the cached heads were read
        self._rest = b""
        self._greeted = False
        # Stream and flags of an unfinished header block, its bytes, and its frames.
        self._block: tuple[int, int, bytearray, int] | None = None
        self._last_id = 0
        self._opened: list[Stream] = []  # in this turn
        self._unfinished: tuple[Stream, bool] | None = None  # a stream with unprocessed data, and whether it ends
        self._skipped: deque[range] = deque(maxlen=_KEPT_SKIPPED)  # streams that can never be opened
        self._reset_here: deque[int] = deque(maxlen=_KEPT_CLOSED)
        self._receive_window = _DEFAULT_WINDOW
        self.trusted = trusted
        self._strange_bytes = Bucket(*STRANGE_BYTES)
        self._resets = Bucket(*RESETS)
        self._violations = Bucket(*VIOLATIONS)
        self._settings_frames = Bucket(*SETTINGS_FRAMES)
        self._idle_frames = Bucket(*IDLE_FRAMES)
        self._data_sent = False  # since the last PING
        # Turns.
        self._turns = turns
        self.until = 0.0  # the end of the current turn, by time.perf_counter
        self.seen_s = self.used_s = self.finish_s = 0.0
        self._in_turn = self._waits_for_turn = self._asleep = self._reading_paused = False
        self._todo: deque[Callable[[], None]] = deque()
        # Writing.
        self._flow = SendFlow(answers, _FRAME_SIZE)
        self._table_size_sent = False
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._flush_bytes = _FLUSH_BYTES
        self._flushing = False
        self._writable = True
        self._control_bytes = 0  # written while the peer does not read
        self._below: asyncio.WriteTransport | None = None  # the transport under TLS
        self._output = Holding(answers, self, self.abandon)  # the transport's buffer, while the peer does not read
        # The end.
        self._goaway_at: int | None = None  # streams above this are not answered
        self._closing = False
        self._peer_timer: asyncio.TimerHandle | None = None  # for the peer's next step
        self._drain_timer: asyncio.TimerHandle | None = None
        self._unread_seen = 0  # bytes that the peer had not acknowledged at the last look
        self._age_timer: asyncio.TimerHandle | None = None
        self._last_id_seen = 0  # at the last look for idle connections
        self.idle_since = time.monotonic()
        self.streams: dict[int, Stream] = {}
        self.transport: asyncio.Transport

    @property
    def greeted(self) -> bool:
        """Whether the peer has sent HTTP/2's preface."""
        return self._greeted

    @property
    def draining(self) -> bool:
        """Whether the peer was asked to open no more streams here."""
        return self._goaway_at is not None

    @property
    def closing(self) -> bool:
        """Whether the connection is ending, or has ended."""
        return self._closing

    # For asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the socket's options, and send this side's settings."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # Without a buffer of its own: bytes that the kernel does not accept wait here, where they are counted.
        transport.set_write_buffer_limits(high=1, low=0)
        set_read_bytes(transport, READ_BYTES)
        self._below = transport_below_tls(transport)
        if self._below is not None:
            self._flush_bytes = _TLS_FLUSH_BYTES
            self._below.set_write_buffer_limits(high=1, low=0)
        with contextlib.suppress(OSError):  # the peer is gone already; connection_lost comes next
            # A peer that loses power does not close its connection, which would count forever.
            connected = transport.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._on_made(self)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._closing = True  # RFC 9113, 3.2: the peer has not agreed to HTTP/2
            transport.close()
            return
        self._expect_soon("preface", self._limits.handshake_timeout_s)
        settings = {
            _MAX_CONCURRENT_STREAMS: self._limits.max_streams,
            _INITIAL_WINDOW_SIZE: self._stream_window,
            _MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_BYTES,
        }
        self._write(frame(SETTINGS, 0, 0, b"".join(itertools.starmap(_SETTING.pack, settings.items()))))
        # The pools bound a connection's bytes, not its window: waiting streams must not block the other streams.
        self._grant(0, MAX_WINDOW - _DEFAULT_WINDOW)
        self._receive_window = MAX_WINDOW

    def data_received(self, data: bytes) -> None:
        """Read complete frames: some at once, and the rest in later turns."""
        if self._closing:
            return
        self._rest = self._rest + data if self._rest else data
        if not self._waits_for_turn and not self._asleep:
            self._turns.begin(self)

    def eof_received(self) -> bool:
        """Close: a peer that has closed its side reads no answers."""
        self._fail(NO_ERROR, "")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End all streams."""
        self._closing = True
        self._rest, self._block, self._unfinished = b"", None, None
        self._todo.clear()
        self._output.resize(0)
        self._stop_timers()
        self._end_streams()
        self._on_lost(self)

    def pause_writing(self) -> None:
        """Hold answers back: the peer does not read."""
        self._writable = False

    def resume_writing(self) -> None:
        """Send the waiting answers."""
        self._writable, self._control_bytes = True, 0
        self._output.resize(self._buffered())
        self._send_waiting()

    # For LoopTurns.

    def waits(self) -> None:
        """Read nothing more from the peer until the turn comes."""
        self._waits_for_turn = True
        self._pause_reading()

    def turn(self, until: float) -> bool:
        """Work until a time by time.perf_counter; return whether there is more to do."""
        self.until, self._in_turn, more = until, True, False
        try:
            more = not self._closing and self._work()
        except _ConnectionFailed as error:
            self._fail(error.code, str(error))
        except Exception:
            _log.exception("a connection failed")
            self._fail(INTERNAL_ERROR, "internal error")
        self._in_turn = False
        more = self._waits_for_turn = more and not self._closing
        if not more and not self._asleep and self._reading_paused and not self._closing:
            self._reading_paused = False
            self.transport.resume_reading()
        return more

    def _work(self) -> bool:
        if self._todo and not self._do_todo():
            return True
        if self._unfinished is not None:
            stream, ends = self._unfinished
            if not stream.ended and stream.read_on():
                return True
            self._unfinished = None
            if ends and not stream.ended:
                self._remote_end(stream)
        if self._asleep:
            return False
        data = self._rest
        position = 0 if self._greeted else self._read_preface(data)
        more = False
        if self._greeted:
            position, more = self._read_frames(data, position)
        self._rest = b"" if self._closing else data[position:]
        if self._opened:
            for stream in self._opened:
                if not stream.remote_ended and not stream.ended:
                    stream.on_incomplete()
            self._opened.clear()
        return more or bool(self._todo and not self._do_todo())

    def _do_todo(self) -> bool:
        """Do the work that streams have deferred; return whether none is left."""
        todo = self._todo
        while todo:
            todo.popleft()()
            if todo and time.perf_counter() > self.until:
                return False
        return True

    def _sleep(self, seconds: float) -> None:
        """Read nothing for some time."""
        self._asleep = True
        self._pause_reading()
        self._loop.call_later(seconds, self._wake)

    def _wake(self) -> None:
        self._asleep = False
        if not self._closing and not self._waits_for_turn:
            self._turns.wait(self)

    def _pause_reading(self) -> None:
        if not self._reading_paused and not self._closing:
            self._reading_paused = True
            self.transport.pause_reading()

    # For streams and the server.

    def soon(self, work: Callable[[], None]) -> None:
        """Call `work` in this connection's turn, after the received frames are read."""
        if self._closing:
            return
        self._todo.append(work)
        if not self._in_turn and not self._waits_for_turn:
            self._turns.wait(self)

    def send(self, stream: Stream, headers: bytes | None, data: bytes | memoryview, trailers: bytes | None) -> None:
        """Send a part of a stream's answer, now or when the windows allow. Trailers end it; empty ones are not sent."""
        if stream.ended or stream.complete:
            return
        stream.complete = trailers is not None
        if self._writable and len(data) <= _FLUSH_BYTES and self._flow.passes(stream, len(data)):
            self._send_part(stream, headers, data, trailers)
            return
        self._flow.keep(stream, stream.key, stream.on_evicted, headers, data, trailers)
        self._send_waiting()

    def reset(self, stream: Stream, code: int) -> None:
        """End a stream with RST_STREAM."""
        if stream.id in self.streams:
            self._write(frame(RST_STREAM, 0, stream.id, code.to_bytes(4, "big")))
            self._reset_here.append(stream.id)
            self._end(stream)

    def abort(self, stream: Stream, code: int) -> None:
        """End a stream whose peer has broken a rule."""
        self.reset(stream, code)
        stream.on_reset()
        self._violate()

    def forget_answer(self, stream: Stream) -> bool:
        """Drop the waiting part of a stream's answer; return whether nothing of the answer has been sent."""
        unsent = stream.header_block is not None
        self._flow.drop(stream)
        stream.complete = False
        stream.sent()
        return unsent

    @property
    def writable(self) -> bool:
        """Whether the peer reads: no sent bytes wait for the kernel."""
        return self._writable

    def consumed(self, stream: Stream, size: int) -> None:
        """Let the peer send `size` more bytes on a stream."""
        stream.owed += size
        if stream.owed >= _GRANT_AFTER and not stream.remote_ended and not stream.ended:
            stream.receive_window += stream.owed
            self._grant(stream.id, stream.owed)
            stream.owed = 0

    def drain(self) -> None:
        """Ask the peer to open no more streams here, answer the open ones, then close. No call is lost."""
        if self._closing or self._goaway_at is not None:
            return
        self._goaway_at = MAX_WINDOW
        # In two steps, as RFC 9113, 6.8 advises: streams in flight are still answered.
        self._write(frame(GOAWAY, 0, 0, struct.pack(">II", MAX_WINDOW, NO_ERROR)) + frame(PING, 0, 0, _NO_MORE))
        self._drain_timer = self._loop.call_later(GOAWAY_TIMEOUT_S, self._stop_streams)

    def end_later(self, age_s: float, end: "Callable[[Connection[HeadT]], None]") -> None:
        """Call `end` with the connection at the given age, unless the connection has ended."""
        self._age_timer = self._loop.call_later(age_s, end, self)

    def close(self) -> None:
        """Close the connection, and end its calls."""
        self._fail(NO_ERROR, "")

    def look(self, now: float, *, busy: bool) -> None:
        """Record what the peer has done since the last look: streams that it opened, and output that it read."""
        if busy or self._last_id != self._last_id_seen:
            self._last_id_seen, self.idle_since = self._last_id, now
        size = self._buffered()
        if size or self._output.size:
            unread = self._unread()
            progress = size < self._output.size or unread != self._unread_seen
            self._output.resize(size)
            if progress:
                self._output.progress()
            self._unread_seen = unread

    def stands_still_since(self) -> float | None:
        """When the peer last read any of the waiting output, by time.monotonic; None: no output waits."""
        return self._output.since if self._output.size else None

    # Reading.

    def _read_preface(self, data: bytes) -> int:
        """Read the preface, if it is complete; return where the rest begins."""
        if not PREFACE.startswith(data[: len(PREFACE)]):
            raise _ConnectionFailed(PROTOCOL_ERROR, "this port speaks gRPC (HTTP/2 with prior knowledge)")
        if len(data) < len(PREFACE) + _HEAD.size:
            return 0
        _, _, kind, flags, _ = _HEAD.unpack_from(data, len(PREFACE))
        if kind != SETTINGS or flags & ACK:
            raise _ConnectionFailed(PROTOCOL_ERROR, "the preface must end with SETTINGS")
        self._greeted = True
        self._came()
        return len(PREFACE)

    def _read_frames(self, data: bytes, position: int) -> tuple[int, bool]:
        """Read complete frames from a position on; return where the rest begins, and whether to continue later."""
        size, left = len(data), _FRAMES_A_TURN
        while size - position >= 9 and not self._closing:
            if self._asleep:
                return position, False
            if not left or self._unfinished is not None or time.perf_counter() > self.until:
                return position, True
            left -= 1
            high, low, kind, flags, stream_id = _HEAD.unpack_from(data, position)
            end = position + 9 + (high << 16 | low)
            if end - position > 9 + _FRAME_SIZE:
                raise _ConnectionFailed(FRAME_SIZE_ERROR, f"a frame may have at most {_FRAME_SIZE} bytes")
            if end > size:
                break
            payload = data[position + 9 : end]
            position = end
            stream_id &= MAX_WINDOW
            if self._block is not None and (kind != CONTINUATION or stream_id != self._block[0]):
                raise _ConnectionFailed(PROTOCOL_ERROR, "no other frame may interrupt a header block")
            if kind == DATA:
                self._on_data(stream_id, flags, payload)
            elif kind == HEADERS:
                self._on_headers(stream_id, flags, payload)
            elif kind <= CONTINUATION:
                _HANDLERS[kind](self, stream_id, flags, payload)
            else:
                self._count(self._idle_frames, "there are too many frames of unknown types")
        return position, self._unfinished is not None

    def _on_headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        if not stream_id & 1:
            raise _ConnectionFailed(PROTOCOL_ERROR, "a client's streams must have odd numbers")
        if flags & PADDED:
            payload = _unpadded(payload)
        if flags & PRIORITY_FLAG:
            if len(payload) < 5:
                raise _ConnectionFailed(FRAME_SIZE_ERROR, "HEADERS is too short for its priority")
            if int.from_bytes(payload[:4], "big") & MAX_WINDOW == stream_id:
                raise _ConnectionFailed(PROTOCOL_ERROR, "a stream cannot depend on itself")
            payload = payload[5:]
        if flags & END_HEADERS:
            self._on_block(stream_id, flags, payload)
        else:
            self._block = (stream_id, flags, bytearray(payload), 1)
            self._expect_soon("rest of a header block", self._limits.header_timeout_s)

    def _on_continuation(self, stream_id: int, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise _ConnectionFailed(PROTOCOL_ERROR, "CONTINUATION does not follow an unfinished header block")
        _, first_flags, block, frames = self._block
        block += payload
        empty = not payload and not flags & END_HEADERS
        if empty or len(block) > MAX_BLOCK_BYTES or frames > MAX_CONTINUATIONS:
            raise _ConnectionFailed(
                ENHANCE_YOUR_CALM,
                f"a header block may have at most {MAX_BLOCK_BYTES} bytes in {MAX_CONTINUATIONS} CONTINUATION frames",
            )
        self._block = (stream_id, first_flags, block, frames + 1)
        if flags & END_HEADERS:
            self._block = None
            self._came()
            self._on_block(stream_id, first_flags, bytes(block))

    def _on_block(self, stream_id: int, flags: int, block: bytes) -> None:
        if stream_id <= self._last_id:
            self._on_trailers(stream_id, flags, block)
            return
        if stream_id > self._last_id + 2:
            self._skipped.append(range(self._last_id + 1, stream_id))
        self._last_id = stream_id
        try:
            head = self._head(block)
        except ValueError:
            self._refuse(stream_id, PROTOCOL_ERROR)
            self._violate()
            return
        if self._goaway_at is not None and stream_id > self._goaway_at:
            return  # by the GOAWAY, the peer knows that it is not processed, and asks another server
        if self._resets.left <= 0 and self._resets.take(0) <= 0:
            self._count_reset()
            self._refuse(stream_id, ENHANCE_YOUR_CALM)
            return
        if len(self.streams) >= self._limits.max_streams:
            self._refuse(stream_id, REFUSED_STREAM)
            return
        stream = self._open_stream(self, stream_id, head)
        if stream is None:
            self._refuse(stream_id, REFUSED_STREAM)
            return
        stream.window, stream.receive_window = self._flow.initial_window, self._stream_window
        self.streams[stream_id] = stream
        if flags & END_STREAM:
            self._remote_end(stream)
        else:
            self._opened.append(stream)

    def _on_trailers(self, stream_id: int, flags: int, block: bytes) -> None:
        fields = self._decode(block)  # even if they are not used: decoding keeps the table correct
        stream = self.streams.get(stream_id)
        if stream is None:
            if any(stream_id in ids for ids in self._skipped):
                raise _ConnectionFailed(PROTOCOL_ERROR, f"stream {stream_id} comes after a stream with a higher number")
            if self._goaway_at is not None and stream_id > self._goaway_at:
                return
            if stream_id not in self._reset_here:
                raise _ConnectionFailed(STREAM_CLOSED, f"stream {stream_id} is closed")
        elif stream.remote_ended:
            self.abort(stream, STREAM_CLOSED)
        elif not flags & END_STREAM:
            raise _ConnectionFailed(PROTOCOL_ERROR, "trailers must end the stream")
        elif any(not FIELD_NAME.fullmatch(name) or BAD_VALUE.search(value) for name, value in fields):
            self.abort(stream, PROTOCOL_ERROR)
        else:
            self._remote_end(stream)

    def _head(self, block: bytes) -> HeadT:
        """Read a request's header block, or take its head from the cache, which is valid until the table changes."""
        head = self._heads.get(block)
        if head is None:
            changes = self._table.changes
            fields = self._decode(block)
            head = self._read_head(fields)
            # A block that changes the table means something else the next time.
            small = len(block) <= _CACHED_BLOCK_BYTES and len(fields) <= _CACHED_BLOCK_FIELDS
            if small and changes == self._table.changes:
                if len(self._heads) >= _CACHED_BLOCKS:
                    self._heads.clear()
                self._heads[block] = head
        return head

    def _decode(self, block: bytes) -> Fields:
        if block and block[0] >> 5 == 1:
            self._table.changes += 1  # its size changes, perhaps to 0 and back
        fields: Fields = []
        try:
            fields = [(name, value) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError as error:
            raise _ConnectionFailed(
                ENHANCE_YOUR_CALM, f"headers may have at most {MAX_HEADER_LIST_BYTES} bytes"
            ) from error
        except (HPACKError, IndexError, ValueError) as error:
            raise _ConnectionFailed(COMPRESSION_ERROR, "the headers cannot be decoded") from error
        finally:
            if self._heads_of != self._table.changes:
                self._heads_of = self._table.changes
                self._heads.clear()
        cost = max(len(block), 32 * len(fields))  # 32: as RFC 9113 counts a field, besides its own bytes
        if not self.trusted and (left := self._strange_bytes.take(cost)) < 0:
            self._sleep(-left / STRANGE_BYTES[1])
        return fields

    def _on_data(self, stream_id: int, flags: int, payload: bytes) -> None:
        size = len(payload)
        self._receive_window -= size
        if self._receive_window < MAX_WINDOW // 2:
            self._grant(0, MAX_WINDOW - self._receive_window)
            self._receive_window = MAX_WINDOW
        if flags & PADDED:
            payload = _unpadded(payload)
        if not payload and not flags & END_STREAM:
            self._count(self._idle_frames, "there are too many empty DATA frames")
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id > self._last_id or not stream_id & 1:
                raise _ConnectionFailed(PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is not open")
            if self._goaway_at is None and stream_id not in self._reset_here:
                self._count(self._idle_frames, "there is too much DATA on closed streams")
                self._refuse(stream_id, STREAM_CLOSED)
            return
        if stream.remote_ended:
            self.abort(stream, STREAM_CLOSED)
            return
        stream.receive_window -= size
        if stream.receive_window < 0:
            self.abort(stream, FLOW_CONTROL_ERROR)
            return
        last = bool(flags & END_STREAM)
        unfinished = stream.on_data(payload, last=last) if payload else False
        if flags & PADDED:
            self.consumed(stream, size - len(payload))
        if unfinished and not stream.ended:
            self._unfinished = (stream, last)
        elif last and not stream.ended:
            self._remote_end(stream)

    def _remote_end(self, stream: Stream) -> None:
        stream.remote_ended = True
        stream.on_end()

    def _on_rst_stream(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "RST_STREAM must have 4 bytes")
        if stream_id > self._last_id or not stream_id & 1:
            raise _ConnectionFailed(PROTOCOL_ERROR, f"RST_STREAM of stream {stream_id}, which is not open")
        if stream := self.streams.get(stream_id):
            self._end(stream, reset=True)
            self._count_reset()

    def _on_settings(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "SETTINGS must be on stream 0")
        if len(payload) % 6 or (flags & ACK and payload):
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "SETTINGS must have 6 bytes for each setting, and none with ACK")
        if flags & ACK:
            self._count(self._idle_frames, "SETTINGS are acknowledged too often")
            return
        self._count(self._settings_frames, "there are too many SETTINGS frames")
        flow = self._flow
        window = flow.initial_window
        for name, value in _SETTING.iter_unpack(payload):
            if name == _ENABLE_PUSH and value > 1:
                raise _ConnectionFailed(PROTOCOL_ERROR, "ENABLE_PUSH must be 0 or 1")
            if name == _MAX_FRAME_SIZE:
                if not _FRAME_SIZE <= value < 1 << 24:
                    raise _ConnectionFailed(PROTOCOL_ERROR, "MAX_FRAME_SIZE must be from 2^14 to 2^24-1")
                flow.frame_size = min(value, _MAX_PEER_FRAME)
            if name == _INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise _ConnectionFailed(FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE must be at most 2^31-1")
                window = value
        if window != flow.initial_window:
            try:
                flow.resize(window, self.streams.values())
            except Overflow as error:
                raise _ConnectionFailed(FLOW_CONTROL_ERROR, "a window must be at most 2^31-1") from error
        self._control(frame(SETTINGS, ACK, 0))
        self._send_waiting()

    def _on_ping(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "PING must be on stream 0")
        if len(payload) != 8:
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "PING must have 8 bytes")
        if self._data_sent:
            self._data_sent = False  # gRPC's clients send a PING for received data, to measure the bandwidth
        else:
            self._count(self._idle_frames, "there are too many PING frames")
        if not flags & ACK:
            self._control(frame(PING, ACK, 0, payload))
        elif payload == _GOODBYE:
            self.close()
        elif payload == _NO_MORE and self._goaway_at == MAX_WINDOW and self._drain_timer is not None:
            end = self._loop.time() + _GOAWAY_GRACE_S
            if end < self._drain_timer.when():  # not again for each further answer
                self._drain_timer.cancel()
                self._drain_timer = self._loop.call_at(end, self._stop_streams)

    def _on_window_update(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "WINDOW_UPDATE must have 4 bytes")
        more = int.from_bytes(payload, "big") & MAX_WINDOW
        stream = self.streams.get(stream_id)
        if stream_id and stream is None:
            if stream_id > self._last_id or not stream_id & 1:
                raise _ConnectionFailed(PROTOCOL_ERROR, f"WINDOW_UPDATE of stream {stream_id}, which is not open")
            return
        code = NO_ERROR if more else PROTOCOL_ERROR
        try:
            self._flow.grant(stream, more)
        except Overflow:
            code = FLOW_CONTROL_ERROR
        if code and stream is None:
            raise _ConnectionFailed(code, "WINDOW_UPDATE by 0, or to more than 2^31-1")
        if code and stream is not None:
            self.abort(stream, code)
        self._send_waiting()

    def _on_priority(self, stream_id: int, flags: int, payload: bytes) -> None:
        if not stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "PRIORITY must not be on stream 0")
        if len(payload) != 5:
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "PRIORITY must have 5 bytes")
        if int.from_bytes(payload[:4], "big") & MAX_WINDOW == stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "a stream cannot depend on itself")
        self._count(self._idle_frames, "there are too many PRIORITY frames")

    def _on_goaway(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "GOAWAY must be on stream 0")
        if len(payload) < 8:
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "GOAWAY must have 8 bytes or more")
        self._count(self._idle_frames, "there are too many GOAWAY frames")
        self.drain()

    def _on_push_promise(self, stream_id: int, flags: int, payload: bytes) -> None:
        raise _ConnectionFailed(PROTOCOL_ERROR, "a client cannot push")

    @staticmethod
    def _count(bucket: Bucket, text: str) -> None:
        if bucket.take() < 0:
            raise _ConnectionFailed(ENHANCE_YOUR_CALM, text)

    def _violate(self) -> None:
        self._count(self._violations, "there are too many errors on streams")

    def _count_reset(self) -> None:
        """Count a reset or refused stream; end the connection if there are more than twice the burst of `RESETS`."""
        if self._resets.take() < -RESETS[0]:
            raise _ConnectionFailed(ENHANCE_YOUR_CALM, "too many streams are opened and reset")

    # Writing.

    def _send_part(
        self, stream: Stream, headers: bytes | None, data: bytes | memoryview, trailers: bytes | None
    ) -> None:
        """Write a part of a stream's answer that the windows allow; trailers end the stream."""
        pieces: list[bytes | memoryview] = []
        if headers is not None:
            if not self._table_size_sent:
                # This direction uses no dynamic table, so announce size 0: the peer may reduce it (RFC 7541, 4.2).
                self._table_size_sent = True
                headers = b"\x20" + headers
            only = trailers == b"" and not data
            pieces.append(frame(HEADERS, END_HEADERS | END_STREAM if only else END_HEADERS, stream.id, headers))
        if data:
            self._data_sent = True
            most = self._flow.frame_size
            if len(data) > most:
                view = memoryview(data)
                for start in range(0, len(data) - most, most):
                    self._write(*pieces, _frame_head(DATA, 0, stream.id, most), view[start : start + most])
                    pieces.clear()
                data = view[start + most :]
            pieces += (_frame_head(DATA, 0, stream.id, len(data)), data)
        if trailers:
            pieces.append(frame(HEADERS, END_HEADERS | END_STREAM, stream.id, trailers))
        self._write(*pieces)
        if trailers is not None:
            self._finish(stream)

    def _write(self, *pieces: bytes | memoryview) -> None:
        """Buffer pieces for one write in this iteration of the loop; write at once if the buffer is full."""
        if self._closing:
            return
        self._out += pieces
        self._out_bytes += sum(map(len, pieces))
        if self._out_bytes > self._flush_bytes:
            self._flush_now()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._flush_now()

    def _flush_now(self) -> None:
        if self._out:
            data = b"".join(self._out)
            self._out.clear()
            self._out_bytes = 0
            if not self.transport.is_closing():
                self.transport.write(data)
                if not self._writable:
                    self._output.resize(self._buffered())

    def _control(self, data: bytes) -> None:
        """Answer a control frame; fail if the peer causes more answers than it reads."""
        if not self._writable:
            self._control_bytes += len(data)
            if self._control_bytes > MAX_CONTROL_BYTES:
                raise _ConnectionFailed(ENHANCE_YOUR_CALM, "answers to control frames are not read")
        self._write(data)

    def _grant(self, stream_id: int, more: int) -> None:
        self._write(frame(WINDOW_UPDATE, 0, stream_id, more.to_bytes(4, "big")))

    def _refuse(self, stream_id: int, code: int) -> None:
        self._reset_here.append(stream_id)
        self._control(frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big")))

    def _send_waiting(self) -> None:
        """Send the waiting parts that the windows allow, a frame of each stream in turn."""
        while self._writable and not self._closing and (part := self._flow.next()) is not None:
            stream, head, data, trailers = part
            assert isinstance(stream, Stream)
            self._send_part(stream, head, data or b"", trailers)
            if stream.holding is None:
                stream.sent()

    # The end.

    def _finish(self, stream: Stream) -> None:
        """End a stream whose answer is completely written."""
        stream.ended = True
        if not stream.remote_ended:
            # The rest of the request is not read.
            self._write(frame(RST_STREAM, 0, stream.id, NO_ERROR.to_bytes(4, "big")))
            self._reset_here.append(stream.id)
        self._end(stream)

    def _end(self, stream: Stream, *, reset: bool = False) -> None:
        stream.ended = True
        self.streams.pop(stream.id, None)
        if stream.holding is not None:
            self._flow.drop(stream)
        stream.sent()
        if reset:
            stream.on_reset()
        if self._goaway_at is not None and not self.streams and self._goaway_at != MAX_WINDOW:
            self._say_goodbye()

    def _stop_streams(self) -> None:
        self._goaway_at = self._last_id
        self._write(frame(GOAWAY, 0, 0, struct.pack(">II", self._last_id, NO_ERROR)))
        if not self.streams:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Send a last PING, and close on its answer: the peer has then read everything, unless it closes first.

        If this side closed sooner, the bytes in flight would be lost as soon as the peer sends anything. With TLS,
        which cannot be half-closed, they would always be lost.
        """
        if not self._closing:
            self._write(frame(PING, 0, 0, _GOODBYE))
            self._unread_seen = self._unread()
            self._drain_timer = self._loop.call_later(_CLOSE_TIMEOUT_S, self._abort_unread)

    def _abort_unread(self) -> None:
        """End the connection if its peer has read nothing since the last check."""
        if (unread := self._unread()) == self._unread_seen:
            self.transport.abort()
            return
        self._unread_seen = unread
        self._drain_timer = self._loop.call_later(_CLOSE_TIMEOUT_S, self._abort_unread)

    def _buffered(self) -> int:
        """Return how many bytes of output wait for the kernel."""
        size = self.transport.get_write_buffer_size()
        return size if self._below is None else size + self._below.get_write_buffer_size()

    def _unread(self) -> int:
        """Return how many bytes in the kernel's send buffer the peer has not acknowledged."""
        connected = self.transport.get_extra_info("socket")
        try:
            return int.from_bytes(fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (AttributeError, OSError, ValueError):  # the socket is closed, or absent in a test
            return 0

    def _end_streams(self) -> None:
        """End all streams. Ending calls takes time: after the first 16, the rest follow in later iterations."""
        streams = tuple(self.streams.values())
        for stream in streams:
            self._end(stream)
        for stream in streams[:_RESET_AT_ONCE]:
            stream.on_reset()
        self._turns.spread(stream.on_reset for stream in streams[_RESET_AT_ONCE:])

    def leave(self) -> None:
        """Close a connection without calls at once. A client retries a call in flight on another connection."""
        self._write(frame(GOAWAY, 0, 0, struct.pack(">II", self._last_id, NO_ERROR)))
        self._flush_now()
        self._closing = True
        self._stop_timers()
        self.transport.close()

    def abandon(self) -> None:
        """End the connection without a GOAWAY: its peer would not read it."""
        self._closing = True
        self.transport.abort()

    def _expect_soon(self, what: str, timeout_s: float) -> None:
        self._came()
        if timeout_s:
            text = f"no {what} came within {timeout_s:g} s"
            self._peer_timer = self._loop.call_later(timeout_s, self._fail, PROTOCOL_ERROR, text, "slow")

    def _came(self) -> None:
        if self._peer_timer is not None:
            self._peer_timer.cancel()

    def _stop_timers(self) -> None:
        for timer in (self._peer_timer, self._drain_timer, self._age_timer):
            if timer is not None:
                timer.cancel()

    def _fail(self, code: int, text: str, reason: str = "protocol") -> None:
        """Close the connection; for an error, send a GOAWAY with the reason first."""
        if self._closing:
            return
        if code not in (NO_ERROR, INTERNAL_ERROR):
            self._on_failed(self, "flood" if code == ENHANCE_YOUR_CALM else reason, text)
        self._closing = True
        self._stop_timers()
        self._rest, self._block, self._unfinished = b"", None, None
        self._todo.clear()
        if code != NO_ERROR:
            # The last stream id must not be higher than in an earlier GOAWAY.
            last = self._last_id if self._goaway_at is None else min(self._last_id, self._goaway_at)
            self._out.append(frame(GOAWAY, 0, 0, struct.pack(">II", last, code) + text.encode()))
        self._flush_now()
        self._end_streams()
        if self._control_bytes > MAX_CONTROL_BYTES:
            self.transport.abort()
            return
        floods = code == ENHANCE_YOUR_CALM
        if not self.transport.is_closing() and floods != self._reading_paused:
            # From peers that do not flood, further data is read and dropped.
            self._reading_paused = floods
            (self.transport.pause_reading if floods else self.transport.resume_reading)()
        # Half-close: with a full close while the peer still sends, the peer would lose the bytes it has not read yet.
        if self.transport.can_write_eof() and not self.transport.is_closing():
            try:
                self.transport.write_eof()
            except OSError:  # the peer is gone
                self.transport.abort()
                return
        else:
            self.transport.close()
        # A peer that neither reads nor closes would keep the connection open forever.
        timeout_s = _CALM_CLOSE_TIMEOUT_S if floods else _CLOSE_TIMEOUT_S
        self._peer_timer = self._loop.call_later(timeout_s, self.transport.abort)


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise _ConnectionFailed(PROTOCOL_ERROR, "the padding is longer than the frame")
    return payload[1 : len(payload) - payload[0]]


_HANDLERS = {
    PRIORITY: Connection._on_priority,
    RST_STREAM: Connection._on_rst_stream,
    SETTINGS: Connection._on_settings,
    PUSH_PROMISE: Connection._on_push_promise,
    PING: Connection._on_ping,
    GOAWAY: Connection._on_goaway,
    WINDOW_UPDATE: Connection._on_window_update,
    CONTINUATION: Connection._on_continuation,
}
