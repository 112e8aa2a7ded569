"""Measures images a second and latency of the server under five loads, and of bare onnxruntime in the same run.

    L1      one caller, one image a call
    L2      64 calls in flight over 8 connections, one image each
    L3      8 connections, 64 images a call
    each    8 connections, streams of 64 one-image requests (GenerateEach)
    stream  2 streams, as fast as possible

The calls come from h2load (Debian: nghttp2-client), a C program, so that the client does not limit the server. The
streams are read by a raw gRPC client in this process. Bare onnxruntime, the server and the servers to compare with
alternate; medians over the rounds are printed. The server is compared with itself over grpcio's transport (the same
queue and batches, which shows the gain of its own HTTP/2) and with the servicers of rivals.py (no queue, each call a
batch, which shows the gain of both). Bare onnxruntime is the better of one process with all cores and one process for
each core, in batches of 64: with latents drawn in bulk, and with the contract's latents, each from its own seed.

    python benchmarks/serving.py [--models cdcgan-mnist,mlp28,cdcgan28,dcgan64] [--rounds 3] [--seconds 5] [--layers]

--layers also prints where the server's threads spend their time in L2, by py-spy (PyPI).
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
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.settings import BUNDLED_MODELS

PATH = "/ganserve.v1.GenerationService/"
METHOD, EACH = "GenerateImages", "GenerateEach"
# Connections, calls in flight on each, images a request, requests a call.
LOADS = {"L1": (1, 1, 1, 1), "L2": (8, 8, 1, 1), "L3": (8, 1, 64, 1), "each": (8, 1, 1, 64)}
TRANSPORTS = ("own", "grpcio")
RIVALS = ("aio", "sync")
COMPARED = {
    "own": "own transport",
    "grpcio": "grpcio's transport, same queue",
    "aio": "servicer on grpc.aio, no queue",
    "sync": "servicer on grpcio's threads, no queue",
}
STREAMS = 2
REFERENCES = ("mlp28", "cdcgan28", "dcgan64")

# Runs bare onnxruntime in a separate process; arguments: model, threads, seconds, how latents are drawn.
BARE = """
import sys, time
import numpy as np
import ganserve_server, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
inputs = {tensor.name: tensor.shape for tensor in session.get_inputs()}
random = np.random.RandomState(0)
size, seeded = inputs["latent"][1], sys.argv[4] == "seeded"
def draw(seed):
    random.seed(seed)
    return random.standard_normal(size)
def batch():
    latents = [draw(seed) for seed in range(64)] if seeded else random.standard_normal((64, size))
    feeds = {"latent": np.asarray(latents, np.float32)}
    if "label" in inputs:
        feeds["label"] = np.arange(64) % 10
    session.run(None, feeds)
batch()
input()
started, images = time.perf_counter(), 0
while time.perf_counter() - started < float(sys.argv[3]):
    batch()
    images += 64
