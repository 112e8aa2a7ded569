"""HTTP/2 and gRPC on the wire: peers that keep the rules in unusual ways, and peers that do not.

The rules of HTTP/2 themselves, each with its case: tests/wire_rules/test_conformance.py.
"""

import asyncio
import gzip
import socket
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from urllib.parse import unquote

import pytest
from tests.conftest import RunningServer
from tests.wire import (
    CANCEL,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    EACH,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    GENERATE,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    INTERNAL_ERROR,
    MAX_FRAME_SIZE,
    NO_ERROR,
    PADDED,
    PING,
    PREFACE,
    PRIORITY_FLAG,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    RST_STREAM,
    SERVICE,
    SETTINGS,
    STREAM,
    WINDOW_UPDATE,
    Answer,
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

from ganserve import Client, UnavailableError
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.transport import http2
from ganserve_server.transport.grpc_server import GrpcServer
from ganserve_server.transport.interface import Call, Method, RequestSink
from ganserve_server.transport.limits import Limits
from ganserve_server.transport.pools import Pool
from ganserve_server.transport.turns import LoopTurns

Start = Callable[..., RunningServer]
Break = Callable[[Peer], None]
OK, CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = 0, 1, 3, 4, 5
RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 8, 12, 13, 14
MAX_WINDOW = 2**31 - 1
MAX_REQUEST = 4 << 20
FIRST = 1


@pytest.fixture
def peer(server: RunningServer) -> Iterator[Peer]:
    with Peer(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def pixels(server: RunningServer) -> bytes:
    """The image of seed 1, as grpcio's client sees it."""
    from ganserve import Client

    with Client(server.address) as client:
        return client.generate("mlp-mnist", seed=1).pixels.tobytes()


def open_and_reset(peer: Peer) -> None:
    peer.answer(peer.start(request()))
    again = peer.encoder.encode(list(head()))  # a few bytes
    peer.write(
        b"".join(
            frame(HEADERS, END_HEADERS, stream, again) + frame(RST_STREAM, 0, stream, bytes(4))
            for stream in range(3, 80_000, 2)
        )
    )


# What costs the server more than it costs the peer.
FLOODS: dict[str, Break] = {
    "a header block without end": lambda peer: peer.write(
        frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 0, 1, bytes(16000)) * 5
    ),
    "empty CONTINUATION frames": lambda peer: peer.write(
        frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 0, 1) * 100
    ),
    "a header block that grows once read": lambda peer: peer.send(
        HEADERS, END_HEADERS, 1, b"\x40\x01a\x7f\xa1\x1e" + bytes(4000) + b"\xbe" * 1000
    ),
    "streams opened to be reset": open_and_reset,
    "SETTINGS after SETTINGS": lambda peer: peer.write(frame(SETTINGS, 0, 0) * 20_000),
}


@pytest.mark.parametrize("name", FLOODS)
def test_the_connection_ends_after(name: str, peer: Peer) -> None:
    FLOODS[name](peer)
    assert peer.closed_for() == ENHANCE_YOUR_CALM


def test_a_closing_server_reads_on_so_that_its_last_words_arrive(peer: Peer) -> None:
    peer.send(PING, 0, 1, bytes(8))
    peer.write(frame(PING, 0, 0, bytes(8)) * 50_000)
    assert peer.closed_for() == PROTOCOL_ERROR


def test_an_error_of_the_connection_ends_the_calls_on_it_and_both_are_logged(start_server: Start) -> None:
    running = start_server("--access-log", "all")
    with Peer(running.address) as peer:
        requested(peer)
        peer.until(DATA)
        peer.send(PING, 0, 1, bytes(8))
        assert peer.closed_for() == PROTOCOL_ERROR
        # Before this side has closed its half.
        ended, call = running.wait_for("connection ended"), running.wait_for("call")
        assert (ended["reason"], call["code"]) == ("protocol", "CANCELLED")
    assert running.stop() == 0
    assert {running.events.get(timeout=10)["event"] for _ in range(2)} == {"draining", "stopped"}


def test_padding_priority_and_continuation_change_nothing(peer: Peer, pixels: bytes) -> None:
    whole = peer.encoder.encode(list(head()))
    payload = b"\x07" + b"\x00\x00\x00\x00\x10" + whole[:3] + bytes(7)
    peer.send(HEADERS, PADDED | PRIORITY_FLAG, 1, payload)
    for byte in whole[3:-1]:
        peer.send(CONTINUATION, 0, 1, bytes((byte,)))
    peer.send(CONTINUATION, END_HEADERS, 1, whole[-1:])
    for byte in message(request()):
        peer.send(DATA, PADDED, 1, b"\xff" + bytes((byte,)) + bytes(255))
    peer.send(DATA, PADDED | END_STREAM, 1, b"\x00")
    assert peer.answer(1).images.pixels == pixels


