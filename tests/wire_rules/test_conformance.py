"""RFC 9113 and RFC 7541, a case at a time: every case of h2spec, and rules that it has no case for.

A case is named by h2spec's section and number ("http2/5.1/3"), or by the RFC's section and a number of ours
("rfc9113/6.2/1"). Requests that h2spec sends as GET are gRPC calls here: status 0 shows that all of it was understood.
A server may end the connection for an error of a stream (RFC 9113, 5.4.1), but then all other calls on it end, too: so
most cases of h2spec that allow both are `ends_stream` here.
"""

import contextlib
import struct
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hpack import Encoder, NeverIndexedHeaderTuple
from tests.conftest import RunningServer
from tests.wire import (
    ACK,
    CANCEL,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    EACH,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GENERATE,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    REFUSED_STREAM,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    Answer,
    Fields,
    Peer,
    frame,
    granted,
    head,
    literal_indexed,
    message,
    request,
    requested,
    setting,
)

from ganserve.v1 import generation_pb2 as pb

Act = Callable[[Peer], object]
Verify = Callable[[Peer], None]
OK, NOT_FOUND, RESOURCE_EXHAUSTED = 0, 5, 8
MAX_WINDOW = 2**31 - 1
FIRST = 1  # the stream that a case is about
PROBE = b"all read"
ENABLE_PUSH = 2
LARGEST_FRAME = 16384
WEIGHT = bytes(4) + b"\xff"  # no dependency
ON_ITSELF = FIRST.to_bytes(4, "big") + b"\xff"
ONE = request()


class Case(NamedTuple):
    text: str
    act: Act
    verify: Verify
    settings: dict[int, int] | None = None  # of the client's preface; None: none
    greets: bool = True


# What a server may answer.


def error_of(peer: Peer) -> tuple[str, int] | None:
    """Read until all that was sent has been read; return which error it was to the server, and its code."""
    with contextlib.suppress(ConnectionError):
        peer.send(PING, 0, 0, PROBE)
    while (got := peer.read()) is not None and not (got.kind == PING and got.payload == PROBE):
        pass
    codes = [int.from_bytes(seen.payload[4:8], "big") for seen in peer.seen if seen.kind == GOAWAY]
    if got is None:
        return "connection", codes[-1]
    assert not any(codes)
    return next((("stream", answer.reset) for answer in peer.answers.values() if answer.reset), None)


def ends_connection(*codes: int) -> Verify:
    def verify(peer: Peer) -> None:
        error = error_of(peer)
        assert error in [("connection", code) for code in codes]

    return verify


def ends_stream(*codes: int) -> Verify:
    def verify(peer: Peer) -> None:
        assert error_of(peer) in [("stream", code) for code in codes]
        assert peer.answers[FIRST].reset in codes
        assert peer.call(b"").status == NOT_FOUND  # needs no window, which others may have used up

    return verify


def ends_either(*codes: int) -> Verify:
    def verify(peer: Peer) -> None:
        assert error_of(peer) in [(what, code) for code in codes for what in ("stream", "connection")]

    return verify


def lives(peer: Peer) -> None:
    assert error_of(peer) is None


def answered(peer: Peer) -> None:
    assert error_of(peer) is None
    assert peer.answer(FIRST).status == OK
    assert peer.answers[FIRST].images.count == 1


def refused_with(status: str) -> Verify:
    """Answered by an HTTP status, before the request is complete."""

    def verify(peer: Peer) -> None:
        assert peer.answer(FIRST).blocks[-1] == {":status": status}
        lives(peer)

    return verify


def greeted(peer: Peer) -> None:
    first = peer.read()
    assert first is not None
    assert (first.kind, first.flags) == (SETTINGS, 0)


def acknowledged(peer: Peer) -> None:
    peer.until(SETTINGS, flags=ACK)  # of the preface
    peer.until(SETTINGS, flags=ACK)
    lives(peer)


def pinged(*payloads: bytes) -> Verify:
    def verify(peer: Peer) -> None:
        lives(peer)
        assert [got.payload for got in peer.seen if got.kind == PING and got.flags & ACK] == [*payloads, PROBE]

    return verify


def gives_a_byte(peer: Peer) -> None:
    """The first DATA frame has one byte, and there is no second one."""
    assert len(peer.until(DATA).payload) == 1
    lives(peer)
    assert len(peer.answers[FIRST].data) == 1


# What a client does.


def together(*acts: Act) -> Act:
    def act(peer: Peer) -> None:
        for each in acts:
            each(peer)

    return act


def sends(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> Act:
    return lambda peer: peer.send(kind, flags, stream, payload)


def window(stream: int, more: int) -> Act:
    return lambda peer: granted(peer, stream, more)


def sets(*settings: tuple[int, int]) -> Act:
    return sends(SETTINGS, 0, 0, b"".join(setting(*each) for each in settings))


def opens(fields: Fields | None = None, *, end: bool = False, stream: int | None = None) -> Act:
    flags = END_HEADERS | END_STREAM if end else END_HEADERS
    return lambda peer: peer.head(head() if fields is None else fields, flags, stream)


opened: Act = opens()
has_reset: Act = together(opened, sends(RST_STREAM, 0, FIRST, CANCEL.to_bytes(4, "big")))


def called(peer: Peer, fields: Fields | None = None) -> None:
    peer.start(ONE, fields)


def has_answer(peer: Peer) -> None:
    called(peer)
    assert peer.answer(FIRST).status == OK


def data(payload: bytes = message(ONE), flags: int = END_STREAM, stream: int = FIRST) -> Act:
    return sends(DATA, flags, stream, payload)


def trailers(*fields: tuple[str, str], end: bool = True) -> Act:
    return opens(fields, end=end, stream=FIRST)


def block(*fields: tuple[str, str]) -> bytes:
    """The header block of a call, which leaves the dynamic table alone."""
    return Encoder().encode([NeverIndexedHeaderTuple(*field) for field in (*head(), *fields)])


X = b"\x00\x01x" + b"\x01y"  # a field that any part of a block may end with


def begins() -> Act:
    """Begin a header block that goes on."""
    return sends(HEADERS, 0, FIRST, block())


def continues(flags: int = END_HEADERS, stream: int = FIRST, payload: bytes = X) -> Act:
    return sends(CONTINUATION, flags, stream, payload)


def block_of(before: bytes = b"", after: bytes = b"") -> Act:
    """A call whose block has that besides."""
    return together(sends(HEADERS, END_HEADERS, FIRST, before + block() + after), data())


def heads_with(*fields: tuple[str, str], changed: Fields | None = None) -> Act:
    return opens([*(head() if changed is None else changed), *fields], end=True)


def without(name: str) -> Fields:
    return [field for field in head() if field[0] != name]


def a_whole_frame() -> bytes:
    """A message that fills a frame, by a field that nobody knows."""
    size = LARGEST_FRAME - 5 - len(ONE) - 3
    return message(ONE + b"\x7a" + bytes((size & 127 | 128, size >> 7)) + bytes(size))


def length_of(length: str, path: str = GENERATE, *parts: bytes) -> Act:
    """A call that says a length of its body, which comes in parts."""
    first, last = parts[:-1], parts[-1]
    return together(
        opens(head(path, content_length=length)), *(data(part, 0) for part in first), data(last, END_STREAM)
    )


def too_many_streams(peer: Peer) -> None:
    most = dict(struct.iter_unpack(">HI", peer.until(SETTINGS).payload))[MAX_CONCURRENT_STREAMS]
    for _ in range(most + 1):
        peer.head(head())


def one_stream_too_many(peer: Peer) -> None:
    assert error_of(peer) == ("stream", REFUSED_STREAM)
    last = max(peer.answers)
    assert [stream for stream, answer in peer.answers.items() if answer.reset is not None] == [last]
    assert last == peer.new_id() - 2


def is_below_zero(peer: Peer) -> None:
    """More than h2spec asks for: the window that is owed comes first, then a byte for each."""
    called(peer)
    while len(peer.answers.get(FIRST, Answer()).data) < 100:
        peer.read()
    peer.send(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 0))  # now at -100
    granted(peer, FIRST, 100)
    peer.ping()
    assert len(peer.answers[FIRST].data) == 100
    granted(peer, FIRST, 1)
    peer.ping()
    assert len(peer.answers[FIRST].data) == 101
    peer.send(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 1 << 20))


