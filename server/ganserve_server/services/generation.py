"""GenerationService: finds the model, checks the request, queues the images, and writes the response."""

import asyncio
import time

import numpy as np
from numpy.typing import NDArray

from ganserve._formats import ENCODED
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.compute.inputs import Draw
from ganserve_server.errors import InvalidRequest, ServingError
from ganserve_server.machine import cores
from ganserve_server.observe.metrics import OTHER, Metrics
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.jobs import CallWork, Made
from ganserve_server.repository.table import ModelTable
from ganserve_server.services.generate_each import GenerateEachStream
from ganserve_server.services.messages import (
    GenerationRequest,
    describe,
    files_of,
    images_limit,
    parse,
    respond,
    shortened,
    times,
)
from ganserve_server.services.wire import embedded, tag
from ganserve_server.settings import ServerSettings
from ganserve_server.transport.interface import Call, Method, RequestSink, Server, read_message

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
# Bytes of pixels to encode in the event loop. For fewer, a thread costs more than the encoding; more would delay other
# calls. The metadata takes time for each image and each attribute, too.
_ENCODE_HERE_AT_MOST = 4096
_ENCODE_AT_ONCE = 64 << 10  # bytes of pixels that a thread encodes before another call's: 10 ms as WebP, 5 ms as PNG
_DESCRIBE_HERE_AT_MOST = 64
_CHUNK_TAG = tag(pb.StreamImagesResponse.CHUNK_FIELD_NUMBER)
_MODEL_TAG = tag(pb.ListModelsResponse.MODELS_FIELD_NUMBER)
_PAGE_BYTES = 2 << 20  # of ListModels: with one more card, it is below 4 MiB, the default limit of gRPC clients
_LITTLE_UNREAD = 16 << 20  # bytes of unread answers; with more, clients read more slowly than images are made


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """The service, over the queues of all models."""

    def __init__(self, models: ModelTable, settings: ServerSettings, metrics: Metrics) -> None:
        self._models = models
        self._settings = settings
        self._metrics = metrics
        self._threads = settings.threads or cores().usable

    def add_to(self, server: Server) -> None:
        """Answer the service's calls."""
        server.add_method(f"/{SERVICE}/GenerateImages", Method(start=self._generate_images, counts_images=True))
        server.add_method(f"/{SERVICE}/GenerateEach", Method(open=self._generate_each, counts_images=True))
        server.add_method(f"/{SERVICE}/StreamImages", Method(start=self._stream_images, counts_images=True))
        server.add_method(f"/{SERVICE}/ListModels", Method(start=self._list_models))
        pb_grpc.add_GenerationServiceServicer_to_server(self, server)

    def _generate_images(self, call: Call, content: bytes) -> None:
        """Make all images, then answer. Uses no task, which would cost as much as an image of a small model."""
        batcher, checked = self.check(read_message(pb.GenerateImagesRequest.FromString, content), call)
        draw = checked.draw(0, checked.count)

        def done(made: Made | ServingError) -> None:
            if isinstance(made, ServingError):
                call.fail(made)
            elif checked.encoding == pb.ENCODING_RAW:
                call.reply(respond(checked, draw, made.pixels, times(made)))
            else:
                call.spawn(encode(made))

        async def encode(made: Made) -> None:
            call.reply(await self.encoded(checked, draw, made.pixels, times(made), call))

        call.work = job = batcher.submit(
            draw, done, fairness_key=call.fairness_key, deadline=call.deadline, bulk=checked.bulk
        )
        call.on_cancel = job.cancel

    def _generate_each(self, call: Call) -> RequestSink:
        """Answer each request of a stream, in order."""
        return GenerateEachStream(self.check, self.encoded, call).sink

    def check(self, request: pb.GenerateImagesRequest, call: Call) -> tuple[Batcher, GenerationRequest]:
        """Find the model, and check the request and the rate of its caller.

        Raises:
            ServingError: it cannot be answered.
        """
        batcher = self._find(request, call)
        most = self._settings.max_images_per_request
        checked = parse(request, batcher.model, images_limit(batcher.model, most), most)
        if call.caller is not None:
            call.caller.take(checked.count)
        return batcher, checked

    def _stream_images(self, call: Call, content: bytes) -> None:
        """Make at most one chunk while the chunk before it is sent, so that a slow reader costs little memory."""
        request = read_message(pb.StreamImagesRequest.FromString, content).generate
        batcher, limit = self._find(request, call), self._settings.max_images_per_request
        checked = parse(request, batcher.model, self._settings.max_images_per_stream, limit)
        if checked.sheet:
            raise InvalidRequest("generate.layout", "a stream cannot return a contact sheet; use GenerateImages")
        call.work = work = CallWork(checked.count)
        call.spawn(self._stream(call, batcher, checked, work))

    async def _stream(self, call: Call, batcher: Batcher, request: GenerationRequest, work: CallWork) -> None:
        stop = 0

        def begin(*, accepted: bool) -> "asyncio.Task[bytes] | None":
            nonlocal stop
            if stop == request.count:
                return None
            # The first chunk is small, so that the first images arrive early.
            size = batcher.first_chunk_size()
            if stop and request.encoding == pb.ENCODING_RAW and call.unread_bytes < _LITTLE_UNREAD:
                # At most the caller's burst: after a larger chunk, the next one would wait for the caller's rate.
                most = batcher.chunk_size() if call.caller is None else min(batcher.chunk_size(), call.caller.burst)
                size = max(size, int(most))
            start, stop = stop, min(stop + size, request.count)
            return asyncio.create_task(self._make(batcher, request, start, stop, call, work, accepted=accepted))

        with batcher.held():
            chunk = begin(accepted=False)
            try:
                while chunk is not None:
                    message = embedded(_CHUNK_TAG, await chunk)
                    # What is made before it can be sent is in no pool, so only a little of it may wait.
                    ahead = call.unread_bytes < _LITTLE_UNREAD
                    chunk = begin(accepted=True) if ahead else None
                    writing = call.write(message)
                    del message  # which the connection keeps
                    await writing
                    if not ahead:
                        chunk = begin(accepted=True)
            finally:
                if chunk is not None:
                    chunk.cancel()
                    await asyncio.gather(chunk, return_exceptions=True)
        call.finish()

    def _list_models(self, call: Call, content: bytes) -> None:
        """Describe the newest version of every model, or of as many as one message may have.

        The models are serialised one by one: in one message object, 120 cards with 1,000 classes each take 18 ms, this
        way 3 ms.
        """
        after = read_message(pb.ListModelsRequest.FromString, content).page_token
        pieces, size = [], 0
        for name in self._models.names:
            if name > after:
                pieces.append(embedded(_MODEL_TAG, shortened(self._describe(name, None)).SerializeToString()))
                size += len(pieces[-1])
                if size > _PAGE_BYTES:
                    pieces.append(pb.ListModelsResponse(next_page_token=name).SerializeToString())
                    break
        call.reply(b"".join(pieces))

    async def GetModel(self, request: pb.GetModelRequest, context: Call) -> pb.GetModelResponse:  # noqa: N802
        """Describe one version."""
        context.model = request.model if request.model in self._models else OTHER
        version = request.version if request.HasField("version") else None
        model = self._describe(request.model, version)
        context.version = model.version
        return pb.GetModelResponse(model=model)

    def _describe(self, name: str, version: int | None) -> pb.Model:
        return describe(self._models.find(name, version).model, self._models.versions(name))

    def _find(self, request: pb.GenerateImagesRequest, call: Call) -> Batcher:
        name = request.model  # read once: protobuf makes a new string each time
        call.model = name if name in self._models else OTHER
        batcher = self._models.find(name, request.version if request.HasField("version") else None)
        call.version = batcher.model.version
        return batcher

    async def _make(
        self,
        batcher: Batcher,
        request: GenerationRequest,
        start: int,
        stop: int,
        call: Call,
        work: CallWork,
        *,
        accepted: bool,
    ) -> bytes:
        """Make images `start` to `stop` (exclusive) of a request, and return the serialised response."""
        if call.caller is not None:
            while wait_s := call.caller.must_wait_s(stop - start):
                call.throttled_s += wait_s
                call.throttled_until = time.monotonic() + wait_s
                await asyncio.sleep(wait_s)  # there is no event to wait for, only time
        draw = request.draw(start, stop)
        made = await batcher.make(
            draw,
            fairness_key=call.fairness_key,
            deadline=call.deadline,
            bulk=request.bulk,
            accepted=accepted,
            work=work,
        )
        return await self.encoded(request, draw, made.pixels, times(made), call)

    async def encoded(
        self, request: GenerationRequest, draw: Draw, pixels: NDArray[np.uint8], took: bytes, call: Call
    ) -> bytes:
        """Return the serialised response, with the images encoded as the request asks."""
        if request.encoding == pb.ENCODING_RAW:
            return respond(request, draw, pixels, took)
        started = time.perf_counter()
        described = len(pixels) * (1 + len(request.model.inputs.attributes))
        if pixels.nbytes <= _ENCODE_HERE_AT_MOST and described <= _DESCRIBE_HERE_AT_MOST:
            response = respond(request, draw, files_of(request, draw, pixels), took)
        else:
            files = await self._files(request, draw, pixels)
            response = await asyncio.to_thread(respond, request, draw, files, took)
        seconds = time.perf_counter() - started
        call.encode_s += seconds
        self._metrics.encode_seconds.labels(ENCODED[request.encoding].name).observe(seconds)
        return response

    async def _files(self, request: GenerationRequest, draw: Draw, pixels: NDArray[np.uint8]) -> list[bytes]:
        """Encode images in as many threads as there are cores; each takes a few images, so that calls take turns."""
        step = draw.count if request.sheet else max(1, _ENCODE_AT_ONCE // request.model.pixel_bytes)
        starts = range(0, draw.count, step)
        left, files = iter(starts), {}

        async def encode() -> None:
            for start in left:
                stop = min(start + step, draw.count)
                part = draw.part(start, stop)
                files[start] = await asyncio.to_thread(files_of, request, part, pixels[start:stop])

        async with asyncio.TaskGroup() as group:
            for _ in starts[: self._threads]:
                group.create_task(encode())
        return [file for start in starts for file in files[start]]
