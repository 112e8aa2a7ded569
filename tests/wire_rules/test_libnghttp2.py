"""libnghttp2 beside the server: as a second server that is sent the same frames, and as a client.

What a client sends, mostly right, goes to the server and to a session of libnghttp2. After each step both must agree on
whether the connection lives and which streams are reset, and each request that is complete to libnghttp2 has its
answer, with the status that its body has to have. What the server sends then passes through libnghttp2's windows: it is
as much as they allow, neither more nor less. `DIFFERENCES` has the only ones, each with its reason.

    GANSERVE_ORACLE_EXAMPLES=5000 python -m pytest tests/wire_rules/test_libnghttp2.py
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ngh2
import pytest
from hpack import Encoder, NeverIndexedHeaderTuple
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import RunningServer
from tests.wire import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    EACH,
    END_HEADERS,
    END_STREAM,
    GENERATE,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    RST_STREAM,
    SERVICE,
    SETTINGS,
    WINDOW_UPDATE,
    Answer,
    Fields,
    Frame,
    Peer,
    frame,
    head,
    message,
    request,
    setting,
)

from ganserve.v1 import generation_pb2 as pb

EXAMPLES = int(os.environ.get("GANSERVE_ORACLE_EXAMPLES", "60"))
many = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 60, suppress_health_check=list(HealthCheck)
)
OK, INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED = 0, 3, 5, 8
MAX_WINDOW = 2**31 - 1
PROBE = b"all read"
# A call whose answer has always the same size: 8 KiB, of which eight fill the connection's window.
GET_MODEL = SERVICE + "GetModel"
BODY = message(pb.GetModelRequest(model="mlp-mnist").SerializeToString())


class Errors(NamedTuple):
    connection: bool  # is given up
    streams: set[int]  # are reset

    @property
    def scope(self) -> str:
        return "connection" if self.connection else "stream" if self.streams else "nothing"


NO_ERRORS = Errors(False, set())


def errors_in(frames: Sequence[Frame]) -> Errors:
    return Errors(
        any(each.kind == GOAWAY and any(each.payload[4:8]) for each in frames),
        {each.stream for each in frames if each.kind == RST_STREAM and any(each.payload)},
    )


def frames_of(data: bytes) -> list[Frame]:
    frames, data = [], data.removeprefix(PREFACE)
    while data:
        kind, flags, stream = struct.unpack(">BBI", data[3:9])
        end = 9 + int.from_bytes(data[:3], "big")
        frames.append(Frame(kind, flags, stream, data[9:end]))
        data = data[end:]
    return frames


# What both are sent.


class Step(NamedTuple):
    what: str
    data: bytes


def block(fields: Fields) -> bytes:
    """A block that leaves the table alone."""
    return Encoder().encode([NeverIndexedHeaderTuple(*field) for field in fields])


CALL = head(GET_MODEL)
WELL_FORMED: tuple[Fields, ...] = (
    CALL,
    head(GET_MODEL, te=None),
    [*CALL, ("x-request-id", "mine"), ("x-bin", "AAEC")],
    [*CALL, ("x", "y" * 300)],
    [*CALL, ("x", "\u00fc"), ("cookie", "a=b"), ("cookie", "c=d")],
)
MALFORMED: dict[str, Fields] = {
    "upper case": [*CALL, ("X-Upper", "1")],
    "a space in a name": [*CALL, ("x y", "1")],
    "a line end": [*CALL, ("x", "1\r\n")],
    "a NUL": [*CALL, ("x", "a\0b")],
    "connection": [*CALL, ("connection", "close")],
    "transfer-encoding": [*CALL, ("transfer-encoding", "chunked")],
    "te": head(GET_MODEL, te="gzip"),
    "no :method": head(GET_MODEL, method=None),
    "no :scheme": head(GET_MODEL, scheme=None),
    "no :path": [field for field in CALL if field[0] != ":path"],
    "an empty :path": head(""),
    "two :path": [(":path", GET_MODEL), *CALL],
    "a late pseudo-header": [*CALL, (":authority", "x")],
    "an unknown pseudo-header": [(":x", "1"), *CALL],
    "a response's pseudo-header": [(":status", "200"), *CALL],
    "no :authority": head(GET_MODEL, authority=None),
    "a space before a value": [*CALL, ("x", " y")],
}
# Each breaks a rule, or does what the two see differently.
ODD: dict[str, bytes] = {
    "DATA of stream 0": frame(DATA, 0, 0, b"x"),
    "HEADERS of stream 0": frame(HEADERS, END_HEADERS, 0, block(CALL)),
    "HEADERS of stream 2": frame(HEADERS, END_HEADERS, 2, block(CALL)),
    "RST_STREAM of stream 0": frame(RST_STREAM, 0, 0, bytes(4)),
    "SETTINGS of a stream": frame(SETTINGS, 0, 1),
    "SETTINGS of 5 bytes": frame(SETTINGS, 0, 0, bytes(5)),
    "SETTINGS ACK": frame(SETTINGS, ACK, 0),
    "SETTINGS ACK with a payload": frame(SETTINGS, ACK, 0, setting(0xFF, 1)),
    "ENABLE_PUSH of 2": frame(SETTINGS, 0, 0, setting(2, 2)),
    "INITIAL_WINDOW_SIZE of 2^31": frame(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 1 << 31)),
    "MAX_FRAME_SIZE of 1": frame(SETTINGS, 0, 0, setting(MAX_FRAME_SIZE, 1)),
    "MAX_FRAME_SIZE of 2^24": frame(SETTINGS, 0, 0, setting(MAX_FRAME_SIZE, 1 << 24)),
    "PING of a stream": frame(PING, 0, 1, bytes(8)),
    "PING of 7 bytes": frame(PING, 0, 0, bytes(7)),
    "GOAWAY of a stream": frame(GOAWAY, 0, 1, bytes(8)),
    "GOAWAY of 7 bytes": frame(GOAWAY, 0, 0, bytes(7)),
    "WINDOW_UPDATE of 3 bytes": frame(WINDOW_UPDATE, 0, 0, bytes(3)),
    "WINDOW_UPDATE of the connection by nothing": frame(WINDOW_UPDATE, 0, 0, bytes(4)),
    "WINDOW_UPDATE of the connection above 2^31-1": frame(WINDOW_UPDATE, 0, 0, MAX_WINDOW.to_bytes(4, "big")) * 2,
    "PRIORITY of stream 0": frame(PRIORITY, 0, 0, bytes(5)),
    "PRIORITY of 4 bytes": frame(PRIORITY, 0, 1, bytes(4)),
    "PRIORITY of itself": frame(PRIORITY, 0, 1, b"\0\0\0\1\x10"),
    "PUSH_PROMISE of stream 0": frame(PUSH_PROMISE, END_HEADERS, 0, bytes(4)),
    "CONTINUATION of stream 0": frame(CONTINUATION, END_HEADERS, 0),
    "a frame that is too large": frame(0x42, 0, 0, bytes(16385)),
}
IN_A_BLOCK = (
    frame(PING, 0, 0, bytes(8)),
    frame(SETTINGS, 0, 0),
    frame(DATA, 0, 1, b"x"),
    frame(0x42, 0, 0),
    frame(CONTINUATION, END_HEADERS, 77),
)
UNDECODABLE = (b"\x80", b"\x40", b"\xff" * 6, b"\x00\x85\xf2\xb2\x4a\x84\xff\x83\x49\x50\x90", b"\x3f\xe2\x1f")
OPEN = frame(HEADERS, END_HEADERS, 1, block(CALL))
COMPLETE = OPEN + frame(DATA, END_STREAM, 1, BODY)  # half-closed as long as windows are 0
CLOSED = OPEN + frame(DATA, END_STREAM, 1)  # by an error, which needs no window
SKIPPED = frame(HEADERS, END_HEADERS, 3, block(CALL))
TRAILERS = frame(HEADERS, END_HEADERS | END_STREAM, 1, block([("x", "y")]))


class Difference(NamedTuple):
    """A step that both take otherwise; the second frames show it after the first."""

    ours: str
    theirs: str
    why: str
    before: bytes
    shown_by: bytes


DIFFERENCES = {
    "DATA half-closed": Difference(
        "stream", "connection", "RFC 9113, 5.1: an error of the stream", COMPLETE, frame(DATA, 0, 1, b"x")
    ),
    "HEADERS half-closed": Difference(
        "stream", "connection", "RFC 9113, 5.1: an error of the stream", COMPLETE, TRAILERS
    ),
    "DATA closed": Difference("stream", "nothing", "RFC 9113, 5.1: both are right", CLOSED, frame(DATA, 0, 1, b"x")),
    "DATA skipped": Difference("stream", "nothing", "as if it were closed", SKIPPED, frame(DATA, 0, 1, b"x")),
    "padding closed": Difference(
        "connection", "nothing", "RFC 9113, 6.1: an error of the connection", CLOSED, frame(DATA, PADDED, 1, b"\x04abc")
    ),
    "padding skipped": Difference(
        "connection",
        "nothing",
        "RFC 9113, 6.1: an error of the connection",
        SKIPPED,
        frame(DATA, PADDED, 1, b"\x04abc"),
    ),
    "HEADERS closed": Difference(
        "connection", "nothing", "RFC 9113, 5.1: an error of the connection", CLOSED, TRAILERS
    ),
    "HEADERS skipped": Difference(
        "connection", "nothing", "RFC 9113, 5.1.1: an error of the connection", SKIPPED, OPEN
    ),
    "WINDOW_UPDATE by nothing": Difference(
        "stream",
        "connection",
        "RFC 9113, 6.9: an error of the stream",
        OPEN,
        frame(WINDOW_UPDATE, 0, 1, bytes(4)),
    ),
    "WINDOW_UPDATE by 2^31-1": Difference(
        "stream",
        "connection",
        "RFC 9113, 6.9.1: an error of the stream",
        OPEN + frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"),
        frame(WINDOW_UPDATE, 0, 1, MAX_WINDOW.to_bytes(4, "big")),
    ),
    "PRIORITY of itself": Difference(
        "connection", "nothing", "RFC 7540 alone has this error", b"", ODD["PRIORITY of itself"]
    ),
    "PRIORITY of stream 0": Difference(
        "connection", "nothing", "RFC 9113, 6.3: an error of the connection", b"", ODD["PRIORITY of stream 0"]
    ),
    "SETTINGS ACK": Difference(
        "nothing", "connection", "RFC 9113 has no rule for one too many", b"", ODD["SETTINGS ACK"]
    ),
    "trailers that do not end": Difference(
        "connection", "stream", "RFC 9113, 5.4.1: both are right", OPEN, TRAILERS.replace(b"\x01\x05", b"\x01\x04", 1)
    ),
    "no :authority": Difference(
        "nothing",
        "stream",
        "RFC 9113, 8.3.1: it SHOULD be there, and gRPC's servers take calls without",
        b"",
        frame(HEADERS, END_HEADERS, 1, block(MALFORMED["no :authority"])),
    ),
    "a space before a value": Difference(
        "nothing",
        "stream",
        "gRPC's metadata may have spaces at its ends",
        b"",
        frame(HEADERS, END_HEADERS, 1, block(MALFORMED["a space before a value"])),
    ),
}


# The two servers.


class Sides:
    """The server and a session of libnghttp2, which are sent the same."""

    def __init__(self, ours: Peer, theirs: ngh2.Connection, answer_bytes: int) -> None:
        self.ours, self.theirs = ours, theirs
        self.answer_bytes = answer_bytes  # of a call that succeeds
        self.over = False
        self.last_id = 0
        # What libnghttp2 makes of the requests.
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.gone: set[int] = set()  # reset by either side
        # What the server has sent.
        self._read = len(ours.seen)
        self._begun: set[int] = set()
        self._sent: dict[int, int] = {}
        self._answered: set[int] = set()

    def state(self, stream: int) -> str:
        if stream in self.gone or stream in self._answered:
            return "closed"
        if stream not in self.bodies:
            return "skipped"
        return "half-closed" if stream in self.ended else "open"

    def exchange(self, data: bytes) -> tuple[Errors, Errors]:
        """Send to both, and return which errors it was to the server and to libnghttp2."""
        theirs = self._feed(data)
        with contextlib.suppress(ConnectionError):
            self.ours.write(data + frame(PING, 0, 0, PROBE))
        while (got := self.ours.read()) is not None and got.payload != PROBE:
            pass
        ours = errors_in(self.ours.seen[self._read :])
        assert ours.connection == (got is None)
        return ours, theirs

    def step(self, what: str, data: bytes) -> None:
        """Send to both, and compare."""
        ours, theirs = self.exchange(data)
        if ours.scope != theirs.scope:
            assert what in DIFFERENCES, f"{what}: {ours} against {theirs}"
            assert DIFFERENCES[what][:2] == (ours.scope, theirs.scope), f"{what}: {ours} against {theirs}"
            self.over = "connection" in (ours.scope, theirs.scope) or theirs.scope == "stream"
        else:
            assert ours.connection or ours == theirs, f"{what}: {ours} against {theirs}"
            self.over = ours.connection
        self.gone |= ours.streams | theirs.streams
        if not self.over:
            self._mirror()
            self._await_answers()

    def _feed(self, data: bytes) -> Errors:
        with contextlib.suppress(ngh2.NGH2Error):
            self.theirs.receive_data(data)
        errors = errors_in(frames_of(self.theirs.data_to_send()))
        for event in self.theirs.events():
            match event:
                case ngh2.RequestReceived(stream_id=stream, end_stream=ends):
                    self.bodies[stream] = b""
                case ngh2.DataReceived(stream_id=stream, data=more, end_stream=ends):
                    self.bodies[stream] += more
                case ngh2.TrailersReceived(stream_id=stream):
                    ends = True
                case ngh2.StreamReset(stream_id=stream):
                    self.gone.add(stream)
                    continue
                case _:
                    continue
            if ends:
                self.ended.add(stream)
        return errors

    def _mirror(self) -> None:
        """Send what the server has sent from libnghttp2's side: its windows must let it pass."""
        for got in self.ours.seen[self._read :]:
            stream = got.stream
            if got.kind not in (HEADERS, DATA) or stream in self.gone:
                continue
            assert stream in self.ended, f"an answer to stream {stream}, which has not ended"
            ends = bool(got.flags & END_STREAM)
            if got.kind == DATA:
                self._sent[stream] = self._sent.get(stream, 0) + len(got.payload)
                self.theirs.send_data(stream, got.payload)
                self.theirs.data_to_send()
                assert self.theirs.queued_body_size(stream) == 0, f"stream {stream} passes a window"
            elif stream in self._begun:
                self.theirs.send_trailers(stream, [(b"grpc-status", b"0")])
            else:
                self._begun.add(stream)
                self.theirs.send_response(stream, [(b":status", b"200")], end_stream=ends)
            if ends:
                self._answered.add(stream)
        self._read = len(self.ours.seen)
        assert errors_in(frames_of(self.theirs.data_to_send())) == NO_ERRORS
        self.theirs.events()

    def _await_answers(self) -> None:
        """Read until all has come that the windows allow."""
        while self._may_send():
            got = self.ours.read()
            assert got is not None
            assert errors_in([got]) == NO_ERRORS
            self._mirror()
        for stream in self._answered - self.gone:
            assert self.ours.answers[stream].status == (OK if self.bodies[stream] == BODY else INVALID_ARGUMENT)

    def _may_send(self) -> bool:
        allowed = 0
        for stream in self.ended - self._answered - self.gone:
            left = self.answer_bytes - self._sent.get(stream, 0)
            if stream not in self._begun or self.bodies[stream] != BODY or not left:
                return True  # the headers, an error, or the trailers
            allowed += min(left, max(0, self.theirs.stream_remote_window_size(stream)))
        return min(allowed, max(0, self.theirs.remote_window_size)) > 0


