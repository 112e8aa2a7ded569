"""HTTP/2, the server's side of it, over asyncio: frames, compressed headers, flow control, and the bounds of each.

Why not grpcio's: an empty call costs its Python server 165 to 290 µs of a core, several times what a small model's
image costs. Here calls that came in one packet are read together, answered together, and written in one packet.

RFC 9113 is followed but for two things that gRPC has no use for: push and priorities. What a peer may make the server
keep is bounded: streams, bytes of a header block, and answers to its control frames (bodies and answers are bounded by
the layer above, which alone knows what a message is: `kept_bytes` and `Backlog` tell it what waits for a slow reader).
"""

import asyncio
import contextlib
import itertools
import logging
import socket
import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

from hpack import Decoder, HPACKError, OversizedHeaderListError
from hpack.table import HeaderTable

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
_MAX_WINDOW = 2**31 - 1
_FRAME_SIZE = 16384  # the least and the default of RFC 9113, for both directions: larger ones gained nothing measurable
_HEADER_LIST_BYTES = 16384
_DEFAULT_WINDOW = 65535
_PREFACE_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 5.0
_HIGH_WATER = 256 << 10  # bytes on their way to a peer that does not read, before its streams must wait
_MAX_CONTROL_BYTES = 1 << 20  # beyond those: acknowledgements that it asks for and does not read
_MAX_PEER_FRAME = 64 << 10  # larger frames would be written past the high-water mark
_CACHED_BLOCKS = 32
_CACHED_BLOCK_BYTES = 1024
_GRANT_AFTER = 16384  # bytes done with, before the peer is told: a frame a message would cost more than the message
# Frames of one read that cost far more than their bytes: SETTINGS, and streams opened and reset in one breath. A client
# that gives up all its calls while the server is busy stays below.
_MAX_COSTLY = 1000
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))  # seconds, seconds, tries
GOAWAY_GRACE_S = 0.1  # for streams that were opened before the peer read that it should open none
_GOODBYE = b"goodbye!"  # of the last PING
_KEPT_CLOSED = 128  # streams that this side reset, whose late frames are no error
_KEPT_SKIPPED = 16
# Frames of one connection in one turn of the event loop, which may be 2 ms of calls: 256 KiB of them would be 100 ms,
# for which all other connections, and the engines, would wait.
_FRAMES_A_TURN = 64

Fields = list[tuple[bytes, bytes]]
HeadT = TypeVar("HeadT")


class _ConnectionFailed(Exception):  # noqa: N818
    """The peer broke a rule, and the connection ends."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Write one frame."""
    size = len(payload)
    return _HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """Write a header field that needs no table and no Huffman code (RFC 7541, 6.2.2)."""
    return b"\x00" + _integer(len(name)) + name + _integer(len(value)) + value


def _integer(value: int) -> bytes:
    """Write an integer with a prefix of 7 bits (RFC 7541, 5.1)."""
    if value < 127:
        return bytes((value,))
    out, value = bytearray((127,)), value - 127
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


class Stream:
    """One exchange: its request comes by the `on_` methods, which a subclass fills in; its answer goes by `send`."""

    __slots__ = (
        "_drained",
        "ended",
        "id",
        "owed",
        "pending",
        "pending_bytes",
        "receive_window",
        "remote_ended",
        "send_window",
        "trailers",
    )

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        self.send_window = self.receive_window = 0
        self.owed = 0  # bytes done with that the peer has not been told of
        self.remote_ended = False
        self.ended = False  # nothing will be sent any more
        self.pending: deque[bytes | memoryview] | None = None  # waits for the peer's window
        self.pending_bytes = 0
        self.trailers: bytes | None = None  # go after what is pending
        self._drained: asyncio.Future[None] | None = None

    def on_data(self, data: bytes) -> None:
        """Take some of the request's body."""
        raise NotImplementedError

    def on_end(self) -> None:
        """Take note that the body is complete."""
        raise NotImplementedError

    def on_reset(self) -> None:
        """Take note that the peer, or the connection, is gone; nothing can be sent."""
        raise NotImplementedError

    def sent(self) -> None:
        """Let whoever waits for `drained` go on: what was pending is sent, or never will be."""
        if self._drained is not None:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None

    async def drained(self) -> None:
        """Wait until nothing is pending."""
        if self.pending and not self.ended:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await self._drained


