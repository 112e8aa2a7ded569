"""GenerationService: finds the model, has the request checked, the images made, and the answer written."""

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.batcher import Batcher, Job, Made, Tally
from ganserve_server.engine import Draw
from ganserve_server.errors import InvalidRequest, ServingError
from ganserve_server.grpc_server import Call, GrpcServer, Method, RequestSink, read_message
from ganserve_server.lifecycle import ModelTable
from ganserve_server.metrics import OTHER, Metrics
from ganserve_server.requests import GenerationRequest, images_limit, parse, respond, varint
from ganserve_server.settings import ServerSettings

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
# Bytes of pixels. Encoding fewer costs less than the way to a thread and back; more would hold up other calls.
_ENCODE_HERE_AT_MOST = 4096
_LENGTH_DELIMITED = 2  # protobuf's wire type of messages
_CHUNK_TAG = bytes((pb.StreamImagesResponse.CHUNK_FIELD_NUMBER << 3 | _LENGTH_DELIMITED,))
_RESPONSE_TAG = bytes((pb.GenerateEachResponse.RESPONSE_FIELD_NUMBER << 3 | _LENGTH_DELIMITED,))
# Of one stream of requests: more wait unread, so that neither they nor their answers fill the memory.
_EACH_RUNNING = 256
_EACH_PENDING_BYTES = 1 << 20


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """The service, over the queues of all models."""

    def __init__(self, models: ModelTable, settings: ServerSettings, metrics: Metrics) -> None:
        self._models = models
        self._settings = settings
        self._metrics = metrics

    def add_to(self, server: GrpcServer) -> None:
        """Answer the service's calls."""
        server.add_method(f"/{SERVICE}/GenerateImages", Method(start=self._generate_images, counts_images=True))
        server.add_method(f"/{SERVICE}/GenerateEach", Method(open=self._generate_each, counts_images=True))
        server.add_method(f"/{SERVICE}/StreamImages", Method(start=self._stream_images, counts_images=True))
        pb_grpc.add_GenerationServiceServicer_to_server(self, server)

    def _generate_images(self, call: Call, content: bytes) -> None:
        """Make all images, then answer. No task: one costs as much as a small model's image."""
        request = read_message(pb.GenerateImagesRequest.FromString, content)
        batcher = self._find(request, call)
        checked = self._check(request, batcher)
        if call.caller is not None:
            call.caller.take(checked.count)
        draw = checked.draw(0, checked.count)

        def done(made: Made | ServingError) -> None:
            if isinstance(made, ServingError):
                call.fail(made)
            elif checked.encoding == pb.ENCODING_RAW:
                call.reply(respond(checked, draw, made))
            else:
                call.server.spawn(call, encode(made))

        async def encode(made: Made) -> None:
            call.reply(await self._encoded(checked, draw, made, call))

        call.work = job = batcher.submit(draw, done, caller=call.turn_of, deadline=call.deadline, bulk=checked.bulk)
        call.on_cancel = job.cancel

    def _generate_each(self, call: Call) -> RequestSink:
        """Answer each request of a stream, in order."""
        return EachRequest(self, call).sink

    def begin_one(
        self, call: Call, tally: Tally, request: pb.GenerateImagesRequest, done: Callable[[bytes | ServingError], None]
    ) -> Job:
        """Make the images of one request of many; `done` gets the serialised response, or the error.

        Raises:
            ServingError: at once.
        """
        batcher = self._find(request, call)
        checked = self._check(request, batcher)
        if call.caller is not None:
            call.caller.take(checked.count)
        draw = checked.draw(0, checked.count)

        async def encode(made: Made) -> None:
            done(await self._encoded(checked, draw, made, call))

        def made_or_not(made: Made | ServingError) -> None:
            if isinstance(made, ServingError):
                done(made)
                return
            tally.compute_s += made.compute_s
            if checked.encoding == pb.ENCODING_RAW:
                done(respond(checked, draw, made))
            else:
                call.server.spawn(call, encode(made), cancel=call.on_cancel)

        job = batcher.submit(draw, made_or_not, caller=call.turn_of, deadline=call.deadline, bulk=checked.bulk)
        tally.count += draw.count
        tally.queued(job)
        return job

    def _stream_images(self, call: Call, content: bytes) -> None:
        """Make the next chunk while the last one is being sent; never more, so that a slow reader costs no memory."""
        request = read_message(pb.StreamImagesRequest.FromString, content).generate
        batcher, limit = self._find(request, call), self._settings.max_images_per_request
        checked = parse(request, batcher.model, self._settings.max_images_per_stream, limit)
        if checked.sheet:
            raise InvalidRequest("generate.layout", "a stream has no contact sheet; ask for one by GenerateImages")
        call.work = tally = Tally(checked.count)
        call.server.spawn(call, self._stream(call, batcher, checked, tally))

    async def _stream(self, call: Call, batcher: Batcher, request: GenerationRequest, tally: Tally) -> None:
        size = self._settings.max_batch_size
        starts = iter(range(0, request.count, size))

        def begin(*, accepted: bool) -> "asyncio.Task[bytes] | None":
            start = next(starts, None)
            if start is None:
                return None
            stop = min(start + size, request.count)
            return asyncio.create_task(self._make(batcher, request, start, stop, call, tally, accepted=accepted))

        with batcher.held():
            chunk = begin(accepted=False)
            try:
                while chunk is not None:
                    response = await chunk
                    chunk = begin(accepted=True)
                    await call.write(_CHUNK_TAG + varint(len(response)) + response)
            finally:
                if chunk is not None:
                    chunk.cancel()
                    await asyncio.gather(chunk, return_exceptions=True)
        call.finish()

    async def ListModels(self, request: pb.ListModelsRequest, context: Call) -> pb.ListModelsResponse:  # noqa: N802
        """Describe the newest version of every model."""
        return pb.ListModelsResponse(models=[self._models.describe(name, None) for name in self._models.names])

    async def GetModel(self, request: pb.GetModelRequest, context: Call) -> pb.GetModelResponse:  # noqa: N802
        """Describe one version."""
        context.model = request.model if request.model in self._models else OTHER
        version = request.version if request.HasField("version") else None
        model = self._models.describe(request.model, version)
        context.version = model.version
        return pb.GetModelResponse(model=model)

    def _find(self, request: pb.GenerateImagesRequest, call: Call) -> Batcher:
        call.model = request.model if request.model in self._models else OTHER
        batcher = self._models.find(request.model, request.version if request.HasField("version") else None)
        call.version = batcher.model.version
        return batcher

    def _check(self, request: pb.GenerateImagesRequest, batcher: Batcher) -> GenerationRequest:
        most = self._settings.max_images_per_request
        return parse(request, batcher.model, images_limit(batcher.model, most), most)

    async def _make(
        self,
        batcher: Batcher,
        request: GenerationRequest,
        start: int,
        stop: int,
        call: Call,
        tally: Tally,
        *,
        accepted: bool,
    ) -> bytes:
        """Make images start to stop of a request, and write them as it asks."""
        if call.caller is not None:
            while wait_s := call.caller.must_wait_s(stop - start):
                call.throttled_s += wait_s
                call.throttled_until = time.monotonic() + wait_s
                await asyncio.sleep(wait_s)  # only time makes room: there is no event to wait for
        draw = request.draw(start, stop)
        made = await batcher.make(
            draw, caller=call.turn_of, deadline=call.deadline, bulk=request.bulk, accepted=accepted, tally=tally
        )
        return await self._encoded(request, draw, made, call)

    async def _encoded(self, request: GenerationRequest, draw: Draw, made: Made, call: Call) -> bytes:
        if request.encoding == pb.ENCODING_RAW:
            return respond(request, draw, made)
        started = time.perf_counter()
        if made.pixels.nbytes <= _ENCODE_HERE_AT_MOST:
            response = respond(request, draw, made)
        else:
            response = await asyncio.to_thread(respond, request, draw, made)
        encoding = pb.Encoding.Name(request.encoding).removeprefix("ENCODING_")
        took = time.perf_counter() - started
        call.encode_s += took
        self._metrics.encode_seconds.labels(encoding).observe(took)
        return response


