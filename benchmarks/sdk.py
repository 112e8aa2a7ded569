"""Measures the overhead of the SDK over the raw stubs, on one server in one run.

latency   one caller, one image a call: the median of `Client` and `AsyncClient` minus the raw stub's (at most 30 µs)
calls     one caller, 64 images a call: images a second as a share of the raw stub's (at least 0.90)
stream    streams as fast as possible, by batches and by images, as a share of the images a second that h2load gets with
          8 connections and 64 images a call (at least 0.95)
each      the image of each of many scattered seeds: images a second by a loop of `generate`, by 64 such loops at once
          (`AsyncClient`), and by `generate_each`

Blocks of raw and SDK calls alternate; the medians of the blocks are printed.

    python benchmarks/sdk.py [--model cdcgan-mnist] [--rounds 15] [--seconds 5]
"""

import argparse
import asyncio
import itertools
import re
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, closing

import grpc
from running import h2load, serving

from ganserve import AsyncClient, Client
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

CALLS = {1: 300, 64: 60}
STREAMS = 2
AT_ONCE = 64
_OPTIONS = [("grpc.max_receive_message_length", -1)]


def block(call: Callable[[int], object], count: int) -> list[float]:
    """Make `count` calls; return the seconds that each took."""
    seconds = []
    for seed in range(CALLS[count]):
        started = time.perf_counter()
        call(seed)
        seconds.append(time.perf_counter() - started)
    return seconds


async def async_block(call: Callable[[int], Awaitable[object]], count: int) -> list[float]:
    seconds = []
    for seed in range(CALLS[count]):
        started = time.perf_counter()
        await call(seed)
        seconds.append(time.perf_counter() - started)
    return seconds


def tell(kind: str, count: int, raw: list[list[float]], ours: list[list[float]]) -> None:
    """Print the median over the rounds of the difference between the medians of both blocks."""
    added = [statistics.median(b) - statistics.median(a) for a, b in zip(raw, ours, strict=True)]
    shares = [sum(a) / sum(b) for a, b in zip(raw, ours, strict=True)]
    rate = count / statistics.median(statistics.mean(b) for b in ours)
    raw_ms = 1000 * statistics.median(statistics.median(a) for a in raw)
    print(
        f"{kind}, {count} image{'s' if count > 1 else ''} a call: {1e6 * statistics.median(added):+.0f} µs to "
        f"{raw_ms:.3f} ms; {rate:,.0f} images/s, {statistics.median(shares):.2f} of the raw stub's",
        flush=True,
    )


def threads(address: str, model: str, rounds: int) -> None:
    with grpc.insecure_channel(address, _OPTIONS) as channel, Client(address) as client:
        stub = pb_grpc.GenerationServiceStub(channel)
        for count in CALLS:

            def raw_call(seed: int, count: int = count) -> object:
                return stub.GenerateImages(pb.GenerateImagesRequest(model=model, count=count, seed=seed), timeout=30)

            def our_call(seed: int, count: int = count) -> object:
                return client.generate(model, count=count, seed=seed)

            raw, ours = [], []
            for _ in range(rounds + 1):
                raw.append(block(raw_call, count))
                ours.append(block(our_call, count))
            tell("Client", count, raw[1:], ours[1:])  # the first warms up


async def asyncio_(address: str, model: str, rounds: int) -> None:
    async with grpc.aio.insecure_channel(address, _OPTIONS) as channel, AsyncClient(address) as client:
        stub = pb_grpc.GenerationServiceStub(channel)
        for count in CALLS:

            async def raw_call(seed: int, count: int = count) -> object:
                request = pb.GenerateImagesRequest(model=model, count=count, seed=seed)
                return await stub.GenerateImages(request, timeout=30)

            async def our_call(seed: int, count: int = count) -> object:
                return await client.generate(model, count=count, seed=seed)

            raw, ours = [], []
            for _ in range(rounds + 1):
                raw.append(await async_block(raw_call, count))
                ours.append(await async_block(our_call, count))
            tell("AsyncClient", count, raw[1:], ours[1:])