@pytest.fixture(scope="module")
def answer_bytes(server: RunningServer) -> int:
    with Peer(server.address) as peer:
        return len(peer.call(BODY[5:], CALL).data)


@contextlib.contextmanager
def both(address: str, answer_bytes: int, preface: dict[int, int] | None = None) -> Iterator[Sides]:
    with Peer(address, preface) as peer:
        session = ngh2.Connection(ngh2.Role.SERVER)
        session.initiate_connection(dict(struct.iter_unpack(">HI", peer.until(SETTINGS).payload)))
        peer.until(SETTINGS, flags=ACK)
        payload = b"".join(setting(*each) for each in (preface or {}).items())
        session.receive_data(PREFACE + frame(SETTINGS, 0, 0, payload) + frame(SETTINGS, ACK, 0))
        session.data_to_send()
        session.events()
        yield Sides(peer, session, answer_bytes)


class Client:
    """Draws steps that make sense where an exchange is."""

    def __init__(self, sides: Sides, draw: Any) -> None:
        self._sides, self._draw = sides, draw
        self._encoder = Encoder()

    def step(self) -> Step:
        if not self._sides.last_id:
            return self._call()
        if self._one_in(30):
            return self._break()
        actions = (
            [self._call, self._open, self._window_update, self._settings] * 2
            + [self._data] * 4
            + [self._trailers, self._reset, self._nothing]
        )
        return self._draw(st.sampled_from(actions))()

    def _one_in(self, count: int) -> bool:
        return self._draw(st.integers(1, count)) == count

    def _stream(self) -> int:
        """Mostly an open one, or else one that was opened or skipped."""
        ids = range(max(1, self._sides.last_id - 12), self._sides.last_id + 1, 2)
        are_open = [stream for stream in ids if self._sides.state(stream) == "open"]
        return self._draw(st.sampled_from(ids if not are_open or self._one_in(4) else are_open))

    def _new_stream(self) -> int:
        skip = 2 if self._one_in(5) else 0
        self._sides.last_id += 2 + skip if self._sides.last_id else 1 + skip
        return self._sides.last_id

    def _padded(self, flags: int, payload: bytes) -> tuple[int, bytes]:
        padding = self._draw(st.sampled_from((None, None, 0, 1, 255)))
        return (flags, payload) if padding is None else (flags | PADDED, bytes((padding,)) + payload + bytes(padding))

    def _headers(self, stream: int, fields: Fields, *, end: bool) -> bytes:
        draw = self._draw
        if self._one_in(10):
            self._encoder.header_table_size = draw(st.sampled_from((0, 100, 4096)))
        whole = self._encoder.encode(list(fields), huffman=draw(st.booleans()))
        cuts = sorted(draw(st.sets(st.integers(1, 400), max_size=4)) & {*range(1, len(whole))})
        first, *rest = (whole[start:stop] for start, stop in zip([0, *cuts], [*cuts, None], strict=True))
        flags = (END_STREAM if end else 0) | (0 if rest else END_HEADERS)
        if draw(st.booleans()):
            flags |= PRIORITY_FLAG
            first = draw(st.sampled_from((bytes(5), b"\x80\x00\x00\x63\xff"))) + first
        flags, first = self._padded(flags, first)
        out = frame(HEADERS, flags, stream, first)
        for part in rest:
            out += frame(CONTINUATION, END_HEADERS if part is rest[-1] else 0, stream, part)
        return out

    def _call(self) -> Step:
        """A call that succeeds."""
        stream = self._new_stream()
        start = self._headers(stream, self._draw(st.sampled_from(WELL_FORMED)), end=False)
        return Step("HEADERS", start + frame(DATA, END_STREAM, stream, BODY))

    def _open(self) -> Step:
        what = self._draw(st.sampled_from((*MALFORMED,))) if self._one_in(4) else "HEADERS"
        fields = MALFORMED.get(what) or self._draw(st.sampled_from(WELL_FORMED))
        return Step(what, self._headers(self._new_stream(), fields, end=self._one_in(6)))

    def _data(self) -> Step:
        stream = self._stream()
        left = BODY[len(self._sides.bodies.get(stream, b"")) :]
        part = left[: self._draw(st.sampled_from((len(BODY), len(BODY), 0, 1, 6)))]
        flags, payload = self._padded(self._draw(st.sampled_from((0, END_STREAM))), part)
        return Step(f"DATA {self._sides.state(stream)}", frame(DATA, flags, stream, payload))

    def _trailers(self) -> Step:
        stream, ends = self._stream(), not self._one_in(6)
        fields = self._draw(st.sampled_from(([("x", "y")], [("x", "y"), ("z-bin", "AAEC")], [(":path", "/")])))
        state = self._sides.state(stream)
        what = f"HEADERS {state}" if ends or state != "open" else "trailers that do not end"
        return Step(what, self._headers(stream, fields, end=ends))

    def _reset(self) -> Step:
        code = self._draw(st.sampled_from((0, CANCEL, 0xFF)))
        return Step("RST_STREAM", frame(RST_STREAM, 0, self._stream(), code.to_bytes(4, "big")))

    def _window_update(self) -> Step:
        stream = 0 if self._draw(st.booleans()) else self._stream()
        sizes = (1, 7, 1000, 65535, 1 << 20)
        more = self._draw(st.sampled_from((0, MAX_WINDOW) if stream and self._one_in(10) else sizes))
        what = {0: "WINDOW_UPDATE by nothing", MAX_WINDOW: "WINDOW_UPDATE by 2^31-1"}.get(more, "WINDOW_UPDATE")
        return Step(what, frame(WINDOW_UPDATE, 0, stream, more.to_bytes(4, "big")))

    def _settings(self) -> Step:
        windows = [(INITIAL_WINDOW_SIZE, size) for size in (0, 1, 100, 10_000, 65535, 1 << 20)]
        others = [(MAX_FRAME_SIZE, 1 << 14), (MAX_FRAME_SIZE, (1 << 24) - 1), (2, 0), (2, 1), (3, 0), (6, 1), (0xFF, 5)]
        chosen = self._draw(st.lists(st.sampled_from(windows + others), max_size=3))
        return Step("SETTINGS", frame(SETTINGS, 0, 0, b"".join(setting(*each) for each in chosen)))

    def _nothing(self) -> Step:
        """What changes nothing."""
        stream = self._stream()
        frames = (
            frame(PING, 0, 0, bytes(8)),
            frame(PING, ACK, 0, bytes(8)),
            frame(PRIORITY, 0, stream, (stream + 2).to_bytes(4, "big") + b"\x10"),
            frame(0x42, 0xFF, stream, b"anything"),
            frame(WINDOW_UPDATE, 0xFF, 1 << 31, b"\x80\x00\x00\x01"),
        )
        return Step("nothing", self._draw(st.sampled_from(frames)))

    def _break(self) -> Step:
        fresh = self._sides.last_id + 2
        what = self._draw(st.sampled_from((*ODD, "padding", "in a header block", "undecodable", "idle")))
        if what in ODD:
            return Step(what, ODD[what])
        if what == "padding":
            flags, stream = self._draw(st.sampled_from(((0, self._stream()), (END_HEADERS, fresh))))
            padding = self._draw(st.integers(1, 255))
            payload = bytes((padding,)) + bytes(self._draw(st.integers(0, padding - 1)))
            if not flags:
                return Step(f"padding {self._sides.state(stream)}", frame(DATA, PADDED, stream, payload))
            return Step(what, frame(HEADERS, flags | PADDED, stream, payload))
        if what == "in a header block":
            return Step(what, frame(HEADERS, 0, fresh, block(CALL)) + self._draw(st.sampled_from(IN_A_BLOCK)))
        if what == "undecodable":
            return Step(what, frame(HEADERS, END_HEADERS, fresh, self._draw(st.sampled_from(UNDECODABLE))))
        kind = self._draw(st.sampled_from((DATA, RST_STREAM, WINDOW_UPDATE, CONTINUATION)))
        return Step(what, frame(kind, 0, fresh, b"\x00\x00\x00\x01"))


