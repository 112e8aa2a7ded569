"""A client that says to an HTTP/2 server just what a test wants said, rules or no rules."""

import itertools
import socket
import ssl
import struct
from collections.abc import Sequence
from typing import NamedTuple

from hpack import Decoder, Encoder

from ganserve.v1 import generation_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED = range(6)
FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM = range(6, 12)
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 3, 4, 5

SERVICE = "/ganserve.v1.GenerationService/"
GENERATE, EACH, STREAM = SERVICE + "GenerateImages", SERVICE + "GenerateEach", SERVICE + "StreamImages"

Fields = Sequence[tuple[str, str]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def setting(name: int, value: int) -> bytes:
    return struct.pack(">HI", name, value)


def literal_indexed(name: bytes, value: bytes) -> bytes:
    """A header field that becomes the newest entry of the table."""
    return b"\x40" + bytes((len(name),)) + name + bytes((len(value),)) + value


def message(content: bytes, compressed: int = 0) -> bytes:
    """Frame a message as gRPC does."""
    return struct.pack(">BI", compressed, len(content)) + content


def request(count: int = 1, model: str = "mlp-mnist", seed: int = 1) -> bytes:
    return pb.GenerateImagesRequest(model=model, count=count, seed=seed).SerializeToString()


def head(path: str = GENERATE, *more: tuple[str, str], **changes: str | None) -> Fields:
    """A call's header fields; `changes` replaces some, or leaves out those that are None."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    for name, value in changes.items():
        key = name.replace("_", "-")
        fields[f":{key}" if f":{key}" in fields else key] = value or ""
        if value is None:
            del fields[f":{key}" if f":{key}" in fields else key]
    return [*fields.items(), *more]


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


class Answer:
    """What came on one stream."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, str]] = []
        self.data = b""
        self.ended = False
        self.reset: int | None = None

    @property
    def status(self) -> int:
        return int(self.blocks[-1]["grpc-status"])

    @property
    def messages(self) -> list[bytes]:
        messages, rest = [], self.data
        while rest:
            end = 5 + int.from_bytes(rest[1:5], "big")
            assert rest[0] == 0
            assert len(rest) >= end
            messages.append(rest[5:end])
            rest = rest[end:]
        return messages

    @property
    def images(self) -> pb.GenerateImagesResponse:
        (content,) = self.messages
        return pb.GenerateImagesResponse.FromString(content)


class Peer:
    """One connection."""

    def __init__(
        self,
        address: str,
        settings: dict[int, int] | None = None,
        *,
        greet: bool = True,
        receive_buffer: int = 0,
        tls: ssl.SSLContext | None = None,
        protocols: Sequence[str] = ("h2",),
    ) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(20)
        self.socket.connect((host, int(port)))
        if tls is not None:
            tls.set_alpn_protocols(list(protocols))
            self.socket = tls.wrap_socket(self.socket, server_hostname=host)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.answers: dict[int, Answer] = {}
        self.seen: list[Frame] = []
        self._next_id, self._greets = 1, greet
        self._rest = b""
        if greet:
            payload = b"".join(itertools.starmap(setting, (settings or {}).items()))
            self.write(PREFACE + frame(SETTINGS, 0, 0, payload))

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def write(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        self.write(frame(kind, flags, stream, payload))

    def new_id(self) -> int:
        self._next_id += 2
        return self._next_id - 2

    def head(self, fields: Fields, flags: int = END_HEADERS, stream: int | None = None) -> int:
        """Open a stream."""
        stream = self.new_id() if stream is None else stream
        self.send(HEADERS, flags, stream, self.encoder.encode(list(fields)))
        return stream

    def body(self, stream: int, data: bytes, *, end: bool = True) -> None:
        for start in range(0, max(1, len(data)), 16384):
            part = data[start : start + 16384]
            self.send(DATA, END_STREAM if end and start + 16384 >= len(data) else 0, stream, part)

    def start(self, content: bytes, fields: Fields | None = None) -> int:
        """Begin a call of one message."""
        stream = self.head(head() if fields is None else fields)
        self.body(stream, message(content))
        return stream

    def call(self, content: bytes, fields: Fields | None = None) -> Answer:
        return self.answer(self.start(content, fields))

    def read(self) -> Frame | None:
        """Read one frame; None at the end of the connection."""
        while len(self._rest) < 9 or len(self._rest) < 9 + int.from_bytes(self._rest[:3], "big"):
            try:
                more = self.socket.recv(1 << 18)
            except ConnectionResetError:
                return None
            if not more:
                return None
            self._rest += more
        end = 9 + int.from_bytes(self._rest[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", self._rest[3:9])
        got = Frame(kind, flags, stream, self._rest[9:end])
        self._rest = self._rest[end:]
        self.seen.append(got)
        if kind in (DATA, HEADERS, RST_STREAM) and stream:
            answer = self.answers.setdefault(stream, Answer())
            if kind == DATA:
                answer.data += got.payload
            elif kind == HEADERS:
                answer.blocks.append(dict(self.decoder.decode(got.payload)))
            else:
                answer.reset = int.from_bytes(got.payload, "big")
            answer.ended |= kind != RST_STREAM and bool(flags & END_STREAM)
        elif kind in (SETTINGS, PING) and not flags & ACK and self._greets:
            self.send(kind, ACK, payload=got.payload if kind == PING else b"")
        return got

    def until(self, kind: int, *, flags: int = 0) -> Frame:
        """Read up to a frame of a kind."""
        while (got := self.read()) is not None:
            if got.kind == kind and got.flags & flags == flags:
                return got
        raise AssertionError(f"the connection ended before a frame of kind {kind} came: {self.seen[-3:]}")

    def answer(self, stream: int) -> Answer:
        """Read to the end of a stream."""
        while not ((answer := self.answers.get(stream)) and (answer.ended or answer.reset is not None)):
            assert self.read() is not None, f"the connection ended: {self.seen[-3:]}"
        return answer

    def ping(self, data: bytes = b"12345678") -> None:
        """Wait until all that was sent has been read."""
        self.send(PING, 0, 0, data)
        assert self.until(PING, flags=ACK).payload == data

    def closed_for(self) -> int:
        """Read to the end of the connection; return the code of its GOAWAY."""
        code = int.from_bytes(self.until(GOAWAY).payload[4:8], "big")
        while self.read() is not None:
            pass
        return code


def granted(peer: Peer, stream: int, size: int) -> None:
    """Let the server send so much more: on a stream, or by 0 on all together."""
    peer.send(WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


def requested(peer: Peer) -> None:
    """Open the first stream, and end it on this side: its answer has no end."""
    stream = pb.StreamImagesRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=1_000_000))
    assert peer.start(stream.SerializeToString(), head(STREAM)) == 1
