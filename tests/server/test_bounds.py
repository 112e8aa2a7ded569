"""What a peer may have the server keep, do and wait for: each bound is reached on the wire, and nobody else is hurt."""

import asyncio
import contextlib
import functools
import gzip
import logging
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import trustme
from benchmarks.worst_case import fill_connection, fill_tls
from hpack import Encoder
from tests.conftest import RunningServer
from tests.programs import unread_pipe
from tests.server.test_http2 import granted, memory_kib, setting
from tests.wire import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    EACH,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    GENERATE,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    PRIORITY,
    PROTOCOL_ERROR,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Answer,
    Peer,
    frame,
    head,
    message,
    request,
)

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.cli.bounds import CONNECTION_BYTES, TLS_BYTES, page, worst_case_bytes
from ganserve_server.errors import Unauthenticated
from ganserve_server.processes.log_writer import MAX_BYTES, MAX_LINES, LogWriter
from ganserve_server.settings import ServerSettings
from ganserve_server.transport import grpc_server, http2, pools
from ganserve_server.transport.grpc_server import GrpcServer
from ganserve_server.transport.interface import Call, Method, RequestSink
from ganserve_server.transport.limits import Limits

Start = Callable[..., RunningServer]
ResultT = TypeVar("ResultT")
OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAUTHENTICATED = 0, 3, 4, 8, 16
HEALTH = "/grpc.health.v1.Health/Check"
HEADER_TABLE_SIZE = 1
KIB, MIB = 1 << 10, 1 << 20
ROOT = Path(__file__).parents[2]


# A server of this process, with methods that answer as a test wants it and bounds that are soon reached.


class Small:
    """A server with three methods: Answer replies with as many bytes as asked for, Each once a message, Hold never."""

    def __init__(self, limits: Limits, guard: Callable[[Any], None] | None = None) -> None:
        self.errors: list[BaseException] = []
        self.ended: list[str] = []
        self.server = GrpcServer(
            on_finished=lambda *_: None,
            on_refused=lambda *_: None,
            on_internal_error=lambda _, error: self.errors.append(error),
            on_ended=lambda reason, *_: self.ended.append(reason),
            limits=limits,
            guard=guard,
        )
        self.server.add_method("/t.T/Answer", Method(start=lambda call, content: call.reply(bytes(int(content)))))
        self.server.add_method("/t.T/Hold", Method(start=lambda *_: None))
        self.server.add_method("/t.T/Each", Method(open=_each))
        self.server.add_method("/t.Open/Answer", Method(start=lambda call, _: call.reply(b""), guarded=False))
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listening.getsockname()[1]}"
        self.server.start([listening])

    @property
    def kept(self) -> dict[str, int]:
        return self.server.kept_bytes()


def _each(call: Call) -> RequestSink:
    def take(content: bytes) -> None:
        call.consumed(len(content))
        call.send(content)

    return take, call.finish