@many
@given(data=st.data(), preface=st.sampled_from((None, {INITIAL_WINDOW_SIZE: 0}, {INITIAL_WINDOW_SIZE: 100})))
def test_the_server_and_libnghttp2_agree_on_what_lives(
    data: st.DataObject, preface: dict[int, int] | None, server: RunningServer, answer_bytes: int
) -> None:
    with both(server.address, answer_bytes, preface) as sides:
        client = Client(sides, data.draw)
        for _ in range(data.draw(st.integers(1, 30))):
            sides.step(*client.step())
            if sides.over:
                return


@many
@given(data=st.data(), change=st.sampled_from(("replace", "insert", "delete", "cut")), huffman=st.booleans())
def test_the_server_and_libnghttp2_agree_on_which_blocks_can_be_decoded(
    data: st.DataObject, change: str, huffman: bool, server: RunningServer, answer_bytes: int
) -> None:
    """A valid block but for a byte. What the fields mean is the business of other tests."""
    with both(server.address, answer_bytes) as sides:
        changed = bytearray(Encoder().encode([*CALL, ("x-first", "1")], huffman=huffman))
        at, byte = data.draw(st.integers(0, len(changed) - 1)), data.draw(st.integers(0, 255))
        if change == "replace":
            changed[at] = byte
        elif change == "insert":
            changed.insert(at, byte)
        else:
            del changed[at : at + 1 if change == "delete" else None]
        ours, theirs = sides.exchange(frame(HEADERS, END_HEADERS | END_STREAM, 1, bytes(changed)))
        assert ours.connection == theirs.connection