def test_a_call_that_comes_byte_by_byte_is_answered(server: RunningServer, pixels: bytes) -> None:
    with Peer(server.address, greet=False) as peer:
        block_ = peer.encoder.encode(list(head()))
        data = PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, block_)
        data += b"".join(frame(DATA, 0, 1, bytes((byte,))) for byte in message(request()))
        for byte in data + frame(DATA, END_STREAM, 1):
            peer.write(bytes((byte,)))
        assert peer.answer(1).images.pixels == pixels


def test_many_calls_in_one_packet_are_all_answered(server: RunningServer, pixels: bytes) -> None:
    with Peer(server.address, greet=False) as peer:
        data = PREFACE + frame(SETTINGS, 0, 0)
        for stream in range(1, 401, 2):
            data += frame(HEADERS, END_HEADERS, stream, peer.encoder.encode(list(head())))
            data += frame(DATA, END_STREAM, stream, message(request()))
        peer.write(data + frame(WINDOW_UPDATE, 0, 0, (1 << 24).to_bytes(4, "big")))
        assert {peer.answer(stream).images.pixels for stream in range(1, 401, 2)} == {pixels}


def test_more_streams_than_allowed_are_refused_and_may_be_asked_again(start_server: Start) -> None:
    with Peer(start_server("--max-calls-per-connection", "3").address) as peer:
        streams = [peer.head(head()) for _ in range(4)]
        assert peer.answer(streams[3]).reset == REFUSED_STREAM
        peer.body(streams[3], message(request()))  # was on its way
        for stream in streams[:3]:
            peer.body(stream, message(request()))
            assert peer.answer(stream).status == OK
        assert peer.call(request()).status == OK


# Header blocks: a server may remember what one meant, but not for longer than it means it.


def fixed(*more: bytes) -> bytes:
    """A call's fields without a table, but for `more`."""
    path = b"\x04" + bytes((len(SERVICE + "GenerateImages"),)) + (SERVICE + "GenerateImages").encode()
    return b"\x83\x86" + path + b"\x0f\x10\x10application/grpc" + b"".join(more)


def id_of(peer: Peer, block_: bytes) -> str:
    stream = peer.new_id()
    peer.send(HEADERS, END_HEADERS, stream, block_)
    peer.body(stream, message(request()))
    return peer.answer(stream).blocks[-1]["x-request-id"]


NEWEST = b"\xbe"  # the entry of the dynamic table that was added last
TRAILERS_THAT_INDEX = literal_indexed(b"x-request-id", b"second")


def by_a_request(peer: Peer) -> None:
    assert id_of(peer, fixed(literal_indexed(b"x-request-id", b"second"))) == "second"


def by_trailers(peer: Peer) -> None:
    stream = peer.new_id()
    peer.send(HEADERS, END_HEADERS, stream, fixed())
    peer.body(stream, message(request()), end=False)
    peer.send(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS_THAT_INDEX)
    assert peer.answer(stream).status == OK


def by_a_malformed_request(peer: Peer) -> None:
    stream = peer.new_id()
    peer.send(HEADERS, END_HEADERS | END_STREAM, stream, literal_indexed(b"x-request-id", b"second"))
    assert peer.answer(stream).reset == PROTOCOL_ERROR


def by_trailers_of_a_closed_stream(peer: Peer) -> None:
    stream = peer.new_id()
    peer.send(HEADERS, END_HEADERS, stream, fixed() + b"\x00\x0cgrpc-timeout\x021n")
    assert peer.answer(stream).status == DEADLINE_EXCEEDED
    peer.send(HEADERS, END_HEADERS | END_STREAM, stream, TRAILERS_THAT_INDEX)


@pytest.mark.parametrize("change", [by_a_request, by_trailers, by_a_malformed_request, by_trailers_of_a_closed_stream])
def test_the_same_block_means_something_else_once_the_table_is_changed(change: Break, peer: Peer) -> None:
    assert id_of(peer, fixed(literal_indexed(b"x-request-id", b"first"))) == "first"
    for _ in range(3):
        assert id_of(peer, fixed(NEWEST)) == "first"
    change(peer)
    for _ in range(3):
        assert id_of(peer, fixed(NEWEST)) == "second"


@pytest.mark.parametrize("size", [b"\x20\x3f\xe1\x1f", b"\x20", b"\x3f\x00"])
def test_a_block_means_nothing_once_its_entry_is_evicted(size: bytes, peer: Peer) -> None:
    id_of(peer, fixed(literal_indexed(b"x-request-id", b"first")))
    for _ in range(2):
        assert id_of(peer, fixed(NEWEST)) == "first"
    id_of(peer, size + fixed())
    peer.send(HEADERS, END_HEADERS, peer.new_id(), fixed(NEWEST))
    assert peer.closed_for() == COMPRESSION_ERROR


