"""Windows, streams and settings, against a model of both peers that knows only RFC 9113 and the frames it sees.

The machine plays the client and the methods of the server, several actions in one turn of the event loop if it likes.
After each turn: no DATA passes a window or is larger than the peer takes, each stream's bytes come whole and in order,
its trailers last, nothing waits that could be sent, and the server's counters are the model's.

    GANSERVE_MODEL_EXAMPLES=5000 python -m pytest tests/transport/test_flow_model.py
"""

import asyncio
import functools
import itertools
import math
import os
import random
import struct
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from tests.transport.in_process import FakeTransport, SteppedLoop, logged_errors, take_frames
from tests.wire import (
    ACK,
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    NO_ERROR,
    PADDED,
    PING,
    PREFACE,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    Frame,
    frame,
)

from ganserve_server.transport import turns
from ganserve_server.transport.flow import Flow, Part, SendFlow
from ganserve_server.transport.http2 import Connection, Fields, Stream
from ganserve_server.transport.limits import Limits
from ganserve_server.transport.pools import Pool as AnswerPool
from ganserve_server.transport.turns import LoopTurns

# `make test` has about ten seconds for it; .ci/run asks for more.
EXAMPLES = int(os.environ.get("GANSERVE_MODEL_EXAMPLES", "150"))
STEPS = 60
MAX_STREAMS = 4
UPLOAD_WINDOW = 50_000
MAX_WINDOW = 2**31 - 1
DEFAULT_WINDOW = 65535
GRACE_S = 2.5  # after which a draining connection has said its last GOAWAY
REQUEST, REQUEST_TRAILERS, ANSWER, TRAILERS = b"\x82", b"\x00\x01a\x01b", b"\x88", b"\x00\x01c\x01d"
_RANDOM = random.Random(0).randbytes(1 << 20)
PATTERN = memoryview(_RANDOM * 2)

Action = tuple[str, tuple[Any, ...]]  # a method of Peer, and its arguments


def each(name: str, *choices: Iterable[object]) -> list[Action]:
    return [(name, arguments) for arguments in itertools.product(*choices)]


# What breaks a rule of flow control lies at these edges. One table and one rule, not a rule for each: hypothesis leaves
# half of the rules out of each run, and one without answers, or without windows, finds nothing.
OF_STREAM = [
    *each("answer", (0, 1, 1000, 16385, DEFAULT_WINDOW, DEFAULT_WINDOW + 1, 100_000, 300_000), (False,)),
    *each("answer", (0, 1, 1000, DEFAULT_WINDOW, 100_000), (True,)),
    *each("grant", (1, 1000, 16384, DEFAULT_WINDOW, 1 << 20)),
    *each("upload", (0, 1, 16384), (0,), (False,)),
    *each("upload", (0, 1), (0, 3), (True,)),
    *each("consume", (1, 5000, 16384, 1 << 20)),
    *each("wait") * 4,
    *each("give_up") * 3,
    *each("send_trailers") * 2,
    *each("leave"),
    *each("reset"),
]
OF_CONNECTION = [
    *each("open_stream", (False, True), (None, 0, 1000, DEFAULT_WINDOW, 100_000), (False,)),
    *each("open_stream", (False,), (None, 1000), (True,)),
    *each("refuse_stream"),
    *each("grant_all", (1, 1000, 16384, DEFAULT_WINDOW, 1 << 20)),
    *each("change_settings", (0, 1, 1000, DEFAULT_WINDOW - 1, DEFAULT_WINDOW, 100_000, 1 << 20), (None,)),
    *each("change_settings", (None, 0), (16384, 16385, 65536, (1 << 24) - 1)),
    *each("read", (0, 0, 0, 1000, 65536)),
    *each("read", (None,) * 4),
    *each("ping", (1, 70)),
]
OF_ALL = [
    *each("connect", (0, 1), (1 << 30, 1000), (False, True)),
    *each("break_a_rule", ("grant nothing", "grant too much", "send too much")),
    *each("end", (*["drain"] * 8, "eof", "leave", "window", "nothing", "settings")),
    *each("go_on_draining") * 8,
]
ACTIONS = st.sampled_from(OF_STREAM * 3 + OF_CONNECTION * 3 + OF_ALL)
TRANSPORTS = st.tuples(st.sampled_from((0, 1)), st.sampled_from((1 << 30, 1000)), st.booleans())
TARGETS = st.integers(0, 15).map(lambda number: Target(bool(number & 1), number >> 1 & 3, number >> 3))