def each(address: str, model: str, rounds: int, seconds: float) -> None:
    ways: dict[str, Callable[[], float]] = {
        "Client: a loop of generate": lambda: loop_of_calls(address, model, seconds),
        "Client.generate_each": lambda: each_blocking(address, model, seconds),
        "AsyncClient: a loop of generate": lambda: asyncio.run(calls_at_once(address, model, seconds, 1)),
        f"AsyncClient: {AT_ONCE} loops of generate at once": lambda: asyncio.run(
            calls_at_once(address, model, seconds, AT_ONCE)
        ),
        "AsyncClient.generate_each": lambda: asyncio.run(each_async(address, model, seconds)),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, rate in ways.items():
            found[way].append(rate())
    for way, rates in found.items():
        print(f"scattered seeds, {way}: {statistics.median(rates):,.0f} images/s", flush=True)


def scattered() -> Iterator[int]:
    return (count * 2654435761 % 2**32 for count in itertools.count())


def loop_of_calls(address: str, model: str, seconds: float) -> float:
    with Client(address) as client:
        return rate_of((client.generate(model, seed=seed) for seed in scattered()), seconds)


def each_blocking(address: str, model: str, seconds: float) -> float:
    with Client(address) as client, closing(client.generate_each(model, scattered())) as images:
        return rate_of(images, seconds)


def rate_of(images: Iterator[object], seconds: float) -> float:
    next(images)  # connects
    count, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        next(images)
        count += 1
    return count / passed


async def calls_at_once(address: str, model: str, seconds: float, callers: int) -> float:
    async with AsyncClient(address) as client:
        seeds, count = scattered(), 0
        await client.generate(model, seed=1)
        begin = time.perf_counter()

        async def call() -> None:
            nonlocal count
            while time.perf_counter() - begin < seconds:
                await client.generate(model, seed=next(seeds))
                count += 1

        await asyncio.gather(*(call() for _ in range(callers)))
        return count / (time.perf_counter() - begin)


async def each_async(address: str, model: str, seconds: float) -> float:
    async with AsyncClient(address) as client, aclosing(client.generate_each(model, scattered())) as images:
        await anext(images)
        count, begin = 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds:
            await anext(images)
            count += 1
        return count / passed


def read_streams(address: str, seconds: float, images: Callable[[Client], Iterator[int]]) -> float:
    """Read each stream with a client of its own; return the images a second of all, without the first second."""
    counted = [0] * STREAMS
    begin = time.perf_counter() + 1
    end = begin + seconds

    def read(number: int) -> None:
        with Client(address, timeout_s=seconds + 30) as client:
            for count in images(client):
                now = time.perf_counter()
                if now > end:
                    return
                if now > begin:
                    counted[number] += count

    readers = [threading.Thread(target=read, args=(number,)) for number in range(STREAMS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return sum(counted) / seconds


def by_images(images: Iterator[object]) -> Iterator[int]:
    """Read image by image; count in hundreds, because reading the clock takes as long as an image."""
    while read := sum(1 for _ in itertools.islice(images, 100)):
        yield read


def streams(address: str, model: str, rounds: int, seconds: float) -> None:
    count = 10_000_000
    ways: dict[str, Callable[[Client], Iterator[int]]] = {
        "stream_batches": lambda client: map(len, client.stream_batches(model, count=count, seed=1)),
        "stream": lambda client: by_images(client.stream(model, count=count, seed=1)),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    server = []
    for _ in range(rounds):
        flags = ("--clients=8", "-m1", "--threads=1", f"--duration={seconds:.0f}")
        told = re.search(r"([\d.]+) req/s", h2load(address, model, *flags, count=64).communicate()[0])
        assert told
        server.append(64 * float(told[1]))
        for way, images in ways.items():
            found[way].append(read_streams(address, seconds, images))
    limit = statistics.median(server)
    print(f"the server, 8 connections, 64 images a call, read by h2load: {limit:,.0f} images/s")
    for way, rates in found.items():
        rate = statistics.median(rates)
        print(f"Client.{way}, {STREAMS} streams: {rate:,.0f} images/s, {rate / limit:.2f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cdcgan-mnist")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    with serving() as running:
        threads(running.address, options.model, options.rounds)
        asyncio.run(asyncio_(running.address, options.model, options.rounds))
        each(running.address, options.model, max(1, options.rounds // 5), options.seconds)
        streams(running.address, options.model, max(1, options.rounds // 5), options.seconds)


if __name__ == "__main__":
    main()
