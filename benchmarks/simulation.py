"""Finds how many replicas a p99 needs, by simulating them with service times measured on a real server.

It measures a server's times (calibration), sends the same requests to a real server and to a simulated one
(validation), and then simulates fleets behind balancers and an autoscaler. Needs h2load (Debian: nghttp2-client).

    python benchmarks/simulation.py [--models cdcgan-mnist,dcgan64] [--server=--workers=2] [--quick]

A balancer's policies: round-robin; two choices (the one of two random replicas with fewer calls in flight: Envoy's
LEAST_REQUEST); least-request (of all replicas). If there are several balancers, each knows only its own calls.

A simulated replica has one thread that reads and answers calls, and two cores that compute. The thread takes all
waiting calls, in `turn_s` plus `call_s` for each call; then the calls wait for a core. A free core takes its share of
the waiting calls, at most a batch, in `batch_s` plus `image_s` for each image. While both cores compute, the thread's
time is taken from theirs. After 2 ms of idle time, the thread and a core take `cold_turn_s` and `cold_batch_s` longer
for their first work (caches, clock), and less after a shorter idle time. A call of 64 images is made in parts. Calls
arrive at random (Poisson) and are not retried. The simulation has no network, no garbage collector, no other load, no
batch on several cores, and no batch in the thread itself.
"""

import argparse
import heapq
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from running import Running, h2load, metrics, serving

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.settings import BUNDLED_MODELS

BALANCERS = 20  # in a fleet with many balancers; each knows only its own calls
WAYS = (
    ("round-robin", 1),
    ("round-robin", BALANCERS),
    ("two choices", 1),
    ("two choices", BALANCERS),
    ("least-request", 1),
)
SIZES = (1, 4, 16, 64)
FAST = "cdcgan-mnist"
BALANCER_US, BALANCER_US_PER_KB = 35.0, 3.0  # core time of a call through Envoy, as benchmarks/replicas.py prints
COLD_AFTER_S = 0.002  # idle
LONGEST_BATCH_S = 0.02  # the longest batch on a core, unless it has only one image


@dataclass(frozen=True, slots=True)
class Times:
    """The measured times of a server, for calls of `images` images each."""

    model: str
    images: int
    turn_s: float  # of the thread that reads and answers, for each turn
    call_s: float  # of the thread, for each call
    batch_s: float  # of a core, for each batch
    image_s: float  # of a core, for each image
    cold_turn_s: float  # in addition, of a thread that was idle
    cold_batch_s: float  # in addition, of a core that was idle
    bytes_per_call: float
    cores: int = 2

    @property
    def largest_batch(self) -> int:
        """The most images in a batch."""
        return max(1, min(64, int(LONGEST_BATCH_S / self.image_s)))

    @property
    def capacity(self) -> float:
        """A replica's maximum calls a second: limited by its thread, or by its cores minus the thread's work."""
        compute_s = self.images * (self.image_s + self.batch_s / self.largest_batch)
        return min(1 / self.call_s, self.cores / (compute_s + self.call_s))


# Calibration


