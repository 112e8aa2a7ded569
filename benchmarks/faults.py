"""Subjects a real server to common faults, and measures the damage. Needs h2load (Debian: nghttp2-client).

start         the time from the command to the first answer, and the server's memory then
connections   1,000 connections at a time, each with calls
readers       50 streams whose readers stop reading, beside an ordinary caller: its latency, the server's memory
leavers       300 callers that disconnect in the middle of a stream: what remains in the queue and in open files
drain         SIGTERM under load, with a drain delay for load balancers: failed calls, exit status
kill          SIGKILL of one of two workers under load: failed calls, and the time until the next worker serves
stop          the same with SIGSTOP, after which the worker stands still
soak          all kinds of calls for some minutes: the server's memory each minute

    python benchmarks/faults.py [--only start,connections,readers,leavers,drain,kill,stop] [--soak-minutes 0]
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import resource
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from running import Running, counted, h2load, metrics, serving

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.settings import BUNDLED_MODELS

CALLS = 300
CLOSED_IN_S = 15.0
FAULTS = ("start", "connections", "readers", "leavers", "drain", "kill", "stop")


def not_ok(found: dict[str, float]) -> float:
    names = (name for name in found if name.startswith("ganserve_requests_total") and 'code="OK"' not in name)
    return sum(found[name] for name in names)


def replaced(found: dict[str, float]) -> float:
    return sum(value for name, value in found.items() if name.startswith("ganserve_workers_replaced_total"))


def images(running: Running) -> float:
    return sum(value for name, value in metrics(running).items() if name.startswith("ganserve_images_total"))


def open_files(running: Running) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in running.pids())


def waiting(running: Running) -> float:
    return sum(value for name, value in metrics(running).items() if name.startswith("ganserve_queue_images"))


def first_answer(port: int) -> float:
    """Call as soon as the server accepts; return the time of the answer."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.005)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        pb_grpc.GenerationServiceStub(channel).GenerateImages(pb.GenerateImagesRequest(model="mlp-mnist"), timeout=30)
    return time.perf_counter()


def start() -> None:
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as caller:
        (Path(scratch) / "mlp-mnist").symlink_to(BUNDLED_MODELS / "mlp-mnist")
        models = {"the bundled models": (), "one model": (f"--models={scratch}",)}
        kinds = itertools.product(models.items(), (1, 2), ("first start", "later start"))
        for (title, flags), workers, which in kinds:
            answered, ready, memory, cpu = [], [], [], []
            for _ in range(5):
                state = Path(scratch) / "state"
                if which == "first start":
                    shutil.rmtree(state, ignore_errors=True)  # no file was checked before
                before_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
                with socket.create_server(("127.0.0.1", 0)) as free:
                    port = free.getsockname()[1]
                started = time.perf_counter()
                answer = caller.submit(first_answer, port)
                given = (f"--address=127.0.0.1:{port}", f"--workers={workers}", f"--state-dir={state}")
                with serving(*given, *flags) as running:
                    ready.append(time.perf_counter() - started)
                    answered.append(answer.result() - started)
                    memory.append(running.resident_mib())
                cpu.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before_s)
            print(
                f"start: {title}, {workers} workers, {which}: first answer after {statistics.median(answered):.2f} s, "
                f"all serve after {statistics.median(ready):.2f} s, {statistics.median(cpu):.2f} s of CPU time with "
                f"the end, {statistics.median(memory):.0f} MiB resident"
            )


def connections() -> None:
    with serving() as running:
        before = running.resident_mib()
        answered, failed = counted(h2load(running.address, "mlp-mnist", "--clients=1000", "--requests=20000", "-m1"))
        print(
            f"connections: 1,000, {answered:,} calls answered, {failed + not_ok(metrics(running)):.0f} failed; "
            f"memory {before:.0f} MiB before, {running.resident_mib():.0f} after"
        )


async def readers() -> None:
    with serving() as running:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]

        def stub() -> pb_grpc.GenerationServiceStub:
            return pb_grpc.GenerationServiceStub(grpc.aio.insecure_channel(running.address, options))

        async def latencies(caller: pb_grpc.GenerationServiceStub) -> list[float]:
            rows = []
            for seed in range(CALLS):
                started = time.perf_counter()
                await caller.GenerateImages(pb.GenerateImagesRequest(model="mlp-mnist", seed=seed))
                rows.append(1000 * (time.perf_counter() - started))
            return rows

        caller = stub()
        alone, before = statistics.median(await latencies(caller)), running.resident_mib()
        request = pb.StreamImagesRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=10_000_000))
        streams = [stub().StreamImages(request) for _ in range(50)]
        for stream in streams:
            await stream.read()
        # Wait until images are made only for the caller: all streams are then blocked.
        made = -1.0
        while images(running) != made:
            await latencies(caller)
            made = images(running) + CALLS
            await latencies(caller)
        beside = statistics.median(await latencies(caller))
        print(
            f"readers: 50 streams of 10,000,000 images (7.8 GB each), unread: memory {before:.0f} MiB before, "
            f"{running.resident_mib():.0f} with them; a caller's p50 {alone:.2f} ms before, {beside:.2f} with them"
        )
        for stream in streams:
            stream.cancel()


