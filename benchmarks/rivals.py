"""A simple server for comparison: a gRPC servicer on grpcio, one onnxruntime session, no queue, each call a batch.

It lacks two parts of the server: the queue that combines calls to batches, and the transport. `ganserve-server
--transport=grpcio` lacks only the transport; serving.py measures all of them.

    python benchmarks/rivals.py sync|aio REPOSITORY

Serves the repository's models with the same messages as ganserve, on a port that it prints, with all cores in the
session. It draws all latents of a call at once, which is faster than one seed for each image, but breaks ganserve's
contract.
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.machine import cores

OPTIONS = (("grpc.max_send_message_length", -1),)


class Model:
    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores().usable
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = {tensor.name: tensor.shape for tensor in self.session.get_inputs()}
        self.latent_dim, self.labelled = inputs["latent"][1], "label" in inputs

    def answer(self, request: pb.GenerateImagesRequest) -> pb.GenerateImagesResponse:
        seeds = range(request.seed, request.seed + request.count)
        latents = np.random.RandomState(request.seed).standard_normal((request.count, self.latent_dim))
        feeds: dict[str, Any] = {"latent": latents.astype(np.float32)}
        if self.labelled:
            feeds["label"] = np.array(seeds) % 10
        pixels = self.session.run(None, feeds)[0]
        return pb.GenerateImagesResponse(count=request.count, seeds=seeds, pixels=pixels.tobytes())


class Servicer(pb_grpc.GenerationServiceServicer):
    def __init__(self, models: dict[str, Model]) -> None:
        self.models = models

    def GenerateImages(self, request: pb.GenerateImagesRequest, context: Any) -> pb.GenerateImagesResponse:  # noqa: N802
        return self.models[request.model].answer(request)


class AsyncServicer(Servicer):
    async def GenerateImages(self, request: pb.GenerateImagesRequest, context: Any) -> pb.GenerateImagesResponse:  # noqa: N802
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self.models[request.model].answer, request)


async def serve_aio(models: dict[str, Model]) -> None:
    server = grpc.aio.server(options=OPTIONS)
    pb_grpc.add_GenerationServiceServicer_to_server(AsyncServicer(models), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


def serve_sync(models: dict[str, Model]) -> None:
    server = grpc.server(ThreadPoolExecutor(8), options=OPTIONS)
    pb_grpc.add_GenerationServiceServicer_to_server(Servicer(models), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


def main() -> None:
    models = {path.name: Model(path / "1" / "model.onnx") for path in Path(sys.argv[2]).iterdir()}
    if sys.argv[1] == "sync":
        serve_sync(models)
    else:
        asyncio.run(serve_aio(models))


if __name__ == "__main__":
    main()