def calibrate(repository: Path, models: list[str], seconds: float) -> list[Times]:
    """Measure calls of one image and of 64 images by their CPU time, which hardly depends on the machine's other load.

    Two servers with one core each do the same at the same time, so that the cores disturb each other as in a replica.
    The cost of a call besides computing is measured with a model that computes little.
    """
    with (
        serving("--threads=1", f"--models={repository}") as one,
        serving("--threads=1", f"--models={repository}") as two,
    ):

        def call(model: str, count: int, *flags: str) -> tuple[float, float]:
            """Return the core-seconds of a call, and the calls in a batch."""
            before = metrics(one)
            flags = ("--threads=1", f"--duration={1000 * seconds:.0f}ms", *flags)
            for process in [h2load(running.address, model, *flags, count=count) for running in (one, two)]:
                process.communicate()
            after = metrics(one)
            more = {name: _sum(after, name) - _sum(before, name) for name in after}
            calls = _sum(more, "ganserve_requests_total")
            return more["process_cpu_seconds_total"] / calls, calls / _sum(more, "ganserve_compute_seconds_count")

        def batches(model: str) -> tuple[float, float]:
            """Return the time of a batch, and the time of each image in it with its part of the answer."""
            took = np.array([call(model, count, "--clients=1")[0] for count in SIZES])
            image_s = float(np.polyfit(SIZES, took, 1, w=1 / took)[0])  # small batches count as much as large ones
            return max(0.0, _computing(one, model) - image_s), image_s

        def cold(model: str) -> float:
            """Return the additional time of a call on a server that is idle between calls."""
            return max(0.0, call(model, 1, "--clients=1", "--rps=100")[0] - call(model, 1, "--clients=1")[0])

        batch_s, image_s = batches(FAST)
        alone, (busy, turn) = call(FAST, 1, "--clients=1")[0], call(FAST, 1, "--clients=8", "-m8")
        cold_turn_s = cold(FAST)  # this model computes little
        turn_s = (alone - busy) / (1 - 1 / turn) - batch_s
        call_s = alone - turn_s - batch_s - image_s
        return [
            Times(model, count, turn_s, call_s, *found, cold_turn_s, cold_batch_s, _bytes_per_call(one, model, count))
            for model in models
            for found in [(batch_s, image_s) if model == FAST else batches(model)]
            for cold_batch_s in [0.0 if model == FAST else max(0.0, cold(model) - cold_turn_s)]
            for count in (1, 64)
        ]