def content(stream: int, start: int, size: int) -> memoryview:
    """Return the bytes that a stream has at a place, in both directions."""
    first = (stream * 7919 + start) % len(_RANDOM)
    return PATTERN[first : first + size]


class Side:
    """The server's side of a connection: all that the model knows of the classes it drives."""

    def __init__(self, pool: "Pool", open_stream: Callable[[int], Stream | None], on_lost: Callable[[], None]) -> None:
        def opened(_: Connection[None], stream_id: int, head: None) -> Stream | None:
            return open_stream(stream_id)

        def head(_: Fields) -> None: ...

        self.connection: Connection[None] = Connection(
            read_head=head,
            open_stream=opened,
            limits=Limits(max_streams=MAX_STREAMS, max_request_bytes=UPLOAD_WINDOW),
            answers=pool.answers,
            turns=pool.turns,
            trusted=True,
            on_made=lambda _: None,
            on_lost=lambda _: on_lost(),
        )

    def kept(self) -> int:
        """Return how many bytes wait on this connection."""
        return sum(stream.pending_bytes for stream in self.connection.streams.values())

    def send(self, stream: Stream, headers: bytes | None, data: bytes | memoryview, trailers: bytes | None) -> None:
        """Send some of an answer."""
        self.connection.send(stream, headers, data, trailers)

    def reset(self, stream: Stream, code: int) -> None:
        """End a stream."""
        self.connection.reset(stream, code)

    def consumed(self, stream: Stream, size: int) -> None:
        """Let the client send more."""
        self.connection.consumed(stream, size)

    def drain(self) -> None:
        """End the connection once its streams have ended."""
        self.connection.drain()


class Pool:
    """What the connections share."""

    def __init__(self, loop: SteppedLoop) -> None:
        self.answers = AnswerPool(1 << 40, 1 << 40, of_answers=True)
        self.turns = LoopTurns(loop)

    def kept(self) -> int:
        """Return how many bytes are counted, on all connections."""
        assert self.answers.bytes == sum(holding.size for holding in self.answers), "the pool has lost count"
        return self.answers.bytes


class Exchange(Stream):
    """A stream as the server has it; what happens to it is the model's business."""

    __slots__ = ("model", "peer")

    def __init__(self, peer: "Peer", model: "Model") -> None:
        super().__init__(model.id)
        self.peer, self.model = peer, model

    @property
    def key(self) -> object:
        """All streams have one share."""
        return "all"

    def read_on(self) -> bool:
        """All is read at once."""
        return False

    def on_evicted(self) -> None:
        """Nothing is evicted: the pool is large."""
        raise AssertionError(f"stream {self.model.id} is evicted")

    def on_data(self, data: bytes, *, last: bool) -> bool:
        """Check that it is what was sent; some methods are done with it at once."""
        model = self.model
        assert data == content(model.id, model.taken, len(data)), f"stream {model.id}: the request's bytes are wrong"
        model.taken += len(data)
        if model.eager:
            self.peer.consume(model, len(data))
        return False

    def on_end(self) -> None:
        """Some methods answer at once."""
        model = self.model
        assert model.ended_here or model.taken == model.uploaded, f"stream {model.id}: the request's end comes early"
        model.complete = True
        if model.answer is not None:
            self.peer.answer(model, model.answer, True)

    def on_reset(self) -> None:
        """Take note of it."""
        self.model.told_of_reset = True


