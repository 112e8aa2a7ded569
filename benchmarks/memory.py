"""Measures the memory of a server with a large model, and of its export: a StyleGAN2 for 256x256 pixels, untrained.

`alone` is what onnxruntime needs without a server to open the file and make one image. The program then adds the model
to a running server, requests images, and compares peaks of resident memory with their limits:

export     `export_module`, in a process of its own, with its imports: 4 GB
check      the process that checks the file before the server opens it: what a server takes without the model, five
           times the file's size, and an image
load       the server, without what it takes before: 1.3 times the sum of `alone` and the file's size
request    the server: what stays resident after loading, and --batch-memory-mib, or one image if it takes more, for
           each core

    python -m benchmarks.memory [--side 256] [--most-channels 512] [--dense] [--images 64] [--check]

With `--most-channels 1024`, the file has 325 MiB instead of 115. `--dense` is another model, of two matrices; its file
has 400 MiB.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from benchmarks.running import Running, metrics, serving
from torch import Tensor, nn
from torch.nn import functional

from ganserve import Client
from ganserve_server.settings import BUNDLED_MODELS
from ganserve_trainer.export import export_module
from ganserve_trainer.model_file import MODEL_FILE_NAME

EXPORT_LIMIT_MIB = 4e9 / (1 << 20)
LATENT = 512
NAME = "style"
ALONE = """
import ctypes, json, pathlib, sys
import numpy, onnxruntime

def resident():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Vm") and "kB" in line}

