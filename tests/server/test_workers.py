"""Several worker processes behind one port, killed and counted."""

import asyncio
import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from tests.conftest import START_TIMEOUT_S, RunningServer
from tests.programs import Program, installed
from tests.server.test_start_and_drain import failing_start, wait_for_sample

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.machine import cores
from ganserve_server.settings import BUNDLED_MODELS
from ganserve_server.shared.scoreboard import AcceptOrder, Scoreboard, scoreboard_bytes

Start = Callable[..., RunningServer]
UNLIMITED = "--stuck-timeout-s=3600"  # for tests of what happens while a worker stands still


class Caller:
    """Has a connection of its own, which clients of one process do not."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._stub = pb_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> "Caller":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def version(self, model: str) -> int:
        """Return the version that makes an image."""
        response = await self._stub.GenerateImages(pb.GenerateImagesRequest(model=model, count=1), timeout=30)
        return int(response.version)

    async def make(self, model: str, count: int, seed: int) -> bytes:
        request = pb.GenerateImagesRequest(model=model, count=count, seed=seed)
        response: pb.GenerateImagesResponse = await self._stub.GenerateImages(request, timeout=30)
        return response.pixels


def workers_of(running: RunningServer) -> list[int]:
    return sorted(children_of(running.process.pid))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def threads_of(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").glob("*/stat"))


def number_of(pid: int) -> int | None:
    """Tell which worker a process is; None if it is none, not yet, or no longer."""
    try:
        if b"\0-m\0ganserve_server\0" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return None
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    given = next(variable for variable in variables if variable.startswith(b"GANSERVE_WORKER="))
    number: int = json.loads(given.partition(b"=")[2])["number"]
    return number


@contextlib.contextmanager
def halfway(*flags: str | Path) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """Start a server of two workers, and have both stand still as soon as they are there."""
    common = ("--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--log-format=json", "--workers=2")
    command = [installed("ganserve-server"), *common, *map(str, flags)]
    with Program(command, stderr=subprocess.PIPE, text=True) as process:
        pids: dict[int, int] = {}
        try:
            while len(pids) < 2:
                for pid in children_of(process.pid):
                    if (number := number_of(pid)) is not None and number not in pids:
                        pids[number] = pid
                        os.kill(pid, signal.SIGSTOP)
            yield process, [pids[0], pids[1]]
        finally:
            process.kill()
            for pid in pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def read_up_to(process: "subprocess.Popen[str]", event: str) -> list[str]:
    """Read the log up to an event; return all of them."""
    assert process.stderr is not None
    events: list[str] = []
    while event not in events:
        events.append(json.loads(process.stderr.readline())["event"])
    return events


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
        samples = running.scrape()
    assert samples['ganserve_images_total{model="mlp-mnist",version="1"}'] == 40
    assert samples['ganserve_requests_total{code="OK",method="GenerateImages",model="mlp-mnist",version="1"}'] == 8
    assert samples["ganserve_workers"] == 2
    assert samples['ganserve_queue_images{model="mlp-mnist"}'] == 0
    assert samples["process_resident_memory_bytes"] > 0
    assert sum(name.startswith("ganserve_model_info{") and value == 1 for name, value in samples.items()) == 4


def connect(address: str) -> socket.socket:
    """Open a connection, and wait until the server has greeted it."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
    assert connection.recv(9)
    return connection


def test_connections_that_come_all_the_time_are_spread_evenly(start_server: Start) -> None:
    running = start_server("--workers", "3")
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(running.address))
        counts = [connections_of(pid, int(running.address.rpartition(":")[2])) for pid in workers_of(running)]
    assert sum(counts) == 300
    assert max(counts) - min(counts) <= 15