@dataclass
class Model:
    """What is known of a stream from RFC 9113, the frames, and what the server's methods did."""

    id: int
    eager: bool = False
    answer: int | None = None  # sent at the request's end
    stream: Exchange | None = None  # once the server has opened it
    settled: bool = False  # the server has had a turn since it was opened

    granted: int = 0  # by WINDOW_UPDATE
    handed: int = 0  # bytes of the answer that methods gave
    came: int = 0  # of them, what the client saw
    headers_given: bool = False
    headers_came: bool = False
    trailers_given: bool = False
    ended_here: bool = False  # the server has reset it
    answered: bool = False  # END_STREAM came
    reset: int | None = None  # RST_STREAM came
    may_reset: set[int] = field(default_factory=set)  # with these codes

    window: int = 0  # the client's
    uploaded: int = 0
    taken: int = 0
    done_with: int = 0
    remote_ended: bool = False  # the client has sent END_STREAM
    complete: bool = False  # the server has read that
    left: bool = False  # the client has sent RST_STREAM, or broke a rule
    silent: bool = False  # the server has read that
    told_of_reset: bool = False
    waits: "list[asyncio.Task[None]]" = field(default_factory=list)  # for `drained`
    waited: "list[asyncio.Task[None]]" = field(default_factory=list)  # of them, those that did so in the last turn
    handed_before: int = 0  # in the last turn

    @property
    def over(self) -> bool:
        """Whether nothing more is to come from the server."""
        return self.answered or self.reset is not None or self.left or self.ended_here


