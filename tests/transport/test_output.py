"""What a connection knows of a peer that reads slowly or not at all, by a clock that only the test moves."""

import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hpack import Encoder
from tests.transport.in_process import FakeTransport, SteppedLoop, take_frames
from tests.wire import (
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    PREFACE,
    PROTOCOL_ERROR,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    head,
    message,
    setting,
)

from ganserve_server.transport import http2, pools
from ganserve_server.transport.grpc_server import GrpcServer
from ganserve_server.transport.interface import Method
from ganserve_server.transport.limits import Limits

HIGH_WATER, ANSWER_BYTES = 1000, 50_000


class Connected:
    """A connection whose peer asks for an answer, and its server: it answers each call with ANSWER_BYTES."""

    def __init__(self, loop: SteppedLoop) -> None:
        self.loop = loop
        self.server = loop.run_until_complete(self._start())
        loop.run(self._connect)
        settings = frame(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 1 << 20))
        more = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 20))
        self._encoder = Encoder()
        self.deliver(PREFACE + settings + more)

    async def _start(self) -> GrpcServer:
        server = GrpcServer(
            on_finished=lambda *_: None,
            on_refused=lambda *_: None,
            on_internal_error=lambda *_: None,
            limits=Limits(write_timeout_s=20.0),
        )
        server.add_method("/t.T/Answer", Method(start=lambda call, _: call.reply(bytes(ANSWER_BYTES))))
        return server

    def _connect(self) -> None:
        accepted: Any = object()
        self.connection = self.server._new_connection(accepted)
        self.transport = FakeTransport(self.loop, self.connection, high_water=HIGH_WATER)
        self.connection.connection_made(self.transport)

    def deliver(self, data: bytes) -> None:
        self.loop.run(self.transport.deliver, data)

    def ask(self, stream: int) -> None:
        block = self._encoder.encode(head("/t.T/Answer"))
        self.deliver(frame(HEADERS, END_HEADERS, stream, block) + frame(0, END_STREAM, stream, message(b"")))

    @property
    def kept(self) -> int:
        return sum(self.server.kept_bytes().values())


@pytest.fixture
def connected() -> Iterator[Connected]:
    loop = SteppedLoop()
    one = Connected(loop)
    yield one
    loop.run(one.transport.leave)
    assert not one.kept
    loop.cancel_and_close()


def test_what_the_peer_has_not_read_is_counted_until_it_has(connected: Connected) -> None:
    connected.transport.peer_reads = False
    connected.ask(1)
    assert connected.kept == connected.transport.get_write_buffer_size() > ANSWER_BYTES
    connected.deliver(frame(PING, 0, 0, bytes(8)))  # its answer waits too
    assert connected.kept == connected.transport.get_write_buffer_size()
    connected.loop.run(connected.transport.read, None)
    assert connected.kept == 0


def test_a_peer_that_reads_some_does_not_stand_still(connected: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pools, "time", SimpleNamespace(monotonic=lambda: now))
    connected.transport.peer_reads = False
    connected.ask(1)
    assert connected.connection.stands_still_since() == 100.0
    now = 105.0
    connected.loop.run(lambda: connected.connection.look(now, busy=True))
    assert connected.connection.stands_still_since() == 100.0
    connected.loop.run(connected.transport.read, 100)
    now = 110.0
    connected.loop.run(lambda: connected.connection.look(now, busy=True))
    assert connected.connection.stands_still_since() == 110.0
    now = 115.0
    connected.loop.run(lambda: connected.connection.look(now, busy=True))
    assert connected.connection.stands_still_since() == 110.0
    connected.loop.run(connected.transport.read, None)
    assert connected.connection.stands_still_since() is None


def test_a_last_goaway_names_no_higher_stream_than_the_one_before(connected: Connected) -> None:
    connected.ask(1)
    connected.transport.written.clear()
    connected.loop.run(connected.connection.drain)
    connected.ask(3)  # crosses the first GOAWAY
    connected.loop.advance(http2.GOAWAY_TIMEOUT_S)
    connected.transport.peer_reads = False  # so the connection stays
    connected.ask(5)
    connected.deliver(frame(PING, 0, 1, bytes(8)))
    told = [got.payload for got in take_frames(connected.transport.written) if got.kind == GOAWAY]
    last, code = struct.unpack_from(">II", told[-1])
    assert (last, code) == (3, PROTOCOL_ERROR)


def test_the_age_of_a_holding_begins_with_its_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1.0
    monkeypatch.setattr(pools, "time", SimpleNamespace(monotonic=lambda: now))
    pool = pools.Pool(limit=1000, share_limit=1000)
    old, new = pools.Holding(pool, "a", lambda: None), pools.Holding(pool, "b", lambda: None)
    now = 2.0
    old.resize(400)
    now = 3.0
    old.resize(500)
    assert old.since == 2.0
    new.resize(1)
    old.resize(0)
    now = 4.0
    old.resize(600)
    assert (old.since, new.since) == (4.0, 3.0)
    now = 5.0
    # In bytes times seconds, a is in the way of others by 600, b by 802.
    new.resize(401)
    assert (old.size, new.size, pool.evictions) == (600, 0, 1)