print(images / (time.perf_counter() - started))
"""


@dataclass(frozen=True)
class Measured:
    images_per_s: float
    p50_ms: float
    p99_ms: float
    server_cores: float  # the number of cores that the server kept busy
    client_cores: float


def bare_onnxruntime(path: Path, processes: int, threads: int, seconds: float, latents: str) -> float:
    """Measure images a second of 64-image batches."""
    command = [sys.executable, "-c", BARE, str(path), str(threads), str(seconds), latents]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in running)


def cpu_s(pids: list[int]) -> float:
    """Return the CPU seconds that the processes have used together."""
    used = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def process_and_children(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    return [pid, *(one for child in children for one in process_and_children(child))]


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def h2load(address: str, model: str, load: str, seconds: float, scratch: Path, server: list[int]) -> Measured:
    connections, in_flight, count, requests = LOADS[load]
    method = EACH if load == "each" else METHOD
    request = pb.GenerateImagesRequest(model=model, count=count, seed=1)
    message = (pb.GenerateEachRequest(generate=request) if method == EACH else request).SerializeToString()
    body, log = scratch / "body", scratch / "log"
    body.write_bytes((struct.pack(">BI", 0, len(message)) + message) * requests)
    log.unlink(missing_ok=True)
    command = ["h2load", f"--clients={connections}", f"--max-concurrent-streams={in_flight}", "--threads=1"]
    command += [f"--duration={seconds}", "--warm-up-time=1", f"--data={body}", f"--log-file={log}"]
    command += ["--header=content-type: application/grpc", "--header=te: trailers", f"http://{address}{PATH}{method}"]
    before, children, started = cpu_s(server), os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    took, after = time.perf_counter() - started, os.times()
    client = after.children_user + after.children_system - children.children_user - children.children_system
    rows = [line.split() for line in log.read_text().splitlines()]
    milliseconds = [int(microseconds) / 1000 for _, status, microseconds in rows if status == "200"]
    # h2load cuts off the calls that run when the time is over; they may be in the log.
    if len(milliseconds) < len(rows) - connections * in_flight or len(rows) < 10:
        sys.exit(f"{model} {load}: {len(milliseconds)} of {len(rows)} calls were answered")
    percentiles = statistics.quantiles(milliseconds, n=100)
    rate = len(milliseconds) * count * requests / seconds
    return Measured(rate, percentiles[49], percentiles[98], (cpu_s(server) - before) / took, client / took)


def streams(address: str, model: str, seconds: float, server: list[int]) -> Measured:
    """Read streams for a number of seconds, without counting the first of them."""
    images, gaps, counting = [0] * STREAMS, [], threading.Event()

    def read(index: int) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options) as channel:
            generate = pb.GenerateImagesRequest(model=model, count=10**6, seed=1)
            call = pb_grpc.GenerationServiceStub(channel).StreamImages(pb.StreamImagesRequest(generate=generate))
            last = time.perf_counter()
            for response in call:
                now = time.perf_counter()
                if counting.is_set():
                    images[index] += response.chunk.count
                    gaps.append(1000 * (now - last))
                last = now
                if now > end:
                    break
            call.cancel()

    end = time.perf_counter() + 1 + seconds
    readers = [threading.Thread(target=read, args=(index,)) for index in range(STREAMS)]
    for reader in readers:
        reader.start()
    time.sleep(max(0.0, end - seconds - time.perf_counter()))
    before, mine = cpu_s(server), time.process_time()
    counting.set()
    for reader in readers:
        reader.join()
    percentiles = statistics.quantiles(gaps, n=100)
    busy = (cpu_s(server) - before) / seconds
    return Measured(
        sum(images) / seconds, percentiles[49], percentiles[98], busy, (time.process_time() - mine) / seconds
    )


@contextmanager
def server_over(transport: str, repository: Path, flags: str) -> Iterator[tuple[dict[str, str], int]]:
    """Run the server; yield its log line "serving" and its process id."""
    command = [Path(sys.executable).with_name("ganserve-server"), f"--transport={transport}", f"--models={repository}"]
    command += ["--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--log-format=json", "--access-log=off"]
    with subprocess.Popen([*command, *flags.split()], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            serving = json.loads(process.stderr.readline())
            yield serving, process.pid
            if failed := failed_calls(serving["metrics_address"]):
                sys.exit(f"{failed:.0f} calls failed over the transport {transport}")
        finally:
            process.terminate()


def failed_calls(metrics_address: str) -> float:
    """Return the number of calls that did not end with OK: h2load sees only the HTTP status 200."""
    with urllib.request.urlopen(f"http://{metrics_address}/metrics") as response:
        lines = response.read().decode().splitlines()
    calls = [line for line in lines if line.startswith("ganserve_requests_total") and 'code="OK"' not in line]
    # Without CANCELLED: when its time is over, h2load drops the calls in flight.
    return sum(float(line.split()[-1]) for line in calls if 'code="CANCELLED"' not in line)


@contextmanager
def rival(kind: str, repository: Path) -> Iterator[tuple[str, int]]:
    """Run a servicer of rivals.py; yield its address and its process id."""
    command = [sys.executable, str(Path(__file__).with_name("rivals.py")), kind, str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{process.stdout.readline().strip()}", process.pid
        finally:
            process.kill()


LAYERS = {
    "onnxruntime": ("onnxruntime/",),
    "latents": ("_latents (",),
    "HTTP/2": ("ganserve_server/transport/http2.py",),
    "gRPC": tuple(f"ganserve_server/transport/{name}.py" for name in ("grpc_server", "call", "answering")),
    "checking and answering": ("ganserve_server/services/",),
    "scheduling": ("ganserve_server/queueing/",),
    "metrics": ("prometheus_client/", "ganserve_server/observe/"),
    "sockets and event loop": ("asyncio/", "selectors.py"),
}


def layers(pid: int, seconds: float) -> dict[str, float]:
    """Sample the stacks of a process; return each layer's share of the time in which its threads run."""
    with tempfile.NamedTemporaryFile("r") as file:
        command = ["py-spy", "record", f"--pid={pid}", f"--duration={seconds:.0f}", "--rate=400", "--format=raw"]
        subprocess.run([*command, f"--output={file.name}"], check=True, capture_output=True)
        lines = file.readlines()
    samples: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        # Skip threads that wait for work.
        if "select (selectors.py" in frames[-1] or frames[-1].startswith(("_run (", "Scheduler._run", "_worker")):
            continue
        innermost = (
            name for frame in reversed(frames) for name, marks in LAYERS.items() if any(m in frame for m in marks)
        )
        samples[next(innermost, "other")] += int(count)
    total = sum(samples.values())
    return {name: count / total for name, count in samples.most_common()}