class Peer:
    """One connection: the client, the server's side, and the model of both."""

    def __init__(self, loop: SteppedLoop, pool: Pool, cut: int, transport: Callable[[asyncio.Protocol], FakeTransport]):
        self.side = Side(pool, self._open_stream, self._on_lost)
        self.loop = loop
        self.transport = transport(self.side.connection)
        self.cut = cut
        self.unsent = bytearray()
        self.streams: dict[int, Model] = {}
        self.next_id = 1
        self.refuse_next = False
        self.window = DEFAULT_WINDOW  # what the server may send on the connection
        self.initial, self.max_frame = DEFAULT_WINDOW, 16384  # acknowledged
        self.settings: deque[tuple[int, int]] = deque()  # not acknowledged yet
        self.last_initial, self.last_max_frame = self.initial, self.max_frame
        self.pings: deque[bytes] = deque()
        self.upload_window, self.upload_initial = DEFAULT_WINDOW, DEFAULT_WINDOW
        self.goaway_at: int | None = None
        self.drained_at: float | None = None
        self.goodbye: bytes | None = None
        self.table_told = False  # the server has said how large its header table is
        self.expected_end: int | None = None  # the code of the error that the client has made
        self.ended = False  # GOAWAY with an error has come
        self.lost = 0
        self.side.connection.connection_made(self.transport)
        self.send(PREFACE + frame(SETTINGS, 0, 0))
        self.settings.append((self.initial, self.max_frame))

    # The client.

    def send(self, data: bytes) -> None:
        """Send at the next flush."""
        self.unsent += data

    def flush(self) -> None:
        """Deliver what the client has sent, in pieces."""
        data = bytes(self.unsent)
        self.unsent.clear()
        cut = self.cut if self.cut > 0 and len(data) < 3000 else max(1, len(data))
        for start in range(0, len(data), cut):
            self.transport.deliver(data[start : start + cut])

    def live(self) -> list[Model]:
        """Return the streams that may still say something, oldest first."""
        return [model for model in self.streams.values() if not model.over]

    def send_window(self, model: Model) -> int:
        """Return what the server may send on a stream."""
        return self.initial + model.granted - model.came

    def open_stream(self, end: bool, answer: int | None, eager: bool) -> None:
        """Begin a request; `answer` comes at its end."""
        full = len(self.live()) >= MAX_STREAMS  # the server may not have read of all of them yet
        model = Model(self.next_id, eager=eager, answer=answer)
        self.streams[model.id] = model
        self.next_id += 2
        model.window = self.upload_initial
        model.remote_ended = end
        self.send(frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), model.id, REQUEST))
        self.flush()
        if full:
            model.may_reset.add(REFUSED_STREAM)

    def refuse_stream(self) -> None:
        """Begin a request that the server refuses."""
        self.flush()
        self.refuse_next = True
        self.open_stream(end=False, answer=None, eager=False)
        self.refuse_next = False

    def upload(self, model: Model, size: int, padding: int, end: bool) -> None:
        """Send some of a request, as the server's windows let it."""
        extra = padding + 1 if padding else 0
        size = min(size, 16384 - extra)
        if model.remote_ended or model.left or size + extra > min(model.window, self.upload_window):
            return
        payload = bytes(content(model.id, model.uploaded, size))
        flags = END_STREAM if end else 0
        if padding:
            flags, payload = flags | PADDED, bytes((padding,)) + payload + bytes(padding)
        model.window -= len(payload)
        self.upload_window -= len(payload)
        model.uploaded += size
        model.remote_ended = end
        model.may_reset.add(STREAM_CLOSED)  # if the server has ended it meanwhile
        self.send(frame(DATA, flags, model.id, payload))

    def send_trailers(self, model: Model) -> None:
        """End a request without DATA."""
        if not model.remote_ended and not model.left:
            model.remote_ended = True
            model.may_reset.add(STREAM_CLOSED)
            self.send(frame(HEADERS, END_HEADERS | END_STREAM, model.id, REQUEST_TRAILERS))

    def leave(self, model: Model) -> None:
        """Reset a stream."""
        model.left = True
        self.send(frame(RST_STREAM, 0, model.id, CANCEL.to_bytes(4, "big")))

    def wrong(self, model: Model, way: str) -> bytes | None:
        """Return a frame that is an error of a stream, if its state allows that."""
        if way == "grant nothing":
            model.may_reset.add(PROTOCOL_ERROR)
            return frame(WINDOW_UPDATE, 0, model.id, bytes(4))
        if way == "grant too much" and self.send_window(model) > 0:
            model.may_reset.add(FLOW_CONTROL_ERROR)
            return frame(WINDOW_UPDATE, 0, model.id, MAX_WINDOW.to_bytes(4, "big"))
        if way == "send too much" and not model.remote_ended and model.window < 16384:
            model.may_reset.add(FLOW_CONTROL_ERROR)
            self.upload_window -= model.window + 1
            return frame(DATA, 0, model.id, bytes(model.window + 1))
        return None

    def ping(self, count: int) -> None:
        """Ask for so many answers."""
        for number in range(count):
            self.pings.append(number.to_bytes(8, "big"))
            self.send(frame(PING, 0, 0, self.pings[-1]))

    def change_settings(self, initial: int | None, max_frame: int | None) -> None:
        """Change the windows of all streams, or the largest frame, unless a window would overflow."""
        if initial is not None:
            highest = max((model.granted - model.came for model in self.streams.values()), default=0)
            if initial + highest > MAX_WINDOW:
                return
        self.last_initial = self.last_initial if initial is None else initial
        self.last_max_frame = self.last_max_frame if max_frame is None else max_frame
        pairs = ((INITIAL_WINDOW_SIZE, initial), (MAX_FRAME_SIZE, max_frame))
        self.send(frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs if pair[1] is not None)))
        self.settings.append((self.last_initial, self.last_max_frame))

    def grant(self, model: Model, more: int) -> None:
        """Open a stream's window, unless it could overflow by settings that are on their way."""
        highest = max(self.initial, self.last_initial, *(initial for initial, _ in self.settings))
        if not model.left and highest + model.granted - model.came + more <= MAX_WINDOW:
            model.granted += more
            self.send(frame(WINDOW_UPDATE, 0, model.id, more.to_bytes(4, "big")))

    def grant_all(self, more: int) -> None:
        """Open the connection's window, unless it would overflow."""
        if self.window + more <= MAX_WINDOW:
            self.window += more
            self.send(frame(WINDOW_UPDATE, 0, 0, more.to_bytes(4, "big")))

    def read(self, size: int | None) -> None:
        """Read all from now on; or no more than that of what is there."""
        self.transport.read(size)

    # The server's methods.

    def answer(self, model: Model, size: int, last: bool) -> None:
        """Send some of an answer, after what the client has sent."""
        self.flush()
        stream = model.stream
        if stream is None or stream.ended or model.trailers_given:
            return
        headers = None if model.headers_given else ANSWER
        data = content(model.id, model.handed, size)
        model.headers_given = True
        model.trailers_given = last
        model.handed += size
        if last and headers is not None and not size:
            self.side.send(stream, ANSWER + TRAILERS, b"", b"")
        else:
            self.side.send(stream, headers, data if size % 2 else bytes(data), TRAILERS if last else None)

    def consume(self, model: Model, size: int) -> None:
        """Be done with some of a request."""
        self.flush()
        size = min(size, model.taken - model.done_with)
        if model.stream is not None and size:
            model.done_with += size
            self.side.consumed(model.stream, size)

    def reset(self, model: Model) -> None:
        """End a stream on the server's side."""
        self.flush()
        if model.stream is not None and not model.stream.ended:
            model.ended_here = True
            model.may_reset.add(CANCEL)
            self.side.reset(model.stream, CANCEL)

    def wait(self, model: Model) -> None:
        """Begin to wait until all that was given is sent."""
        self.flush()
        if model.stream is not None:
            model.waits.append(self.loop.create_task(model.stream.drained()))

    def give_up(self, model: Model) -> None:
        """End the oldest of these waits."""
        if model.waits:
            model.waits[0].cancel()

    def drain(self) -> None:
        """End the connection once its streams have ended."""
        self.flush()
        if self.drained_at is None:
            self.drained_at = self.loop.time()
        self.side.drain()

    def _open_stream(self, stream_id: int) -> Exchange | None:
        model = self.streams[stream_id]
        if self.refuse_next:
            model.may_reset.add(REFUSED_STREAM)
            return None
        model.stream = Exchange(self, model)
        return model.stream

    def _on_lost(self) -> None:
        self.lost += 1

    # What comes from the server.

    def take(self) -> None:
        """Read what the server has written, and check it against the model."""
        for got in take_frames(self.transport.written):
            assert not self.ended, f"{got} comes after the end"
            if got.kind in (DATA, HEADERS, RST_STREAM):
                self._read_of_stream(got, self.streams[got.stream])
            elif got.kind == WINDOW_UPDATE:
                self._read_grant(got)
            elif got.kind == SETTINGS and got.flags & ACK:
                self.initial, self.max_frame = self.settings.popleft()
            elif got.kind == SETTINGS:
                self.upload_initial = dict(struct.iter_unpack(">HI", got.payload))[INITIAL_WINDOW_SIZE]
            elif got.kind == PING and got.flags & ACK:
                assert got.payload == self.pings.popleft(), "a PING's answer is another's"
            elif got.kind == PING and got.payload == b"no more!":
                assert self.goaway_at == MAX_WINDOW, "a PING comes before GOAWAY"
            elif got.kind == PING:
                assert self.goodbye is None, "two goodbyes"
                self.goodbye = got.payload
            elif got.kind == GOAWAY:
                last, code = struct.unpack_from(">II", got.payload)
                assert self.goaway_at is None or last <= self.goaway_at, "the last stream of a GOAWAY grows"
                assert code in (NO_ERROR, self.expected_end), f"the connection ends: {code} {got.payload[8:]!r}"
                self.goaway_at = last
                self.ended = code != NO_ERROR
            else:
                raise AssertionError(f"{got} is not to come")

    def _read_of_stream(self, got: Frame, model: Model) -> None:
        told = f"stream {model.id}"
        assert not model.silent, f"{told}: {got} comes after it was reset by the client"
        assert len(got.payload) <= self.max_frame, f"{told}: a frame of {len(got.payload)} bytes"
        if got.kind == RST_STREAM:
            code = int.from_bytes(got.payload, "big")
            if model.answered and code == NO_ERROR:
                assert not model.complete, f"{told}: the request was complete"
            else:
                assert code in model.may_reset, f"{told}: reset with {code}"
                assert not model.answered or code == STREAM_CLOSED, f"{told}: reset with {code} after its end"
            model.reset = code
            return
        if got.kind == HEADERS and not self.table_told:
            # RFC 7541, 4.2: the server uses no table, whatever the client's settings are.
            assert got.payload.startswith(b"\x20"), told
            got, self.table_told = got._replace(payload=got.payload[1:]), True
        assert not model.answered, f"{told}: {got} comes after its end"
        assert model.reset is None, f"{told}: {got} comes after its reset"
        if got.kind == DATA:
            size = len(got.payload)
            assert model.headers_came, f"{told}: DATA comes before HEADERS"
            assert not size or size <= self.send_window(model), f"{told}: {size} > {self.send_window(model)}"
            assert not size or size <= self.window, f"{told}: {size} > {self.window} of the connection"
            assert got.flags == 0, told
            assert model.came + size <= model.handed, f"{told}: more than was given"
            assert got.payload == content(model.id, model.came, size), f"{told}: the answer's bytes are wrong"
            model.came += size
            self.window -= size
        elif got.flags & END_STREAM:
            assert model.trailers_given, told
            assert model.came == model.handed, f"{told}: trailers pass {model.handed - model.came} bytes"
            assert got.payload == (TRAILERS if model.headers_came else ANSWER + TRAILERS), told
            model.answered = True
        else:
            assert not model.headers_came, told
            assert got.payload == ANSWER, told
            model.headers_came = True

    def _read_grant(self, got: Frame) -> None:
        more = int.from_bytes(got.payload, "big")
        assert more, "WINDOW_UPDATE by nothing"
        if not got.stream:
            self.upload_window += more
            assert self.upload_window <= MAX_WINDOW, "the connection's window overflows"
        else:
            model = self.streams[got.stream]
            model.window += more
            assert model.window <= MAX_WINDOW, f"stream {got.stream}: the window overflows"

    # What holds once the loop is idle.

    def check(self) -> None:
        """Compare the server with the model."""
        self.take()
        gone = self.transport.lost or self.transport.closing or self.transport.eof_written or self.ended
        kept = 0
        for model in self.streams.values():
            if not gone:
                kept += self._check_stream(model)
            model.settled = True
            model.silent = model.left
        assert self.side.kept() == kept, f"kept_bytes is {self.side.kept()}, and {kept} wait"
        if gone:
            self._check_end()
            return
        assert not self.settings, "SETTINGS are not acknowledged"
        assert not self.pings, "PINGs are not answered"
        assert self.upload_window >= DEFAULT_WINDOW, "the connection's window is not opened"
        if self.drained_at is not None and self.loop.time() >= self.drained_at + GRACE_S and not self.live():
            assert self.goodbye is not None, "a drained connection is not closed"

    def _check_stream(self, model: Model) -> int:
        """Check a stream; return how many bytes of it wait."""
        told = f"stream {model.id}"
        stream = model.stream
        if stream is None:
            ignored = self.goaway_at is not None and model.id > self.goaway_at
            assert model.reset is not None or model.left or ignored, f"{told} was neither opened nor refused"
            return 0
        waits = 0 if model.over else model.handed - model.came
        assert stream.pending_bytes == waits, f"{told}: pending_bytes is {stream.pending_bytes}, and {waits} wait"
        assert stream.ended == model.over, f"{told}: ended is {stream.ended}, and over {model.over}"
        self._check_waits(model, waits, self.transport.paused)
        if model.over:
            server_ended = model.answered or model.ended_here
            assert model.told_of_reset or server_ended, f"{told}: nobody says that it is over"
        else:
            assert not model.told_of_reset, f"{told}: it is not over"
            assert model.complete == model.remote_ended, f"{told}: the request's end"
            if not self.transport.paused and self.window > 0:
                sendable = waits and self.send_window(model) > 0
                assert not sendable, f"{told}: {waits} bytes wait, and the windows are open"
            if not self.transport.paused:
                assert waits or not model.trailers_given, f"{told}: the end waits for nothing"
                assert model.headers_came == model.headers_given, told
            assert model.taken == model.uploaded, f"{told}: {model.uploaded - model.taken} bytes did not come"
            if not model.complete:
                room = model.window + model.taken - model.done_with
                assert UPLOAD_WINDOW <= room <= self.upload_initial, f"{told}: the client has a window of {room}"
        return waits

    @staticmethod
    def _check_waits(model: Model, waits: int, paused: bool) -> None:
        for wait in model.waits:
            assert wait.done() or waits or paused, f"stream {model.id}: drained() waits for nothing"
            given_up = wait.cancelling()
            assert given_up or not wait.cancelled(), f"stream {model.id}: drained() ends since another gave up"
            # What began in this turn may have found nothing pending.
            if waits and wait in model.waited and model.handed == model.handed_before:
                assert given_up or not wait.done(), f"stream {model.id}: drained() ends, and {waits} bytes wait"
        model.waits = [wait for wait in model.waits if not wait.done()]
        model.waited = list(model.waits)
        model.handed_before = model.handed

    def _check_end(self) -> None:
        assert not self.side.connection.streams, "streams are left"
        for model in self.streams.values():
            if (stream := model.stream) is not None:
                assert stream.ended, f"stream {model.id} goes on"
                assert not stream.pending_bytes, f"stream {model.id}: pending_bytes is {stream.pending_bytes}"
                told = model.told_of_reset or model.over or model.trailers_given
                assert told, f"stream {model.id}: nobody says that it is over"
            assert all(wait.done() for wait in model.waits), f"stream {model.id}: drained() waits"
        assert self.lost == self.transport.lost, "on_lost is called once"