def test_a_worker_that_stands_still_is_waited_for_once(start_server: Start) -> None:
    running = start_server("--workers", "3", UNLIMITED)
    os.kill(workers_of(running)[0], signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(connect(running.address))
            time.sleep(0.2)  # what comes long after is not waited with either
        started = time.monotonic()
        for _ in range(12):
            stack.enter_context(connect(running.address))
        seconds = time.monotonic() - started
        counts = [connections_of(pid, int(running.address.rpartition(":")[2])) for pid in workers_of(running)]
    assert counts == [0, 9, 9]
    assert seconds < 0.5


def memory_for_metrics(pid: int) -> list[int]:
    """Return the inodes of the memory in which workers count, of each that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [int(line.split()[4]) for line in lines if "ganserve-metrics" in line]


async def test_a_killed_worker_is_replaced_while_the_others_serve(
    start_server: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    running = start_server("--workers", "2")
    before = memory_for_metrics(running.process.pid)
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
    samples = running.scrape()
    # Those of the dead one are not lost.
    assert (
        samples['ganserve_requests_total{code="OK",method="GenerateImages",model="mlp-mnist",version="1"}']
        == 8 + answered
    )
    assert samples["ganserve_workers"] == 2
    # Nor is its memory kept.
    after = memory_for_metrics(running.process.pid)
    assert len(before) == len(after) == 2
    assert len({*before, *after}) == 3
    assert (samples["ganserve_workers"], samples["ganserve_workers_missing"]) == (2, 0)
    replaced = [samples[f'ganserve_workers_replaced_total{{reason="{reason}"}}'] for reason in ("ended", "stuck")]
    assert replaced == [1, 0]


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
    events: list[str] = []

    def read_events_up_to(last: str, times: int) -> None:
        while events.count(last) < times:
            events.append(running.events.get(timeout=START_TIMEOUT_S)["event"])

    running.process.send_signal(signal.SIGHUP)
    read_events_up_to("reloaded", 1)
    assert running.scrape()['ganserve_model_loads_total{outcome="loaded"}'] == 4
    with Client(running.address) as client:
        assert client.generate("mlp-mnist", seed=1).version == 2
    shutil.rmtree(tmp_path / "mlp-mnist" / "2")
    running.process.send_signal(signal.SIGHUP)
    read_events_up_to("reloaded", 2)
    assert running.scrape()['ganserve_model_loads_total{outcome="unloaded"}'] == 2
    running.stop()
    read_events_up_to("stopped", 1)
    # Told once, and nothing else.
    assert events == ["model loading", "model loaded", "reloaded", "model unloaded", "reloaded", "draining", "stopped"]


@pytest.mark.parametrize("draining", [False, True])
def test_workers_end_at_once_when_their_supervisor_does(
    draining: bool, start_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    running = start_server("--workers", "2", "--drain-delay-s", "600")
    pids = [os.pidfd_open(pid) for pid in workers_of(running)]
    if draining:
        running.process.terminate()
        with Client(running.address) as client:
            while client.health():
                pass  # a worker knows it
        running.process.terminate()
    else:
        running.process.kill()
    ended = [wait_for_end(descriptor) for descriptor in pids]
    for descriptor in pids:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    assert all(ended), "a worker lives on"
    assert not list(tmp_path.iterdir())


def wait_for_end(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(30_000))


def test_sigterm_ends_a_start() -> None:
    with halfway() as (process, pids):
        ends = [os.pidfd_open(pid) for pid in pids]
        while any(file.read_text().rpartition(")")[2].split()[0] != "S" for file in threads_of(process.pid)):
            pass  # until it only waits for them
        process.terminate()
        _, told = process.communicate(timeout=30)
        assert process.returncode == 0
        assert [json.loads(line)["event"] for line in told.splitlines()] == ["stopped"]
        for descriptor in ends:
            assert wait_for_end(descriptor), "a worker lives on"


def test_workers_end_whose_supervisor_was_killed_while_they_started() -> None:
    with halfway("--drain-delay-s=600") as (process, pids):
        ends = [os.pidfd_open(pid) for pid in pids]
        process.kill()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        for descriptor in ends:
            assert wait_for_end(descriptor), "a worker lives on"
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_sighup_while_the_workers_start_is_obeyed_when_they_serve() -> None:
    with halfway() as (process, pids):
        for pid in (process.pid, *pids):
            os.kill(pid, signal.SIGHUP)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert read_up_to(process, "serving") == ["serving"]
        process.terminate()
        assert process.wait(30) == 0


def test_a_start_survives_the_end_of_its_first_worker() -> None:
    with halfway() as (process, pids):
        os.kill(pids[0], signal.SIGKILL)
        os.kill(pids[1], signal.SIGCONT)
        assert "serving" in read_up_to(process, "worker started")
        process.terminate()
        assert process.wait(30) == 0


def test_a_start_fails_whose_workers_are_all_killed() -> None:
    with halfway() as (process, pids):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "a worker ended with status -9 before it served" in told
        assert "Traceback" not in told


async def test_a_worker_that_stands_still_holds_up_nobody_else(start_server: Start) -> None:
    running = start_server("--workers", "2", "--drain-timeout-s", "1", UNLIMITED)
    stopped = workers_of(running)[0]
    number = number_of(stopped)
    os.kill(stopped, signal.SIGSTOP)
    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(running.address)) for _ in range(8)]
        await asyncio.gather(*(caller.make("mlp-mnist", 1, 1) for caller in callers))
    running.process.terminate()
    killed = await asyncio.to_thread(running.wait_for, "workers do not end; they are killed")
    assert (killed["timeout_s"], killed["workers"]) == (6, [number])
    assert await asyncio.to_thread(running.process.wait, 30) == 0


def test_a_reload_is_done_when_all_workers_have_reloaded(
    start_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(BUNDLED_MODELS / "mlp-mnist", tmp_path / "mlp-mnist")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{tmp_path}/notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(30)
        systemd.bind(f"\0{tmp_path}/notify")
        running = start_server("--workers", "2", "--models", tmp_path, "--reload", "off", UNLIMITED)
        assert systemd.recv(4096) == b"READY=1"
        last = workers_of(running)[1]
        os.kill(last, signal.SIGSTOP)
        shutil.copytree(tmp_path / "mlp-mnist" / "1", tmp_path / "mlp-mnist" / "2")
        running.process.send_signal(signal.SIGHUP)
        assert systemd.recv(4096).startswith(b"RELOADING=1")
        wait_for_sample(running, 'ganserve_model_loads_total{outcome="loaded"}', lambda loads: loads == 3)
        os.kill(last, signal.SIGCONT)
        assert systemd.recv(4096) == b"READY=1"
        assert running.scrape()['ganserve_model_loads_total{outcome="loaded"}'] == 4


def test_changes_are_told_once_though_the_first_worker_is_just_being_replaced(
    start_server: Start, tmp_path: Path
) -> None:
    shutil.copytree(BUNDLED_MODELS / "mlp-mnist", tmp_path / "mlp-mnist")
    running = start_server("--workers", "2", "--models", tmp_path, "--reload", "off")
    (first,) = (pid for pid in workers_of(running) if number_of(pid) == 0)
    os.kill(first, signal.SIGKILL)
    running.wait_for("a worker ended; it is replaced")
    shutil.copytree(tmp_path / "mlp-mnist" / "1", tmp_path / "mlp-mnist" / "2")
    running.process.send_signal(signal.SIGHUP)
    events = [running.events.get(timeout=30)["event"] for _ in range(4)]
    assert sorted(events) == ["model loaded", "model loading", "reloaded", "worker started"]
    running.stop()
    assert running.wait_for("draining")


def test_a_worker_that_cannot_be_replaced_is_tried_again(start_server: Start) -> None:
    running = start_server("--workers", "2")
    pid = running.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.kill(workers_of(running)[0], signal.SIGKILL)
    assert "Too many open files" in running.wait_for("a worker cannot be started")["reason"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    running.wait_for("worker started")
    assert len(workers_of(running)) == 2


@pytest.mark.parametrize("workers", ["auto", "1", "2"])
def test_a_link_to_nothing_in_a_models_place_is_rejected(workers: str, start_server: Start, tmp_path: Path) -> None:
    shutil.copytree(BUNDLED_MODELS / "mlp-mnist", tmp_path / "mlp-mnist")
    (tmp_path / "mlp-mnist" / "2").mkdir()
    (tmp_path / "mlp-mnist" / "2" / "model.onnx").symlink_to(tmp_path / "nothing")
    running = start_server("--workers", workers, "--models", tmp_path)
    with Client(running.address) as client:
        assert client.generate("mlp-mnist", seed=1).version == 1


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
    assert (
        f"is '{most + 1}'; this machine has {cores().machine} cores, so a server may have at most {most} threads"
        in told
    )


def test_connections_that_are_kept_unused_do_not_send_the_next_ones_elsewhere() -> None:
    memory = os.memfd_create("board")
    os.ftruncate(memory, scoreboard_bytes(2))
    one, other = Scoreboard(memory, workers=2, mine=0), Scoreboard(memory, workers=2, mine=1)
    one.set_connections(100)
    other.set_connections(5)
    for board, in_use in ((one, 5), (other, 5)):
        board.set_in_use(in_use)
    assert AcceptOrder(one).may_accept()
    assert AcceptOrder(other).may_accept()
    one.set_in_use(100)
    assert not AcceptOrder(one).may_accept()
    other.absent(1)
    assert AcceptOrder(one).may_accept()
