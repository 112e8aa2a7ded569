"""Images a second and latency of the server under three loads, beside bare onnxruntime in the same run.

    L1  one caller, one image a call
    L2  64 calls in flight over 8 connections, one image each
    L3  8 connections, 64 images a call

The load comes from h2load (Debian: nghttp2-client), a C program, so that the server is what is measured. Server and
bare onnxruntime alternate; medians over the rounds are printed.

    python benchmarks/serving.py [--model cdcgan-mnist] [--rounds 3] [--seconds 5]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.settings import BUNDLED_MODELS

PATH = "/ganserve.v1.GenerationService/GenerateImages"
# Connections, calls in flight on each, images a call.
LOADS = {"L1": (1, 1, 1), "L2": (8, 8, 1), "L3": (8, 1, 64)}


def bare_onnxruntime(path: Path, seconds: float) -> float:
    """Measure images a second of 64-image batches on all cores, latents drawn in bulk."""
    import onnxruntime  # after ganserve_server, which tells it not to report its use

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {tensor.name: tensor.shape for tensor in session.get_inputs()}
    random = np.random.RandomState(0)

    def batch() -> None:
        feeds = {"latent": random.standard_normal((64, inputs["latent"][1])).astype(np.float32)}
        if "label" in inputs:
            feeds["label"] = np.arange(64) % 10
        session.run(None, feeds)

    batch()
    started, images = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        batch()
        images += 64
    return images / (time.perf_counter() - started)


def h2load(address: str, model: str, load: str, seconds: float, scratch: Path) -> tuple[float, float, float]:
    """Return images a second, and the median and 99th percentile of the calls' latency in milliseconds."""
    connections, in_flight, count = LOADS[load]
    message = pb.GenerateImagesRequest(model=model, count=count, seed=1).SerializeToString()
    body, log = scratch / "body", scratch / "log"
    body.write_bytes(struct.pack(">BI", 0, len(message)) + message)
    log.unlink(missing_ok=True)
    command = ["h2load", f"--clients={connections}", f"--max-concurrent-streams={in_flight}", "--threads=1"]
    command += [f"--duration={seconds}", "--warm-up-time=1", f"--data={body}", f"--log-file={log}"]
    command += ["--header=content-type: application/grpc", "--header=te: trailers", f"http://{address}{PATH}"]
    subprocess.run(command, check=True, capture_output=True)
    rows = [line.split() for line in log.read_text().splitlines()]
    milliseconds = [int(microseconds) / 1000 for _, status, microseconds in rows if status == "200"]
    if len(milliseconds) < len(rows) or len(rows) < 10:
        sys.exit(f"{load}: {len(milliseconds)} of {len(rows)} calls were answered")
    percentiles = statistics.quantiles(milliseconds, n=100)
    return len(rows) * count / seconds, percentiles[49], percentiles[98]


def failed_calls(metrics_address: str) -> float:
    """Count the calls that did not end with OK: h2load sees only HTTP's 200."""
    with urllib.request.urlopen(f"http://{metrics_address}/metrics") as response:
        lines = response.read().decode().splitlines()
    calls = [line for line in lines if line.startswith("ganserve_requests_total") and 'code="OK"' not in line]
    # h2load drops the calls in flight when its time is over.
    return sum(float(line.split()[-1]) for line in calls if 'code="CANCELLED"' not in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="cdcgan-mnist", choices=sorted(path.name for path in BUNDLED_MODELS.iterdir())
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("h2load is missing; on Debian: apt-get install nghttp2-client")
    program = Path(sys.executable).with_name("ganserve-server")
    command = [program, "--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--log-format=json"]
    limits: list[float] = []
    results: dict[str, list[tuple[float, float, float]]] = {load: [] for load in LOADS}
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server,
    ):
        assert server.stderr is not None
        try:
            serving = json.loads(server.stderr.readline())
            for _ in range(options.rounds):
                path = BUNDLED_MODELS / options.model / "1" / "model.onnx"
                limits.append(bare_onnxruntime(path, options.seconds))
                for load, rows in results.items():
                    rows.append(h2load(serving["address"], options.model, load, options.seconds, Path(scratch)))
            if failed := failed_calls(serving["metrics_address"]):
                sys.exit(f"{failed:.0f} calls failed")
        finally:
            server.terminate()
    limit = statistics.median(limits)
    print(f"{options.model}, {os.cpu_count()} cores, {platform.machine()}")
    print(f"bare onnxruntime  {limit:9,.0f} images/s")
    for load, rows in results.items():
        rate, p50, p99 = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{load:<16}  {rate:9,.0f} images/s  {rate / limit:5.2f} of bare  p50 {p50:.2f} ms  p99 {p99:.2f} ms")


if __name__ == "__main__":
    main()