def below_zero_while_the_connection_waits(peer: Peer) -> None:
    peer.start(request(1000))
    while len(peer.answers.get(FIRST, Answer()).data) < 65535:
        peer.read()
    peer.send(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 0))
    granted(peer, 0, 1 << 20)
    peer.ping()
    assert len(peer.answers[FIRST].data) == 65535
    peer.send(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 1 << 20))


def a_thousand_images(peer: Peer) -> None:
    assert len(peer.answer(FIRST).images.pixels) == 784_000


def table_of(size: int) -> Act:
    """A call by a client whose table is so small, and whose decoder insists on it."""

    def act(peer: Peer) -> None:
        peer.decoder.max_allowed_table_size = size
        called(peer)

    return act


def smaller_table_later(peer: Peer) -> None:
    has_answer(peer)
    peer.send(SETTINGS, 0, 0, setting(HEADER_TABLE_SIZE, 0))
    peer.until(SETTINGS, flags=ACK)
    peer.decoder.max_allowed_table_size = 0


def goes_on(peer: Peer) -> None:
    assert peer.call(ONE).status == OK


LONG = "x" * 20_000


def too_many_fields(peer: Peer) -> None:
    """In the end there is an entry of the table, which must not be lost."""
    whole = block(("x-long", LONG)) + literal_indexed(b"x-request-id", b"mine")
    peer.send(HEADERS, 0, peer.new_id(), whole[:LARGEST_FRAME])
    peer.send(CONTINUATION, END_HEADERS, FIRST, whole[LARGEST_FRAME:])
    peer.send(DATA, END_STREAM, FIRST, message(ONE))


def says_too_large(peer: Peer) -> None:
    fields = peer.answer(FIRST).blocks[-1]
    assert fields[":status"] == "431" or fields["grpc-status"] == str(RESOURCE_EXHAUSTED)


def loses_no_entry(peer: Peer) -> None:
    says_too_large(peer)
    second = peer.new_id()
    peer.send(HEADERS, END_HEADERS, second, block() + b"\xbe")
    peer.send(DATA, END_STREAM, second, message(ONE))
    assert peer.answer(second).blocks[-1]["x-request-id"] == "mine"


def above_goaway(peer: Peer) -> None:
    """Opened before the client has read that it would not be looked at."""
    peer.head(head())
    peer.send(GOAWAY, 0, 0, bytes(8))
    while int.from_bytes(peer.until(GOAWAY).payload[:4], "big") != FIRST:
        pass
    late = peer.head(head())
    peer.send(DATA, 0, late, message(ONE))
    peer.head([("x-checksum", "1")], END_HEADERS | END_STREAM, late)
    peer.send(RST_STREAM, 0, late, CANCEL.to_bytes(4, "big"))
    peer.send(DATA, END_STREAM, FIRST, message(ONE))


EACH_ONE = message(
    pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=1)).SerializeToString()
)
HUFFMAN_X_TEST = b"\x85\xf2\xb2\x4a\x84\xff"
HUFFMAN_USER_AGENT = b"\x87\xb5\x05\xb1\x61\xcc\x5a\x93"
HUFFMAN_H2SPEC = b"\x84\x9c\x48\xac\xa4"
X_TEST, USER_AGENT, H2SPEC = b"\x06x-test", b"\x0auser-agent", b"\x06h2spec"