def _layer(frame: str) -> str | None:
    return next((name for name, marks in LAYERS.items() if any(mark in frame for mark in marks)), None)


def measure(
    servers: dict[str, tuple[dict[str, str], int]], path: Path, options: argparse.Namespace, scratch: Path
) -> None:
    """Measure one model and print its tables."""
    model, cores = path.parts[-3], len(os.sched_getaffinity(0))
    limits: dict[str, list[float]] = {"in bulk": [], "seeded": []}
    results: dict[str, dict[str, list[Measured]]] = {kind: {load: [] for load in LOADS} for kind in TRANSPORTS}
    results |= {kind: {load: [] for load in ("L1", "L2", "L3")} for kind in RIVALS}
    results["own"]["stream"] = []
    for _ in range(options.rounds):
        ways = {(1, cores), (cores, 1)}
        for latents, found in limits.items():
            found.append(max(bare_onnxruntime(path, *way, options.seconds, latents) for way in ways))
        for kind, measured in results.items():
            with ExitStack() as stack:
                if kind in RIVALS:
                    address, pid = stack.enter_context(rival(kind, path.parents[2]))
                else:
                    address, pid = servers[kind][0]["address"], servers[kind][1]
                for load, rows in measured.items():
                    pids = process_and_children(pid)
                    if load == "stream":
                        rows.append(streams(address, model, options.seconds, pids))
                    else:
                        rows.append(h2load(address, model, load, options.seconds, scratch, pids))
    medians = {kind: {load: _median(rows) for load, rows in measured.items()} for kind, measured in results.items()}
    limit, seeded_limit = (statistics.median(limits[latents]) for latents in ("in bulk", "seeded"))
    print(f"\n{model}: bare onnxruntime {limit:,.0f} images/s, {seeded_limit:,.0f} with a seed an image\n")
    titles = ("load", "images/s", "of bare", "seeded", "p50 ms", "p99 ms", "cores of the server", "of the client")
    print(_row(titles) + "\n" + "|---" * len(titles) + "|")
    for load, found in medians["own"].items():
        shares = [f"{found.images_per_s / of:.2f}" for of in (limit, seeded_limit)]
        times = [f"{number:.2f}" for number in _columns(found)[1:]]
        print(_row((load, f"{found.images_per_s:,.0f}", *shares, *times)))
    print("\nimages/s (p50 ms; µs of a core that a call takes)\n")
    print(_row(("load", *COMPARED.values())) + "\n" + "|---" * (1 + len(COMPARED)) + "|")
    for load in LOADS:
        print(_row((load, *(_compared(medians[kind].get(load), load) for kind in COMPARED))), flush=True)
    if options.layers:
        serving, server = servers["own"]
        pids = process_and_children(server)
        loading = threading.Thread(
            target=h2load, args=(serving["address"], model, "L2", options.seconds, scratch, pids)
        )
        loading.start()
        shares = layers(pids[-1], options.seconds)
        loading.join()
        print("layers in L2: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def _median(rows: list[Measured]) -> Measured:
    return Measured(*(statistics.median(column) for column in zip(*map(_columns, rows), strict=True)))


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _compared(found: Measured | None, load: str) -> str:
    if found is None:
        return ""
    _, _, count, requests = LOADS[load]
    core_us = found.server_cores * 1e6 * count * requests / found.images_per_s
    return f"{found.images_per_s:,.0f} ({found.p50_ms:.2f}; {core_us:,.0f})"


def _columns(found: Measured) -> tuple[float, ...]:
    return (found.images_per_s, found.p50_ms, found.p99_ms, found.server_cores, found.client_cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=f"cdcgan-mnist,{','.join(REFERENCES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--layers", action="store_true", help="say where the time goes, by py-spy")
    parser.add_argument("--server", default="", help="more flags for ganserve-server")
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("h2load is missing; on Debian: apt-get install nghttp2-client")
    names = options.models.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch, "models")
        repository.mkdir()
        if set(names) & set(REFERENCES):
            from reference_models import publish  # needs the extra "trainer"

            publish(repository)
        for name in names:
            if name not in REFERENCES:
                (repository / name).symlink_to(BUNDLED_MODELS / name)
        with ExitStack() as stack:
            servers = {
                transport: stack.enter_context(server_over(transport, repository, options.server))
                for transport in TRANSPORTS
            }
            started = servers["own"][0]["start_s"]
            print(f"{os.cpu_count()} cores, {platform.machine()}, started in {started} s")
            for name in names:
                measure(servers, repository / name / "1" / "model.onnx", options, Path(scratch))


if __name__ == "__main__":
    main()
