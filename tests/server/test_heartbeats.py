"""Event loops that stand still: they are noticed, and what is stuck is replaced."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from tests.conftest import START_TIMEOUT_S, RunningServer
from tests.server.test_start_and_drain import health_told, http_get
from tests.server.test_workers import connections_of, number_of, workers_of

from ganserve import Client
from ganserve.v1 import administration_pb2 as admin_pb
from ganserve.v1 import administration_pb2_grpc as admin_grpc
from ganserve_server.processes.heartbeat import Heart

Start = Callable[..., RunningServer]
STUCK = 'ganserve_workers_replaced_total{reason="stuck"}'


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_workers_that_stand_still_are_replaced(start_server: Start) -> None:
    running = start_server("--workers=2", "--stuck-timeout-s=3", "--admin-address=127.0.0.1:0", "--drain-timeout-s=600")
    port = int(running.address.rpartition(":")[2])
    with Client(running.address) as client, grpc.insecure_channel(running.admin_address) as operator:
        client.generate("mlp-mnist", seed=1)
        (stopped,) = (pid for pid in workers_of(running) if connections_of(pid, port))
        (other,) = set(workers_of(running)) - {stopped}
        number = number_of(stopped)
        os.kill(stopped, signal.SIGSTOP)
        reload = admin_grpc.AdministrationServiceStub(operator).ReloadModels.future(admin_pb.ReloadModelsRequest())
        assert client.generate("mlp-mnist", seed=1, timeout_s=60)  # the SDK repeats it when the worker is killed
        assert reload.result(60).versions
    line = running.wait_for("a worker is stuck; it is replaced")
    assert (line["worker"], line["pid"]) == (number, stopped)
    assert line["seconds"] >= 3
    running.wait_for("worker started")
    samples = running.scrape()
    assert (samples[STUCK], samples["ganserve_workers_missing"]) == (1, 0)
    assert samples["ganserve_event_loop_standstill_seconds"] >= 3
    assert other in workers_of(running)

    for pid in workers_of(running):
        os.kill(pid, signal.SIGSTOP)
    until(lambda: http_get(running.metrics_address, "/livez")[0] == 503, "/livez does not fail")
    status, reason = http_get(running.metrics_address, "/readyz")
    assert status == 503
    assert reason.startswith("no worker answers calls: worker 0 ")
    until(lambda: running.scrape()["ganserve_workers_missing"] == 0, "the workers are not replaced")
    assert http_get(running.metrics_address, "/livez") == http_get(running.metrics_address, "/readyz") == (200, "ok\n")
    assert running.scrape()[STUCK] == 3

    stopped = workers_of(running)[1]
    os.kill(stopped, signal.SIGSTOP)
    running.process.terminate()
    assert running.wait_for("a worker is stuck; it is killed")["pid"] == stopped
    assert running.process.wait(START_TIMEOUT_S) == 0


def test_a_server_whose_processes_were_all_stopped_replaces_nobody(start_server: Start) -> None:
    running = start_server("--workers=2", "--stuck-timeout-s=3")
    workers = workers_of(running)
    for pid in (*workers, running.process.pid):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    for pid in (running.process.pid, *workers):  # the observer first: it finds old beats
        os.kill(pid, signal.SIGCONT)
    time.sleep(1.5)  # it looks three times
    assert http_get(running.metrics_address, "/readyz") == (200, "ok\n")
    assert workers_of(running) == workers
    assert running.scrape()[STUCK] == 0


BLOCKED = """
import logging, sys, time
from ganserve_server.__main__ import main

def block(line):
    if line.msg == "reloaded":
        if {locked}:
            logging.getLogger().handlers[0].acquire()
        time.sleep(600)
    return True

logging.getLogger("ganserve_server.processes.management").addFilter(block)
main()
"""


@pytest.mark.parametrize("locked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_only_process_ends_if_its_event_loop_is_stuck(
    locked: bool, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variant holds the log's lock, as a process does that waits for a full pipe."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(open_folder / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "7000000")
    flags = ("--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--workers=1", "--log-format=json")
    command = [sys.executable, "-c", BLOCKED.format(locked=locked), *flags, "--reload=off", "--stuck-timeout-s=4"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(open_folder / "notify"))
        systemd.settimeout(START_TIMEOUT_S)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                serving = json.loads(process.stderr.readline())
                while systemd.recv(4096) != b"READY=1":
                    pass
                assert systemd.recv(4096) == b"WATCHDOG=1"
                process.send_signal(signal.SIGHUP)
                until(lambda: http_get(serving["metrics_address"], "/livez")[0] == 503, "/livez does not fail")
                told = http_get(serving["metrics_address"], "/readyz")
                systemd.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while systemd.recv(4096):
                        pass
                assert health_told("--metrics-address", serving["metrics_address"])[0] == 1
                assert process.wait(START_TIMEOUT_S) == 3
            finally:
                process.kill()
            log = [json.loads(line) for line in process.stderr]
        with pytest.raises(BlockingIOError):
            systemd.recv(4096)  # the loop is not reported to run
    assert told[1].startswith("the event loop has stood still for ")
    if not locked:
        events = ["the event loop stands still", "the event loop is stuck; the process ends"]
        assert [line["event"] for line in log] == events
        assert "in block" in log[0]["stacks"]
        assert "MainThread" in log[0]["stacks"]


async def test_an_event_loop_that_runs_again_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    beats: list[int] = []
    with contextlib.closing(Heart(2.0, beats.append, ends_process=False)) as heart:
        while not any(line.msg == "the event loop stands still" for line in caplog.records):
            time.sleep(0.01)  # noqa: ASYNC251
        assert heart.why_stuck().startswith("the event loop has stood still for ")
        assert len(beats) == 1
        while heart.why_stuck():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert [line.msg for line in caplog.records] == ["the event loop stands still", "the event loop runs again"]
    assert test_an_event_loop_that_runs_again_is_left_alone.__name__ in caplog.records[0].__dict__["stacks"]
    assert "heart" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_on_an_overloaded_machine_nobody_is_replaced(start_server: Start) -> None:
    running = start_server("--workers=2", "--stuck-timeout-s=2")
    workers = workers_of(running)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * (os.cpu_count() or 1))]
    try:
        with Client(running.address) as client:
            end = time.monotonic() + 10
            while time.monotonic() < end:
                client.generate("cdcgan-mnist", count=64, seed=1)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert workers_of(running) == workers
    assert running.scrape()[STUCK] == 0
