"""What the fuzzer runs: bytes that a peer sends, read by the server's own classes over a transport in process.

An input is two bytes of options, then what the peer sends. Only the engine is missing: images are zeros.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from hpack import Decoder
from tests.transport.in_process import FakeTransport, SteppedLoop, logged_errors, take_frames
from tests.wire import DATA, END_STREAM, HEADERS, PREFACE, RST_STREAM, SETTINGS, frame

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.inputs import Draw, Inputs
from ganserve_server.compute.model import ModelVersion
from ganserve_server.errors import QueueFull, ServingError, Unauthenticated
from ganserve_server.observe.call_recorder import CallRecorder
from ganserve_server.observe.metrics import Metrics
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.jobs import Made
from ganserve_server.repository.table import ModelTable
from ganserve_server.services import health, reflection
from ganserve_server.services.generation import GenerationServicer
from ganserve_server.settings import ServerSettings
from ganserve_server.transport.grpc_server import GrpcServer
from ganserve_server.transport.interface import Call
from ganserve_server.transport.limits import Limits

MAX_CALL_S = 1.0  # of a core, in one turn of the loop
MAX_BYTES = 1 << 16  # of an input
MOST_IMAGES = 200  # more would be encoded in a thread
_HOUR_S = 3600.0
_MOST_CUT = 1 << 12  # bytes of an input: more would be too many pieces


@dataclass(frozen=True)
class Options:
    """The two bytes before the frames."""

    greeted: bool  # the preface and SETTINGS come before the input
    cut: int  # bytes that are read at a time; 0: all; -1: a frame
    reads: bool  # the peer reads the answers
    high_water: bool  # writing pauses early
    guarded: bool  # a token is asked for
    ends: bool  # the peer closes its direction before it leaves
    drains: bool  # the server is asked to end
    waits: bool  # hours pass before the peer leaves
    half_closes: bool
    little_room: bool  # for unfinished requests and unread answers

    @staticmethod
    def of(first: int, second: int) -> "Options":
        """Read them."""
        return Options(
            greeted=not first & 1,
            cut=(0, 0, -1, 17)[first >> 1 & 3],
            reads=not first & 8,
            high_water=bool(first & 16),
            guarded=bool(first & 32),
            ends=bool(first & 64),
            drains=bool(first & 128),
            waits=bool(second & 1),
            half_closes=not second & 2,
            little_room=bool(second & 4),
        )


class _Job:
    """A draw that is made in the next turn of the loop."""

    def __init__(self, count: int) -> None:
        self.count, self.taken, self.accepted = count, 0, time.monotonic()
        self.queue_s = self.compute_s = 0.0
        self.cancelled = False

    def cancel(self) -> None:
        """Make none of it."""
        self.cancelled = True


class _Zeros:
    """Answers as a batcher does, without an engine."""

    max_batch_size, small = 16, 4

    def __init__(self, name: str, class_names: list[str]) -> None:
        # Some hundred images are more than the windows let pass.
        card = pb.ModelCard(latent_dim=2, height=16, width=16, channels=1, class_names=class_names)
        self.model = ModelVersion(
            name,
            1,
            "0" * 64,
            card,
            cast(Any, SimpleNamespace(provider="none", inputs=Inputs.of(card))),
            pb.Model(name=name).SerializeToString(),
        )

    def submit(self, draw: Draw, done: Callable[[Made | ServingError], None], **_: object) -> _Job:
        """Make zeros, or refuse what a full queue would."""
        if draw.count == 13:
            raise QueueFull("13 images find the queue full", 1.0)
        job = _Job(draw.count)

        def make() -> None:
            if not job.cancelled:
                job.taken = draw.count
                done(self._made(draw) if draw.count != 14 else QueueFull("14 images are refused later", 1.0))

        asyncio.get_running_loop().call_soon(make)
        return job

    async def make(self, draw: Draw, **_: object) -> Made:
        """Make zeros."""
        await asyncio.sleep(0)
        return self._made(draw)

    def _made(self, draw: Draw) -> Made:
        card = self.model.card
        return Made(np.zeros((draw.count, card.height, card.width, card.channels), np.uint8), 0.0, 0.0)

    def first_chunk_size(self) -> int:
        """Return how many images of a stream go into its first message."""
        return self.max_batch_size

    def chunk_size(self) -> int:
        """Return how many images of a stream go into a message."""
        return 64

    @contextmanager
    def held(self) -> Iterator[None]:
        """Do nothing: the version is never retired."""
        yield


def _guard(call: Call) -> None:
    if b"authorization" not in call.metadata:
        raise Unauthenticated("a token is missing")


class Target:
    """Reads inputs, one after the other."""

    def __init__(self) -> None:
        self.loop = SteppedLoop()
        self._settings = ServerSettings(max_images_per_request=MOST_IMAGES, max_images_per_stream=1000)
        self._metrics = Metrics()
        self._models = ModelTable()
        self._servers: dict[tuple[bool, bool], GrpcServer] = {}
        for one in (_Zeros("plain", []), _Zeros("digits", ["zero", "one", "two"])):
            self._models.put(cast(Batcher, one))

    def close(self) -> None:
        """Close the loop."""
        self.loop.cancel_and_close()

    def run(self, data: bytes) -> None:
        """Read an input.

        Raises:
            AssertionError: the server did what it must not.
        """
        if len(data) < 2 or len(data) > MAX_BYTES:
            return
        options = Options.of(data[0], data[1])
        with logged_errors() as errors:
            self._run(options, data[2:])
            assert not errors, errors[0]
            assert not self.loop.unexpected, self.loop.unexpected[0]
            left = asyncio.all_tasks(self.loop)
            assert not left, f"tasks are left: {left}"

    def _run(self, options: Options, data: bytes) -> None:
        # All that a connection leaves behind would be seen: a server is used again, unless it was asked to end.
        kind = (options.guarded, options.little_room)
        server = self._servers.pop(kind, None) or self.loop.run_until_complete(self._server(options))
        if not options.drains:
            self._servers[kind] = server

        def connect() -> FakeTransport:
            accepted: Any = object()
            protocol = server._new_connection(accepted)
            high_water = 1000 if options.high_water else 1 << 30
            transport = FakeTransport(self.loop, protocol, high_water=high_water, half_closes=options.half_closes)
            transport.peer_reads = options.reads
            protocol.connection_made(transport)
            return transport

        transports: list[FakeTransport] = []
        self.loop.run(lambda: transports.append(connect()))
        (transport,) = transports
        if options.greeted:
            data = PREFACE + frame(SETTINGS, 0, 0) + data
        for piece in _pieces(data, options.cut):
            self._timed(transport.deliver, piece)
        if options.drains:
            drain = self.loop.create_task(server.drain(10.0))
            self.loop.settle()
        self._timed(transport.read, None)
        if options.waits:
            for seconds in (0.5, 5.0, 20.0, _HOUR_S):
                self.loop.advance(seconds)
        if options.ends:
            self._timed(transport.end)
        self._timed(transport.leave)
        if options.drains:
            self.loop.advance(30.0)
            assert drain.done(), "drain() goes on after the last connection"
        _check_written(transport.written)
        counters = {
            "calls": server.running,
            "connections": len(server._connections),
            "tasks": len(server.tasks),
            **server.kept_bytes(),
        }
        assert not any(counters.values()), f"something is left: {counters}"
        timers = self.loop.timers()
        assert not timers, f"timers are left: {timers}"

    def _timed(self, function: Callable[..., object], *args: object) -> None:
        """Call in the loop; no turn may take long."""
        self.loop.run(function, *args)
        longest, self.loop.longest_turn_s = self.loop.longest_turn_s, 0.0
        assert longest <= MAX_CALL_S, f"a turn of the loop took {longest:.2f} s of a core"

    async def _server(self, options: Options) -> GrpcServer:
        recorder = CallRecorder(self._metrics, "off")
        server = GrpcServer(
            on_finished=recorder.finished,
            on_refused=recorder.refused,
            on_internal_error=recorder.internal_error,
            limits=Limits(
                max_connections=2,
                max_streams=20,
                max_request_bytes=20_000,
                request_bytes=20_000 if options.little_room else 1 << 20,
                request_bytes_each=10_000 if options.little_room else 1 << 20,
                answer_bytes=10_000 if options.little_room else 1 << 20,
                answer_bytes_each=5000 if options.little_room else 1 << 20,
            ),
            guard=_guard if options.guarded else None,
        )
        GenerationServicer(self._models, self._settings, self._metrics).add_to(server)
        servicer = health.HealthServicer()
        servicer.set("plain", health.SERVING)
        servicer.add_to(server)
        reflection.ReflectionServicer((health.SERVICE,), (health.DESCRIPTOR,)).add_to(server)
        return server


def split(data: bytes) -> list[bytes]:
    """Cut frames apart; the last one may be incomplete."""
    frames, position = [], 0
    while position < len(data):
        end = position + 9 + int.from_bytes(data[position : position + 3], "big")
        frames.append(data[position:end])
        position = end
    return frames


def _pieces(data: bytes, cut: int) -> list[bytes]:
    if cut < 0:
        start = len(PREFACE) if data.startswith(PREFACE) else 0
        return [data[:start], *split(data[start:])] if start else split(data)
    if not cut or len(data) > _MOST_CUT:
        return [data]
    return [data[start : start + cut] for start in range(0, len(data), cut)]


def _check_written(written: bytearray) -> None:
    """Check what any client would: whole frames, headers that can be decoded, and nothing after a stream's end."""
    decoder, ended = Decoder(), set[int]()
    for got in take_frames(written):
        assert got.kind <= 9, got
        if got.kind in (HEADERS, DATA):
            assert got.stream, got
            assert got.stream not in ended, f"{got} comes after the end of its stream"
        if got.kind == HEADERS:
            decoder.decode(got.payload)
        if got.kind == RST_STREAM or (got.kind in (HEADERS, DATA) and got.flags & END_STREAM):
            ended.add(got.stream)
    assert not written, f"a frame is cut off: {bytes(written[:20])!r}"