def test_a_block_that_changes_the_table_changes_it_each_time(peer: Peer) -> None:
    adding = fixed(literal_indexed(b"x-request-id", b"first"))
    for _ in range(3):
        assert id_of(peer, adding) == "first"
    assert id_of(peer, fixed(b"\xc0")) == "first"  # the third newest


# Flow control.


def test_an_answer_comes_whole_through_a_window_grown_by_a_byte_at_a_time(server: RunningServer, pixels: bytes) -> None:
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 1}) as peer:
        stream = peer.start(request())
        size = 1
        while not (answer := peer.answers.get(stream, Answer())).ended:
            got = peer.read()
            assert got is not None
            if got.kind == DATA:
                assert len(answer.data) <= size
                size += 1
                granted(peer, stream, 1)
        assert answer.images.pixels == pixels
        assert answer.status == OK


def test_a_stream_that_ends_while_its_window_is_below_zero_leaves_the_connections_window_right(
    server: RunningServer,
) -> None:
    with Peer(server.address) as peer:
        stream = peer.head(head(EACH))
        each = pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=1)).SerializeToString()
        peer.body(stream, message(each), end=False)
        peer.until(DATA)
        sent = len(peer.answers[stream].data)
        peer.send(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 0))
        peer.ping()
        peer.body(stream, b"")
        assert peer.answer(stream).status == OK
        peer.send(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 1 << 20))
        second = peer.start(request(count=200))
        peer.ping()
        while sent + len(peer.answers.get(second, Answer()).data) < 65535:
            peer.read()
        peer.ping()
        assert sent + len(peer.answers[second].data) == 65535


def test_the_connections_window_is_shared_fairly_and_never_passed(server: RunningServer) -> None:
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 1 << 20}) as peer:
        streams = [peer.start(request(count=200)) for _ in range(4)]
        while sum(len(peer.answers.get(stream, Answer()).data) for stream in streams) < 65535:
            peer.read()
        peer.ping()
        assert sum(len(peer.answers.get(stream, Answer()).data) for stream in streams) == 65535
        granted(peer, 0, 4 * 16384)
        for _ in range(4):
            peer.until(DATA)
        assert sum(len(peer.answers.get(stream, Answer()).data) for stream in streams) == 65535 + 4 * 16384
        granted(peer, 0, 1 << 24)
        for stream in streams:
            assert len(peer.answer(stream).images.pixels) == 200 * 784


def test_an_end_needs_no_window(server: RunningServer) -> None:
    # Its answer, an error, has the same size each time: it says no durations.
    generate = pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="unknown")).SerializeToString()
    with Peer(server.address) as peer:
        stream = peer.head(head(EACH))
        peer.body(stream, message(generate))
        size = len(peer.answer(stream).data)
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 0}) as peer:
        filler = peer.start(request(count=1000))
        granted(peer, filler, 65535 - size)
        while len(peer.answers.get(filler, Answer()).data) < 65535 - size:
            peer.read()
        stream = peer.head(head(EACH))
        peer.body(stream, message(generate))
        peer.ping()
        granted(peer, stream, size)  # takes the connection's last byte
        assert peer.answer(stream).status == OK


def test_a_frame_is_no_larger_than_the_peer_takes(server: RunningServer) -> None:
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 1 << 24}) as peer:
        granted(peer, 0, 1 << 24)
        peer.call(request(count=1000))
        assert max(len(got.payload) for got in peer.seen if got.kind == DATA) == 16384


def test_a_peer_that_sends_more_than_its_window_loses_the_stream(server: RunningServer) -> None:
    each = pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=64)).SerializeToString()
    unknown_field = b"\x7a\xa0\x9c\x01" + bytes(20_000)
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 0}) as peer:
        stream = peer.head(head(EACH))
        # The answers cannot be sent, so that the server takes no more requests after a while.
        peer.body(stream, message(each + unknown_field) * 1000, end=False)
        assert peer.answer(stream).reset == FLOW_CONTROL_ERROR
        assert peer.call(b"").status == NOT_FOUND


@pytest.mark.parametrize("compress", [None, gzip.compress, lambda data: gzip.compress(data, 0, mtime=0)])
def test_a_stream_of_requests_goes_on_past_its_window(
    compress: Callable[[bytes], bytes] | None, server: RunningServer
) -> None:
    """The windows hold what comes, compressed or not, and padding."""
    wrong = pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="x" * 200_000)).SerializeToString()
    with Peer(server.address, {INITIAL_WINDOW_SIZE: MAX_WINDOW}) as peer:
        window = dict(struct.iter_unpack(">HI", peer.until(SETTINGS).payload))[INITIAL_WINDOW_SIZE]
        sent = 0
        stream = peer.head(head(EACH, ("grpc-encoding", "gzip" if compress else "identity")))
        data = message(wrong) if compress is None else message(compress(wrong), 1)
        for start in range(0, 60 * len(data), 16000):
            payload = b"\x64" + (data * 60)[start : start + 16000] + bytes(100)
            while sent + len(payload) > window + granted_on(peer, stream):
                assert peer.read() is not None
            peer.send(DATA, PADDED, stream, payload)
            sent += len(payload)
        peer.send(DATA, END_STREAM, stream)
        answer = peer.answer(stream)
        assert len(answer.messages) == 60
        assert answer.status == OK
        assert granted_on(peer, stream) <= sent