GENERIC = {
    "generic/1/1": Case("the preface", called, answered, settings={INITIAL_WINDOW_SIZE: 65535}),
    "generic/2/1": Case("PRIORITY on an idle stream", sends(PRIORITY, 0, FIRST, WEIGHT), lives),
    "generic/2/2": Case(
        "WINDOW_UPDATE on a half-closed stream",
        together(called, window(FIRST, 1)),
        gives_a_byte,
        settings={INITIAL_WINDOW_SIZE: 0},
    ),
    "generic/2/3": Case(
        "PRIORITY on a half-closed stream",
        together(called, sends(PRIORITY, 0, FIRST, WEIGHT), window(FIRST, 1)),
        gives_a_byte,
        settings={INITIAL_WINDOW_SIZE: 0},
    ),
    "generic/2/4": Case(
        "RST_STREAM on a half-closed stream",
        together(requested, sends(RST_STREAM, 0, FIRST, CANCEL.to_bytes(4, "big"))),
        lives,
    ),
    "generic/2/5": Case("PRIORITY on a closed stream", together(has_answer, sends(PRIORITY, 0, FIRST, WEIGHT)), lives),
    "generic/3.1/1": Case("a DATA frame", together(opened, data()), answered),
    "generic/3.1/2": Case("DATA frames", together(opened, data(message(ONE)[:7], 0), data(message(ONE)[7:])), answered),
    "generic/3.1/3": Case(
        "DATA with padding",
        together(opened, data(b"\x05" + message(ONE) + bytes(5), PADDED | END_STREAM)),
        answered,
    ),
    "generic/3.2/1": Case("HEADERS", called, answered),
    "generic/3.2/2": Case(
        "HEADERS with padding",
        together(sends(HEADERS, END_HEADERS | PADDED, FIRST, b"\x08" + block() + bytes(8)), data()),
        answered,
    ),
    "generic/3.2/3": Case(
        "HEADERS with a priority",
        together(sends(HEADERS, END_HEADERS | PRIORITY_FLAG, FIRST, WEIGHT + block()), data()),
        answered,
    ),
    "generic/3.3/1": Case("PRIORITY of weight 1", together(sends(PRIORITY, 0, FIRST, bytes(5)), called), answered),
    "generic/3.3/2": Case("PRIORITY of weight 256", together(sends(PRIORITY, 0, FIRST, WEIGHT), called), answered),
    "generic/3.3/3": Case(
        "PRIORITY with a dependency", together(sends(PRIORITY, 0, 3, b"\x00\x00\x00\x01\x00"), called), answered
    ),
    "generic/3.3/4": Case(
        "PRIORITY with an exclusive dependency",
        together(sends(PRIORITY, 0, FIRST, b"\x80\x00\x00\x00\x00"), called),
        answered,
    ),
    "generic/3.3/5": Case("PRIORITY of a higher stream", together(sends(PRIORITY, 0, 3, WEIGHT), called), answered),
    "generic/3.4/1": Case("RST_STREAM", has_reset, lives),
    "generic/3.5/1": Case(
        "SETTINGS",
        sets(
            (HEADER_TABLE_SIZE, 4096),
            (ENABLE_PUSH, 1),
            (MAX_CONCURRENT_STREAMS, 100),
            (INITIAL_WINDOW_SIZE, 65535),
            (MAX_FRAME_SIZE, LARGEST_FRAME),
            (6, 100),
        ),
        acknowledged,
    ),
    "generic/3.7/1": Case("PING", sends(PING, 0, 0, b"h2spec\0\0"), pinged(b"h2spec\0\0")),
    "generic/3.8/1": Case("GOAWAY", sends(GOAWAY, 0, 0, bytes(8) + b"h2spec"), lives),
    "generic/3.9/1": Case("WINDOW_UPDATE of the connection", window(0, 1), lives),
    "generic/3.9/2": Case("WINDOW_UPDATE of a stream", together(called, window(FIRST, 1)), answered),
    "generic/3.10/1": Case(
        "CONTINUATION",
        together(sends(HEADERS, 0, FIRST, block()[:5]), continues(payload=block()[5:]), data()),
        answered,
    ),
    "generic/3.10/2": Case(
        "CONTINUATION frames",
        together(
            sends(HEADERS, 0, FIRST, block()[:5]),
            continues(0, payload=block()[5:10]),
            continues(payload=block()[10:]),
            data(),
        ),
        answered,
    ),
    "generic/4/1": Case("GET", opens(head(method="GET"), end=True), refused_with("405")),
    "generic/4/2": Case("HEAD", opens(head(method="HEAD"), end=True), refused_with("405")),
    "generic/4/3": Case("POST", called, answered),
    "generic/4/4": Case(
        "POST with trailers",
        together(opens(head(GENERATE, ("trailer", "x-test"))), data(flags=0), trailers(("x-test", "ok"))),
        answered,
    ),
    "generic/5/1": Case("an indexed field", block_of(after=b"\xba"), answered),
    # h2spec's names of the following two are each other's.
    "generic/5/2": Case(
        "a literal to be indexed, Huffman", block_of(after=b"\x40" + HUFFMAN_USER_AGENT + HUFFMAN_H2SPEC), answered
    ),
    "generic/5/3": Case("a literal to be indexed", block_of(after=b"\x40" + USER_AGENT + H2SPEC), answered),
    "generic/5/4": Case("a new name to be indexed", block_of(after=b"\x40" + X_TEST + H2SPEC), answered),
    "generic/5/5": Case(
        "a new name to be indexed, Huffman", block_of(after=b"\x40" + HUFFMAN_X_TEST + HUFFMAN_H2SPEC), answered
    ),
    "generic/5/6": Case("a literal without indexing", block_of(after=b"\x00" + USER_AGENT + H2SPEC), answered),
    "generic/5/7": Case(
        "a literal without indexing, Huffman",
        block_of(after=b"\x00" + HUFFMAN_USER_AGENT + HUFFMAN_H2SPEC),
        answered,
    ),
    "generic/5/8": Case("a new name without indexing", block_of(after=b"\x00" + X_TEST + H2SPEC), answered),
    "generic/5/9": Case(
        "a new name without indexing, Huffman", block_of(after=b"\x00" + HUFFMAN_X_TEST + HUFFMAN_H2SPEC), answered
    ),
    "generic/5/10": Case("a literal never indexed", block_of(after=b"\x10" + USER_AGENT + H2SPEC), answered),
    "generic/5/11": Case(
        "a literal never indexed, Huffman",
        block_of(after=b"\x10" + HUFFMAN_USER_AGENT + HUFFMAN_H2SPEC),
        answered,
    ),
    "generic/5/12": Case("a new name never indexed", block_of(after=b"\x10" + X_TEST + H2SPEC), answered),
    "generic/5/13": Case(
        "a new name never indexed, Huffman", block_of(after=b"\x10" + HUFFMAN_X_TEST + HUFFMAN_H2SPEC), answered
    ),
    "generic/5/14": Case("a table size update, to 128", block_of(before=b"\x3f\x61"), answered),
    "generic/5/15": Case("table size updates", block_of(before=b"\x3f\x61\x3f\xe1\x1f"), answered),
}

