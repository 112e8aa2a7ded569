"""Counts the images whose bytes depend on how they were requested: of 10,000 images of each model, none should.

The models are the bundled ones, the reference models, and one for each architecture of `architectures.py`.

Each image is first made alone by a lone caller (with all cores, if that is faster). It is then made again in requests
of 64, in requests of 1,000 that the server splits, among many concurrent callers, in a stream, in a stream of requests,
by two workers, and by a server with one computing thread. All results are compared with the first.

    python benchmarks/determinism.py [--images 10000]
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray
from running import serving

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.settings import BUNDLED_MODELS

Stub = pb_grpc.GenerationServiceStub


def request(model: str, seed: int, count: int) -> pb.GenerateImagesRequest:
    return pb.GenerateImagesRequest(model=model, seed=seed, count=count)


def pixels(responses: Iterator[pb.GenerateImagesResponse]) -> NDArray[np.uint8]:
    rows = [np.frombuffer(one.pixels, np.uint8).reshape(one.count, -1) for one in responses]
    return np.concatenate(rows)


def by_requests(size: int, callers: int) -> Callable[[Stub, str, int], NDArray[np.uint8]]:
    def make(stub: Stub, model: str, images: int) -> NDArray[np.uint8]:
        starts = range(0, images, size)
        with ThreadPoolExecutor(callers) as pool:
            calls = pool.map(lambda s: stub.GenerateImages(request(model, s, min(size, images - s))), starts)
            return pixels(iter(list(calls)))

    return make


def by_stream(stub: Stub, model: str, images: int) -> NDArray[np.uint8]:
    call = stub.StreamImages(pb.StreamImagesRequest(generate=request(model, 0, images)))
    return pixels(one.chunk for one in call)


def by_each(stub: Stub, model: str, images: int) -> NDArray[np.uint8]:
    sizes = [1, 2, 3, 5, 8, 13, 21, 34]
    starts, start = [], 0
    while start < images:
        count = min(sizes[len(starts) % len(sizes)], images - start)
        starts.append((start, count))
        start += count
    call = stub.GenerateEach(pb.GenerateEachRequest(generate=request(model, first, n)) for first, n in starts)
    return pixels(one.response for one in call)


WAYS = {
    "requests of 64": by_requests(64, 1),
    "requests of 1,000": by_requests(1000, 3),
    "one each, 32 callers": by_requests(1, 32),
    "7 each, 16 callers": by_requests(7, 16),
    "a stream": by_stream,
    "a stream of requests of 1 to 34": by_each,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    images = parser.parse_args().images
    differing = 0
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        repository = Path(scratch)
        try:
            import architectures
            import reference_models

            reference_models.publish(repository)
            architectures.publish(repository)
        except ModuleNotFoundError:
            print("without the models of other architectures, which need the extra 'trainer'")
        for folder in BUNDLED_MODELS.iterdir():
            (repository / folder.name).symlink_to(folder)
        stubs = {}
        for name, flags in {
            "": ("--workers=1",),
            "2 workers": ("--workers=2",),
            "1 thread": ("--workers=1", "--threads=1"),
        }.items():
            running = stack.enter_context(serving(f"--models={repository}", *flags))
            options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
            stubs[name] = Stub(stack.enter_context(grpc.insecure_channel(running.address, options)))
        for model in sorted(path.name for path in repository.iterdir()):
            count = images if model != "dcgan64" else images // 10  # a thousand images have 12 MB
            wanted = by_requests(1, 1)(stubs[""], model, count)
            for server, stub in stubs.items():
                for way, make in WAYS.items():
                    differ = int((make(stub, model, count) != wanted).any(axis=1).sum())
                    differing += differ
                    if differ:
                        print(f"{model}: {differ} of {count} images differ: {way} {server}")
            print(
                f"{model}: {count:,} images, {len(np.unique(wanted[:1000], axis=0))} of the first 1,000 distinct, "
                f"{len(WAYS) * len(stubs)} other ways",
                flush=True,
            )
    print(f"images with other bytes: {differing}")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