@pytest.mark.parametrize("what", DIFFERENCES)
def test_the_difference_is_there(what: str, server: RunningServer, answer_bytes: int) -> None:
    known = DIFFERENCES[what]
    with both(server.address, answer_bytes, {INITIAL_WINDOW_SIZE: 0}) as sides:
        sides.step("before", known.before)
        ours, theirs = sides.exchange(known.shown_by)
        assert (ours.scope, theirs.scope) == (known.ours, known.theirs)


# libnghttp2 as a client: it finds fault with all that a server must not send.


class Caller:
    """One connection."""

    def __init__(self, address: str, preface: dict[int, int]) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        self.session = ngh2.Connection(ngh2.Role.CLIENT)
        self.session.initiate_connection(preface)
        self.answers: dict[int, Answer] = {}
        self.cancelled: set[int] = set()
        self.pings = 0

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def flush(self) -> None:
        data = self.session.data_to_send()
        errors = errors_in(frames_of(data))
        assert not errors.connection
        assert errors.streams <= self.cancelled
        self.socket.sendall(data)

    def start(self, body: bytes, path: str = GET_MODEL, *fields: tuple[str, str], ends: bool = True) -> int:
        encoded = [(name.encode(), value.encode()) for name, value in head(path, *fields)]
        stream = self.session.send_request(encoded)
        self.answers[stream] = Answer()
        self.session.send_data(stream, body, end_stream=ends)
        self.flush()
        return stream

    def cancel(self, stream: int) -> None:
        self.cancelled.add(stream)
        if not self.answers[stream].ended:
            self.session.reset_stream(stream, CANCEL)
            self.flush()

    def read(self) -> None:
        data = self.socket.recv(1 << 16)
        assert data, "the connection ended"
        self.session.receive_data(data)
        for event in self.session.events():
            match event:
                case ngh2.ResponseReceived(stream_id=stream, headers=fields):
                    self.answers[stream].blocks.append({name.decode(): value.decode() for name, value in fields})
                case ngh2.TrailersReceived(stream_id=stream, headers=fields):
                    self.answers[stream].blocks.append({name.decode(): value.decode() for name, value in fields})
                case ngh2.DataReceived(stream_id=stream, data=more):
                    self.answers[stream].data += more
                case ngh2.PingAcknowledged():
                    self.pings += 1
                case ngh2.StreamClosed(stream_id=stream, error_code=code):
                    assert code == 0 or stream in self.cancelled
                    self.answers[stream].ended = True
        self.flush()

    def ping(self) -> None:
        """Wait until all that was sent has been read."""
        self.session.ping()
        self.flush()
        sent = self.pings + 1
        while self.pings < sent:
            self.read()

    def answer(self, stream: int) -> Answer:
        while not self.answers[stream].ended:
            self.read()
        return self.answers[stream]


