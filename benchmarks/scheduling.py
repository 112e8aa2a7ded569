"""Measures the scheduler's guarantees on a real server.

fairness   one-image callers, alone and beside a stream of 10,000 images and bulk requests: the rise of their p99, in
           batch times (at most 2).
overload   ten times as many calls as the server can answer, with a deadline: images made in time as a share of the
           maximum (at least 0.9), the p99 of answered calls, and how the other calls were refused.
small      the same with one image a call, from h2load (Debian: nghttp2-client): the cost of refusals.

    python benchmarks/scheduling.py [--model dcgan64] [--seconds 10]
"""

import argparse
import asyncio
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import grpc
from running import Running, h2load, metrics, serving

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.settings import BUNDLED_MODELS

CALLERS = 4
DEADLINE_S = 1.0


def channel(address: str) -> grpc.aio.Channel:
    """Return a channel with a connection of its own; by default, the channels of a program share connections."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(address, options)


async def one_image_calls(address: str, model: str, seconds: float) -> list[float]:
    """Make one-image calls one after the other, on a few connections; return the latencies in ms."""
    latencies: list[float] = []

    async def caller(number: int) -> None:
        async with channel(address) as connected:
            stub = pb_grpc.GenerationServiceStub(connected)
            end = time.perf_counter() + seconds
            while (started := time.perf_counter()) < end:
                await stub.GenerateImages(pb.GenerateImagesRequest(model=model, seed=number))
                latencies.append(1000 * (time.perf_counter() - started))

    await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return latencies


async def fairness(address: str, model: str, seconds: float) -> None:
    async with channel(address) as connected:
        stub = pb_grpc.GenerationServiceStub(connected)
        batches = []
        for _ in range(5):
            answer = await stub.GenerateImages(pb.GenerateImagesRequest(model=model, count=64, seed=0))
            # On one core, as a batch of 64 would be.
            batches.append(1000 * answer.compute_time.ToTimedelta().total_seconds())
        batch_ms = statistics.median(batches)

        async def stream(priority: "pb.Priority") -> None:
            while True:
                generate = pb.GenerateImagesRequest(model=model, count=10_000, seed=0, priority=priority)
                async for _ in stub.StreamImages(pb.StreamImagesRequest(generate=generate)):
                    pass

        async def requests() -> None:
            while True:
                await stub.GenerateImages(pb.GenerateImagesRequest(model=model, count=1000, seed=0))

        p99 = statistics.quantiles(await one_image_calls(address, model, seconds), n=100)[98]
        print(f"{model}: a batch of 64 takes {batch_ms:.1f} ms on one core; p99 of one-image calls alone {p99:.1f} ms")
        for beside, others in {
            "a stream of 10,000": [stream(pb.PRIORITY_INTERACTIVE)],
            "a bulk stream of 10,000": [stream(pb.PRIORITY_BULK)],
            "requests of 1,000": [requests(), requests()],
        }.items():
            tasks = [asyncio.create_task(other) for other in others]
            rows = await one_image_calls(address, model, seconds)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            beside_p99 = statistics.quantiles(rows, n=100)[98]
            print(
                f"  beside {beside}: p99 {beside_p99:.1f} ms, {(beside_p99 - p99) / batch_ms:+.2f} batches", flush=True
            )


async def load(address: str, model: str, rate: float, count: int, seconds: float) -> tuple[Counter[str], list[float]]:
    """Call at a fixed rate, whether or not earlier calls were answered; return the outcomes, and answered latencies."""
    outcomes: Counter[str] = Counter()
    latencies: list[float] = []
    channels = [channel(address) for _ in range(8)]
    stubs = [pb_grpc.GenerationServiceStub(one) for one in channels]

    async def call(stub: pb_grpc.GenerationServiceStub, seed: int) -> None:
        started = time.perf_counter()
        try:
            await stub.GenerateImages(pb.GenerateImagesRequest(model=model, count=count, seed=seed), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            outcomes[error.code().name] += 1
        else:
            outcomes["OK"] += 1
            latencies.append(1000 * (time.perf_counter() - started))

    calls: set[asyncio.Task[None]] = set()
    started, sent = time.perf_counter(), 0
    while (now := time.perf_counter() - started) < seconds:
        while sent < now * rate:
            task = asyncio.create_task(call(stubs[sent % 8], sent))
            calls.add(task)
            task.add_done_callback(calls.discard)
            sent += 1
        await asyncio.sleep(max(0.0, (sent + 1) / rate - (time.perf_counter() - started)))
    await asyncio.gather(*calls)
    for one in channels:
        await one.close()
    return outcomes, latencies


async def overload(address: str, model: str, count: int, seconds: float) -> None:
    """Find the maximum rate with a closed loop, then ask for more."""

    async def caller(connected: grpc.aio.Channel, end: float) -> int:
        stub, images = pb_grpc.GenerationServiceStub(connected), 0
        while time.perf_counter() < end:
            await stub.GenerateImages(pb.GenerateImagesRequest(model=model, count=count, seed=images))
            images += count
        return images

    peaks, before = [], time.process_time()
    channels = [channel(address) for _ in range(8)]
    for _ in range(3):
        started = time.perf_counter()
        end = started + seconds / 3
        made = sum(await asyncio.gather(*(caller(one, end) for one in channels for _ in range(2))))
        peaks.append(made / (time.perf_counter() - started))
    for one in channels:
        await one.close()
    peak = statistics.median(peaks)
    client_cores = (time.process_time() - before) / seconds
    print(
        f"{model}, {count} images a call, deadline {DEADLINE_S:g} s: at most {peak:,.0f} images/s; the client takes "
        f"{client_cores:.2f} cores"
    )
    for factor in (0.5, 1, 2, 5, 10):
        before = time.process_time()
        outcomes, latencies = await load(address, model, factor * peak / count, count, seconds)
        client_cores = (time.process_time() - before) / seconds
        goodput = outcomes["OK"] * count / seconds
        p99 = statistics.quantiles(latencies, n=100)[98] if len(latencies) > 1 else float("nan")
        refused = ", ".join(f"{code} {number:,}" for code, number in sorted(outcomes.items()) if code != "OK")
        print(
            f"  {factor:g} x: goodput {goodput:,.0f} images/s, {goodput / peak:.2f} of the peak; p99 {p99:.0f} ms; "
            f"{outcomes['OK']:,} answered; {refused or 'none refused'}; the client takes {client_cores:.2f} cores",
            flush=True,
        )


def small(running: Running, model: str, seconds: float) -> None:
    """Ask for one image a call, at the rate that the server can answer and at a higher rate."""

    def outcomes(*flags: str) -> Counter[str]:
        before = codes(metrics(running))
        h2load(running.address, model, "--clients=8", "--threads=1", f"--duration={seconds:.0f}", *flags).communicate()
        return codes(metrics(running)) - before

    def codes(found: dict[str, float]) -> Counter[str]:
        calls = ((re.search(r'requests_total{code="(\w+)"', name), value) for name, value in found.items())
        return sum((Counter({match[1]: int(value)}) for match, value in calls if match), Counter())

    peak = outcomes("-m8")["OK"] / seconds
    print(f"{model}, one image a call, deadline {DEADLINE_S:g} s: at most {peak:,.0f} images/s")
    for factor in (1, 2, 5, 10):
        rate = f"--rps={max(1, round(factor * peak / 8))}"
        found = outcomes("-m2000", rate, f"--header=grpc-timeout: {1000 * DEADLINE_S:.0f}m")
        goodput = found["OK"] / seconds
        others = ", ".join(f"{code} {number:,}" for code, number in sorted(found.items()) if code != "OK")
        print(f"  {factor} x: goodput {goodput:,.0f} images/s, {goodput / peak:.2f} of the peak; {others}", flush=True)


async def measure(address: str, options: argparse.Namespace) -> None:
    await fairness(address, options.model, options.seconds)
    # Calls of many images, so that this program can make ten times as many as the server can answer.
    await overload(address, options.model, options.count, options.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dcgan64")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--count", type=int, default=64, help="images a call of the overload")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch)
        if (BUNDLED_MODELS / options.model).exists():
            (repository / options.model).symlink_to(BUNDLED_MODELS / options.model)
        else:
            from reference_models import publish  # needs the extra "trainer"

            publish(repository)
        with serving(f"--models={repository}") as running:
            asyncio.run(measure(running.address, options))
            small(running, options.model, options.seconds)


if __name__ == "__main__":
    main()