def granted_on(peer: Peer, stream: int) -> int:
    updates = (got for got in peer.seen if got.kind == WINDOW_UPDATE and got.stream == stream)
    return sum(int.from_bytes(got.payload, "big") for got in updates)


# gRPC.


def test_an_unknown_method_is_unimplemented(peer: Peer) -> None:
    for path in (SERVICE + "Nothing", "/nothing", "/", "*"):
        answer = peer.call(request(), head(path))
        assert answer.status == UNIMPLEMENTED
        assert path in unquote(answer.blocks[0]["grpc-message"])


def test_an_error_is_one_block_with_what_a_client_needs(peer: Peer) -> None:
    answer = peer.call(request(model="n\u00fcll %"), head(GENERATE, ("x-request-id", "mine")))
    (fields,) = answer.blocks
    assert not answer.data
    assert fields[":status"] == "200"
    assert fields["content-type"] == "application/grpc"
    assert fields["grpc-status"] == str(NOT_FOUND)
    assert "n%C3%BCll %25" in fields["grpc-message"]
    assert fields["x-request-id"] == "mine"
    assert fields["grpc-status-details-bin"]


def test_an_answer_is_headers_a_message_and_trailers(peer: Peer, pixels: bytes) -> None:
    answer = peer.call(request(), head(GENERATE, ("x-request-id", "mine")))
    first, last = answer.blocks
    assert first[":status"] == "200"
    assert first["content-type"] == "application/grpc"
    assert last["grpc-status"] == str(OK)
    assert last["x-request-id"] == "mine"
    assert answer.images.pixels == pixels


@pytest.mark.parametrize("given", ["", "x" * 65, "with space", "\xfc"])
def test_a_request_id_that_cannot_be_one_is_replaced(given: str, peer: Peer) -> None:
    ids = {peer.call(request(), head(GENERATE, ("x-request-id", given))).blocks[-1]["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert given not in ids


def test_what_is_not_grpc_is_refused_as_http_does(peer: Peer) -> None:
    for status, fields in (
        ("405", head(method="GET")),
        ("415", head(content_type="application/json")),
        ("415", head(content_type="application/grpc-web+proto")),
        ("415", head(content_type="application/grpc+json")),
        ("415", head(content_type=None)),
        ("400", head(GENERATE, ("grpc-timeout", "soon"))),
        ("400", head(GENERATE, ("grpc-timeout", "123456789S"))),
        ("400", head(GENERATE, ("grpc-timeout", "-1S"))),
    ):
        # The body's length, read as gRPC's, would be far too large.
        for body in (b'{"model": "mlp-mnist"}', b""):
            stream = peer.head(fields, END_HEADERS if body else END_HEADERS | END_STREAM)
            if body:
                peer.body(stream, body)
            assert peer.answer(stream).blocks == [{":status": status}]


async def test_what_is_not_grpc_opens_no_method() -> None:
    """A stream's task would wait for ever for what is not read."""
    server = GrpcServer(
        on_finished=lambda *_: None,
        on_refused=lambda *_: None,
        on_internal_error=lambda *_: None,
        limits=Limits(),
    )
    opened: list[Call] = []

    def open_(call: Call) -> RequestSink:
        opened.append(call)
        return lambda _: None, call.finish

    server.add_method("/a.B/C", Method(open=open_))
    listening = socket.create_server(("127.0.0.1", 0))
    server.start([listening])

    def ask(**changes: str) -> dict[str, str]:
        with Peer(f"127.0.0.1:{port}") as peer:
            return peer.answer(peer.head(head("/a.B/C", **changes), END_HEADERS | END_STREAM)).blocks[-1]

    port = listening.getsockname()[1]
    assert await asyncio.to_thread(ask, content_type="text/plain") == {":status": "415"}
    assert not opened
    assert (await asyncio.to_thread(ask))["grpc-status"] == "0"
    await server.drain(10)


@pytest.mark.parametrize("content_type", ["application/grpc+proto", "application/grpc;charset=utf-8"])
def test_other_names_of_grpc_are_taken_and_te_may_be_missing(content_type: str, peer: Peer) -> None:
    assert peer.call(request(), head(content_type=content_type, te=None)).status == OK


COMPRESSED = {
    "gzip": gzip.compress(request(), mtime=0),
    "deflate": zlib.compress(request()),
}


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_compressed_requests_are_read(encoding: str, peer: Peer, pixels: bytes) -> None:
    stream = peer.head(head(GENERATE, ("grpc-encoding", encoding)))
    peer.body(stream, message(COMPRESSED[encoding], 1))
    assert peer.answer(stream).images.pixels == pixels


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", message(gzip.compress(bytes(1 << 26), mtime=0), 1), RESOURCE_EXHAUSTED),
        ("gzip", message(b"not gzip at all", 1), INVALID_ARGUMENT),
        ("gzip", message(COMPRESSED["gzip"][:-6], 1), INVALID_ARGUMENT),
        ("gzip", message(COMPRESSED["deflate"], 1), INVALID_ARGUMENT),
        ("br", message(request(), 1), UNIMPLEMENTED),
        ("identity", message(request(), 1), INTERNAL),
        ("gzip", message(request(), 2), INVALID_ARGUMENT),
        ("identity", message(request())[:-1], INVALID_ARGUMENT),
        ("identity", message(request()) + b"x", INVALID_ARGUMENT),
        ("identity", message(request()) * 2, INVALID_ARGUMENT),
        ("identity", b"\x00\x00", INVALID_ARGUMENT),
        ("identity", b"", INVALID_ARGUMENT),
        ("identity", message(b"\xff\xff"), INVALID_ARGUMENT),
        ("identity", message(bytes(MAX_REQUEST + 1)), RESOURCE_EXHAUSTED),
        ("identity", b"\x00\xff\xff\xff\xff", RESOURCE_EXHAUSTED),
    ],
)
@pytest.mark.parametrize("path", [GENERATE, STREAM, SERVICE + "GetModel"])
def test_a_body_that_is_not_one_message_is_refused(
    path: str, encoding: str, body: bytes, status: int, peer: Peer
) -> None:
    stream = peer.head(head(path, ("grpc-encoding", encoding)))
    peer.body(stream, body)
    answer = peer.answer(stream)
    assert answer.status == status
    assert "gzip" in answer.blocks[0]["grpc-accept-encoding"]