PREFACES: dict[str, dict[int, int]] = {
    "as it is": {},
    "no table": {HEADER_TABLE_SIZE: 0},
    "a small table": {HEADER_TABLE_SIZE: 100},
    "a large table": {HEADER_TABLE_SIZE: 1 << 20},
    "small windows": {INITIAL_WINDOW_SIZE: 500},
    "large windows and frames": {INITIAL_WINDOW_SIZE: MAX_WINDOW, MAX_FRAME_SIZE: (1 << 24) - 1},
    "no push, no priorities": {2: 0, 9: 1},
}
EACH_ONE = message(
    pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=1)).SerializeToString()
)


@pytest.mark.parametrize("preface", PREFACES.values(), ids=PREFACES)
def test_libnghttp2_takes_all_that_the_server_sends(preface: dict[int, int], server: RunningServer) -> None:
    with Caller(server.address, preface) as caller:
        for _ in range(3):
            assert caller.answer(caller.start(message(request()), GENERATE)).images.count == 1
        together = [caller.start(message(request(100)), GENERATE) for _ in range(5)]
        unknown = caller.start(message(request(model="none")), GENERATE)
        each = caller.start(EACH_ONE * 3, EACH, ends=False)
        caller.session.send_trailers(each, [(b"x-checksum", b"1")])
        caller.ping()
        assert [caller.answer(stream).images.count for stream in together] == [100] * 5
        assert caller.answer(unknown).status == NOT_FOUND
        assert len(caller.answer(each).messages) == 3
        assert caller.answers[each].status == OK


