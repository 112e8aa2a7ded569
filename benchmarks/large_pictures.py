"""Counts pictures of 256 and 512 pixels a second: from the server in each encoding, and from bare onnxruntime.

The generator is a small DCGAN with random weights. Bare onnxruntime makes one image at a time in as many threads as the
server has cores, in this process, from latents that are there already. The server answers as many callers as it needs,
each of whom asks for 8 images at a time. Both run in alternation; the medians of the rounds are printed, with the share
of bare onnxruntime's.

    python benchmarks/large_pictures.py [--rounds 5] [--seconds 5]
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import torch
from running import serving
from torch import nn

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_trainer import wrap
from ganserve_trainer.export import export_module

SIDES = (256, 512)
LATENT_DIM, CALLERS, COUNT = 64, 8, 8
ENCODINGS = (pb.ENCODING_RAW, pb.ENCODING_PNG, pb.ENCODING_WEBP, pb.ENCODING_JPEG)


def generator(side: int) -> nn.Module:
    """Return a network that doubles 4x4 pixels to `side`; its images are smooth, with some grain."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(LATENT_DIM, 64 * 16), nn.Unflatten(1, (64, 4, 4))]
    width, size = 64, 4
    while size < side:
        after = max(8, width // 2) if size >= 32 else width
        layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, after, 3, padding=1), nn.LeakyReLU(0.2)]
        width, size = after, 2 * size
    layers.append(nn.Conv2d(width, 3, 3, padding=1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, a=0.2)  # keeps the spread of the values
    return nn.Sequential(*layers)


def rate(work: Callable[[], int], threads: int, seconds: float) -> float:
    """Return how many images a second several threads make, each by calling `work` again and again."""
    made = [0] * threads
    end = time.perf_counter() + seconds

    def run(number: int) -> None:
        while time.perf_counter() < end:
            made[number] += work()

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(made) / (time.perf_counter() - begun)


def bare(file: Path) -> Callable[[], int]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    latent = np.random.RandomState(1).standard_normal((1, LATENT_DIM)).astype(np.float32)

    def make() -> int:
        return len(session.run(["image"], {"latent": latent})[0])

    return make


def served(stub: pb_grpc.GenerationServiceStub, model: str, encoding: pb.Encoding) -> Callable[[], int]:
    request = pb.GenerateImagesRequest(model=model, count=COUNT, seed=1, encoding=encoding)

    def make() -> int:
        return int(stub.GenerateImages(request).count)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        files = {
            side: export_module(
                wrap.Served(generator(side), lambda g, z: wrap.to_image(g(z))),
                Path(scratch),
                f"pictures-{side}",
                latent_dim=LATENT_DIM,
            )
            for side in SIDES
        }
        with serving("--workers=1", f"--models={scratch}") as running:
            options = [("grpc.max_receive_message_length", -1)]
            with grpc.insecure_channel(running.address, options) as channel:
                stub = pb_grpc.GenerationServiceStub(channel)
                ways = {(side, "bare onnxruntime"): (bare(file), cores) for side, file in files.items()} | {
                    (side, pb.Encoding.Name(encoding).removeprefix("ENCODING_")): (
                        served(stub, f"pictures-{side}", encoding),
                        CALLERS,
                    )
                    for side in SIDES
                    for encoding in ENCODINGS
                }
                for _ in range(arguments.rounds):
                    for way, (work, threads) in ways.items():
                        found[way].append(rate(work, threads, arguments.seconds))
    for side in SIDES:
        for (of, way), rates in found.items():
            if of == side:
                share = statistics.median(a / b for a, b in zip(rates, found[side, "bare onnxruntime"], strict=True))
                print(f"{side} px, {way}: {statistics.median(rates):,.1f} images/s, {share:.2f} of bare onnxruntime")


if __name__ == "__main__":
    main()
