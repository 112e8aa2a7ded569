"""The same service on grpc.aio, with images of the same size at no cost, to attack another transport for comparison.

    python -m benchmarks.attacks.aio_server [CERTIFICATE KEY]

Prints its port.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from benchmarks.attacks.patterns import PIXELS
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

OPTIONS = (("grpc.max_send_message_length", -1),)
MOST_IMAGES = 1024  # in an answer


def answer(request: pb.GenerateImagesRequest) -> pb.GenerateImagesResponse:
    count = request.count or 1
    seeds = range(request.seed, request.seed + count)
    return pb.GenerateImagesResponse(
        model=request.model, version=1, count=count, height=28, width=28, seeds=seeds, pixels=bytes(count * PIXELS)
    )


class Servicer(pb_grpc.GenerationServiceServicer):
    async def GenerateImages(self, request: pb.GenerateImagesRequest, context: Any) -> pb.GenerateImagesResponse:  # noqa: N802
        if not request.model or request.count > MOST_IMAGES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a request names a model, and at most 1024 images")
        return answer(request)

    async def GenerateEach(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.GenerateEachRequest], context: Any
    ) -> AsyncIterator[pb.GenerateEachResponse]:
        async for request in request_iterator:
            if request.generate.model:
                yield pb.GenerateEachResponse(response=answer(request.generate))
            else:
                yield pb.GenerateEachResponse(error=pb.Error(code=3, message="a request names a model"))


async def serve(*files: bytes) -> None:
    server = grpc.aio.server(options=OPTIONS)
    pb_grpc.add_GenerationServiceServicer_to_server(Servicer(), server)
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if files:
        chain, key = files
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(*(Path(file).read_bytes() for file in sys.argv[1:])))