HTTP2 = {
    "http2/3.5/1": Case("the server's preface", lambda _: None, greeted),
    "http2/3.5/2": Case(
        "another preface",
        lambda peer: peer.write(b"INVALID CONNECTION PREFACE\r\n\r\n"),
        ends_connection(PROTOCOL_ERROR),
        greets=False,
    ),
    "http2/4.1/1": Case("an unknown type", sends(0x16, 0, 0, bytes(8)), lives),
    "http2/4.1/2": Case("an undefined flag", sends(PING, 0x16, 0, bytes(8)), pinged(bytes(8))),
    "http2/4.1/3": Case("a reserved bit", sends(PING, 0x16, 0x80000000, bytes(8)), pinged(bytes(8))),
    "http2/4.2/1": Case("DATA of 2^14 bytes", together(opened, data(a_whole_frame())), answered),
    "http2/4.2/2": Case(
        "DATA of more", together(opened, data(bytes(LARGEST_FRAME + 1))), ends_either(FRAME_SIZE_ERROR)
    ),
    "http2/4.2/3": Case(
        "HEADERS of more",
        lambda peer: peer.send(HEADERS, END_HEADERS | END_STREAM, FIRST, block(("x-long", LONG))),
        ends_connection(FRAME_SIZE_ERROR),
    ),
    "http2/4.3/1": Case(
        "an invalid header block",
        sends(HEADERS, END_HEADERS | END_STREAM, 1, b"\x40"),
        ends_connection(COMPRESSION_ERROR),
    ),
    "http2/4.3/2": Case(
        "PRIORITY in a header block",
        together(begins(), sends(PRIORITY, 0, FIRST, WEIGHT), continues()),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/4.3/3": Case(
        "HEADERS of another stream in a header block",
        together(begins(), sends(HEADERS, END_HEADERS | END_STREAM, 3, block()), continues()),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/5.1/1": Case("idle: DATA", data(), ends_connection(PROTOCOL_ERROR)),
    "http2/5.1/2": Case("idle: RST_STREAM", sends(RST_STREAM, 0, 1, bytes(4)), ends_connection(PROTOCOL_ERROR)),
    "http2/5.1/3": Case("idle: WINDOW_UPDATE", window(1, 100), ends_connection(PROTOCOL_ERROR)),
    "http2/5.1/4": Case("idle: CONTINUATION", continues(payload=block()), ends_connection(PROTOCOL_ERROR)),
    "http2/5.1/5": Case("half-closed: DATA", together(requested, data()), ends_stream(STREAM_CLOSED)),
    "http2/5.1/6": Case("half-closed: HEADERS", together(requested, trailers(("a", "b"))), ends_stream(STREAM_CLOSED)),
    "http2/5.1/7": Case(
        "half-closed: CONTINUATION", together(requested, continues()), ends_either(STREAM_CLOSED, PROTOCOL_ERROR)
    ),
    "http2/5.1/8": Case("reset: DATA", together(has_reset, data()), ends_stream(STREAM_CLOSED)),
    "http2/5.1/9": Case(
        "reset: HEADERS", together(has_reset, opens(end=True, stream=FIRST)), ends_either(STREAM_CLOSED)
    ),
    "http2/5.1/10": Case(
        "reset: CONTINUATION", together(has_reset, continues()), ends_either(STREAM_CLOSED, PROTOCOL_ERROR)
    ),
    "http2/5.1/11": Case("closed: DATA", together(has_answer, data()), ends_stream(STREAM_CLOSED)),
    "http2/5.1/12": Case(
        "closed: HEADERS", together(has_answer, opens(end=True, stream=FIRST)), ends_connection(STREAM_CLOSED)
    ),
    "http2/5.1/13": Case(
        "closed: CONTINUATION", together(has_answer, continues()), ends_connection(STREAM_CLOSED, PROTOCOL_ERROR)
    ),
    "http2/5.1.1/1": Case("an even number", opens(stream=2), ends_connection(PROTOCOL_ERROR)),
    "http2/5.1.1/2": Case(
        "a lower number",
        together(opens(end=True, stream=5), opens(end=True, stream=3)),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/5.1.2/1": Case("more streams than allowed", too_many_streams, one_stream_too_many),
    "http2/5.3.1/1": Case(
        "HEADERS that depend on themselves",
        sends(HEADERS, END_HEADERS | END_STREAM | PRIORITY_FLAG, FIRST, ON_ITSELF + block()),
        ends_either(PROTOCOL_ERROR),
    ),
    "http2/5.3.1/2": Case(
        "PRIORITY that depends on itself", sends(PRIORITY, 0, FIRST, ON_ITSELF), ends_either(PROTOCOL_ERROR)
    ),
    "http2/5.4.1/1": Case("an invalid PING: closed", sends(PING, 0, 3, bytes(8)), ends_connection(PROTOCOL_ERROR)),
    "http2/5.4.1/2": Case("an invalid PING: GOAWAY", sends(PING, 0, 3, bytes(8)), ends_connection(PROTOCOL_ERROR)),
    "http2/5.5/1": Case("an extension's frame", sends(0x16, 0, 0, bytes(8)), lives),
    "http2/5.5/2": Case(
        "an extension's frame in a header block",
        together(begins(), sends(0x16, 0, 0, bytes(8))),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/6.1/1": Case("DATA without a stream", data(stream=0), ends_connection(PROTOCOL_ERROR)),
    "http2/6.1/2": Case("DATA on a stream that is not open", together(requested, data()), ends_stream(STREAM_CLOSED)),
    "http2/6.1/3": Case(
        "DATA with more padding than frame",
        together(opens(head(content_length="4")), data(b"\x06Test", PADDED | END_STREAM)),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/6.2/1": Case(
        "HEADERS that go on, and PRIORITY",
        together(begins(), sends(PRIORITY, 0, FIRST, WEIGHT), continues()),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/6.2/2": Case(
        "HEADERS that go on, and HEADERS of another stream",
        together(begins(), sends(HEADERS, END_HEADERS | END_STREAM, 3, block()), continues()),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/6.2/3": Case("HEADERS without a stream", opens(end=True, stream=0), ends_connection(PROTOCOL_ERROR)),
    "http2/6.2/4": Case(
        "HEADERS with more padding than frame",
        sends(HEADERS, END_HEADERS | END_STREAM | PADDED, FIRST, bytes((len(block()) + 2,)) + block()),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/6.3/1": Case("PRIORITY without a stream", sends(PRIORITY, 0, 0, WEIGHT), ends_connection(PROTOCOL_ERROR)),
    "http2/6.3/2": Case(
        "PRIORITY of 4 bytes",
        together(requested, sends(PRIORITY, 0, FIRST, WEIGHT[:4])),
        ends_either(FRAME_SIZE_ERROR),
    ),
    "http2/6.4/1": Case(
        "RST_STREAM without a stream", sends(RST_STREAM, 0, 0, bytes(4)), ends_connection(PROTOCOL_ERROR)
    ),
    "http2/6.4/2": Case(
        "RST_STREAM of an idle stream", sends(RST_STREAM, 0, 1, bytes(4)), ends_connection(PROTOCOL_ERROR)
    ),
    "http2/6.4/3": Case(
        "RST_STREAM of 3 bytes",
        together(requested, sends(RST_STREAM, 0, FIRST, bytes(3))),
        ends_connection(FRAME_SIZE_ERROR),
    ),
    "http2/6.5/1": Case(
        "SETTINGS acknowledged with a payload", sends(SETTINGS, ACK, 0, b"\x00"), ends_connection(FRAME_SIZE_ERROR)
    ),
    "http2/6.5/2": Case(
        "SETTINGS on a stream",
        sends(SETTINGS, 0, 1, setting(MAX_CONCURRENT_STREAMS, 100)),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/6.5/3": Case("SETTINGS of 3 bytes", sends(SETTINGS, 0, 0, bytes(3)), ends_connection(FRAME_SIZE_ERROR)),
    "http2/6.5.2/1": Case("ENABLE_PUSH of 2", sets((ENABLE_PUSH, 2)), ends_connection(PROTOCOL_ERROR)),
    "http2/6.5.2/2": Case(
        "INITIAL_WINDOW_SIZE of 2^31", sets((INITIAL_WINDOW_SIZE, 1 << 31)), ends_connection(FLOW_CONTROL_ERROR)
    ),
    "http2/6.5.2/3": Case("MAX_FRAME_SIZE below 2^14", sets((MAX_FRAME_SIZE, 16383)), ends_connection(PROTOCOL_ERROR)),
    "http2/6.5.2/4": Case(
        "MAX_FRAME_SIZE above 2^24-1", sets((MAX_FRAME_SIZE, 1 << 24)), ends_connection(PROTOCOL_ERROR)
    ),
    "http2/6.5.2/5": Case("an unknown setting", sets((0xFF, 1)), acknowledged),
    "http2/6.5.3/1": Case(
        "a setting twice",
        together(sets((INITIAL_WINDOW_SIZE, 100), (INITIAL_WINDOW_SIZE, 1)), called),
        gives_a_byte,
    ),
    "http2/6.5.3/2": Case("SETTINGS without ACK", sets((ENABLE_PUSH, 0)), acknowledged),
    "http2/6.7/1": Case("PING", sends(PING, 0, 0, bytes(range(8))), pinged(bytes(range(8)))),
    "http2/6.7/2": Case(
        "PING with ACK",
        together(sends(PING, ACK, 0, b"whatever"), sends(PING, 0, 0, b"h2spec\0\0")),
        pinged(b"h2spec\0\0"),
    ),
    "http2/6.7/3": Case("PING on a stream", sends(PING, 0, 1, bytes(8)), ends_connection(PROTOCOL_ERROR)),
    "http2/6.7/4": Case("PING of 6 bytes", sends(PING, 0, 0, bytes(6)), ends_connection(FRAME_SIZE_ERROR)),
    "http2/6.8/1": Case("GOAWAY on a stream", sends(GOAWAY, 0, 1, bytes(8)), ends_connection(PROTOCOL_ERROR)),
    "http2/6.9/1": Case("WINDOW_UPDATE by nothing", window(0, 0), ends_connection(PROTOCOL_ERROR)),
    "http2/6.9/2": Case(
        "WINDOW_UPDATE of a stream by nothing", together(opened, window(FIRST, 0)), ends_stream(PROTOCOL_ERROR)
    ),
    "http2/6.9/3": Case(
        "WINDOW_UPDATE of 3 bytes", sends(WINDOW_UPDATE, 0, 0, b"\x00\x00\x01"), ends_connection(FRAME_SIZE_ERROR)
    ),
    "http2/6.9.1/1": Case("a window of a byte", called, gives_a_byte, settings={INITIAL_WINDOW_SIZE: 1}),
    "http2/6.9.1/2": Case(
        "a connection's window above 2^31-1",
        together(window(0, MAX_WINDOW), window(0, MAX_WINDOW)),
        ends_connection(FLOW_CONTROL_ERROR),
    ),
    "http2/6.9.1/3": Case(
        "a stream's window above 2^31-1",
        together(opened, window(FIRST, MAX_WINDOW), window(FIRST, MAX_WINDOW)),
        ends_stream(FLOW_CONTROL_ERROR),
    ),
    "http2/6.9.2/1": Case(
        "a window of nothing that grows by SETTINGS",
        together(called, sets((INITIAL_WINDOW_SIZE, 1))),
        gives_a_byte,
        settings={INITIAL_WINDOW_SIZE: 0},
    ),
    "http2/6.9.2/2": Case("a window below zero", is_below_zero, answered, settings={INITIAL_WINDOW_SIZE: 100}),
    "http2/6.9.2/3": Case(
        "INITIAL_WINDOW_SIZE of 2^31", sets((INITIAL_WINDOW_SIZE, 1 << 31)), ends_connection(FLOW_CONTROL_ERROR)
    ),
    "http2/6.10/1": Case("CONTINUATION frames", together(begins(), continues(0), continues(), data()), answered),
    "http2/6.10/2": Case(
        "CONTINUATION that goes on, and DATA",
        together(begins(), continues(0), data()),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/6.10/3": Case(
        "CONTINUATION without a stream", together(begins(), continues(stream=0)), ends_connection(PROTOCOL_ERROR)
    ),
    "http2/6.10/4": Case(
        "CONTINUATION after HEADERS that end", together(opened, continues()), ends_connection(PROTOCOL_ERROR)
    ),
    "http2/6.10/5": Case(
        "CONTINUATION after CONTINUATION that ends",
        together(begins(), continues(), continues()),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/6.10/6": Case(
        "CONTINUATION after DATA",
        together(begins(), data(), continues(0), continues(stream=0)),
        ends_connection(PROTOCOL_ERROR),
    ),
    "http2/7/1": Case("GOAWAY with an unknown code", sends(GOAWAY, 0, 0, bytes(7) + b"\xff"), lives),
    "http2/7/2": Case(
        "RST_STREAM with an unknown code", together(opened, sends(RST_STREAM, 0, FIRST, b"\0\0\0\xff")), lives
    ),
    "http2/8.1/1": Case(
        "trailers that do not end the stream",
        together(opened, data(flags=0), trailers(("x-test", "ok"), end=False)),
        ends_either(PROTOCOL_ERROR),
    ),
    # Upper case as h2spec's, which the encoder of `hpack` leaves as it is.
    "http2/8.1.2/1": Case("a name in upper case", heads_with(("X-TEST", "ok")), ends_stream(PROTOCOL_ERROR)),
    "http2/8.1.2.1/1": Case(
        "an unknown pseudo-header",
        heads_with(changed=[*head()[:4], (":test", "ok"), *head()[4:]]),
        ends_stream(PROTOCOL_ERROR),
    ),
    "http2/8.1.2.1/2": Case(
        "a response's pseudo-header",
        heads_with(changed=[*head()[:4], (":status", "200"), *head()[4:]]),
        ends_stream(PROTOCOL_ERROR),
    ),
    "http2/8.1.2.1/3": Case(
        "a pseudo-header in trailers",
        together(opened, data(flags=0), trailers((":method", "POST"), end=False)),
        ends_either(PROTOCOL_ERROR),
    ),
    "http2/8.1.2.1/4": Case(
        "a pseudo-header after a field", heads_with(changed=[("x-test", "ok"), *head()]), ends_stream(PROTOCOL_ERROR)
    ),
    "http2/8.1.2.2/1": Case("connection", heads_with(("connection", "keep-alive")), ends_stream(PROTOCOL_ERROR)),
    "http2/8.1.2.2/2": Case(
        "te with more than trailers", opens(head(te="trailers, deflate"), end=True), ends_stream(PROTOCOL_ERROR)
    ),
    "http2/8.1.2.3/1": Case("an empty :path", opens(head(""), end=True), ends_stream(PROTOCOL_ERROR)),
    "http2/8.1.2.3/2": Case("no :method", heads_with(changed=without(":method")), ends_stream(PROTOCOL_ERROR)),
    "http2/8.1.2.3/3": Case("no :scheme", heads_with(changed=without(":scheme")), ends_stream(PROTOCOL_ERROR)),
    "http2/8.1.2.3/4": Case("no :path", heads_with(changed=without(":path")), ends_stream(PROTOCOL_ERROR)),
    "http2/8.1.2.3/5": Case(
        "two :method", heads_with(changed=[(":method", "POST"), *head()]), ends_stream(PROTOCOL_ERROR)
    ),
    "http2/8.1.2.3/6": Case(
        "two :scheme", heads_with(changed=[(":scheme", "http"), *head()]), ends_stream(PROTOCOL_ERROR)
    ),
    "http2/8.1.2.3/7": Case(
        "two :path", heads_with(changed=[(":path", GENERATE), *head()]), ends_stream(PROTOCOL_ERROR)
    ),
    "http2/8.1.2.6/1": Case(
        "content-length of another body", length_of("1", GENERATE, message(ONE)), ends_stream(PROTOCOL_ERROR)
    ),
    "http2/8.1.2.6/2": Case(
        "content-length of another body in two frames",
        length_of("1", GENERATE, message(ONE)[:7], message(ONE)[7:]),
        ends_stream(PROTOCOL_ERROR),
    ),
    "http2/8.2/1": Case(
        "PUSH_PROMISE",
        together(opened, sends(PUSH_PROMISE, END_HEADERS, FIRST, b"\x00\x00\x00\x03" + block())),
        ends_connection(PROTOCOL_ERROR),
    ),
}

HPACK = {
    "hpack/2.3.3/1": Case("an index beyond the table", block_of(after=b"\xc6"), ends_connection(COMPRESSION_ERROR)),
    "hpack/2.3.3/2": Case(
        "a name's index beyond the table", block_of(after=b"\x7f\x07\x00"), ends_connection(COMPRESSION_ERROR)
    ),
    "hpack/4.2/1": Case(
        "a table size update after a field", block_of(after=b"\x21"), ends_connection(COMPRESSION_ERROR)
    ),
    "hpack/5.2/1": Case(
        "Huffman padding of more than 7 bits",
        block_of(after=b"\x00" + HUFFMAN_X_TEST + b"\x84\x49\x50\x9f\xff"),
        ends_connection(COMPRESSION_ERROR),
    ),
    "hpack/5.2/2": Case(
        "Huffman padding by zeros",
        block_of(after=b"\x00" + HUFFMAN_X_TEST + b"\x83\x49\x50\x90"),
        ends_connection(COMPRESSION_ERROR),
    ),
    "hpack/5.2/3": Case(
        "Huffman's EOS",
        block_of(after=b"\x00" + HUFFMAN_X_TEST + b"\x87\x49\x51\xff\xff\xff\xfa\x7f"),
        ends_connection(COMPRESSION_ERROR),
    ),
    "hpack/6.1/1": Case("index 0", block_of(after=b"\x80"), ends_connection(COMPRESSION_ERROR)),
    "hpack/6.3/1": Case(
        "a table size above the setting", block_of(before=b"\x3f\xe2\x1f"), ends_connection(COMPRESSION_ERROR)
    ),
}

# What h2spec has no case for.
OURS = {
    "rfc9113/3.4/1": Case(
        "HTTP/1.1",
        lambda peer: peer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"),
        ends_connection(PROTOCOL_ERROR),
        greets=False,
    ),
    "rfc9113/3.4/2": Case(
        "a preface that differs in its last byte",
        lambda peer: peer.write(PREFACE[:-1] + b"x"),
        ends_connection(PROTOCOL_ERROR),
        greets=False,
    ),
    "rfc9113/3.4/3": Case(
        "a preface without SETTINGS",
        lambda peer: peer.write(PREFACE + frame(PING, 0, 0, bytes(8))),
        ends_connection(PROTOCOL_ERROR),
        greets=False,
    ),
    "rfc9113/3.4/4": Case(
        "a preface with an acknowledgement",
        lambda peer: peer.write(PREFACE + frame(SETTINGS, ACK, 0)),
        ends_connection(PROTOCOL_ERROR),
        greets=False,
    ),
    "rfc9113/4.1/1": Case(
        "unknown types, undefined flags and reserved bits",
        together(
            sends(0x42, 0xFF, 0x80000001, b"anything"),
            sends(WINDOW_UPDATE, 0xFF, 0x80000000, b"\x80\x00\x00\x01"),
            sends(PRIORITY, 0xFF, 0x80000007, b"\x80\x00\x00\x03\x10"),
            called,
        ),
        answered,
    ),
    "rfc9113/4.2/1": Case(
        "SETTINGS of more than 2^14 bytes",
        sends(SETTINGS, 0, 0, setting(0xFF, 1) * 2731),
        ends_connection(FRAME_SIZE_ERROR),
    ),
    "rfc9113/4.3/1": Case(
        "a frame of the connection in a header block",
        together(begins(), sends(PING, 0, 0, bytes(8))),
        ends_connection(PROTOCOL_ERROR),
    ),
    "rfc9113/5.1/1": Case(
        "closed: WINDOW_UPDATE and RST_STREAM",
        together(has_answer, window(FIRST, 1), sends(RST_STREAM, 0, FIRST, bytes(4))),
        lives,
    ),
    "rfc9113/5.1/2": Case(
        "frames that were on their way when the server reset the stream",
        together(opened, window(FIRST, 0), data(flags=0), trailers(("a", "b")), window(FIRST, 1)),
        ends_stream(PROTOCOL_ERROR),
    ),
    "rfc9113/6.1/1": Case(
        "DATA without the length of its padding", together(opened, data(b"", PADDED)), ends_connection(PROTOCOL_ERROR)
    ),
    "rfc9113/6.1/2": Case(
        "DATA that is all padding",
        together(opened, data(message(ONE), 0), data(b"\x05" + bytes(5), PADDED | END_STREAM)),
        answered,
    ),
    "rfc9113/6.1/3": Case(
        "padding that is not zero",
        together(opened, data(b"\x03" + message(ONE) + b"abc", PADDED | END_STREAM)),
        answered,
    ),
    "rfc9113/6.1/4": Case(
        "padding of just the frame's length",
        together(opened, data(b"\x05Test", PADDED | END_STREAM)),
        ends_connection(PROTOCOL_ERROR),
    ),
    "rfc9113/6.2/1": Case(
        "HEADERS too short for a priority",
        sends(HEADERS, END_HEADERS | PRIORITY_FLAG, 1, bytes(2)),
        ends_connection(FRAME_SIZE_ERROR),
    ),
    "rfc9113/6.2/2": Case(
        "HEADERS of which only padding is left after the priority",
        sends(HEADERS, END_HEADERS | PRIORITY_FLAG | PADDED, 1, b"\x06" + WEIGHT + bytes(5)),
        ends_connection(PROTOCOL_ERROR, FRAME_SIZE_ERROR),
    ),
    "rfc9113/6.5/1": Case(
        "SETTINGS acknowledged with settings", sends(SETTINGS, ACK, 0, bytes(6)), ends_connection(FRAME_SIZE_ERROR)
    ),
    "rfc9113/6.5/2": Case("empty SETTINGS", sets(), acknowledged),
    "rfc9113/6.5.2/1": Case("no table on the client's side", table_of(0), answered, settings={HEADER_TABLE_SIZE: 0}),
    "rfc9113/6.5.2/2": Case(
        "a small table on the client's side", table_of(100), answered, settings={HEADER_TABLE_SIZE: 100}
    ),
    "rfc9113/6.5.2/3": Case("a table that the client gives up later", smaller_table_later, goes_on),
    "rfc9113/6.5.2/4": Case(
        "a large table on the client's side", table_of(1 << 20), answered, settings={HEADER_TABLE_SIZE: 1 << 20}
    ),
    "rfc9113/6.8/1": Case("frames of a stream above GOAWAY's", above_goaway, answered),
    "rfc9113/6.8/2": Case("GOAWAY of 7 bytes", sends(GOAWAY, 0, 0, bytes(7)), ends_connection(FRAME_SIZE_ERROR)),
    "rfc9113/6.9/1": Case(
        "WINDOW_UPDATE of a stream by nothing, half-closed",
        together(requested, window(FIRST, 0)),
        ends_stream(PROTOCOL_ERROR),
    ),
    "rfc9113/6.9.1/1": Case(
        "a stream's window above 2^31-1, half-closed",
        together(requested, window(FIRST, MAX_WINDOW)),
        ends_stream(FLOW_CONTROL_ERROR),
    ),
    "rfc9113/6.9.2/1": Case(
        "a stream's window above 2^31-1 by SETTINGS",
        together(requested, window(FIRST, MAX_WINDOW - 65535), sets((INITIAL_WINDOW_SIZE, MAX_WINDOW))),
        ends_connection(FLOW_CONTROL_ERROR),
    ),
    "rfc9113/6.9.2/2": Case(
        "a window below zero of a stream that waits for the connection's",
        below_zero_while_the_connection_waits,
        a_thousand_images,
        settings={INITIAL_WINDOW_SIZE: 1 << 20},
    ),
    "rfc9113/6.10/1": Case(
        "CONTINUATION of another stream", together(begins(), continues(stream=3)), ends_connection(PROTOCOL_ERROR)
    ),
    "rfc9113/8.1/1": Case(
        "a pseudo-header in trailers that end the stream",
        together(opened, trailers((":path", "/"))),
        ends_stream(PROTOCOL_ERROR),
    ),
    "rfc9113/8.1/2": Case(
        "a second request on a stream", together(opened, opens(stream=FIRST)), ends_either(PROTOCOL_ERROR)
    ),
    "rfc9113/8.1/3": Case(
        "a name in upper case in trailers", together(opened, trailers(("X-Test", "ok"))), ends_stream(PROTOCOL_ERROR)
    ),
    "rfc9113/8.1/4": Case("GET that does not end", opens(head(method="GET")), refused_with("405")),
    "rfc9113/8.1/5": Case(
        "another content-type that does not end", opens(head(content_type="text/plain")), refused_with("415")
    ),
    "rfc9113/8.1.1/1": Case(
        "content-length of a longer body", length_of("1000", GENERATE, message(ONE)), ends_stream(PROTOCOL_ERROR)
    ),
    "rfc9113/8.1.1/2": Case("content-length below zero", opens(head(content_length="-1")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.1.1/3": Case(
        "content-length of a stream with a shorter body",
        length_of("1", EACH, EACH_ONE),
        ends_stream(PROTOCOL_ERROR),
    ),
    "rfc9113/8.1.1/4": Case(
        "content-length of a stream with a longer body",
        length_of("1000", EACH, EACH_ONE),
        ends_stream(PROTOCOL_ERROR),
    ),
    "rfc9113/8.1.1/5": Case(
        "content-length and an end without a body",
        opens(head(content_length="5"), end=True),
        ends_stream(PROTOCOL_ERROR),
    ),
    "rfc9113/8.1.1/6": Case(
        "content-length and trailers before all has come",
        together(opens(head(content_length="1000")), data(flags=0), trailers(("a", "b"))),
        ends_stream(PROTOCOL_ERROR),
    ),
    "rfc9113/8.1.1/7": Case(
        "content-length of the body", length_of(str(len(message(ONE))), GENERATE, message(ONE)), answered
    ),
    "rfc9113/8.2.1/1": Case("a name with a space", heads_with(("x y", "1")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.1/2": Case("an empty name", heads_with(("", "1")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.1/3": Case("a colon in a name", heads_with(("x:y", "1")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.1/4": Case("a name that is not ASCII", heads_with(("x\u00fc", "1")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.1/5": Case("a line end in a value", heads_with(("x", "1\r\ny: 2")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.1/6": Case("a NUL in a value", heads_with(("x", "1\0")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.1/7": Case(
        "a line end in :path", opens(head(GENERATE + "\r\nx: y"), end=True), ends_stream(PROTOCOL_ERROR)
    ),
    "rfc9113/8.2.1/8": Case("a space before a value", heads_with(("x", " 1")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.1/9": Case("a tab after a value", heads_with(("x", "1\t")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.1/10": Case(
        "bytes above ASCII in a value", lambda peer: called(peer, head(GENERATE, ("x", "\u00fc"))), answered
    ),
    "rfc9113/8.2.2/1": Case(
        "transfer-encoding", heads_with(("transfer-encoding", "chunked")), ends_stream(PROTOCOL_ERROR)
    ),
    "rfc9113/8.2.2/2": Case("keep-alive", heads_with(("keep-alive", "timeout=5")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.2/3": Case("upgrade", heads_with(("upgrade", "h2c")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.2/4": Case("proxy-connection", heads_with(("proxy-connection", "close")), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.2.2/5": Case("another te", opens(head(te="gzip"), end=True), ends_stream(PROTOCOL_ERROR)),
    "rfc9113/8.3.1/1": Case(
        "two :authority", heads_with(changed=[(":authority", "localhost"), *head()]), ends_stream(PROTOCOL_ERROR)
    ),
    "rfc9113/8.3.1/2": Case("no :authority", lambda peer: called(peer, without(":authority")), answered),
    "rfc9113/10.5.1/1": Case("more fields than allowed", too_many_fields, loses_no_entry),
    "rfc9113/10.5.1/2": Case(
        "more fields than allowed once they are decompressed",
        block_of(after=b"\x40\x01a\x7f\xa1\x1e" + bytes(b"x" * 4000) + b"\xbe" * 10),
        says_too_large,
    ),
    "rfc7541/4.2/1": Case(
        "table size updates to 0 and back, and an entry",
        block_of(before=b"\x20\x3f\xe1\x1f", after=literal_indexed(b"x", b"y") + b"\xbe"),
        answered,
    ),
    "rfc7541/5.1/1": Case(
        "an integer without end", sends(HEADERS, END_HEADERS, 1, b"\xff" * 6), ends_connection(COMPRESSION_ERROR)
    ),
    "rfc7541/5.1/2": Case(
        "an integer of a kilobyte",
        sends(HEADERS, END_HEADERS, 1, b"\x7f" + b"\x80" * 1000 + b"\x01"),
        ends_connection(COMPRESSION_ERROR),
    ),
    "rfc7541/5.2/1": Case(
        "a string that is cut off", block_of(after=b"\x00\x01x\x05abc"), ends_connection(COMPRESSION_ERROR)
    ),
    "rfc7541/5.2/2": Case(
        "Huffman padding alone", block_of(after=b"\x40\x81\xff\x81\xff"), ends_connection(COMPRESSION_ERROR)
    ),
}

CASES = GENERIC | HTTP2 | HPACK | OURS
# Cases that do not hold, and why.
WHITESPACE = "gRPC lets metadata begin and end with spaces, which servers may strip: such calls are served elsewhere"
EXCEPTIONS = {"rfc9113/8.2.1/8": WHITESPACE, "rfc9113/8.2.1/9": WHITESPACE}
# How many cases h2spec 2.6 has, by section.
H2SPEC = {
    "generic/1": 1, "generic/2": 5, "generic/3.1": 3, "generic/3.2": 3, "generic/3.3": 5, "generic/3.4": 1,
    "generic/3.5": 1, "generic/3.7": 1, "generic/3.8": 1, "generic/3.9": 2, "generic/3.10": 2, "generic/4": 4,
    "generic/5": 15, "http2/3.5": 2, "http2/4.1": 3, "http2/4.2": 3, "http2/4.3": 3, "http2/5.1": 13,
    "http2/5.1.1": 2, "http2/5.1.2": 1, "http2/5.3.1": 2, "http2/5.4.1": 2, "http2/5.5": 2, "http2/6.1": 3,
    "http2/6.2": 4, "http2/6.3": 2, "http2/6.4": 3, "http2/6.5": 3, "http2/6.5.2": 5, "http2/6.5.3": 2,
    "http2/6.7": 4, "http2/6.8": 1, "http2/6.9": 3, "http2/6.9.1": 3, "http2/6.9.2": 3, "http2/6.10": 6,
    "http2/7": 2, "http2/8.1": 1, "http2/8.1.2": 1, "http2/8.1.2.1": 4, "http2/8.1.2.2": 2, "http2/8.1.2.3": 7,
    "http2/8.1.2.6": 2, "http2/8.2": 1, "hpack/2.3.3": 2, "hpack/4.2": 1, "hpack/5.2": 3, "hpack/6.1": 1,
    "hpack/6.3": 1,
}  # fmt: skip


def of(case: str) -> object:
    marks = [pytest.mark.xfail(strict=True, reason=EXCEPTIONS[case])] if case in EXCEPTIONS else []
    return pytest.param(CASES[case], id=case, marks=marks)


@pytest.mark.parametrize("case", [*map(of, CASES)])
def test_the_rule_holds_in(case: Case, server: RunningServer) -> None:
    with Peer(server.address, case.settings, greet=case.greets) as peer:
        case.act(peer)
        case.verify(peer)


def test_there_is_each_case_of_h2spec() -> None:
    assert sum(H2SPEC.values()) == 147
    sections = Counter(case.rpartition("/")[0] for case in (GENERIC | HTTP2 | HPACK))
    assert sections == H2SPEC
    for section, count in H2SPEC.items():
        assert all(f"{section}/{number}" in CASES for number in range(1, count + 1))
