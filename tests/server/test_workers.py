"""Several worker processes behind one port, killed and counted."""

import asyncio
import contextlib
import os
import select
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from tests.conftest import RunningServer
from tests.server.test_start_and_drain import failing_start, scrape, wait_for_sample

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.machine import cores
from ganserve_server.settings import BUNDLED_MODELS

Start = Callable[..., RunningServer]


class Caller:
    """Has a connection of its own, which clients of one process do not."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._stub = pb_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> "Caller":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def make(self, model: str, count: int, seed: int) -> bytes:
        request = pb.GenerateImagesRequest(model=model, count=count, seed=seed)
        response: pb.GenerateImagesResponse = await self._stub.GenerateImages(request, timeout=30)
        return response.pixels


def workers_of(running: RunningServer) -> list[int]:
    pid = running.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children)


def connections_of(pid: int, port: int) -> int:
    """Count a process's established connections on a port, by the inodes of its open sockets."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    mine = {row[9] for row in rows if int(row[1].split(":")[1], 16) == port and row[3] == "01"}
    opened = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            opened += os.readlink(descriptor).removeprefix("socket:[").removesuffix("]") in mine
    return opened


async def test_connections_are_spread_evenly_and_counters_are_true_sums(start_server: Start) -> None:
    running = start_server("--workers", "2")
    port = int(running.address.rpartition(":")[2])
    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(running.address)) for _ in range(8)]
        made = await asyncio.gather(*(caller.make("mlp-mnist", 5, 1) for caller in callers))
        assert len(set(made)) == 1
        assert [connections_of(pid, port) for pid in workers_of(running)] == [4, 4]
        samples = scrape(running)
    assert samples['ganserve_images_total{model="mlp-mnist",version="1"}'] == 40
    assert samples['ganserve_requests_total{code="OK",method="GenerateImages",model="mlp-mnist",version="1"}'] == 8
    assert samples["ganserve_workers"] == 2
    assert samples['ganserve_queue_images{model="mlp-mnist"}'] == 0
    assert samples["process_resident_memory_bytes"] > 0
    assert sum(name.startswith("ganserve_model_info{") and value == 1 for name, value in samples.items()) == 4


async def test_a_killed_worker_is_replaced_while_the_others_serve(start_server: Start) -> None:
    running = start_server("--workers", "2")
    first, second = workers_of(running)
    port = int(running.address.rpartition(":")[2])
    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(running.address)) for _ in range(4)]
        await asyncio.gather(*(caller.make("mlp-mnist", 1, 1) for caller in callers))
        assert connections_of(first, port) == connections_of(second, port) == 2
        os.kill(first, signal.SIGKILL)
        outcomes = await asyncio.gather(*(caller.make("mlp-mnist", 1, 1) for caller in callers), return_exceptions=True)
        answered = sum(isinstance(outcome, bytes) for outcome in outcomes)
        assert answered >= 2  # all but those whose connection was the killed worker's
        replaced = await asyncio.to_thread(running.wait_for, "worker started")
        assert workers_of(running) == sorted([second, replaced["pid"]])
        await asyncio.gather(*(caller.make("mlp-mnist", 1, 1) for caller in callers))
    samples = scrape(running)
    # Those of the dead one are not lost.
    assert (
        samples['ganserve_requests_total{code="OK",method="GenerateImages",model="mlp-mnist",version="1"}']
        == 8 + answered
    )
    assert samples["ganserve_workers"] == 2


async def test_sigterm_under_load_ends_no_call_but_with_an_answer_or_unavailable(start_server: Start) -> None:
    running = start_server("--workers", "2")
    outcomes: list[grpc.StatusCode] = []
    loaded = asyncio.Event()

    async def call_on(caller: Caller) -> None:
        while True:
            try:
                await caller.make("mlp-mnist", 1, 1)
            except grpc.aio.AioRpcError as error:
                outcomes.append(error.code())
                return
            outcomes.append(grpc.StatusCode.OK)
            if len(outcomes) >= 100:
                loaded.set()

    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(running.address)) for _ in range(8)]
        calls = [asyncio.create_task(call_on(caller)) for caller in callers]
        await loaded.wait()
        running.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*calls)
    assert set(outcomes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert await asyncio.to_thread(running.process.wait, 30) == 0


def test_sighup_reloads_in_every_worker(start_server: Start, tmp_path: Path) -> None:
    shutil.copytree(BUNDLED_MODELS / "mlp-mnist", tmp_path / "mlp-mnist")
    running = start_server("--workers", "2", "--models", tmp_path, "--reload", "off")
    shutil.copytree(tmp_path / "mlp-mnist" / "1", tmp_path / "mlp-mnist" / "2")
    running.process.send_signal(signal.SIGHUP)
    wait_for_sample(running, 'ganserve_model_loads_total{outcome="loaded"}', lambda loads: loads == 4)
    with Client(running.address) as client:
        assert client.generate("mlp-mnist", seed=1).version == 2
    shutil.rmtree(tmp_path / "mlp-mnist" / "2")
    running.process.send_signal(signal.SIGHUP)
    wait_for_sample(running, 'ganserve_model_loads_total{outcome="unloaded"}', lambda unloads: unloads == 2)
    running.stop()
    events = []
    while "stopped" not in events:
        events.append(running.events.get(timeout=30)["event"])
    assert events == ["model loaded", "model unloaded", "draining", "stopped"]  # told once, and nothing else


def test_workers_end_at_once_when_their_supervisor_is_killed(start_server: Start) -> None:
    running = start_server("--workers", "2", "--drain-delay-s", "600")
    pids = [os.pidfd_open(pid) for pid in workers_of(running)]
    running.process.kill()
    for descriptor in pids:
        assert wait_for_end(descriptor), "a worker lives on"


def wait_for_end(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(30_000))


def test_what_keeps_a_worker_from_starting_keeps_the_server(server: RunningServer, tmp_path: Path) -> None:
    assert server.address in failing_start("--workers", "2", "--address", server.address, code=1)
    assert "ganserve-trainer export" in failing_start("--workers", "2", "--models", tmp_path, code=1)


@pytest.mark.parametrize("workers", ["0", "many", "-1"])
def test_a_number_of_workers_that_is_none_is_refused(workers: str) -> None:
    assert "--workers" in failing_start("--workers", workers, code=2)


def test_auto_is_a_quarter_of_the_cores(start_server: Start) -> None:
    running = start_server("--workers=auto", "--threads", str(max(64, cores().machine)))  # threads are no cores
    assert len(workers_of(running)) in (0, cores().usable // 4)


def test_far_more_threads_than_cores_are_refused() -> None:
    most = max(64, cores().machine)
    told = failing_start("--threads", str(most + 1), code=2)
    assert f"is '{most + 1}': this machine has {cores().machine} cores, a server at most {most} threads" in told
