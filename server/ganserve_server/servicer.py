"""GenerationService: finds the model, has the request checked, the images made, and the answer written."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.batcher import Batcher
from ganserve_server.errors import InvalidRequest
from ganserve_server.lifecycle import ModelTable
from ganserve_server.metrics import Metrics
from ganserve_server.requests import GenerationRequest, parse, respond
from ganserve_server.settings import ServerSettings

Context = grpc.aio.ServicerContext[Any, Any]
# Bytes of pixels. Encoding fewer costs less than the way to a thread and back; more would hold up other calls.
_ENCODE_HERE_AT_MOST = 4096
_MAX_PIXEL_BYTES = 256 << 20


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """The service, over the batchers of all models. Its errors are ServingErrors; the interceptor answers with them."""

    def __init__(self, models: ModelTable, settings: ServerSettings, metrics: Metrics) -> None:
        self._models = models
        self._settings = settings
        self._metrics = metrics

    async def GenerateImages(self, request: pb.GenerateImagesRequest, context: Context) -> pb.GenerateImagesResponse:  # noqa: N802
        """Make all images, then answer."""
        batcher = self._find(request)
        limit = self._settings.max_images_per_request
        # By bytes too: protobuf holds 2 GiB, and a server should not try.
        card = batcher.model.card
        limit = max(1, min(limit, _MAX_PIXEL_BYTES // (card.height * card.width * card.channels)))
        checked = parse(request, batcher.model, limit, self._settings.max_images_per_request)
        with batcher.held():
            return await self._make(batcher, checked, 0, checked.count, context)

    async def StreamImages(  # noqa: N802
        self, request: pb.StreamImagesRequest, context: Context
    ) -> AsyncIterator[pb.StreamImagesResponse]:
        """Make the next chunk while the last one is being sent; never more, so that a slow reader costs no memory."""
        batcher, limit = self._find(request.generate), self._settings.max_images_per_request
        checked = parse(request.generate, batcher.model, self._settings.max_images_per_stream, limit)
        if checked.sheet:
            raise InvalidRequest("generate.layout", "a stream has no contact sheet; ask for one by GenerateImages")
        size = self._settings.max_batch_size
        starts = iter(range(0, checked.count, size))

        def begin(*, accepted: bool) -> "asyncio.Task[pb.GenerateImagesResponse] | None":
            start = next(starts, None)
            if start is None:
                return None
            stop = min(start + size, checked.count)
            return asyncio.create_task(self._make(batcher, checked, start, stop, context, accepted=accepted))

        with batcher.held():
            chunk = begin(accepted=False)
            try:
                while chunk is not None:
                    response = await chunk
                    chunk = begin(accepted=True)
                    yield pb.StreamImagesResponse(chunk=response)
            finally:
                if chunk is not None:
                    chunk.cancel()
                    await asyncio.gather(chunk, return_exceptions=True)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        """Describe the newest version of every model."""
        return pb.ListModelsResponse(models=[self._models.describe(name, None) for name in self._models.names])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        """Describe one version."""
        version = request.version if request.HasField("version") else None
        return pb.GetModelResponse(model=self._models.describe(request.model, version))

    def _find(self, request: pb.GenerateImagesRequest) -> Batcher:
        return self._models.find(request.model, request.version if request.HasField("version") else None)

    async def _make(
        self,
        batcher: Batcher,
        request: GenerationRequest,
        start: int,
        stop: int,
        context: Context,
        *,
        accepted: bool = False,
    ) -> pb.GenerateImagesResponse:
        """Make images start to stop of a request, and write them as it asks."""
        draw = request.draw(start, stop)
        made = await batcher.make(draw, context.time_remaining(), accepted=accepted)
        if request.encoding == pb.ENCODING_RAW:
            return respond(request, draw, made)
        started = time.perf_counter()
        if made.pixels.nbytes <= _ENCODE_HERE_AT_MOST:
            response = respond(request, draw, made)
        else:
            response = await asyncio.to_thread(respond, request, draw, made)
        encoding = pb.Encoding.Name(request.encoding).removeprefix("ENCODING_")
        self._metrics.encode_seconds.labels(encoding).observe(time.perf_counter() - started)
        return response