def test_the_largest_request_is_taken_whole_with_padding_or_without(peer: Peer) -> None:
    size = MAX_REQUEST - len(request()) - 5
    varint = bytes((size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21))
    unknown_field = b"\x7a" + varint + bytes(size)
    data = message(request() + unknown_field)
    assert len(data) == MAX_REQUEST + 5
    window = dict(struct.iter_unpack(">HI", peer.until(SETTINGS).payload))[INITIAL_WINDOW_SIZE]
    for padding in (0, 255):
        stream, sent = peer.head(head()), 0
        for start in range(0, len(data), 16000):
            payload = bytes((padding,)) + data[start : start + 16000] + bytes(padding)
            while sent + len(payload) > window + granted_on(peer, stream):
                assert peer.read() is not None
            peer.send(DATA, PADDED, stream, payload)
            sent += len(payload)
        peer.send(DATA, END_STREAM, stream)
        assert peer.answer(stream).status == OK


@pytest.mark.parametrize("timeout", ["0S", "1n", "0m", "00000000u"])
def test_a_deadline_that_has_passed_is_told_so(timeout: str, peer: Peer) -> None:
    answer = peer.answer(peer.head(head(GENERATE, ("grpc-timeout", timeout))))
    assert answer.status == DEADLINE_EXCEEDED
    # The rest of the request is not wanted.
    while peer.answers[FIRST].reset is None:
        peer.read()
    assert peer.answers[FIRST].reset == NO_ERROR


@pytest.mark.parametrize("timeout", ["99999999H", "99999999M", "30S", "30000m", "30000000u"])
def test_a_long_deadline_is_none(timeout: str, peer: Peer) -> None:
    assert peer.call(request(), head(GENERATE, ("grpc-timeout", timeout))).status == OK


def test_a_deadline_ends_a_request_that_is_never_complete(peer: Peer) -> None:
    stream = peer.head(head(GENERATE, ("grpc-timeout", "100m")))
    peer.body(stream, message(request())[:-1], end=False)
    assert peer.answer(stream).status == DEADLINE_EXCEEDED