class Target(NamedTuple):
    """Whom an action is about, and whether the next one is in the same turn of the loop."""

    together: bool
    which: int
    place: int


class FlowControl(RuleBasedStateMachine):
    """Two connections at most, whose answers are counted together."""

    def __init__(self) -> None:
        super().__init__()
        self.ending = ExitStack()
        self.errors = self.ending.enter_context(logged_errors())
        self.loop = SteppedLoop()
        self.pool = Pool(self.loop)
        self.peers: list[Peer] = []
        self.queued: list[Callable[[], None]] = []
        self.whole = True  # no check has failed

    def teardown(self) -> None:
        """End all connections: nothing may be counted any more, and nothing may run."""
        try:
            if self.whole:
                self.flush()
                for peer in tuple(self.peers):
                    self.loop.run(peer.transport.leave)
                    self.check()
                assert not self.pool.kept(), f"{self.pool.kept()} bytes are counted, and no connection is left"
                assert not (left := asyncio.all_tasks(self.loop)), f"tasks are left: {left}"
        finally:
            self.ending.close()
            self.loop.cancel_and_close()

    def do(self, action: Callable[[], None], at: Target) -> None:
        """Act now and let the server run; or in one turn with what comes next."""
        self.queued.append(action)
        if not at.together:
            self.flush()

    def flush(self) -> None:
        """Act, let the server run, and compare it with the model."""
        actions, self.queued = self.queued, []
        self.whole = False

        def act() -> None:
            for action in actions:
                action()
            for peer in self.peers:
                peer.flush()

        self.loop.run(act)
        self.check()
        self.whole = True

    def check(self) -> None:
        """Compare the server with the model."""
        assert not self.errors, self.errors[0]
        assert not self.loop.unexpected, self.loop.unexpected[0]
        for peer in tuple(self.peers):
            peer.check()
            if peer.ended or peer.transport.eof_written or peer.transport.closing:
                self.loop.run(peer.transport.leave)
                peer.check()
                self.peers.remove(peer)
        kept = sum(peer.side.kept() for peer in self.peers)
        # Beside the answers' bytes, what waits has an overhead, and the transports' buffers count.
        assert self.pool.kept() >= kept, f"{self.pool.kept()} bytes are counted, and {kept} wait"
        paused = any(peer.transport.paused for peer in self.peers)
        assert kept or paused or not self.pool.kept(), f"{self.pool.kept()} bytes are counted, and none wait"

    def peer_at(self, at: Target) -> Peer:
        return self.peers[at.place % len(self.peers)]

    def choose(self, at: Target) -> tuple[Peer, Model] | None:
        """Choose a connection and one of its streams, if there are any."""
        for peer in self.peers[at.place :] + self.peers[: at.place]:
            if models := peer.live():
                return peer, models[at.which % len(models)]
        return None

    @initialize(transport=TRANSPORTS)
    def begin(self, transport: tuple[int, int, bool]) -> None:
        self.connect(Target(False, 0, 0), *transport)

    @rule(at=TARGETS, action=ACTIONS)
    def act(self, at: Target, action: Action) -> None:
        """Act as the client, or as one of the server's methods."""
        name, arguments = action
        if action in OF_ALL:
            self.flush()
        if not self.peers:
            self.connect(at, 0, 1 << 30, True)
        elif action in OF_ALL:
            getattr(self, name)(at, *arguments)
        elif action in OF_CONNECTION:
            self.do(functools.partial(getattr(self.peer_at(at), name), *arguments), at)
        elif (chosen := self.choose(at)) is not None:
            peer, model = chosen
            self.do(functools.partial(getattr(peer, name), model, *arguments), at)

    def connect(self, at: Target, cut: int, high_water: int, half_closes: bool) -> None:
        """Open a connection, unless there are two, and two streams."""

        def new_transport(protocol: asyncio.Protocol) -> FakeTransport:
            return FakeTransport(self.loop, protocol, high_water=high_water, half_closes=half_closes)

        def new_peer() -> None:
            peer = Peer(self.loop, self.pool, cut, new_transport)
            self.peers.append(peer)
            for _ in range(2):
                peer.open_stream(end=False, answer=None, eager=False)

        if len(self.peers) < 2:
            self.queued.append(new_peer)
            self.flush()

    def break_a_rule(self, at: Target, way: str) -> None:
        """Do what is an error of a stream."""
        chosen = self.choose(at)
        if chosen is not None and chosen[1].stream is not None:
            peer, model = chosen
            if (wrong := peer.wrong(model, way)) is not None:
                peer.send(wrong)
                self.flush()
                assert model.reset is not None or peer not in self.peers, "the stream goes on"

    def end(self, at: Target, way: str) -> None:
        """End a connection in one of many ways."""
        peer = self.peer_at(at)
        transport = peer.transport
        if way == "drain":
            self.do(peer.drain, at)
        elif way == "eof":
            self.do(transport.end, at)
        elif way == "leave":
            self.do(functools.partial(transport.leave, ConnectionResetError()), at)
        elif way != "window" or peer.window:
            too_large = struct.pack(">HI", INITIAL_WINDOW_SIZE, MAX_WINDOW + 1)
            wrong, peer.expected_end = {
                "window": (frame(WINDOW_UPDATE, 0, 0, MAX_WINDOW.to_bytes(4, "big")), FLOW_CONTROL_ERROR),
                "nothing": (frame(WINDOW_UPDATE, 0, 0, bytes(4)), PROTOCOL_ERROR),
                "settings": (frame(SETTINGS, 0, 0, too_large), FLOW_CONTROL_ERROR),
            }[way]
            peer.send(wrong)
            self.flush()
            assert peer not in self.peers, "the connection goes on"

    def go_on_draining(self, at: Target) -> None:
        """Let time pass, or answer the last PING."""
        if (peer := next((peer for peer in self.peers if peer.goodbye is not None), None)) is not None:
            self.do(lambda: peer.send(frame(PING, ACK, 0, peer.goodbye or b"")), at)
        elif any(peer.drained_at is not None for peer in self.peers):
            self.loop.advance(GRACE_S)
            self.check()


