"""Counts pictures of 256 and 512 pixels a second: from the server in each encoding, and from bare onnxruntime.

The generator is a small DCGAN with random weights. Bare onnxruntime makes one image at a time in as many threads as the
server has cores, in this process, from latents that are there already. The server answers 8 callers, each of whom asks
for 8 images at a time; they are h2load (Debian: nghttp2-client), a C program. Both run in alternation; the medians of
the rounds are printed, with the share of bare onnxruntime's, and the cores that the server and the callers keep busy:
the callers have the same cores as the server.

    python benchmarks/large_pictures.py [--rounds 5] [--seconds 5]
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from running import Running, counted, h2load
from running import serving as running_server
from serving import cpu_s
from torch import nn

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer import wrap
from ganserve_trainer.export import export_module

SIDES = (256, 512)
BARE = "bare onnxruntime"
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


@dataclass(frozen=True)
class Measured:
    images_per_s: float
    server_cores: float = 0  # the number of cores that the server kept busy
    client_cores: float = 0


def bare(file: Path, seconds: float) -> Measured:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    latent = np.random.RandomState(1).standard_normal((1, LATENT_DIM)).astype(np.float32)
    end = time.perf_counter() + seconds

    def make(_: int) -> int:
        made = 0
        while time.perf_counter() < end:
            made += len(session.run(["image"], {"latent": latent})[0])
        return made

    begun = time.perf_counter()
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        made = sum(pool.map(make, range(threads)))
    return Measured(made / (time.perf_counter() - begun))


def served(running: Running, model: str, encoding: pb.Encoding, seconds: int) -> Measured:
    before, mine, begun = cpu_s(running.pids()), _children_s(), time.perf_counter()
    flags = (f"--clients={CALLERS}", "-m1", "--warm-up-time=1", f"--duration={seconds}")
    answered, failed = counted(h2load(running.address, model, *flags, count=COUNT, encoding=encoding))
    took = time.perf_counter() - begun
    if failed:
        sys.exit(f"{failed} of {answered + failed} calls failed")
    return Measured(answered * COUNT / seconds, (cpu_s(running.pids()) - before) / took, (_children_s() - mine) / took)


def _children_s() -> float:
    """Return the CPU seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[tuple[int, str], list[Measured]] = defaultdict(list)
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
        with running_server("--workers=1", f"--models={scratch}") as running:
            for _ in range(arguments.rounds):
                for side, file in files.items():
                    found[side, BARE].append(bare(file, arguments.seconds))
                    for encoding in ENCODINGS:
                        name = pb.Encoding.Name(encoding).removeprefix("ENCODING_")
                        measured = served(running, f"pictures-{side}", encoding, arguments.seconds)
                        found[side, name].append(measured)
    for (side, way), rounds in found.items():
        rates = [one.images_per_s for one in rounds]
        of_bare = zip(rates, found[side, BARE], strict=True)
        line = f"{side} px, {way}: {statistics.median(rates):,.1f} images/s"
        if way != BARE:
            share = statistics.median(rate / other.images_per_s for rate, other in of_bare)
            server, client = (
                statistics.median(getattr(one, name) for one in rounds) for name in ("server_cores", "client_cores")
            )
            line += f", {share:.2f} of {BARE}; {server:.2f} cores, the callers {client:.2f}"
        print(line)


if __name__ == "__main__":
    main()