def test_a_call_cancelled_while_it_waits_leaves_the_queue(start_server: Start) -> None:
    running = start_server()
    with Peer(running.address) as peer:
        # Enough that the last ones wait.
        streams = [peer.start(request(1000, "cdcgan-mnist")) for _ in range(4)]
        for stream in streams:
            peer.send(RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big"))
        assert peer.call(request()).status == OK
        samples = running.scrape()
    assert (
        samples['ganserve_requests_total{code="CANCELLED",method="GenerateImages",model="cdcgan-mnist",version="1"}']
        == 4
    )
    assert samples['ganserve_queue_images{model="cdcgan-mnist"}'] == 0
    assert samples.get('ganserve_images_total{model="cdcgan-mnist",version="1"}', 0) < 4000


def test_a_stream_that_is_cancelled_or_whose_peer_leaves_ends(start_server: Start) -> None:
    running = start_server("--access-log", "all")
    for leave in ("reset", "close"):
        with Peer(running.address) as peer:
            requested(peer)
            peer.until(DATA)
            if leave == "reset":
                peer.send(RST_STREAM, 0, FIRST, CANCEL.to_bytes(4, "big"))
                assert running.wait_for("call")["code"] == "CANCELLED"
                peer.ping()
                seen = len(peer.answers[FIRST].data)
                peer.ping()
                assert len(peer.answers[FIRST].data) == seen
        if leave == "close":
            assert running.wait_for("call")["code"] == "CANCELLED"
    assert running.stop() == 0


@pytest.mark.slow
def test_a_peer_that_does_not_read_stops_no_other_and_costs_bounded_memory(start_server: Start, pixels: bytes) -> None:
    running = start_server("--max-images-per-request", "1000000", "--max-queue-images", "10000000")
    before = memory_kib(running)
    with Peer(running.address, {INITIAL_WINDOW_SIZE: MAX_WINDOW}, receive_buffer=4096) as deaf:
        granted(deaf, 0, MAX_WINDOW - 65535)
        for _ in range(9):
            deaf.start(request(30_000))  # 23 MB each
        with Peer(running.address) as peer:
            for _ in range(50):
                assert peer.call(request()).images.pixels == pixels
            while sum(value for name, value in running.scrape().items() if name.startswith("ganserve_requests")) < 59:
                time.sleep(0.1)
            assert peer.call(request()).images.pixels == pixels
        samples = running.scrape()
        assert samples['ganserve_rejections_total{reason="unread"}'] >= 2
        assert memory_kib(running) - before < 500_000
    assert running.stop() == 0


def test_a_peer_that_reads_no_answers_at_all_is_cut_off(server: RunningServer) -> None:
    flood = frame(PING, 0, 0, bytes(8)) * 1000
    with Peer(server.address, receive_buffer=4096) as deaf, pytest.raises(ConnectionError):  # noqa: PT012
        for _ in range(10_000):
            deaf.write(flood)


def test_a_peer_that_reads_no_errors_is_cut_off(server: RunningServer) -> None:
    with Peer(server.address, receive_buffer=4096) as deaf:
        deaf.head(head("/" + "x" * 300), END_HEADERS | END_STREAM)
        block_ = deaf.encoder.encode(list(head("/" + "x" * 300)))
        with pytest.raises(ConnectionError):  # noqa: PT012
            for first in range(3, 600_000, 200):
                streams = range(first, first + 200, 2)
                deaf.write(b"".join(frame(HEADERS, END_HEADERS | END_STREAM, stream, block_) for stream in streams))


def test_unfinished_requests_beyond_the_bound_end_and_the_newest_one_does_not(start_server: Start) -> None:
    running = start_server()
    held = b"\x00" + MAX_REQUEST.to_bytes(4, "big") + bytes(MAX_REQUEST - 100)
    with Peer(running.address) as hoarder, Peer(running.address) as peer:
        streams = [hoarder.head(head()) for _ in range(10)]
        for stream in streams:
            hoarder.body(stream, held, end=False)
        # 32 MiB of one connection are seven of them.
        for evicted in streams[:3]:
            assert hoarder.answer(evicted).status == RESOURCE_EXHAUSTED
        assert peer.call(request()).status == OK
        hoarder.ping()
        assert not set(streams[3:]) & set(hoarder.answers)


def test_compressed_messages_that_nobody_takes_yet_are_bounded_too(start_server: Start) -> None:
    running = start_server()
    before = memory_kib(running)
    each = pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=64)).SerializeToString()
    bomb = gzip.compress(each + b"\x7a\x80\x80\xc0\x01" + bytes(3 << 20), mtime=0)
    with Peer(running.address, {INITIAL_WINDOW_SIZE: 0}) as peer:
        stream = peer.head(head(EACH, ("grpc-encoding", "gzip")))
        peer.body(stream, message(bomb, 1) * 900, end=False)
        peer.ping()
        assert running.scrape()['ganserve_rejections_total{reason="too_large"}'] == 1
        assert memory_kib(running) - before < 200_000
        # After the answers that there are.
        granted(peer, 0, 1 << 24)
        granted(peer, stream, 1 << 24)
        assert peer.answer(stream).status == RESOURCE_EXHAUSTED


def test_messages_of_streams_stay_small_where_much_is_unread(start_server: Start) -> None:
    """A thousand streams of a connection that each kept 256 images, rather than 64, were refused in part."""
    running = start_server("--max-queue-images", "100000")
    asked = pb.StreamImagesRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=600)).SerializeToString()
    with Peer(running.address, {INITIAL_WINDOW_SIZE: 0}) as peer:
        # A caller's own go in order: the last one's first images are made when the others' are kept.
        stream = [peer.start(asked, head(STREAM)) for _ in range(400)][-1]
        granted(peer, 0, 1 << 24)
        granted(peer, stream, 1 << 24)
        messages = [pb.StreamImagesResponse.FromString(content) for content in peer.answer(stream).messages]
    assert [message.chunk.count for message in messages] == [64] * 9 + [24]