class EachRequest:
    """A stream of requests: each is answered, or refused, in its turn, and none ends the stream."""

    def __init__(self, servicer: GenerationServicer, call: Call) -> None:
        self._servicer, self._call = servicer, call
        self._unread: deque[bytes] = deque()
        self._running: deque[_Turn] = deque()
        self._ended = self._waits = False
        call.on_cancel = self._cancel
        call.work = self._tally = Tally()
        self.sink: RequestSink = (self._on_request, self._on_end)

    def _on_request(self, content: bytes) -> None:
        self._unread.append(content)
        self._begin()

    def _on_end(self) -> None:
        self._ended = True
        self._answer()

    def _begin(self) -> None:
        taken = taken_bytes = 0
        while self._unread and len(self._running) < _EACH_RUNNING and not self._waits:
            content = self._unread.popleft()
            taken, taken_bytes = taken + 1, taken_bytes + len(content)
            turn = _Turn()
            self._running.append(turn)
            try:
                request = read_message(pb.GenerateEachRequest.FromString, content).generate
                turn.job = self._servicer.begin_one(
                    self._call, self._tally, request, functools.partial(self._done, turn)
                )
            except ServingError as error:
                self._done(turn, error)
        if taken:
            self._call.consumed(taken_bytes, taken)

    def _done(self, turn: "_Turn", outcome: bytes | ServingError) -> None:
        if isinstance(outcome, bytes):
            turn.answer = _RESPONSE_TAG + varint(len(outcome)) + outcome
        else:
            error = pb.Error(code=outcome.code.value[0], reason=outcome.reason, message=str(outcome))
            turn.answer = pb.GenerateEachResponse(error=error).SerializeToString()
        self._answer()

    def _answer(self) -> None:
        """Send the answers whose turn it is, then begin what their going makes room for."""
        while self._running and (answer := self._running[0].answer) is not None:
            self._running.popleft()
            self._call.send(answer)
        if self._call.pending_bytes > _EACH_PENDING_BYTES and not self._waits:
            self._waits = True
            self._call.server.spawn(self._call, self._go_on_once_sent(), cancel=self._cancel)
        if self._unread:
            self._begin()
        elif self._ended and not self._running:
            self._call.finish()

    async def _go_on_once_sent(self) -> None:
        await self._call.drained()
        self._waits = False
        self._answer()

    def _cancel(self) -> None:
        self._unread.clear()
        for turn in self._running:
            if turn.job is not None:
                turn.job.cancel()
        self._running.clear()


class _Turn:
    """One request of a stream, and its answer once it is there."""

    __slots__ = ("answer", "job")

    def __init__(self) -> None:
        self.job: Job | None = None
        self.answer: bytes | None = None