async def leavers() -> None:
    with serving() as running:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        before, files = running.resident_mib(), open_files(running)
        for _ in range(6):
            channels = [grpc.aio.insecure_channel(running.address, options) for _ in range(50)]
            request = pb.StreamImagesRequest(generate=pb.GenerateImagesRequest(model="dcgan-mnist", count=100_000))
            streams = [pb_grpc.GenerationServiceStub(channel).StreamImages(request) for channel in channels]
            for number, stream in enumerate(streams):
                await stream.read()
                if number % 2:
                    stream.cancel()  # the other streams end with their connection
            for channel in channels:
                await channel.close()
            # gRPC keeps a connection as long as its channel is referenced.
            del channels, channel, streams, stream
        async with grpc.aio.insecure_channel(running.address, options) as channel:
            await pb_grpc.GenerationServiceStub(channel).GenerateImages(pb.GenerateImagesRequest(model="dcgan-mnist"))
        end = time.monotonic() + CLOSED_IN_S
        while open_files(running) > files + 1 and time.monotonic() < end:
            pass
        print(
            f"leavers: 300; left in the queue {waiting(running):.0f} images, open files {files} before, "
            f"{open_files(running)} after; memory {before:.0f} MiB before, {running.resident_mib():.0f} after"
        )


def drain() -> None:
    with serving("--drain-delay-s=4") as running:
        load = h2load(running.address, "mlp-mnist", "--clients=8", "-m4", "--duration=3")
        while not_ok(found := metrics(running)) == 0 and len([n for n in found if "requests_total" in n]) == 0:
            pass
        running.process.send_signal(signal.SIGTERM)
        answered, failed = counted(load)
        print(
            f"drain: {answered:,} calls answered around a SIGTERM, {failed} failed; "
            f"exit status {running.process.wait(60)}"
        )


def kill() -> None:
    lose_worker("kill", signal.SIGKILL)


def stop() -> None:
    lose_worker("stop", signal.SIGSTOP)


def lose_worker(fault: str, number: signal.Signals) -> None:
    """Send one of two workers a signal."""
    with serving("--workers=2") as running:
        first = running.pids()[1]
        outcomes: list[tuple[float, bool]] = []
        over = threading.Event()

        def caller() -> None:
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(running.address, options) as channel:
                stub = pb_grpc.GenerationServiceStub(channel)
                while not over.is_set():
                    try:
                        stub.GenerateImages(pb.GenerateImagesRequest(model="mlp-mnist"), timeout=5)
                        outcomes.append((time.monotonic(), True))
                    except grpc.RpcError:
                        outcomes.append((time.monotonic(), False))

        callers = [threading.Thread(target=caller) for _ in range(8)]
        for one in callers:
            one.start()
        while len(outcomes) < 500:
            time.sleep(0.01)
        killed = time.monotonic()
        os.kill(first, number)
        while not replaced(found := metrics(running)) or found["ganserve_workers_missing"]:
            time.sleep(0.05)
        back_s = time.monotonic() - killed
        over.set()
        for one in callers:
            one.join()
        failed = [at for at, ok in outcomes if not ok]
        last = max((at - killed for at in failed), default=0.0)
        print(
            f"{fault}: {len(outcomes):,} calls by 8 callers without retries, {len(failed)} failed, the last "
            f"{1000 * last:.0f} ms after the signal; the next worker served after {back_s:.2f} s; "
            f"{metrics(running)['ganserve_workers']:.0f} workers"
        )


async def soak(minutes: float) -> None:
    with serving() as running:
        memory = []
        end = time.monotonic() + 60 * minutes
        async with grpc.aio.insecure_channel(running.address, [("grpc.max_receive_message_length", -1)]) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)

            async def caller(number: int) -> int:
                calls = 0
                while time.monotonic() < end:
                    calls += 1
                    model = ("mlp-mnist", "cdcgan-mnist", "dcgan-mnist")[calls % 3]
                    encoding = (pb.ENCODING_RAW, pb.ENCODING_PNG, pb.ENCODING_WEBP)[(calls // 3) % 3]
                    count = (1, 7, 64, 300)[(number + calls) % 4]
                    request = pb.GenerateImagesRequest(model=model, count=count, encoding=encoding)
                    if calls % 5 == 0:
                        stream = stub.StreamImages(pb.StreamImagesRequest(generate=request))
                        async for _ in stream:
                            if calls % 2:
                                stream.cancel()
                                break
                    elif calls % 7 == 0:
                        request.model = "nothing"
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await stub.GenerateImages(request, timeout=(0.002 if calls % 11 == 0 else 30))
                return calls

            callers = [asyncio.create_task(caller(number)) for number in range(6)]
            while time.monotonic() < end:
                await asyncio.wait(callers, timeout=max(0.0, min(60.0, end - time.monotonic())))
                memory.append(round(running.resident_mib()))
            calls = sum(await asyncio.gather(*callers))
        print(
            f"soak: {calls:,} calls in {minutes:g} minutes; MiB each minute: {memory}; "
            f"files {open_files(running)}, waiting {waiting(running):.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAULTS))
    parser.add_argument("--soak-minutes", type=float, default=0)
    options = parser.parse_args()
    for name in options.only.split(","):
        if name not in FAULTS:
            sys.exit(f"{name!r} is none of {', '.join(FAULTS)}")
        found = globals()[name]()
        if asyncio.iscoroutine(found):
            asyncio.run(found)
        sys.stdout.flush()
    if options.soak_minutes:
        asyncio.run(soak(options.soak_minutes))


if __name__ == "__main__":
    main()