def test_a_connection_too_many_is_closed_and_does_not_come_back_at_once(start_server: Start) -> None:
    running = start_server("--max-connections", "2")
    turned_away = 'ganserve_connections_turned_away_total{reason="connections"}'
    with Peer(running.address) as first, Peer(running.address) as second:
        first.ping()
        second.ping()
        with Client(running.address, retries=False) as third, pytest.raises(UnavailableError):
            third.generate("mlp-mnist", seed=1, timeout_s=30)
        # gRPC tries again, too, each time a little later: not at once and for ever, as after a GOAWAY.
        assert 1 <= running.scrape()[turned_away] <= 10
        assert first.call(request()).status == OK
    with Client(running.address) as later:
        assert later.generate("mlp-mnist", seed=1)


def test_a_drain_answers_what_has_come_and_refuses_what_comes_later(start_server: Start, pixels: bytes) -> None:
    running = start_server()
    with Peer(running.address) as peer:
        slow = peer.head(head())
        peer.ping()
        running.process.terminate()
        assert int.from_bytes(peer.until(GOAWAY).payload[:4], "big") == MAX_WINDOW
        late = peer.start(request())  # on its way when the peer was told
        assert int.from_bytes(peer.until(GOAWAY).payload[:4], "big") == late
        peer.start(request())
        peer.body(slow, message(request()))
        assert peer.answer(late).images.pixels == pixels
        assert peer.answer(slow).images.pixels == pixels
        while peer.read() is not None:
            pass
        assert len(peer.answers) == 2
    assert running.process.wait(timeout=10) == 0


def test_a_drain_answers_what_a_slow_peer_sends_before_it_reads_that_it_should_not(
    start_server: Start, pixels: bytes
) -> None:
    running = start_server()
    with Peer(running.address) as peer:
        peer.ping()
        running.process.terminate()
        peer.until(GOAWAY)
        time.sleep(0.4)  # the peer stands still, as a client of a busy machine, before it answers the PING
        late = peer.start(request())
        assert peer.answer(late).images.pixels == pixels
    assert running.process.wait(timeout=10) == 0


def test_a_peer_that_greets_only_after_the_drain_has_begun_does_not_hold_it_up(start_server: Start) -> None:
    running = start_server("--drain-timeout-s", "3600")
    with Peer(running.address) as first, Peer(running.address, greet=False) as peer:
        peer.until(SETTINGS)
        first.ping()
        running.process.terminate()
        peer.until(GOAWAY)
        peer.write(PREFACE + frame(SETTINGS, 0, 0))
        for each in (first, peer):
            while each.read() is not None:
                pass
        assert {got.payload[4:8] for got in peer.seen if got.kind == GOAWAY} == {bytes(4)}
    assert running.process.wait(timeout=10) == 0


def test_a_watcher_that_comes_during_the_drain_does_not_hold_it_up(start_server: Start) -> None:
    running = start_server("--drain-timeout-s", "3600")
    with Peer(running.address) as peer:
        peer.ping()
        running.process.terminate()
        peer.until(GOAWAY)
        stream = peer.start(b"", head("/grpc.health.v1.Health/Watch"))
        assert peer.answer(stream).status == UNAVAILABLE
    assert running.process.wait(timeout=10) == 0