def tls(folder: Path) -> tuple[tuple[object, ...], ssl.SSLContext]:
    """Return the flags of a server with TLS, and what its clients trust."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    key, chain = folder / "key.pem", folder / "cert.pem"
    certificate.private_key_pem.write_to_path(key)
    certificate.cert_chain_pems[0].write_to_path(chain)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return ("--tls-certificate-file", chain, "--tls-key-file", key), context


@pytest.fixture
async def small() -> AsyncIterator[Callable[..., Small]]:
    servers: list[Small] = []

    def start(guard: Callable[[Any], None] | None = None, **limits: Any) -> Small:
        servers.append(Small(Limits(**limits), guard))
        return servers[-1]

    yield start
    for one in servers:
        await one.server.drain(0)
        assert set(one.kept.values()) == {0}
        assert one.server.load == (0, 0)
        assert not one.errors


async def aside(work: Callable[[], ResultT]) -> ResultT:
    """Do a client's work in a thread, while the server's loop runs in this one."""
    return await asyncio.to_thread(work)


def ask(peer: Peer, content: bytes, path: str = "/t.T/Answer", **changes: str) -> Answer:
    return peer.call(content, head(path, **changes))


def deaf(address: str, size: int) -> Peer:
    """Return a peer that has asked for an answer of a size, and has no window for it."""
    peer = Peer(address, {INITIAL_WINDOW_SIZE: 0})
    peer.start(str(size).encode(), head("/t.T/Answer"))
    peer.ping()
    return peer


# Windows.


def test_a_window_made_negative_while_answers_wait_is_respected_and_nothing_is_left_over(start_server: Start) -> None:
    running = start_server()
    for _ in range(6):
        with Peer(running.address, {INITIAL_WINDOW_SIZE: 150_000}) as peer:
            streams = [peer.start(request(count=200)) for _ in range(2)]
            # The connection's window is used up; both streams have some left of theirs.
            while sum(len(peer.answers.get(stream, Answer()).data) for stream in streams) < 65535:
                peer.read()
            peer.send(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 0))
            granted(peer, 0, 1 << 20)
            peer.ping()
            assert sum(len(peer.answers.get(stream, Answer()).data) for stream in streams) == 65535
            for stream in streams:
                peer.send(RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big"))
            peer.ping()
            assert running.scrape()['ganserve_kept_bytes{pool="answers"}'] == 0


# Memory: requests.


async def test_requests_that_never_end_take_no_room_of_others(small: Callable[..., Small]) -> None:
    server = small(request_bytes=10 * MIB, request_bytes_each=4 * MIB)
    part = b"\x00" + (3 * MIB).to_bytes(4, "big") + bytes(60 * KIB)

    def work() -> int:
        with ExitStack() as peers:
            for _ in range(5):
                hoarder = peers.enter_context(Peer(server.address))
                for _ in range(80):
                    hoarder.body(hoarder.head(head("/t.T/Answer")), part, end=False)
                hoarder.ping()
            assert server.kept["requests"] <= 10 * MIB
            good = peers.enter_context(Peer(server.address))
            stream = good.head(head("/t.T/Answer"))
            content = message(b"5".rjust(2 * MIB))
            good.body(stream, content[:MIB], end=False)
            good.ping()
            good.body(stream, content[MIB:])
            return good.answer(stream).status

    assert await aside(work) == OK


async def test_a_callers_unfinished_requests_are_bounded_over_its_connections(small: Callable[..., Small]) -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    def guard(call: Any) -> None:
        call.caller = Named(call.metadata[b"authorization"].decode())

    server = small(guard=guard, request_bytes=8 * MIB, request_bytes_each=1 * MIB)
    part = b"\x00" + MIB.to_bytes(4, "big") + bytes(500 * KIB)

    def work() -> None:
        with Peer(server.address) as one, Peer(server.address) as two, Peer(server.address) as other:
            oldest = one.head(head("/t.T/Answer", ("authorization", "a")))
            one.body(oldest, part, end=False)
            one.ping()
            for _ in range(2):
                two.body(two.head(head("/t.T/Answer", ("authorization", "a"))), part, end=False)
                other.body(other.head(head("/t.T/Answer", ("authorization", "b"))), part, end=False)
            assert one.answer(oldest).status == RESOURCE_EXHAUSTED
            other.ping()
            assert not other.answers

    await aside(work)


def refuse(call: Any) -> None:
    raise Unauthenticated("no")


async def test_what_strangers_send_takes_no_room_of_callers(small: Callable[..., Small]) -> None:
    def guard(call: Any) -> None:
        if b"authorization" not in call.metadata:
            refuse(call)

    server = small(guard=guard, request_bytes=MIB, unguarded_bytes=MIB, unguarded_bytes_each=256 * KIB)
    part = b"\x00" + (4000).to_bytes(4, "big") + bytes(3000)

    def work() -> None:
        with ExitStack() as peers:
            for _ in range(6):
                stranger = peers.enter_context(Peer(server.address))
                for _ in range(100):
                    stranger.body(stranger.head(head("/t.Open/Answer")), part, end=False)
                    stranger.head(head("/t.T/Answer"))
                stranger.ping()
            assert server.kept["requests"] == 0
            assert server.kept["unguarded"] <= MIB
            good = peers.enter_context(Peer(server.address))
            stream = good.head(head("/t.T/Answer", ("authorization", "yes")))
            good.body(stream, message(b"5")[:3], end=False)
            good.ping()
            good.body(stream, message(b"5")[3:])
            assert good.answer(stream).status == OK
            open_ = good.head(head("/t.Open/Answer"))
            good.body(open_, message(bytes(10))[:7], end=False)
            good.ping()
            good.body(open_, message(bytes(10))[7:])
            assert good.answer(open_).status == OK

    await aside(work)


async def test_open_calls_count_and_the_oldest_makes_room(small: Callable[..., Small]) -> None:
    server = small(request_bytes=MIB, request_bytes_each=MIB)

    def work() -> None:
        with Peer(server.address) as peer:
            streams = [peer.head(head("/t.T/Answer")) for _ in range(600)]
            for _ in range(2):  # the first may be answered in the turn of the last calls, which count at its end
                peer.ping()
            ended = [stream for stream in streams if stream in peer.answers]
            # 1 MiB are 128 calls of 8 KiB.
            assert ended == streams[: 600 - 128]
            assert {peer.answers[stream].status for stream in ended} == {RESOURCE_EXHAUSTED}

    await aside(work)


def test_metadata_of_open_calls_is_not_kept(start_server: Start) -> None:
    """40 connections with 1,000 such calls kept 673 MB."""
    running = start_server()
    before = memory_kib(running)
    block = Encoder().encode([*head(HEALTH), ("x-large", "v" * 12_000)], huffman=False)
    with ExitStack() as peers:
        for _ in range(8):
            peer = peers.enter_context(Peer(running.address))
            for _ in range(500):
                peer.send(HEADERS, END_HEADERS, peer.new_id(), block)
            peer.ping()
        assert memory_kib(running) - before < 40 * KIB


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time by which pools weigh what they keep."""
    now = [0.0]
    monkeypatch.setattr(pools, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


# Memory: answers.


async def test_an_answer_that_is_read_is_kept_rather_than_a_smaller_one_that_is_not(
    small: Callable[..., Small], clock: list[float]
) -> None:
    server = small(answer_bytes=MIB, answer_bytes_each=MIB)

    def work() -> None:
        with (
            deaf(server.address, 400 * KIB) as slow,
            deaf(server.address, 300 * KIB) as hoarder,
        ):
            clock[0] = 10
            granted(slow, 1, 1000)
            slow.until(DATA)
            clock[0] = 11
            with deaf(server.address, 400 * KIB) as third:
                assert hoarder.answer(1).reset is not None or hoarder.answer(1).status == RESOURCE_EXHAUSTED
                for peer in (slow, third):
                    granted(peer, 0, MIB)
                    granted(peer, 1, MIB)
                    assert peer.answer(1).status == OK

    await aside(work)


async def test_pings_between_answers_are_not_counted(
    small: Callable[..., Small], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients in Go send one for each round trip, while data comes."""
    monkeypatch.setattr(http2, "IDLE_FRAMES", (10, 0.1))
    server = small()

    def work() -> None:
        with Peer(server.address) as peer:
            for _ in range(50):
                assert ask(peer, b"5").status == OK
                peer.ping()
            with pytest.raises((ConnectionError, AssertionError)):  # noqa: PT012
                for _ in range(50):
                    peer.ping()

    await aside(work)


async def test_answers_that_are_not_read_take_no_room_of_others(small: Callable[..., Small]) -> None:
    server = small(answer_bytes=10 * MIB, answer_bytes_each=4 * MIB)

    def work() -> None:
        with ExitStack() as peers:
            for _ in range(10):
                hoarder = peers.enter_context(deaf(server.address, MIB))
                for _ in range(5):
                    hoarder.start(str(MIB).encode(), head("/t.T/Answer"))
                hoarder.ping()
            assert server.kept["answers"] <= 10 * MIB
            good = peers.enter_context(Peer(server.address, {INITIAL_WINDOW_SIZE: 1000}))
            stream = good.start(b"100000", head("/t.T/Answer"))
            while not (answer := good.answers.get(stream, Answer())).ended:
                got = good.read()
                assert got is not None
                if got.kind == DATA:
                    granted(good, stream, len(got.payload))
                    granted(good, 0, len(got.payload))
            assert answer.status == OK

    await aside(work)


async def test_an_answer_beyond_the_connections_bound_is_refused_and_says_so(small: Callable[..., Small]) -> None:
    server = small(answer_bytes=10 * MIB, answer_bytes_each=MIB)

    def work() -> None:
        with deaf(server.address, 700 * KIB) as peer:
            second = ask(peer, str(700 * KIB).encode())
            assert second.status == RESOURCE_EXHAUSTED
            assert "answers" in second.blocks[-1]["grpc-message"]
            granted(peer, 0, MIB)
            granted(peer, 1, MIB)
            assert peer.answer(1).status == OK

    await aside(work)


async def test_one_answer_alone_may_be_larger_than_the_bound(small: Callable[..., Small]) -> None:
    server = small(answer_bytes=MIB, answer_bytes_each=MIB)

    def work() -> None:
        with deaf(server.address, 3 * MIB) as peer:
            granted(peer, 0, 4 * MIB)
            granted(peer, 1, 4 * MIB)
            assert peer.answer(1).status == OK

    await aside(work)


async def test_acknowledgements_that_are_not_read_are_bounded(small: Callable[..., Small]) -> None:
    server = small()

    def work() -> None:
        with Peer(server.address, {INITIAL_WINDOW_SIZE: 1 << 30}, receive_buffer=4096) as peer:
            granted(peer, 0, 1 << 30)
            for _ in range(20):
                peer.start(str(MIB).encode(), head("/t.T/Answer"))
            end = time.monotonic() + 60
            with pytest.raises(ConnectionError):  # noqa: PT012
                while time.monotonic() < end:
                    peer.write(frame(PING, 0, 0, bytes(8)))

    await aside(work)


# Time.


async def test_the_largest_message_fits_the_window_after_one_that_is_not_granted_again(
    small: Callable[..., Small],
) -> None:
    server = small()

    def work() -> None:
        with Peer(server.address) as peer:
            values = dict(struct.iter_unpack(">HI", peer.until(SETTINGS).payload))
            # Of a message of 16,383 bytes nothing is granted yet; the next has 5 bytes of prefix.
            assert values[INITIAL_WINDOW_SIZE] - 16383 >= Limits().max_request_bytes + 5

    await aside(work)


async def test_places_are_counted_off_once_whenever_a_handshake_is_cancelled(small: Callable[..., Small]) -> None:
    """Counted off twice, they let in any number of connections; never, none."""
    server = small(max_connections=20)
    host, _, port = server.address.rpartition(":")
    with ExitStack() as peers:
        for _ in range(8):
            for _ in range(60):
                peer = peers.enter_context(socket.socket())
                peer.setblocking(False)
                peer.connect_ex((host, int(port)))
            async with asyncio.timeout(60):
                while server.server.load[0] != 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        while server.server.load[0]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def work() -> None:
        with ExitStack() as busy:
            for _ in range(20):
                peer = busy.enter_context(Peer(server.address))
                peer.start(b"", head("/t.T/Hold"))
                peer.ping()
            with Peer(server.address) as late, pytest.raises((ConnectionError, AssertionError)):
                late.ping()

    await aside(work)


async def test_what_is_left_of_an_answer_keeps_no_more_than_itself(small: Callable[..., Small]) -> None:
    server = small()
    with Peer(server.address, {INITIAL_WINDOW_SIZE: MIB - 100}) as peer:

        def read() -> None:
            granted(peer, 0, 64 * MIB)
            peer.start(str(MIB).encode(), head("/t.T/Answer"))
            while len(peer.answers.get(1, Answer()).data) < MIB - 100:
                assert peer.read() is not None

        await aside(read)
        (connection,) = server.server._connections
        (stream,) = connection.streams.values()
        assert stream.waiting is not None
        assert [type(part) for part in stream.waiting] == [bytes]  # a view would keep all


async def test_a_request_has_a_time_to_come(small: Callable[..., Small]) -> None:
    server = small(body_timeout_s=0.2)

    def work() -> None:
        with Peer(server.address) as peer:
            silent = peer.head(head("/t.T/Answer"))
            partly = peer.head(head("/t.T/Answer"))
            peer.body(partly, message(b"5")[:3], end=False)
            stuck = peer.head(head("/t.T/Each"))
            peer.body(stuck, message(b"5") + message(b"6")[:4], end=False)
            idle = peer.head(head("/t.T/Each"))
            peer.body(idle, message(b"5"), end=False)
            for stream in (silent, partly, stuck):
                assert peer.answer(stream).status == DEADLINE_EXCEEDED
            # A stream of requests may wait for the next one.
            peer.body(idle, message(b"6"))
            assert peer.answer(idle).messages == [b"5", b"6"]

    await aside(work)


@pytest.mark.parametrize("asked", [1000, 10 * MIB])
async def test_an_answer_has_a_time_to_be_read(asked: int, small: Callable[..., Small]) -> None:
    server = small(write_timeout_s=0.2)

    def work() -> None:
        with deaf(server.address, asked) as peer:
            answer = peer.answer(1)
            assert answer.reset == ENHANCE_YOUR_CALM or answer.status == RESOURCE_EXHAUSTED

    await aside(work)


async def test_a_connection_that_takes_nothing_ends(small: Callable[..., Small]) -> None:
    server = small(write_timeout_s=0.2)
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 1 << 30}, receive_buffer=4096) as peer:
        granted(peer, 0, 1 << 30)
        peer.start(str(16 * MIB).encode(), head("/t.T/Answer"))
        async with asyncio.timeout(20):
            while not server.ended:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert server.ended == ["unread"]


@pytest.mark.parametrize("part", ["consumed", "send"])
async def test_a_stream_that_goes_on_outlives_one_that_stands_still(part: str, small: Callable[..., Small]) -> None:
    # Their caller keeps too much: of its requests the one without progress for longest goes, not the oldest.
    server = small(request_bytes_each=3 * 8 * KIB + 8000)  # 8 KiB of it for each call, however little has come

    def take(call: Call, content: bytes) -> None:
        call.consumed(len(content)) if part == "consumed" else call.send(content)

    method = Method(open=lambda call: (functools.partial(take, call), call.finish))
    server.server.add_method("/t.T/Part", method)
    rest = message(bytes(3000))[:-1]

    def work() -> None:
        with Peer(server.address) as peer:
            old, still, new = (peer.head(head("/t.T/Part")) for _ in range(3))
            peer.body(old, message(b"1")[:-1], end=False)
            peer.body(still, rest, end=False)
            peer.body(old, b"1", end=False)
            peer.body(old, rest, end=False)
            peer.body(new, rest, end=False)
            assert peer.answer(still).status == RESOURCE_EXHAUSTED
            for stream in (old, new):
                peer.body(stream, b"\0")
                assert peer.answer(stream).status == OK

    await aside(work)


@pytest.mark.parametrize(
    ("reason", "sent", "error"),
    [
        ("flood", frame(PING, 0, 0, bytes(8)) * 20_000, "too many PING frames"),
        ("protocol", frame(PING, 0, 1, bytes(8)), "PING must be on stream 0"),
        ("slow", frame(HEADERS, 0, 1, b"\x82"), "no rest of a header block came within 0.2 s"),
    ],
    ids=["flood", "protocol", "slow"],
)
def test_an_end_by_the_server_is_counted_and_logged(reason: str, sent: bytes, error: str, start_server: Start) -> None:
    running = start_server("--header-timeout-s", "0.2")
    with Peer(running.address) as peer:
        host, port = peer.socket.getsockname()
        with contextlib.suppress(ConnectionError):  # before all of it was sent
            peer.write(sent)
        line = running.wait_for("connection ended")
    assert (line["reason"], line["peer"]) == (reason, f"{host}:{port}")
    assert error in line["error"]
    ended = {name: value for name, value in running.scrape().items() if "connections_ended_total" in name and value}
    assert ended == {f'ganserve_connections_ended_total{{reason="{reason}"}}': 1}


async def test_age_ends_a_connection_whose_peer_reads_nothing(
    small: Callable[..., Small], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "_AGED_WRITE_TIMEOUT_S", 0.1)
    server = small(max_connection_age_s=0.1)

    def work() -> None:
        with deaf(server.address, MIB) as peer:
            while peer.read() is not None:
                pass

    await aside(work)


async def test_a_watcher_that_reads_nothing_holds_up_no_drain(small: Callable[..., Small]) -> None:
    server = small()
    watch = Method(start=lambda call, _: call.send(bytes(1000)), awaited=False, guarded=False)
    server.server.add_method("/t.Open/Watch", watch)
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 0}) as peer:
        peer.start(b"", head("/t.Open/Watch"))
        await aside(peer.ping)
        async with asyncio.timeout(60):
            reading = asyncio.create_task(aside(lambda: [*iter(peer.read, None)]))
            await server.server.drain(3600)
            await reading


async def test_a_connection_without_calls_ends_and_one_with_calls_does_not(small: Callable[..., Small]) -> None:
    server = small(idle_timeout_s=0.2)

    def work() -> None:
        with Peer(server.address) as busy, Peer(server.address) as idle:
            busy.start(b"", head("/t.T/Hold"))
            idle.until(GOAWAY)
            while idle.read() is not None:
                pass
            busy.ping()
            assert not [got for got in busy.seen if got.kind == GOAWAY]

    await aside(work)
    assert server.ended == ["idle"]


async def test_a_connection_that_does_nothing_makes_place_for_another(
    small: Callable[..., Small], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "_IDLE_S", 0.0)
    server = small(max_connections=2)

    def work() -> None:
        with Peer(server.address) as busy, Peer(server.address) as idle, ExitStack() as later:
            busy.start(b"", head("/t.T/Hold"))
            busy.ping()
            assert ask(idle, b"5").status == OK
            third = later.enter_context(Peer(server.address))
            assert ask(third, b"5").status == OK
            idle.until(GOAWAY)
            assert busy.seen[-1].kind != GOAWAY

    await aside(work)
    assert server.ended == ["crowded"]


async def test_silent_connections_make_place_for_others(small: Callable[..., Small]) -> None:
    server = small(max_connections=3)

    def work() -> None:
        with ExitStack() as peers:
            for _ in range(20):
                peers.enter_context(Peer(server.address, greet=False))
            assert ask(peers.enter_context(Peer(server.address)), b"5").status == OK

    await aside(work)


@pytest.mark.parametrize("ending", ["FIN", "RST"])
async def test_connections_that_ended_while_they_waited_are_not_served(
    ending: str, small: Callable[..., Small], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that connects and closes all the time made others wait 0.2 s for their connections to be accepted."""
    server = small()
    served: list[str] = []
    serve = server.server._serve
    monkeypatch.setattr(server.server, "_serve", lambda *one: served.append(one[1]) or serve(*one))
    monkeypatch.setattr(grpc_server, "_ACCEPT_S", 0.0001)
    host, _, port = server.address.rpartition(":")
    for _ in range(100):  # they wait in the kernel's queue, as the loop does not run meanwhile
        with socket.create_connection((host, int(port))) as peer:
            peer.sendall(http2.PREFACE + frame(SETTINGS, 0, 0))
            if ending == "RST":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def work() -> None:
        with Peer(server.address) as peer:
            assert ask(peer, b"5").status == OK

    await aside(work)
    assert len(served) < 50


def test_half_open_handshakes_make_place_for_others(start_server: Start, tmp_path: Any) -> None:
    flags, context = tls(tmp_path)
    running = start_server(*flags, "--max-connections", "4")
    host, _, port = running.address.rpartition(":")
    with ExitStack() as peers:
        for _ in range(20):
            peers.enter_context(socket.create_connection((host, int(port))))
        with Peer(running.address, tls=context) as peer:
            assert peer.call(request()).status == OK
        # HTTP/2 over TLS is agreed upon (RFC 9113, 3.2).
        with Peer(running.address, tls=context, protocols=["http/1.1"]) as peer:
            assert peer.read() is None


# What costs the server more than the peer.


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (frame(PING, 0, 0, bytes(8)), 10_000),
        (frame(PRIORITY, 0, 1, bytes(5)), 10_000),
        (frame(99, 0, 0), 10_000),
        (frame(SETTINGS, 0, 0), 1000),
        (frame(SETTINGS, ACK, 0), 10_000),
    ],
)
async def test_frames_that_bring_nothing_are_bounded(data: bytes, count: int, small: Callable[..., Small]) -> None:
    server = small()

    def work() -> None:
        with Peer(server.address, greet=False) as peer:
            peer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))
            peer.write(data * (count // 2))
            assert ask(peer, b"5").status == OK
            peer.write(data * count * 2)
            assert peer.closed_for() == ENHANCE_YOUR_CALM

    await aside(work)


async def test_empty_data_is_bounded(small: Callable[..., Small]) -> None:
    server = small()

    def work() -> None:
        with Peer(server.address) as peer:
            stream = peer.head(head("/t.T/Answer"))
            peer.write(frame(DATA, 0, stream) * 20_000)
            assert peer.closed_for() == ENHANCE_YOUR_CALM

    await aside(work)


async def test_errors_on_streams_are_bounded(small: Callable[..., Small]) -> None:
    """So that a peer cannot have the server reset its streams, which would be no reset of its own."""
    server = small()

    def work() -> None:
        with Peer(server.address) as peer:
            for _ in range(50):
                peer.send(WINDOW_UPDATE, 0, peer.start(b"", head("/t.T/Hold")), bytes(4))
            assert ask(peer, b"5").status == OK
            for _ in range(100):
                peer.send(WINDOW_UPDATE, 0, peer.start(b"", head("/t.T/Hold")), bytes(4))
            assert peer.closed_for() == ENHANCE_YOUR_CALM

    await aside(work)


def opened_and_reset(peer: Peer, count: int, path: str = "/t.T/Hold") -> bytes:
    block = peer.encoder.encode(list(head(path)))
    streams = [peer.new_id() for _ in range(count)]
    return b"".join(
        frame(HEADERS, END_HEADERS, stream, block)
        + frame(DATA, END_STREAM, stream, message(b""))
        + frame(RST_STREAM, 0, stream, bytes(4))
        for stream in streams
    )


async def test_many_deadlines_that_pass_at_once_lose_nothing(small: Callable[..., Small]) -> None:
    """700 callers with deadlines of 50 ms, whose server stands still for a second."""
    server = small()

    def work() -> None:
        with Peer(server.address) as peer:
            peer.head(head("/t.T/Hold"))  # the table is as it will be
            peer.write(opened_and_reset(peer, 14_000))
            assert ask(peer, b"5").status == OK

    await aside(work)


async def test_paced_resets_are_refused_then_end_the_connection(small: Callable[..., Small]) -> None:
    server = small()

    def work() -> None:
        with Peer(server.address) as peer:
            peer.head(head("/t.T/Hold"))
            with pytest.raises((ConnectionError, AssertionError)):  # noqa: PT012
                for _ in range(100):
                    peer.write(opened_and_reset(peer, 500))
                    peer.ping()
            resets = {answer.reset for answer in peer.answers.values()}
            assert ENHANCE_YOUR_CALM in resets
            goaway = next(got for got in peer.seen if got.kind == GOAWAY)
            assert int.from_bytes(goaway.payload[4:8], "big") == ENHANCE_YOUR_CALM

    await aside(work)


BURSTS = {
    "compressed messages": (
        head(EACH, ("grpc-encoding", "gzip")),
        message(gzip.compress(b"\x7a\x80\x80\xfc\x01" + os.urandom(60 << 10) + bytes((63 << 16) - (60 << 10))), 1) * 60,
    ),
    "empty messages": (head(EACH), message(b"") * 100_000),
}


@pytest.mark.parametrize("name", BURSTS)
def test_a_burst_of_one_connection_does_not_keep_another_waiting(name: str, start_server: Start) -> None:
    running = start_server()
    fields, burst = BURSTS[name]
    with Peer(running.address, {INITIAL_WINDOW_SIZE: 1 << 30}) as busy, Peer(running.address) as other:
        granted(busy, 0, 1 << 30)
        other.ping()
        busy.body(busy.head(fields), burst)
        for _ in range(5):
            assert other.call(request()).status == OK
        # The burst takes seconds, its status comes last, and five calls took milliseconds.
        busy.socket.setblocking(False)
        with pytest.raises(BlockingIOError):  # noqa: PT012
            while True:
                busy._rest += busy.socket.recv(1 << 18)
        assert b"grpc-status" not in busy._rest


def test_a_message_may_not_be_hundreds_of_times_as_large_once_decompressed(server: RunningServer) -> None:
    for size, status in ((1 << 17, OK), (1 << 20, RESOURCE_EXHAUSTED)):
        content = request() + b"\x7a" + bytes((size & 127 | 128, size >> 7 & 127 | 128, size >> 14)) + bytes(size)
        with Peer(server.address) as peer:
            stream = peer.head(head(GENERATE, ("grpc-encoding", "gzip")))
            peer.body(stream, message(gzip.compress(content), 1))
            assert peer.answer(stream).status == status


async def test_headers_of_strangers_are_bounded_in_time(small: Callable[..., Small]) -> None:
    server = small(guard=refuse)

    def work() -> float:
        with Peer(server.address) as peer:
            started = time.monotonic()
            for _ in range(120):
                peer.head([*head("/t.T/Answer"), *(("x", os.urandom(10).hex()) for _ in range(300))])
            peer.ping()
            return time.monotonic() - started

    # 120 times 300 literals of 20 bytes are 570 KB or more of Huffman code; 256 KiB are free, then as many a second.
    assert await aside(work) > 1.0


# Headers.


@pytest.mark.parametrize("size", [16_400, 20_000, 60_000])
def test_headers_that_are_too_large_end_the_call_and_no_other(size: int, server: RunningServer) -> None:
    with Peer(server.address) as peer:
        other = peer.head(head())
        large = peer.encoder.encode([*head(), ("x-large", "v" * size)], huffman=False)
        stream = peer.new_id()
        peer.send(HEADERS, 0, stream, large[:16_384])
        for start in range(16_384, len(large), 16_384):
            last = start + 16_384 >= len(large)
            peer.send(CONTINUATION, END_HEADERS if last else 0, stream, large[start : start + 16_384])
        answer = peer.answer(stream)
        assert answer.status == RESOURCE_EXHAUSTED
        assert "16384" in answer.blocks[-1]["grpc-message"]
        peer.body(other, message(request()))
        assert peer.answer(other).status == OK


def test_a_peer_may_have_no_header_table(server: RunningServer) -> None:
    with Peer(server.address, {HEADER_TABLE_SIZE: 0}) as peer:
        peer.decoder.max_allowed_table_size = 0
        for _ in range(2):
            assert peer.call(request()).status == OK


def test_the_largest_error_fits_grpcs_bound_of_headers(server: RunningServer) -> None:
    with Peer(server.address) as peer:
        answer = peer.call(request(model="\N{GRINNING FACE}" * 1000))
        assert answer.blocks[-1]["grpc-status"] == "5"
        assert sum(len(name) + len(value) + 32 for name, value in answer.blocks[-1].items()) < 8192


@pytest.mark.parametrize(("fields", "status"), [(head(content_type="text/html"), "415"), (head(method="GET"), "405")])
def test_what_is_not_grpc_is_refused_before_its_body_comes(fields: Any, status: str, server: RunningServer) -> None:
    with Peer(server.address) as peer:
        assert peer.answer(peer.head(fields)).blocks == [{":status": status}]


def test_trailers_of_a_stream_that_is_ignored_end_nothing(start_server: Start) -> None:
    running = start_server()
    with Peer(running.address) as peer:
        held = peer.head(head())
        peer.ping()
        running.process.terminate()
        peer.until(GOAWAY)
        peer.until(GOAWAY)
        late = peer.head(head())
        peer.head([("x-checksum", "1")], END_HEADERS | END_STREAM, late)
        peer.body(held, message(request()))
        assert peer.answer(held).status == OK


def test_a_stream_of_requests_keeps_to_its_content_length(server: RunningServer) -> None:
    each = pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", seed=1)).SerializeToString()
    for length, reset in ((len(message(each)), None), (5, PROTOCOL_ERROR), (1000, PROTOCOL_ERROR)):
        with Peer(server.address) as peer:
            stream = peer.head(head(EACH, ("content-length", str(length))))
            peer.body(stream, message(each))
            while not ((answer := peer.answers.get(stream, Answer())).ended or answer.reset is not None):
                assert peer.read() is not None
            assert answer.reset == reset


@pytest.mark.parametrize("path", ["/a\r\nb", "/a\0b", "/a\nb"])
def test_a_path_with_a_line_end_is_malformed(path: str, server: RunningServer) -> None:
    with Peer(server.address) as peer:
        stream = peer.head(head(path))
        while peer.answers.get(stream, Answer()).reset is None:
            assert peer.read() is not None
        assert peer.answers[stream].reset == PROTOCOL_ERROR


@pytest.mark.parametrize("name", ["authorization", "grpc-timeout", "grpc-encoding"])
def test_a_header_of_one_value_comes_once(name: str, server: RunningServer) -> None:
    with Peer(server.address) as peer:
        stream = peer.head(head(GENERATE, (name, "1S"), (name, "2S")))
        assert peer.answer(stream).blocks == [{":status": "400"}]


def test_request_ids_tell_nothing_of_the_process(server: RunningServer) -> None:
    with Peer(server.address) as peer:
        ids = [peer.call(request()).blocks[-1]["x-request-id"] for _ in range(20)]
    assert len({one[:8] for one in ids}) == 20


# The page.


def test_the_page_has_the_bounds_of_the_defaults_which_fit_in_a_gibibyte() -> None:
    settings = ServerSettings()
    limits = settings.limits
    assert limits == Limits()
    assert "\n".join(page(limits, settings.batch_timeout_s)) in (ROOT / "docs" / "bounds.md").read_text()
    assert worst_case_bytes(limits) < 1 << 30


@pytest.mark.parametrize(("length", "kept"), [(10, MAX_LINES), (999, MAX_BYTES // 1000)])
def test_lines_of_the_log_that_nobody_reads_are_dropped_and_counted(
    length: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unread_pipe() as (reading, writing), open(writing, "w", closefd=False) as file:
        monkeypatch.setattr("sys.stderr", file)
        log = LogWriter()
        for number in range(kept + 5):
            log.handle(logging.makeLogRecord({"msg": f"{number:0{length}}"}))
        assert log.dropped == 5
        assert not log.wait(0)
        counted: list[int] = []
        log.count_dropped(counted.append)
        log.handle(logging.makeLogRecord({"msg": "more"}))
        assert counted == [5, 1]
        with open(reading, closefd=False) as lines:
            lines.readline()  # filled the pipe
            assert [int(lines.readline()) for _ in range(kept)] == list(range(kept))
            assert lines.readline() == "log lines dropped\n"
        assert log.wait()


def test_a_connection_keeps_no_more_than_the_page_says(start_server: Start) -> None:
    running = start_server()
    with Peer(running.address) as peer:
        peer.call(request())
    before = memory_kib(running)
    with ExitStack() as peers:
        connections = [peers.enter_context(Peer(running.address)) for _ in range(200)]
        for peer in connections:
            fill_connection(peer)
        # All of it is read once a later connection's request is answered.
        with Peer(running.address) as last:
            for _ in range(20):
                assert last.call(request()).status == OK
        assert (memory_kib(running) - before) / 200 <= CONNECTION_BYTES >> 10


@pytest.mark.slow
def test_tls_keeps_no_more_of_a_connection_than_the_page_says(start_server: Start, tmp_path: Path) -> None:
    flags, context = tls(tmp_path)

    def growth(context: ssl.SSLContext | None, *flags: object) -> float:
        running = start_server(*flags)
        with ExitStack() as peers:

            def read_an_answer() -> None:
                fill_tls(peers.enter_context(Peer(running.address, {INITIAL_WINDOW_SIZE: MIB}, tls=context)))

            # The first ones also fill what the server keeps for all connections together.
            for _ in range(60):
                read_an_answer()
            before = memory_kib(running)
            for _ in range(200):
                read_an_answer()
            grown = memory_kib(running) - before
        until = time.monotonic() + 60
        while memory_kib(running) - before > max(grown / 2, 4096):
            assert time.monotonic() < until, "memory does not come back when the connections have ended"
            time.sleep(0.1)
        return grown / 200

    assert growth(context, *flags) - growth(None) <= TLS_BYTES >> 10


async def test_calls_with_a_task_count_until_they_end(small: Callable[..., Small]) -> None:
    server = small(request_bytes=MIB, request_bytes_each=MIB)

    def start(call: Call, _: bytes) -> None:
        call.spawn(asyncio.Event().wait())  # type: ignore[arg-type]

    server.server.add_method("/t.T/Task", Method(start=start))

    def work() -> None:
        with Peer(server.address) as peer:
            streams = [peer.start(b"", head("/t.T/Task")) for _ in range(300)]
            peer.ping()
            ended = [stream for stream in streams if stream in peer.answers]
            assert ended == streams[: 300 - 128]

    await aside(work)