class Backlog:
    """Bytes of answers that wait for their peers, of all connections that share it."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class _Table(HeaderTable):
    """Counts its changes: what a header block means is known as long as there are none."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)


class Connection(asyncio.Protocol, Generic[HeadT]):
    """One peer.

    Args:
        read_head: makes of a request's fields what the layer above needs; its result is kept for blocks that repeat.
            It may raise ValueError: the request is malformed (RFC 9113, 8.1.1).
        open_stream: called with the connection, a stream's id and that head; returns the stream, or None to refuse it.
        max_streams: that the peer may have open at a time.
        stream_window: bytes that the peer may send on a stream before it is told to go on, at least.
        backlog: where the bytes are counted that wait for this peer.
        on_made: called when the connection is there.
        on_lost: called when the connection is over.
    """

    def __init__(
        self,
        *,
        read_head: Callable[[Fields], HeadT],
        open_stream: "Callable[[Connection[HeadT], int, HeadT], Stream | None]",
        max_streams: int,
        stream_window: int,
        backlog: Backlog,
        on_made: "Callable[[Connection[HeadT]], None]",
        on_lost: "Callable[[Connection[HeadT]], None]",
    ) -> None:
        self._read_head, self._open_stream = read_head, open_stream
        self._on_made, self._on_lost = on_made, on_lost
        self._max_streams, self._stream_window = max_streams, stream_window + _GRANT_AFTER
        self._backlog = backlog
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(_HEADER_LIST_BYTES)
        self._table = self._decoder.header_table = _Table()
        self._heads: dict[bytes, HeadT] = {}
        self._heads_of = 0  # changes of the table when they were read
        self._rest = b""
        self._greeted = False
        self._block: tuple[int, int, bytes] | None = None  # stream, flags and bytes of an unfinished header block
        self._last_id = 0
        self._waits_for_turn = False
        self._last_id_before = 0  # this read
        self._costly = 0  # frames of this read
        self._skipped: deque[range] = deque(maxlen=_KEPT_SKIPPED)  # streams that can never be opened
        self._reset_here: deque[int] = deque(maxlen=_KEPT_CLOSED)
        self._receive_window = _DEFAULT_WINDOW
        self._send_window = _DEFAULT_WINDOW
        self._peer_stream_window = _DEFAULT_WINDOW
        self._peer_frame_size = _FRAME_SIZE
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._flushing = False
        self._writable = True
        # Streams with something pending that their own windows let pass, next one first. The others are not looked at:
        # a peer could have a thousand of them, and open the window of one by a byte, again and again.
        self._ready: OrderedDict[int, Stream] = OrderedDict()
        self.kept_bytes = 0  # pending on all streams
        self._goaway_at: int | None = None  # no stream above this is answered
        self._closing = False
        self._peer_timer: asyncio.TimerHandle | None = None  # for what the peer must do in time
        self._drain_timer: asyncio.TimerHandle | None = None
        self._age_timer: asyncio.TimerHandle | None = None
        self.streams: dict[int, Stream] = {}
        self.transport: asyncio.Transport

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say what this side takes."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(_HIGH_WATER)
        with contextlib.suppress(OSError):  # the peer is gone already; connection_lost comes next
            # A peer that was switched off says no goodbye, and would count as a connection for ever.
            connected = transport.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._expect_soon("preface")
        settings = {
            _MAX_CONCURRENT_STREAMS: self._max_streams,
            _INITIAL_WINDOW_SIZE: self._stream_window,
            _MAX_HEADER_LIST_SIZE: _HEADER_LIST_BYTES,
        }
        self._write(frame(SETTINGS, 0, 0, b"".join(itertools.starmap(_SETTING.pack, settings.items()))))
        # The whole of a connection is bounded by bytes kept, not by its window: streams that wait must not stop others.
        self._grant(0, _MAX_WINDOW - _DEFAULT_WINDOW)
        self._receive_window = _MAX_WINDOW
        self._on_made(self)

    def data_received(self, data: bytes) -> None:
        """Read the frames that are complete: some at once, and if there are more the rest in the next turns."""
        if self._closing:
            return
        self._rest = self._rest + data if self._rest else data
        self._last_id_before, self._costly = self._last_id, 0
        if not self._waits_for_turn:
            self._read()

    def _read(self) -> None:
        data = self._rest
        try:
            position = 0 if self._greeted else self._read_preface(data)
            if self._greeted:
                position, more = self._read_frames(data, position)
                if more:
                    self._waits_for_turn = True
                    self.transport.pause_reading()
                    asyncio.get_running_loop().call_soon(self._next_turn)
            self._rest = b"" if self._closing else data[position:]
        except _ConnectionFailed as error:
            self._fail(error.code, str(error))
        except Exception:
            _log.exception("a connection failed")
            self._fail(INTERNAL_ERROR, "internal error")

    def _next_turn(self) -> None:
        self._waits_for_turn = False
        if not self._closing:
            self._read()
        if not self._waits_for_turn:
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        """Close: a peer that has closed its side reads no answers."""
        self._fail(NO_ERROR, "")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End all streams."""
        self._closing = True
        self._stop_timers()
        self._end_streams()
        self._on_lost(self)

    def pause_writing(self) -> None:
        """Let streams wait: the peer does not read."""
        self._writable = False

    def resume_writing(self) -> None:
        """Let streams go on."""
        self._writable = True
        self._send_pending()

    # What streams, and the server, call.

    def send(self, stream: Stream, headers: bytes | None, data: bytes | memoryview, trailers: bytes | None) -> None:
        """Send some of a stream's answer; trailers end it. What the peer's windows do not let pass yet is kept."""
        if stream.ended or stream.trailers is not None:
            return
        if not self._writable and self._is_flooded():
            self._fail(ENHANCE_YOUR_CALM, "answers are not read")
            return
        if headers is not None:
            flags = END_HEADERS | END_STREAM if trailers == b"" else END_HEADERS
            self._write(frame(HEADERS, flags, stream.id, headers))
            if trailers == b"":
                self._finish(stream)
                return
        stream.trailers = trailers
        size = len(data)
        if stream.pending or (
            size and (size > stream.send_window or size > self._send_window or not self._writable or size > _HIGH_WATER)
        ):
            if stream.pending is None:
                stream.pending = deque()
            # Without data too: trailers must not pass what waits.
            stream.pending.append(data)
            self._keep(stream, size)
            if stream.send_window > 0:
                self._ready[stream.id] = stream
                self._send_pending()
            return
        if size:
            stream.send_window -= size
            self._send_window -= size
            self._write_data(stream.id, data)
        if trailers is not None:
            self._write(frame(HEADERS, END_HEADERS | END_STREAM, stream.id, trailers))
            self._finish(stream)

    def reset(self, stream: Stream, code: int) -> None:
        """End a stream, and tell the peer so."""
        if stream.id in self.streams:
            self._write(frame(RST_STREAM, 0, stream.id, code.to_bytes(4, "big")))
            self._reset_here.append(stream.id)
            self._end(stream)

    def abort(self, stream: Stream, code: int) -> None:
        """End a stream whose peer has broken a rule."""
        self.reset(stream, code)
        stream.on_reset()

    def consumed(self, stream: Stream, size: int) -> None:
        """Let the peer send so much more on a stream."""
        stream.owed += size
        if stream.owed >= _GRANT_AFTER and not stream.remote_ended and not stream.ended:
            stream.receive_window += stream.owed
            self._grant(stream.id, stream.owed)
            stream.owed = 0

    def drain(self) -> None:
        """Ask the peer to open no more streams here, answer those it has opened, then close. No call is lost by it."""
        if self._closing or self._goaway_at is not None:
            return
        self._goaway_at = _MAX_WINDOW
        # In two steps, as RFC 9113, 6.8 advises: streams that are on their way now will be answered.
        self._write(frame(GOAWAY, 0, 0, struct.pack(">II", _MAX_WINDOW, NO_ERROR)))
        self._drain_timer = self._loop.call_later(GOAWAY_GRACE_S, self._stop_streams)

    def end_later(self, age_s: float, end: "Callable[[Connection[HeadT]], None]") -> None:
        """Call `end` with the connection at that age, unless it is over."""
        self._age_timer = self._loop.call_later(age_s, end, self)

    def close(self) -> None:
        """Close the connection, with whatever runs on it."""
        self._fail(NO_ERROR, "")

    # Reading.

    def _read_preface(self, data: bytes) -> int:
        """Read the preface, if it is complete; return where the rest begins."""
        if not PREFACE.startswith(data[: len(PREFACE)]):
            raise _ConnectionFailed(PROTOCOL_ERROR, "this port speaks gRPC (HTTP/2 with prior knowledge)")
        if len(data) < len(PREFACE) + _HEAD.size:
            return 0
        _, _, kind, flags, _ = _HEAD.unpack_from(data, len(PREFACE))
        if kind != SETTINGS or flags & ACK:
            raise _ConnectionFailed(PROTOCOL_ERROR, "the preface ends with SETTINGS")
        self._greeted = True
        self._came()
        return len(PREFACE)

    def _read_frames(self, data: bytes, position: int) -> tuple[int, bool]:
        """Read complete frames from a position on; return where the rest begins, and whether it may be read on."""
        size, left = len(data), _FRAMES_A_TURN
        while size - position >= 9 and not self._closing:
            if not left:
                return position, True
            left -= 1
            high, low, kind, flags, stream_id = _HEAD.unpack_from(data, position)
            end = position + 9 + (high << 16 | low)
            if end - position > 9 + _FRAME_SIZE:
                raise _ConnectionFailed(FRAME_SIZE_ERROR, f"a frame may have {_FRAME_SIZE} bytes")
            if end > size:
                break
            payload = data[position + 9 : end]
            position = end
            stream_id &= _MAX_WINDOW
            if self._block is not None and (kind != CONTINUATION or stream_id != self._block[0]):
                raise _ConnectionFailed(PROTOCOL_ERROR, "a header block must be continued at once")
            if kind == DATA:
                self._on_data(stream_id, flags, payload)
            elif kind == HEADERS:
                self._on_headers(stream_id, flags, payload)
            elif kind <= CONTINUATION:
                _HANDLERS[kind](self, stream_id, flags, payload)
        return position, False

    def _on_headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        if not stream_id & 1:
            raise _ConnectionFailed(PROTOCOL_ERROR, "a client's streams have odd numbers")
        if flags & PADDED:
            payload = _unpadded(payload)
        if flags & PRIORITY_FLAG:
            if len(payload) < 5:
                raise _ConnectionFailed(FRAME_SIZE_ERROR, "HEADERS is too short for its priority")
            if int.from_bytes(payload[:4], "big") & _MAX_WINDOW == stream_id:
                raise _ConnectionFailed(PROTOCOL_ERROR, "a stream cannot depend on itself")
            payload = payload[5:]
        if flags & END_HEADERS:
            self._on_block(stream_id, flags, payload)
        else:
            self._block = (stream_id, flags, payload)
            self._expect_soon("the rest of a header block")

    def _on_continuation(self, stream_id: int, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise _ConnectionFailed(PROTOCOL_ERROR, "CONTINUATION continues nothing")
        _, first_flags, block = self._block
        block += payload
        if len(block) > _HEADER_LIST_BYTES or (not payload and not flags & END_HEADERS):
            raise _ConnectionFailed(ENHANCE_YOUR_CALM, f"a header block may have {_HEADER_LIST_BYTES} bytes")
        self._block = (stream_id, first_flags, block)
        if flags & END_HEADERS:
            self._block = None
            self._came()
            self._on_block(stream_id, first_flags, block)

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
            return
        if self._goaway_at is not None and stream_id > self._goaway_at:
            return  # the peer was told that it would not be looked at, and will ask another server
        if len(self.streams) >= self._max_streams:
            self._refuse(stream_id, REFUSED_STREAM)
            return
        stream = self._open_stream(self, stream_id, head)
        if stream is None:
            self._refuse(stream_id, REFUSED_STREAM)
            return
        stream.send_window, stream.receive_window = self._peer_stream_window, self._stream_window
        self.streams[stream_id] = stream
        if flags & END_STREAM:
            self._remote_end(stream)

    def _on_trailers(self, stream_id: int, flags: int, block: bytes) -> None:
        fields = self._decode(block)  # also if nobody wants them: it keeps the table right
        stream = self.streams.get(stream_id)
        if stream is None:
            if any(stream_id in ids for ids in self._skipped):
                raise _ConnectionFailed(PROTOCOL_ERROR, f"stream {stream_id} comes after higher ones")
            if stream_id not in self._reset_here:
                raise _ConnectionFailed(STREAM_CLOSED, f"stream {stream_id} is closed")
        elif stream.remote_ended:
            self.abort(stream, STREAM_CLOSED)
        elif not flags & END_STREAM:
            raise _ConnectionFailed(PROTOCOL_ERROR, "trailers must end the stream")
        elif any(name.startswith(b":") for name, _ in fields):
            self.abort(stream, PROTOCOL_ERROR)
        else:
            self._remote_end(stream)

    def _head(self, block: bytes) -> HeadT:
        """Read a request's header block, or remember it: the same bytes mean the same while the table is the same."""
        head = self._heads.get(block)
        if head is None:
            changes = self._table.changes
            head = self._read_head(self._decode(block))
            # One that changes the table means something else the next time.
            if changes == self._table.changes and len(block) <= _CACHED_BLOCK_BYTES:
                if len(self._heads) >= _CACHED_BLOCKS:
                    self._heads.clear()
                self._heads[block] = head
        return head

    def _decode(self, block: bytes) -> Fields:
        if block and block[0] >> 5 == 1:
            self._table.changes += 1  # its size changes, perhaps to 0 and back
        try:
            return [(name, value) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError as error:
            raise _ConnectionFailed(ENHANCE_YOUR_CALM, f"headers may have {_HEADER_LIST_BYTES} bytes") from error
        except (HPACKError, IndexError, ValueError) as error:
            raise _ConnectionFailed(COMPRESSION_ERROR, "the headers cannot be decoded") from error
        finally:
            if self._heads_of != self._table.changes:
                self._heads_of = self._table.changes
                self._heads.clear()

    def _on_data(self, stream_id: int, flags: int, payload: bytes) -> None:
        size = len(payload)
        self._receive_window -= size
        if self._receive_window < _MAX_WINDOW // 2:
            self._grant(0, _MAX_WINDOW - self._receive_window)
            self._receive_window = _MAX_WINDOW
        if flags & PADDED:
            payload = _unpadded(payload)
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id > self._last_id or not stream_id & 1:
                raise _ConnectionFailed(PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is not open")
            if self._goaway_at is None and stream_id not in self._reset_here:
                self._refuse(stream_id, STREAM_CLOSED)
            return
        if stream.remote_ended:
            self.abort(stream, STREAM_CLOSED)
            return
        stream.receive_window -= size
        if stream.receive_window < 0:
            self.abort(stream, FLOW_CONTROL_ERROR)
            return
        if payload:
            stream.on_data(payload)
        if flags & PADDED:
            self.consumed(stream, size - len(payload))
        if flags & END_STREAM and not stream.ended:
            self._remote_end(stream)

    def _remote_end(self, stream: Stream) -> None:
        stream.remote_ended = True
        stream.on_end()

    def _on_rst_stream(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "RST_STREAM has 4 bytes")
        if stream_id > self._last_id or not stream_id & 1:
            raise _ConnectionFailed(PROTOCOL_ERROR, f"RST_STREAM of stream {stream_id}, which is not open")
        if stream := self.streams.get(stream_id):
            if stream_id > self._last_id_before:
                self._count_costly("streams are opened only to be reset")
            self._end(stream, reset=True)

    def _on_settings(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "SETTINGS belong to the connection")
        if len(payload) % 6 or (flags & ACK and payload):
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "SETTINGS has 6 bytes for each, and none if acknowledged")
        if flags & ACK:
            return
        self._count_costly("SETTINGS follow SETTINGS")
        window = self._peer_stream_window
        for name, value in _SETTING.iter_unpack(payload):
            if name == _ENABLE_PUSH and value > 1:
                raise _ConnectionFailed(PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
            if name == _MAX_FRAME_SIZE:
                if not _FRAME_SIZE <= value < 1 << 24:
                    raise _ConnectionFailed(PROTOCOL_ERROR, "MAX_FRAME_SIZE is from 2^14 to 2^24-1")
                self._peer_frame_size = min(value, _MAX_PEER_FRAME)
            if name == _INITIAL_WINDOW_SIZE:
                if value > _MAX_WINDOW:
                    raise _ConnectionFailed(FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is at most 2^31-1")
                window = value
        if window != self._peer_stream_window:
            self._resize(window)
        self._control(frame(SETTINGS, ACK, 0))
        self._send_pending()

    def _resize(self, window: int) -> None:
        """Change the windows of all streams, to below zero too (RFC 9113, 6.9.2)."""
        more, self._peer_stream_window = window - self._peer_stream_window, window
        for stream in self.streams.values():
            stream.send_window += more
            if stream.send_window > _MAX_WINDOW:
                raise _ConnectionFailed(FLOW_CONTROL_ERROR, "a window is at most 2^31-1")
            if stream.pending and stream.send_window > 0:
                self._ready[stream.id] = stream

    def _on_ping(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "PING belongs to the connection")
        if len(payload) != 8:
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "PING has 8 bytes")
        if not flags & ACK:
            self._control(frame(PING, ACK, 0, payload))
        elif payload == _GOODBYE:
            self.close()

    def _on_window_update(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "WINDOW_UPDATE has 4 bytes")
        more = int.from_bytes(payload, "big") & _MAX_WINDOW
        if not stream_id:
            self._send_window += more
            if not more:
                raise _ConnectionFailed(PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
            if self._send_window > _MAX_WINDOW:
                raise _ConnectionFailed(FLOW_CONTROL_ERROR, "a window is at most 2^31-1")
        elif stream := self.streams.get(stream_id):
            stream.send_window += more
            if not more or stream.send_window > _MAX_WINDOW:
                self.abort(stream, FLOW_CONTROL_ERROR if more else PROTOCOL_ERROR)
            elif stream.pending and stream.send_window > 0:
                self._ready[stream_id] = stream
        elif stream_id > self._last_id or not stream_id & 1:
            raise _ConnectionFailed(PROTOCOL_ERROR, f"WINDOW_UPDATE of stream {stream_id}, which is not open")
        if self._ready:
            self._send_pending()

    def _on_priority(self, stream_id: int, flags: int, payload: bytes) -> None:
        if not stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "PRIORITY belongs to a stream")
        if len(payload) != 5:
            raise _ConnectionFailed(FRAME_SIZE_ERROR, "PRIORITY has 5 bytes")
        if int.from_bytes(payload[:4], "big") & _MAX_WINDOW == stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "a stream cannot depend on itself")

    def _on_goaway(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise _ConnectionFailed(PROTOCOL_ERROR, "GOAWAY belongs to the connection")
        self.drain()

    def _on_push_promise(self, stream_id: int, flags: int, payload: bytes) -> None:
        raise _ConnectionFailed(PROTOCOL_ERROR, "a client cannot push")

    # Writing.

    def _write(self, data: bytes | memoryview) -> None:
        """Write once for all that is written in this turn of the loop, but for what is more than may be on its way.

        Only the transport knows whether the peer reads. What is far beyond what it takes is taken for answers that the
        peer asks for and does not read.
        """
        if self._closing:
            return
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes > _HIGH_WATER:
            self._flush_now()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _write_data(self, stream_id: int, data: bytes | memoryview) -> None:
        most = self._peer_frame_size
        view = data if len(data) <= most else memoryview(data)
        for start in range(0, len(data), most):
            part = view[start : start + most]
            size = len(part)
            self._write(_HEAD.pack(size >> 16, size & 0xFFFF, DATA, 0, stream_id))
            self._write(part)

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

    def _control(self, data: bytes) -> None:
        """Answer a control frame, unless the peer asks for more answers than it reads."""
        if not self._writable and self._is_flooded():
            raise _ConnectionFailed(ENHANCE_YOUR_CALM, "answers to control frames are not read")
        self._write(data)

    def _is_flooded(self) -> bool:
        return self.transport.get_write_buffer_size() > _HIGH_WATER + _MAX_CONTROL_BYTES

    def _grant(self, stream_id: int, more: int) -> None:
        self._write(frame(WINDOW_UPDATE, 0, stream_id, more.to_bytes(4, "big")))

    def _refuse(self, stream_id: int, code: int) -> None:
        self._reset_here.append(stream_id)
        self._control(frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big")))

    def _keep(self, stream: Stream, size: int) -> None:
        """Count bytes that wait; below zero: that do no more."""
        stream.pending_bytes += size
        self.kept_bytes += size
        self._backlog.bytes += size

    def _send_pending(self) -> None:
        """Send what the windows let pass, a frame of each stream in turn."""
        while self._ready and self._writable and self._send_window > 0:
            _, stream = self._ready.popitem(last=False)
            assert stream.pending
            first = stream.pending[0]
            size = min(len(first), stream.send_window, self._send_window, self._peer_frame_size)
            if size:
                stream.send_window -= size
                self._send_window -= size
                self._keep(stream, -size)
                self._write_data(stream.id, memoryview(first)[:size])
            if size == len(first):
                stream.pending.popleft()
                while stream.pending and not stream.pending[0]:
                    stream.pending.popleft()  # the end, which needs no window
            else:
                stream.pending[0] = memoryview(first)[size:]
            if not stream.pending:
                if stream.trailers is not None:
                    self._write(frame(HEADERS, END_HEADERS | END_STREAM, stream.id, stream.trailers))
                    self._finish(stream)
                stream.sent()
            elif stream.send_window > 0:
                self._ready[stream.id] = stream

    # Ends.

    def _finish(self, stream: Stream) -> None:
        """Take note that all of a stream's answer is written."""
        stream.ended = True
        if not stream.remote_ended:
            # The rest of the request will not be read.
            self._write(frame(RST_STREAM, 0, stream.id, NO_ERROR.to_bytes(4, "big")))
            self._reset_here.append(stream.id)
        self._end(stream)

    def _end(self, stream: Stream, *, reset: bool = False) -> None:
        stream.ended = True
        self.streams.pop(stream.id, None)
        if stream.pending:
            stream.pending.clear()
            self._keep(stream, -stream.pending_bytes)
            self._ready.pop(stream.id, None)
        stream.sent()
        if reset:
            stream.on_reset()
        if self._goaway_at is not None and not self.streams and self._goaway_at != _MAX_WINDOW:
            self._say_goodbye()

    def _stop_streams(self) -> None:
        self._goaway_at = self._last_id
        self._write(frame(GOAWAY, 0, 0, struct.pack(">II", self._last_id, NO_ERROR)))
        if not self.streams:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Close once the peer has read all that was sent: it then answers the PING, if it does not close itself.

        Closed sooner, a connection loses what is on its way as soon as the peer sends anything; TLS, which cannot be
        closed one way alone, surely.
        """
        if not self._closing:
            self._write(frame(PING, 0, 0, _GOODBYE))
            self._drain_timer = self._loop.call_later(_CLOSE_TIMEOUT_S, self.transport.abort)

    def _end_streams(self) -> None:
        for stream in tuple(self.streams.values()):
            self._end(stream, reset=True)

    def _expect_soon(self, what: str) -> None:
        self._peer_timer = self._loop.call_later(_PREFACE_TIMEOUT_S, self._fail, PROTOCOL_ERROR, f"no {what} came")

    def _came(self) -> None:
        if self._peer_timer is not None:
            self._peer_timer.cancel()

    def _stop_timers(self) -> None:
        for timer in (self._peer_timer, self._drain_timer, self._age_timer):
            if timer is not None:
                timer.cancel()

    def _count_costly(self, text: str) -> None:
        self._costly += 1
        if self._costly > _MAX_COSTLY:
            raise _ConnectionFailed(ENHANCE_YOUR_CALM, text)

    def _fail(self, code: int, text: str) -> None:
        """Say why, and close."""
        if self._closing:
            return
        self._closing = True
        self._stop_timers()
        self._rest, self._block = b"", None
        if code != NO_ERROR:
            # The last stream may not be a higher one than the peer has been told already.
            last = self._last_id if self._goaway_at is None else min(self._last_id, self._goaway_at)
            self._out.append(frame(GOAWAY, 0, 0, struct.pack(">II", last, code) + text.encode()))
        self._flush_now()
        self._end_streams()
        if self._is_flooded():
            self.transport.abort()
            return
        # Closed both ways while the peer still sends, the connection would lose what it has not read yet.
        if self.transport.can_write_eof() and not self.transport.is_closing():
            try:
                self.transport.write_eof()
            except OSError:  # the peer is gone
                self.transport.abort()
                return
        else:
            self.transport.close()
        # A peer that neither reads nor closes would keep it for ever.
        self._peer_timer = self._loop.call_later(_CLOSE_TIMEOUT_S, self.transport.abort)


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise _ConnectionFailed(PROTOCOL_ERROR, "there is more padding than frame")
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