# A connection alone, for what a whole server does not let happen, or takes long over.


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Listen with connections whose heads are read by a function; return the address."""
    loop, servers = asyncio.get_running_loop(), []

    async def listen(
        read_head: Callable[[object], object] = list,
        open_stream: Callable[..., http2.Stream | None] = lambda *_: None,
        max_streams: int = 1,
        timeout_s: float = 10.0,
    ) -> str:
        def connection() -> http2.Connection[object]:
            return http2.Connection(
                read_head=read_head,
                open_stream=open_stream,
                limits=Limits(max_streams=max_streams, handshake_timeout_s=timeout_s, header_timeout_s=timeout_s),
                answers=Pool(1 << 30, 1 << 30, of_answers=True),
                turns=LoopTurns(loop),
                trusted=True,
                on_made=lambda _: True,
                on_lost=lambda _: None,
            )

        servers.append(await loop.create_server(connection, "127.0.0.1", 0))
        return f"127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}"

    yield listen
    for listening in servers:
        listening.close()
        await listening.wait_closed()


async def test_an_error_of_our_own_is_logged_and_ends_the_connection(
    connect: Callable[..., Awaitable[str]], caplog: pytest.LogCaptureFixture
) -> None:
    def read_head(_: object) -> object:
        raise RuntimeError("a bug")

    def ask(address: str) -> int:
        with Peer(address) as peer:
            peer.head(head())
            return peer.closed_for()

    assert await asyncio.to_thread(ask, await connect(read_head)) == INTERNAL_ERROR
    assert "a bug" in caplog.text


@pytest.mark.parametrize("begun", [b"", PREFACE[:10], PREFACE, PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 0, 1)])
async def test_a_peer_that_stops_in_the_midst_is_not_waited_for(
    begun: bytes, connect: Callable[..., Awaitable[str]]
) -> None:

    def stop(address: str) -> int:
        with Peer(address, greet=False) as peer:
            peer.write(begun)
            return peer.closed_for()

    assert await asyncio.to_thread(stop, await connect(timeout_s=0.1)) == PROTOCOL_ERROR


async def test_a_peer_that_neither_reads_nor_closes_is_not_kept(
    connect: Callable[..., Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "_CLOSE_TIMEOUT_S", 0.1)

    def stay(address: str) -> None:
        with Peer(address) as peer:
            peer.send(PING, 0, 1, bytes(8))
            assert peer.closed_for() == PROTOCOL_ERROR
            with pytest.raises(ConnectionError):  # noqa: PT012
                for _ in range(100):
                    peer.send(PING, 0, 0, bytes(8))
                    time.sleep(0.01)

    await asyncio.to_thread(stay, await connect())


class Kept(http2.Stream):
    key = "all"

    def on_reset(self) -> None:
        pass

    def on_evicted(self) -> None:
        raise AssertionError("nothing is to be evicted")


async def test_a_flood_of_calls_on_one_connection_lets_the_others_have_turns(
    connect: Callable[..., Awaitable[str]],
) -> None:
    opened: asyncio.Queue[object] = asyncio.Queue()

    def open_stream(connection: object, stream_id: int, _: object) -> http2.Stream:
        opened.put_nowait(connection)
        return Kept(stream_id)

    address = await connect(open_stream=open_stream, max_streams=1000)
    with Peer(address) as flood, Peer(address) as other:
        flood.head(head())
        await opened.get()
        other.head(head())
        other_connection = await opened.get()
        # In the buffers of both sockets before the loop, which runs this test too, reads either.
        block = flood.encoder.encode(list(head()))
        flood.write(b"".join(frame(HEADERS, END_HEADERS, flood.new_id(), block) for _ in range(500)))
        other.head(head())
        order = [await opened.get() for _ in range(501)]
    assert order.index(other_connection) <= 2 * 64


async def test_answers_that_are_on_their_way_are_not_taken_for_a_flood(
    connect: Callable[..., Awaitable[str]],
) -> None:
    """A client's PING that came in the midst of 16 MB of answers ended the connection."""
    opened: asyncio.Queue[tuple[http2.Connection[object], http2.Stream]] = asyncio.Queue()

    def open_stream(connection: http2.Connection[object], stream_id: int, _: object) -> http2.Stream:
        stream = Kept(stream_id)
        opened.put_nowait((connection, stream))
        return stream

    address = await connect(open_stream=open_stream)
    with Peer(address, {INITIAL_WINDOW_SIZE: 1 << 28, MAX_FRAME_SIZE: 1 << 16}, receive_buffer=1 << 16) as peer:
        granted(peer, 0, 1 << 28)
        peer.head(head())
        connection, stream = await opened.get()
        # Until the kernel takes no more, and the transport one part more.
        while connection.writable:
            connection.send(stream, None, bytes(32 << 10), None)
        connection.send(stream, None, bytes(16 << 20), None)
        await asyncio.to_thread(peer.ping)


async def test_many_small_answers_of_one_turn_are_not_taken_for_a_flood(connect: Callable[..., Awaitable[str]]) -> None:
    """A client's PING that came after 130 answers of 12 KiB, as two batches make, ended the connection."""
    opened: asyncio.Queue[tuple[http2.Connection[object], http2.Stream]] = asyncio.Queue()

    def open_stream(connection: http2.Connection[object], stream_id: int, _: object) -> http2.Stream:
        stream = Kept(stream_id)
        opened.put_nowait((connection, stream))
        return stream

    address = await connect(open_stream=open_stream, max_streams=131)
    with Peer(address, {INITIAL_WINDOW_SIZE: 1 << 28}, receive_buffer=1 << 16) as peer:
        granted(peer, 0, 1 << 28)
        for _ in range(131):
            peer.head(head())
        (connection, first), *others = [await opened.get() for _ in range(131)]
        # Until the kernel takes no more, and the transport one part more.
        while connection.writable:
            connection.send(first, None, bytes(32 << 10), None)
        for _, stream in others:
            connection.send(stream, None, bytes(12 << 10), None)
        await asyncio.to_thread(peer.ping)


def memory_kib(running: RunningServer) -> int:
    with open(f"/proc/{running.process.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