before = resident()["VmRSS"]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
sessions, kept = [], []
for _ in range(2):
    sessions.append(onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"]))
    if len(sessions) == 1:
        sessions[0].run(None, {"latent": numpy.zeros((1, int(sys.argv[2])), numpy.float32)})
        peak = resident()["VmHWM"] - before
    ctypes.CDLL(None).malloc_trim(0)
    kept.append(resident()["VmRSS"] - before)
print(json.dumps([peak, *kept]))
"""


class Modulated(nn.Module):
    """A convolution whose input channels the style scales; its outputs have unit variance again.

    The image's style scales its input, not the weights, so that one convolution computes a whole batch.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, demodulated: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel * kernel))
        self.style = nn.Linear(LATENT, inputs)
        self.demodulated = demodulated
        nn.init.ones_(self.style.bias)

    def forward(self, pixels: Tensor, style: Tensor) -> Tensor:
        scale = self.style(style)
        made = functional.conv2d(pixels * scale[:, :, None, None], self.weight, padding=self.weight.shape[-1] // 2)
        if not self.demodulated:
            return made
        variance = scale.square() @ self.weight.square().sum((2, 3)).T
        return made * torch.rsqrt(variance + 1e-8)[:, :, None, None]


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.convolution = Modulated(inputs, outputs, 3)
        self.bias = nn.Parameter(torch.zeros(outputs, 1, 1))
        self.register_buffer("noise", 0.1 * torch.randn(1, 1, side, side))

    def forward(self, pixels: Tensor, style: Tensor) -> Tensor:
        made = self.convolution(pixels, style) + self.noise + self.bias
        return functional.leaky_relu(made, 0.2) * math.sqrt(2)


class StyleGan2(nn.Module):
    """StyleGAN2's synthesis network with skips (Karras et al., 2020), and its mapping network; random weights."""

    def __init__(self, side: int, channels: int, most_channels: int = 512) -> None:
        super().__init__()
        sides = [1 << power for power in range(2, side.bit_length())]
        widths = [min(most_channels, channels * side // each) for each in sides]
        self.mapping = nn.Sequential(*(nn.Sequential(nn.Linear(LATENT, LATENT), nn.LeakyReLU(0.2)) for _ in range(8)))
        self.start = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.first, self.second, self.to_rgb = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for before, width, each in zip([widths[0], *widths], widths, sides, strict=False):
            self.first.append(Layer(before, width, each))
            self.second.append(Layer(width, width, each))
            self.to_rgb.append(Modulated(width, 3, 1, demodulated=False))

    def forward(self, latent: Tensor) -> Tensor:
        style = self.mapping(latent)
        pixels, picture = self.start * torch.ones_like(style[:, :1, None, None]), None
        for number, (first, second, to_rgb) in enumerate(zip(self.first, self.second, self.to_rgb, strict=True)):
            if number:
                pixels = functional.interpolate(pixels, scale_factor=2.0, mode="bilinear")
                picture = functional.interpolate(picture, scale_factor=2.0, mode="bilinear")
                pixels = second(first(pixels, style), style)
            else:
                pixels = second(pixels, style)
            made = to_rgb(pixels, style)
            picture = made if picture is None else picture + made
        levels = (picture * 40 + 128).round().clamp(0, 255)
        return levels.permute(0, 2, 3, 1).to(torch.uint8)


class Dense(nn.Module):
    """A network of two matrices, 400 MiB together with `side` 64."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        pixels = 3 * side * side
        self.layers = nn.Sequential(nn.Linear(LATENT, 8192), nn.LeakyReLU(0.2), nn.Linear(8192, pixels), nn.Tanh())

    def forward(self, latent: Tensor) -> Tensor:
        levels = (self.layers(latent) * 127.5 + 127.5).round().clamp(0, 255)
        return levels.reshape(-1, self.side, self.side, 3).to(torch.uint8)


def export(repository: Path, side: int, most_channels: int, dense: bool) -> tuple[float, float, float]:
    """Publish the network; return the seconds and the CPU seconds of `export_module`, and the process's peak in MiB."""
    torch.manual_seed(0)
    network = Dense(side) if dense else StyleGan2(side, 128, most_channels)
    started, started_cpu = time.perf_counter(), time.process_time()
    export_module(network, repository, NAME, latent_dim=LATENT)
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    return seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone_mib(path: Path) -> tuple[float, float, float]:
    """Return how much memory onnxruntime needs to open a model and make one image, and what 1 and 2 sessions keep."""
    command = [sys.executable, "-c", ALONE, str(path), str(LATENT)]
    peak, one, two = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return peak, one, two


class Peaks:
    """The highest resident memory of a server of one process, and of the process that checks files for it, in MiB."""

    def __init__(self, running: Running) -> None:
        self._pid = running.process.pid
        self.probe = 0.0
        threading.Thread(target=self._watch, daemon=True).start()
        self.take()

    def take(self) -> float:
        """Return the server's since the last call."""
        peak = _status_mib(self._pid, "VmHWM")
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # resets VmHWM
        return peak

    def _watch(self) -> None:
        with contextlib.suppress(OSError):  # the server has ended
            while True:
                for children in Path(f"/proc/{self._pid}/task").glob("*/children"):
                    for child in children.read_text().split():
                        with contextlib.suppress(OSError, IndexError):  # it has ended
                            self.probe = max(self.probe, _status_mib(int(child), "VmHWM"))
                time.sleep(0.02)


def _status_mib(pid: int, field: str) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="of an image, in pixels")
    parser.add_argument("--most-channels", type=int, default=512, help="of a layer")
    parser.add_argument("--dense", action="store_true", help="a model of two matrices, for 64x64 pixels")
    parser.add_argument("--images", type=int, default=64, help="of the request")
    parser.add_argument("--batch-memory-mib", type=int, default=256)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a peak is above its limit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made, models = Path(scratch, "made", NAME), Path(scratch, "models")
        side = 64 if options.dense else options.side
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            exported = process.submit(export, made.parent, side, options.most_channels, options.dense)
            seconds, cpu, export_peak = exported.result()
        alone, one, two = alone_mib(made / "1" / MODEL_FILE_NAME)
        file = (made / "1" / MODEL_FILE_NAME).stat().st_size / (1 << 20)
        shutil.copytree(BUNDLED_MODELS / "mlp-mnist", models / "mlp-mnist")
        flags = ("--workers=1", f"--models={models}", f"--batch-memory-mib={options.batch_memory_mib}")
        with serving(*flags) as running, Client(running.address, timeout_s=3600) as client:
            client.generate("mlp-mnist")
            server = functools.partial(_status_mib, running.process.pid, "VmRSS")
            base, peaks = server(), Peaks(running)
            made.rename(models / NAME)
            loaded = 'ganserve_model_loads_total{outcome="loaded"}'
            while metrics(running)[loaded] < 2:
                if metrics(running).get('ganserve_model_loads_total{outcome="rejected"}'):
                    sys.exit("the server rejects the model")
                time.sleep(0.5)
            client.generate(NAME)
            load, resident = peaks.take() - base, server() - base
            image = metrics(running)[f'ganserve_model_image_bytes{{model="{NAME}",version="1"}}'] / (1 << 20)
            client.generate(NAME, count=options.images)
            request, after = peaks.take() - base, server() - base
    cores = len(os.sched_getaffinity(0))
    peaks_and_limits = {
        "while it is exported": (export_peak, EXPORT_LIMIT_MIB),
        "while it is checked, the process that checks files": (peaks.probe, base + 5 * file + image),
        "while it is loaded": (load, 1.3 * (alone + file)),
        f"while {options.images} images are made": (request, resident + cores * max(options.batch_memory_mib, image)),
    }
    print(f"export_module takes {seconds:.0f} s, {cpu:.0f} s of CPU time; the file has {file:.0f} MiB")
    print(f"onnxruntime alone: at most {alone:.0f} MiB; one session keeps {one:.0f} MiB, and two {two:.0f} MiB")
    print(f"the server has {base:.0f} MiB without the model, which are left out of its rows; an image {image:.0f} MiB")
    print("| peak | MiB | limit, MiB |\n|---|---|---|")
    for when, (peak, limit) in peaks_and_limits.items():
        print(f"| {when} | {peak:.0f} | {limit:.0f} |")
    print(f"after one image {resident:.0f} MiB, after {options.images} {after:.0f} MiB")
    sys.exit(int(options.check and any(peak > limit for peak, limit in peaks_and_limits.values())))


if __name__ == "__main__":
    main()