def test_fields_that_are_too_many_end_their_call_alone(server: RunningServer) -> None:
    with Caller(server.address, {}) as caller:
        other = caller.start(EACH_ONE[:5], EACH, ends=False)
        assert caller.answer(caller.start(BODY, GET_MODEL, ("x-most", "x" * 12_000))).status == OK
        # In HEADERS and CONTINUATION frames.
        fields = caller.answer(caller.start(BODY, GET_MODEL, ("x-too-many", "x" * 40_000))).blocks[-1]
        assert fields[":status"] == "431" or fields["grpc-status"] == str(RESOURCE_EXHAUSTED)
        assert caller.answer(caller.start(BODY)).status == OK
        caller.session.send_data(other, EACH_ONE[5:], end_stream=True)
        caller.flush()
        assert caller.answer(other).status == OK


def test_goaway_of_libnghttp2_loses_no_call(server: RunningServer) -> None:
    with Caller(server.address, {}) as caller:
        streams = [caller.start(BODY) for _ in range(20)]
        caller.session.send_goaway()
        caller.flush()
        assert {caller.answer(stream).status for stream in streams} == {OK}


@many
@given(data=st.data())
def test_libnghttp2_takes_all_whatever_it_does_meanwhile(data: st.DataObject, server: RunningServer) -> None:
    # Windows only grow: libnghttp2 takes data that was on its way when one shrank for too much.
    windows = st.sampled_from((0, 1, 1000, 65535, 1 << 20))
    changes = st.sampled_from(
        [(HEADER_TABLE_SIZE, size) for size in (0, 100, 4096, 1 << 16)]
        + [(MAX_FRAME_SIZE, size) for size in (1 << 14, 1 << 20)]
    )
    window = data.draw(windows)
    with Caller(server.address, dict([(INITIAL_WINDOW_SIZE, window), data.draw(changes)])) as caller:
        for _ in range(data.draw(st.integers(1, 15))):
            match data.draw(st.sampled_from(("call", "call", "call", "settings", "cancel", "wait"))):
                case "call":
                    caller.start(message(request(data.draw(st.sampled_from((1, 1, 30, 200))))), GENERATE)
                case "settings":
                    window = max(window, data.draw(windows))
                    caller.session.update_settings(dict([(INITIAL_WINDOW_SIZE, window), data.draw(changes)]))
                case "cancel" if caller.answers:
                    caller.cancel(data.draw(st.sampled_from(sorted(caller.answers))))
                case "wait":
                    caller.ping()
            caller.flush()
        caller.session.update_settings({INITIAL_WINDOW_SIZE: 1 << 20})
        caller.flush()
        for stream in caller.answers.keys() - caller.cancelled:
            assert caller.answer(stream).status == OK