def _computing(running: Running, model: str) -> float:
    """Return the time of one image in the engine, without interference."""
    with grpc.insecure_channel(running.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        answers = [stub.GenerateImages(pb.GenerateImagesRequest(model=model)) for _ in range(100)]
    took = [answer.compute_time.ToTimedelta().total_seconds() for answer in answers]
    return statistics.quantiles(took, n=10)[0]


def _sum(found: dict[str, float], name: str, model: str = "") -> float:
    return sum(value for key, value in found.items() if key.startswith(name) and model in key)


def _bytes_per_call(running: Running, model: str, count: int) -> float:
    text = h2load(running.address, model, "--requests=100", "--clients=1", count=count).communicate()[0]
    found = re.search(r"traffic: .*\((\d+)\) total", text)
    assert found, text
    return int(found[1]) / 100


# Simulation


@dataclass
class Result:
    """The latencies and the batch size of a simulated fleet."""

    p50_s: float
    p99_s: float
    images_per_batch: float


Call = list[Any]  # its arrival, the number of parts that are not made yet, and its balancer's calls in flight


class Replica:
    """The calls that wait for a replica's thread and cores, and since when the thread and the cores are free."""

    __slots__ = ("free", "idle_since", "queue", "slow", "stolen", "thread_free", "thread_idle_since", "unread")

    def __init__(self, cores: int, slow: float) -> None:
        self.unread: list[Call] = []
        self.thread_free = True
        self.queue: deque[Call] = deque()  # an entry for each part of a call
        self.free = cores
        self.thread_idle_since = 0.0
        self.idle_since = [0.0] * cores  # of the free cores; the last one computes first
        self.stolen = 0.0  # core time that the thread took from computing cores, not yet added to a batch
        self.slow = slow


def simulate(
    times: Times,
    arrivals: list[float],
    replicas: int,
    policy: str = "round-robin",
    balancers: int = 1,
    *,
    slow: tuple[float, float] = (0.0, 1.0),
    client_s: float = 0.0,
) -> Result:
    """Simulate a fleet that gets calls.

    Args:
        times: the times of one replica.
        arrivals: the arrival time of each call; the first fifth of the calls is not counted.
        replicas: the number of replicas.
        policy: how the balancers choose: round-robin, two choices or least-request.
        balancers: the number of balancers. Each call goes to a random one; each balancer knows only its own calls.
        slow: the share of slow replicas, and the factor on their times.
        client_s: core time of each call for the load generator, if it shares the replica's cores.
    """
    draw = random.Random(0).random
    fleet = [Replica(times.cores, slow[1] if number < replicas * slow[0] else 1.0) for number in range(replicas)]
    random.Random(1).shuffle(fleet)
    events: list[
        tuple[float, int, int, list[list[float]]]
    ] = []  # time, serial number, replica (or ~replica: its thread), calls
    in_hand = [[0] * replicas for _ in range(balancers)]  # calls in flight that each balancer knows
    turns = [int(draw() * replicas) for _ in range(balancers)]
    least = [(0, number) for number in range(replicas)]  # a heap by calls in flight, with outdated entries
    latencies: list[float] = []
    serial = batches = 0
    # A call of many images is made in parts, which the cores share.
    parts = 1 if times.images == 1 else max(times.cores, math.ceil(times.images / times.largest_batch))
    most = times.largest_batch if times.images == 1 else 1  # parts in a batch
    part_s = times.image_s * times.images / parts

    def read(number: int, now: float) -> None:
        """Let the thread take all waiting calls."""
        nonlocal serial
        one = fleet[number]
        taken, one.unread, one.thread_free = one.unread, [], False
        cold_s = times.cold_turn_s * min(1.0, (now - one.thread_idle_since) / COLD_AFTER_S)
        took = (times.turn_s + cold_s + times.call_s * len(taken)) * one.slow
        if not one.free:
            one.stolen += took
        one.stolen += client_s * len(taken)
        serial += 1
        heapq.heappush(events, (now + took, serial, ~number, taken))

    def compute(number: int, now: float) -> None:
        """Let each free core take its share of the waiting parts."""
        nonlocal serial, batches
        one = fleet[number]
        queue = one.queue
        while one.free and queue:
            batch = [queue.popleft() for _ in range(min(most, -(-len(queue) // one.free)))]
            one.free -= 1
            cold_s = times.cold_batch_s * min(1.0, (now - one.idle_since.pop()) / COLD_AFTER_S)
            took = (times.batch_s + cold_s + part_s * len(batch)) * one.slow
            if not one.free:
                took, one.stolen = took + one.stolen, 0.0
            else:
                one.stolen = 0.0  # there was a core for it
            batches += 1
            serial += 1
            heapq.heappush(events, (now + took, serial, number, batch))

    def happen(until: float) -> None:
        while events and events[0][0] <= until:
            now, _, number, calls = heapq.heappop(events)
            if number < 0:
                number = ~number
                one = fleet[number]
                one.queue.extend(calls if parts == 1 else [call for call in calls for _ in range(parts)])
                one.thread_idle_since = now
                if one.unread:
                    read(number, now)
                else:
                    one.thread_free = True
            else:
                one = fleet[number]
                one.free += 1
                one.idle_since.append(now)
                for call in calls:
                    call[1] -= 1
                    if not call[1]:
                        latencies.append(now - call[0])
                        call[2][number] -= 1
                        if policy == "least-request":
                            heapq.heappush(least, (call[2][number], number))
            if one.free and one.queue:
                compute(number, now)

    for arrival in arrivals:
        happen(arrival)
        balancer = int(draw() * balancers)
        known = in_hand[balancer]
        if policy == "round-robin":
            number = turns[balancer] = (turns[balancer] + 1) % replicas
        elif policy == "two choices":
            number, other = int(draw() * replicas), int(draw() * replicas)
            if known[other] < known[number]:
                number = other
        else:
            while least[0][0] != known[least[0][1]]:
                heapq.heappop(least)
            number = least[0][1]
            heapq.heapreplace(least, (known[number] + 1, number))
        known[number] += 1
        one = fleet[number]
        one.unread.append([arrival, parts, known])
        if one.thread_free:
            read(number, arrival)
    happen(math.inf)
    p50, p99 = np.quantile(latencies[len(latencies) // 5 :], (0.5, 0.99)).tolist()
    return Result(p50, p99, len(arrivals) * times.images / batches)


def poisson(calls_per_s: float, calls: int) -> list[float]:
    arrivals: list[float] = np.cumsum(np.random.default_rng(0).exponential(1 / calls_per_s, calls)).tolist()
    return arrivals


# Validation


@dataclass
class Trace:
    """The record of calls to a real server."""

    arrivals: list[float]  # s
    latencies_s: list[float]
    client_s: float  # core-seconds of the load generator for each call
    images_per_batch: float
    others: float  # cores that other programs used


def _busy_s() -> float:
    """Return the core-seconds for which this machine has been busy."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def ask(running: Running, model: str, images: int, calls_per_s: float, seconds: float, scratch: Path) -> Trace:
    """Send calls at random times. Four h2loads share them, because one is late; they report the real send times."""
    generators = 4
    before, client, busy, began = metrics(running), os.times(), _busy_s(), time.perf_counter()
    logs, processes = [scratch / f"log-{number}" for number in range(generators)], []
    for number, log in enumerate(logs):
        log.unlink(missing_ok=True)
        script = scratch / f"script-{number}"
        gaps = np.random.default_rng(number).exponential(
            1000 * generators / calls_per_s, round(seconds * calls_per_s / generators)
        )
        url = f"http://{running.address}/ganserve.v1.GenerationService/GenerateImages"
        script.write_text("".join(f"{at:.3f}\t{url}\n" for at in np.cumsum(gaps)))
        flags = (f"--timing-script-file={script}", "--clients=1", "-m1000", f"--log-file={log}")
        processes.append(h2load(running.address, model, *flags, count=images))
    for process in processes:
        process.communicate()
    after, ended, busy, took = metrics(running), os.times(), _busy_s() - busy, time.perf_counter() - began
    rows = sorted(tuple(map(int, line.split())) for log in logs for line in log.read_text().splitlines())
    if any(status != 200 for _, status, _ in rows):
        sys.exit("a call failed")
    used = ended.children_user + ended.children_system - client.children_user - client.children_system
    more = {name: _sum(after, name) - _sum(before, name) for name in after}
    return Trace(
        [(row[0] - rows[0][0]) / 1e6 for row in rows],
        [row[2] / 1e6 for row in rows],
        used / len(rows),
        _sum(more, "ganserve_batch_size_sum") / _sum(more, "ganserve_batch_size_count"),
        max(0.0, (busy - used - more["process_cpu_seconds_total"]) / took),
    )


def validate(repository: Path, times: Times, seconds: float, flags: list[str]) -> None:
    """Send the same calls to a real server and to the simulated one; print both results."""
    with serving(f"--models={repository}", *flags) as running, tempfile.TemporaryDirectory() as scratch:
        for share in (0.2, 0.4, 0.6):
            trace = ask(running, times.model, times.images, share * times.capacity, seconds, Path(scratch))
            found = simulate(times, trace.arrivals, 1, client_s=trace.client_s)
            p50, p99 = np.quantile(trace.latencies_s[len(trace.latencies_s) // 5 :], (0.5, 0.99))
            rate = len(trace.arrivals) * times.images / trace.arrivals[-1]
            print(
                f"| {times.model} | {times.images} | {rate:,.0f} | {1000 * p50:.2f} | {1000 * found.p50_s:.2f} | "
                f"{1000 * p99:.2f} | {1000 * found.p99_s:.2f} | {trace.images_per_batch:.1f} | "
                f"{found.images_per_batch:.1f} | {trace.others:.2f} |",
                flush=True,
            )


# The tables


def policies(times: Times, seconds: float) -> None:
    """Print the p99 of a hundred replicas by load and by policy, also with ten replicas that are half as fast."""
    print(f"\n{times.model}, {_calls(times)}, 100 replicas: p99 in ms (images a batch)")
    titles = [way if number == 1 else f"{way}, {number} balancers" for way, number in WAYS]
    _row("load", "replicas", *titles)
    _row(*["---"] * (2 + len(titles)))
    for slow in ((0.0, 1.0), (0.1, 2.0)):
        for load in (0.5, 0.7, 0.9):
            # A share of the capacity of these replicas.
            calls_per_s = load * 100 * times.capacity * (1 - slow[0] + slow[0] / slow[1])
            arrivals = poisson(calls_per_s, round(seconds * calls_per_s))
            cells = []
            for way in WAYS:
                found = simulate(times, arrivals, 100, *way, slow=slow)
                overload = way[0] == "round-robin" and calls_per_s > 100 * times.capacity / slow[1]
                cells.append("grows" if overload else f"{1000 * found.p99_s:.1f} ({found.images_per_batch:.1f})")
            _row(f"{load:.0%}", "10 of half the speed" if slow[0] else "identical", *cells)


def sizes(times: Times, rates: list[float], seconds: float) -> int:
    """Print how many replicas the p99 needs at some rates; return the number for many balancers with two choices.

    The returned number is that of the last rate. A rate that would take minutes to simulate gets ten times the replicas
    of a tenth of the rate, because larger fleets do no worse. The result is then simulated once, for a shorter time.
    """
    goal_s = max(0.02, 4 * simulate(times, [float(number) for number in range(10)], 1).p50_s)
    found: dict[tuple[str, int], int] = {}
    for rate in rates:
        calls_per_s, cells = rate / times.images, []
        most = calls_per_s / times.capacity  # replicas, at full load
        for way in WAYS[1], WAYS[3], WAYS[4]:
            if calls_per_s > 2e5:
                found[way] *= 10
                p99_s = simulate(times, poisson(calls_per_s, 500_000), found[way], *way).p99_s
                cells.append(f"{found[way]:,} ({most / found[way]:.0%}; {1000 * p99_s:.0f} ms)")
                continue
            arrivals = poisson(calls_per_s, max(10_000, round(seconds * calls_per_s)))
            low, high = math.ceil(most), math.ceil(2 * most) + 1  # too few, maybe, and enough
            while low < high - 0.02 * high or (low < high < 50):
                middle = (low + high) // 2
                enough = simulate(times, arrivals, middle, *way).p99_s <= goal_s
                low, high = (low, middle) if enough else (middle + 1, high)
            found[way] = high
            cells.append(f"{high:,} ({most / high:.0%})")
        _row(times.model, _calls(times), f"{1000 * goal_s:.0f}", f"{rate:,.0f}", *cells)
    return found[WAYS[3]]


def bottlenecks(times: Times, rate: float, replicas: int) -> None:
    calls = rate / times.images
    balancers = calls * (BALANCER_US + BALANCER_US_PER_KB * times.bytes_per_call / 1000) / 1e6
    bits = 8 * calls * times.bytes_per_call / 1e9
    cells = (f"{replicas:,}", f"{calls:,.0f}", f"{balancers:,.0f}", f"{bits:,.1f}", f"{bits / replicas:.2f}")
    # Each thread of a balancer has a connection of its own to each replica.
    _row(times.model, _calls(times), *cells, f"{math.ceil(balancers):,}")


def autoscale(factor: float, target: float, offered: bool, pull_s: float) -> tuple[float, float]:
    """Multiply the load of ten replicas; return the seconds until there are enough, and the refused share in 5 minutes.

    Args:
        factor: the new load divided by the old one.
        target: the load per replica that the autoscaler aims at, as a share of a replica's capacity.
        offered: whether the autoscaler uses all requested images, including refused ones, rather than made ones (CPU,
            images).
        pull_s: the time to download the container image on a machine that lacks it.
    """
    step_s, sync_s, scrape_s, window_s, queue_s = 0.1, 15.0, 15.0, 60.0, 2.0
    ready_s = 1.0 + pull_s + 0.5 + 2.5  # scheduling, download, the server's start, the probe and the balancer's notice
    ready, wanted, queue, refused, asked = 10, 10, 0.0, 0.0, 0.0
    load = factor * target * ready
    coming: list[tuple[float, int]] = []
    samples = [(-scrape_s * number, target * ready) for number in range(6, -1, -1)]
    since, enough_s = 0.0, math.inf
    for step in range(int(300 / step_s)):
        now = step * step_s
        ready += sum(count for at, count in coming if at <= now)
        coming = [one for one in coming if one[0] > now]
        if ready >= load:
            enough_s = min(enough_s, now)
        made = min(load * step_s + queue, ready * step_s)
        left = queue + load * step_s - made
        queue = min(left, queue_s * ready)
        refused += left - queue
        asked += load * step_s
        since += load * step_s if offered else made
        if step % int(scrape_s / step_s) == 0 and step:
            samples.append((now, since / scrape_s))
            since = 0.0
        if step % int(sync_s / step_s) == 0:
            metric = statistics.fmean(value for at, value in samples if at > now - window_s)
            desired = min(math.ceil(round(metric / target, 3)), max(2 * wanted, wanted + 4))
            if desired > wanted * 1.1:  # the autoscaler's tolerance
                coming.append((now + ready_s, desired - wanted))
                wanted = desired
    return enough_s, refused / asked


def autoscaling() -> None:
    print("\nThe load of ten replicas is multiplied: seconds until there are enough (share refused in five minutes)")
    columns = [(offered, pull_s) for offered in (False, True) for pull_s in (0.0, 30.0)]
    titles = [f"{'asked for' if offered else 'made'}, download {pull_s:.0f} s" for offered, pull_s in columns]
    _row("load", "target", *titles)
    _row(*["---"] * (2 + len(titles)))
    for factor in (1.2, 1.5, 2.0, 4.0):
        for target in (0.5, 0.7, 0.85):
            found = [autoscale(factor, target, *column) for column in columns]
            _row(f"× {factor:g}", f"{target:.0%}", *(f"{_seconds(seconds)} ({share:.1%})" for seconds, share in found))


def _calls(times: Times) -> str:
    return "1 image a call" if times.images == 1 else f"{times.images} images a call"


def _seconds(seconds: float) -> str:
    return "never" if math.isinf(seconds) else f"{seconds:.0f} s"


def _row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=f"{FAST},dcgan64")
    parser.add_argument("--server", default="--workers=1", help="more flags for the real server that is compared")
    parser.add_argument("--quick", action="store_true", help="one model, less of everything: seconds")
    options = parser.parse_args()
    models = [FAST] if options.quick else options.models.split(",")
    seconds, simulated_s = (0.3, 0.02) if options.quick else (1.0, 1.0)
    rates = [1e4] if options.quick else [1e3, 1e4, 1e5, 1e6]
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch)
        if not all((BUNDLED_MODELS / model).exists() for model in models):
            from reference_models import publish  # needs the extra "trainer"

            publish(repository)
        for model in {FAST, *models}:
            if (BUNDLED_MODELS / model).exists():
                (repository / model).symlink_to(BUNDLED_MODELS / model)
        measured = calibrate(repository, models, seconds)
        print("Measured, in µs of a core")
        titles = ["turn", "call", "batch", "image", "turn after idling", "batch after idling"]
        _row("model", "calls", *titles, "most in a batch", "calls/s at most", "bytes a call")
        _row(*["---"] * 11)
        for one in measured:
            more = one.turn_s + one.cold_turn_s, one.batch_s + one.cold_batch_s
            times = [f"{1e6 * value:.0f}" for value in (one.turn_s, one.call_s, one.batch_s, one.image_s, *more)]
            _row(
                one.model, _calls(one), *times, one.largest_batch, f"{one.capacity:,.0f}", f"{one.bytes_per_call:,.0f}"
            )
        print("\nA real server and the simulated one, asked for the same at the same times")
        _row(
            "model",
            "calls",
            "images/s",
            "p50 ms",
            "simulated",
            "p99 ms",
            "simulated",
            "in a batch",
            "simulated",
            "cores of others",
        )
        _row(*["---"] * 10)
        for one in measured:
            validate(repository, one, 2 * seconds, options.server.split())
    for one in measured[-2:-1]:
        policies(one, simulated_s)
    print(
        f"\nReplicas that hold the p99 (of what they could make at most); balancers: {BALANCERS}, {BALANCERS} and one"
    )
    _row("model", "calls", "p99 ms", "images/s", "round-robin", "two choices", "least-request")
    _row(*["---"] * 7)
    found = [(one, sizes(one, rates, simulated_s)) for one in measured]
    print(f"\nAt {rates[-1]:,.0f} images a second, behind Envoys")
    _row(
        "model", "calls", "replicas", "calls/s", "Envoys' cores", "Gbit/s", "Gbit/s a replica", "connections a replica"
    )
    _row(*["---"] * 8)
    for one, replicas in found:
        bottlenecks(one, rates[-1], replicas)
    autoscaling()


if __name__ == "__main__":
    main()
