"""GenerateEach: a stream of requests, each answered in order."""

from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.inputs import Draw
from ganserve_server.errors import ServingError
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.jobs import Made
from ganserve_server.services.messages import GenerationRequest, draw_of, respond, times
from ganserve_server.services.request_stream import RequestStream, StreamedRequest
from ganserve_server.services.wire import embedded, tag
from ganserve_server.transport.interface import Call, read_message

_RESPONSE_TAG = tag(pb.GenerateEachResponse.RESPONSE_FIELD_NUMBER)

Check = Callable[[pb.GenerateImagesRequest, Call], tuple[Batcher, GenerationRequest]]
Encode = Callable[[GenerationRequest, Draw, NDArray[np.uint8], bytes, Call], Coroutine[Any, Any, bytes]]


class GenerateEachStream(RequestStream):
    """One call of GenerateEach. Single-image requests that arrive together and are compatible are queued as one draw.

    Args:
        check: finds the model of a request, and raises a ServingError if the request cannot be answered.
        encode: encodes images as their request asks.
        call: the call.
    """

    __slots__ = ("_check", "_compatible", "_encode_images")

    def __init__(self, check: Check, encode: Encode, call: Call) -> None:
        super().__init__(call)
        self._check, self._encode_images = check, encode
        self._compatible: list[_EachRequest] = []  # not queued yet

    def take(self, content: bytes) -> "_EachRequest":
        """Read and check a request; queue the requests before it, unless it is compatible with them."""
        taken = _EachRequest()
        try:
            message = read_message(pb.GenerateEachRequest.FromString, content).generate
            taken.batcher, taken.request = self._check(message, self._call)
        except ServingError as error:
            _refuse([taken], error)
            return taken
        taken.pixel_bytes = taken.request.count * taken.request.model.pixel_bytes
        compatible = self._compatible
        if compatible and not (len(compatible) < taken.batcher.small and taken.is_compatible(compatible[0])):
            self.queue_taken()
        self._compatible.append(taken)
        return taken

    def queue_taken(self) -> None:
        """Queue the compatible requests."""
        if self._compatible:
            compatible, self._compatible = self._compatible, []
            self._submit(compatible)

    def _submit(self, requests: "list[_EachRequest]") -> None:
        draw, first = draw_of([one.request for one in requests]), requests[0]

        def done(made: Made | ServingError) -> None:
            if isinstance(made, ServingError):
                _refuse(requests, made)
            else:
                self._made(requests, draw, made)

        try:
            self.submit(requests, first.batcher, draw, done, deadline=self._call.deadline, bulk=first.request.bulk)
        except ServingError as error:
            if len(requests) == 1:
                _refuse(requests, error)
            else:  # there may be room, or time, for some of the requests
                for one in requests:
                    self._submit([one])

    def _made(self, requests: "list[_EachRequest]", draw: Draw, made: Made) -> None:
        took = times(made)
        for index, one in enumerate(requests):
            part, pixels = draw, made.pixels
            if len(requests) > 1:
                part, pixels = draw.part(index, index + 1), pixels[index : index + 1]
            if one.request.encoding == pb.ENCODING_RAW:
                one.answer = embedded(_RESPONSE_TAG, respond(one.request, part, pixels, took))
            else:
                encoding = self._encode(one, part, pixels, took)
                self._call.spawn(encoding, cancel=self._call.on_cancel)

    async def _encode(self, one: "_EachRequest", draw: Draw, pixels: NDArray[np.uint8], took: bytes) -> None:
        response = await self._encode_images(one.request, draw, pixels, took, self._call)
        one.answer = embedded(_RESPONSE_TAG, response)
        self.send_answers()


def _refuse(requests: "list[_EachRequest]", error: ServingError) -> None:
    failure = pb.Error(code=error.code.value[0], reason=error.reason, message=str(error))
    answer = pb.GenerateEachResponse(error=failure).SerializeToString()
    for one in requests:
        one.answer = answer


class _EachRequest(StreamedRequest):
    __slots__ = ("batcher", "request")

    batcher: Batcher
    request: GenerationRequest

    def is_compatible(self, other: "_EachRequest") -> bool:
        """Return whether both requests are single-image and seeded, and can share one draw."""
        one, another = self.request, other.request
        return (
            one.count == another.count == 1
            and one.first_seed is not None
            and another.first_seed is not None
            and self.batcher is other.batcher
            and one.truncation == another.truncation
            and one.bulk == another.bulk
            and one.plain
            and another.plain
        )