def run(examples: int, **more: Any) -> None:
    run_state_machine_as_test(
        FlowControl,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


@pytest.fixture(autouse=True)
def turns_without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same actions have the same outcome, on a busy machine too: turns end after a number of frames alone."""
    monkeypatch.setattr(turns, "_SLICE_S", math.inf)
    monkeypatch.setattr(turns, "_ITERATION_S", math.inf)
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def test_flow_control_is_as_the_model_says() -> None:
    run(EXAMPLES)


def test_the_model_finds_a_stream_that_stays_ready_below_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that this server had: it sent past the window, and counted bytes that no longer waited, for ever."""

    def sort(flow: SendFlow, stream: Flow) -> None:
        if stream.holding is not None:
            if stream.header_block is not None or not stream.waiting:
                flow._heads[stream.id] = stream
            elif stream.window > 0:
                flow._ready[stream.id] = stream

    def next_(flow: SendFlow) -> Part | None:
        if not flow._heads and flow._ready and flow.window > 0:
            stream = next(iter(flow._ready.values()))
            if stream.waiting and stream.window <= 0:
                first = memoryview(stream.waiting[0])
                size = min(len(first), stream.window, flow.window, flow.frame_size)
                stream.window -= size
                flow.window -= size
                stream.left -= size
                stream.waiting[0] = first[size:]
                del flow._ready[stream.id]
                return Part(stream, None, first[:size], None)
        return right(flow)

    right = SendFlow.next
    monkeypatch.setattr(SendFlow, "_sort", sort)
    monkeypatch.setattr(SendFlow, "next", next_)
    with pytest.raises(AssertionError, match=r"\d+ > -?\d+|pending_bytes|are counted"):
        # Takes some tens of examples. The same ones each time: no run may miss it.
        run(3000, phases=[Phase.generate], derandomize=True, database=None)
