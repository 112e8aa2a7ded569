"""The log where nobody reads it: no call waits for it, lines are dropped and counted, and the server ends as usual."""

import contextlib
import json
import logging
import os
import queue
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import START_TIMEOUT_S, WORKERS, RunningServer
from tests.programs import Program, ended, installed, unread_pipe

from ganserve import Client, ModelNotFoundError
from ganserve_server.processes.log_writer import MAX_LINES, LogWriter
from ganserve_server.settings import BUNDLED_MODELS

DROPPED = "ganserve_log_lines_dropped_total"
UNKNOWN = "\N{GRINNING FACE}" * 1000  # a model whose name makes a line of about 3 KiB


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


@contextlib.contextmanager
def server_on(error: int, *flags: str) -> Iterator[RunningServer]:
    """Start a server whose log goes to a descriptor; it need not be read to know the addresses."""
    address, metrics_address = free_address(), free_address()
    common = ("--address", address, "--metrics-address", metrics_address, "--log-format=json")
    with Program([installed("ganserve-server"), *common, *flags], stderr=error) as process:
        running = RunningServer(process, queue.Queue(), threading.Event(), address, metrics_address)
        try:
            wait_for_readiness(running, "ok")
            yield running
        finally:
            process.kill()


def wait_for_readiness(running: RunningServer, wanted: str) -> None:
    """Ask until the server gives this answer."""
    until, answer = time.monotonic() + START_TIMEOUT_S, ""
    while answer != wanted:
        try:
            url = f"http://{running.metrics_address}/readyz"
            with urllib.request.urlopen(url, timeout=START_TIMEOUT_S) as response:
                answer = response.read().decode().strip()
        except urllib.error.HTTPError as error:
            answer = error.read().decode().strip()
        except OSError:
            assert running.process.poll() is None, "the server has ended"
        assert time.monotonic() < until, f"the server is {answer}"
        time.sleep(0.02)


def fill_log(running: RunningServer, client: Client) -> None:
    """Ask for an unknown model until lines are dropped."""
    before = running.scrape()[DROPPED]
    for _ in range(MAX_LINES // 100):
        for _ in range(100):
            with pytest.raises(ModelNotFoundError):
                client.generate(UNKNOWN)
        if running.scrape()[DROPPED] > before:
            return
    raise AssertionError("no line is dropped")


def read_up_to(descriptor: int, event: str) -> list[dict[str, Any]]:
    """Read the log up to an event, without the line that filled the pipe."""
    lines: list[dict[str, Any]] = []
    content = b""
    while event not in (line["event"] for line in lines):
        *whole, content = (content + os.read(descriptor, 1 << 16)).split(b"\n")
        lines += [json.loads(line) for line in whole if not line.startswith(b"-")]
    return lines


@pytest.mark.parametrize("workers", WORKERS)
def test_a_log_that_nobody_reads_holds_up_no_call_and_no_end(workers: str) -> None:
    with (
        unread_pipe() as (reading, writing),
        server_on(writing, "--workers", workers, "--access-log=all", "--drain-delay-s=0") as running,
        Client(running.address, retries=False, timeout_s=START_TIMEOUT_S) as client,
    ):
        fill_log(running, client)
        assert len(client.generate("mlp-mnist", seed=1)) == 1
        assert client.health()
        dropped = running.scrape()[DROPPED]
        lines = read_up_to(reading, "log lines dropped")
        assert [line["event"] for line in lines if line["event"] != "call"] == ["serving", "log lines dropped"]
        assert 0 < lines[-1]["count"] <= dropped
        assert lines[-1]["reason"] == "standard error was not read"
        fill_log(running, client)
        assert running.stop() == 0


def test_a_second_signal_ends_a_server_whose_log_nobody_reads() -> None:
    with unread_pipe() as (_, writing), server_on(writing, "--workers=1", "--drain-delay-s=3600") as running:
        running.process.terminate()
        wait_for_readiness(running, "draining")
        assert running.stop() == 128 + 15


@pytest.mark.parametrize(("flags", "status"), [(("--models", "/nothing"), 1), (("--workers", "none"), 2)])
def test_a_server_that_cannot_start_ends_though_nobody_reads_why(flags: tuple[str, str], status: int) -> None:
    with unread_pipe() as (_, writing):
        command = [installed("ganserve-server"), *flags]
        with ended(Program(command, stderr=writing)) as process:
            assert process.wait(START_TIMEOUT_S) == status


@pytest.mark.parametrize("workers", WORKERS)
def test_a_full_disk_costs_lines_of_the_log_and_no_call(workers: str) -> None:
    flags = ("--workers", workers, "--drain-delay-s=0")
    with open("/dev/full", "w") as full, server_on(full.fileno(), *flags) as running:
        with Client(running.address) as client, pytest.raises(ModelNotFoundError):
            client.generate("nothing")
        until = time.monotonic() + START_TIMEOUT_S
        while running.scrape()[DROPPED] < 2:  # `serving`, and the call
            assert time.monotonic() < until
        assert running.stop() == 0


def test_a_server_without_standard_error_serves() -> None:
    address, metrics_address = free_address(), free_address()
    command = f"exec {installed('ganserve-server')} --workers=1 --address={address} --metrics-address={metrics_address}"
    with ended(subprocess.Popen(["sh", "-c", f"{command} 2>&-"], text=True)) as process:
        running = RunningServer(process, queue.Queue(), threading.Event(), address, metrics_address)
        wait_for_readiness(running, "ok")
        assert os.readlink(f"/proc/{process.pid}/fd/2") == os.devnull
        running.process.terminate()
        assert process.wait(START_TIMEOUT_S) == 0


@pytest.fixture
def small_file(tmp_path: Path) -> Iterator[int]:
    """Make a file with room for two of the lines of a test; return its descriptor."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250, before[1]))
    yield file
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
    os.close(file)


def test_a_line_that_a_full_disk_cut_off_spoils_no_other(
    small_file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(small_file, "w", closefd=False) as file:
        monkeypatch.setattr("sys.stderr", file)
        log = LogWriter()
        log.setFormatter(logging.Formatter("%(message)s %(reason)s", defaults={"reason": ""}))
        for name in "abcd":
            log.handle(logging.makeLogRecord({"msg": name * 98}))
            assert log.wait()
        assert log.dropped == 2
        os.truncate(tmp_path / "log", 150)
        log.handle(logging.makeLogRecord({"msg": "e"}))
        assert log.wait()
    assert (tmp_path / "log").read_text().splitlines() == [
        *("a" * 98 + " ", "b" * 50),
        *("log lines dropped File too large", "e "),
    ]


def test_processes_that_share_a_pipe_mix_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with unread_pipe() as (reading, writing), open(writing, "w", closefd=False) as file:
        monkeypatch.setattr("sys.stderr", file)
        logs = [LogWriter(), LogWriter()]  # as in two processes
        expected = []
        for number in range(500):
            for log, letter in zip(logs, "ab", strict=True):
                expected.append(letter * (1 + number))
                log.handle(logging.makeLogRecord({"msg": expected[-1]}))
        with open(reading, closefd=False) as lines:
            lines.readline()  # filled the pipe
            assert sorted(lines.readline().strip() for _ in expected) == sorted(expected)


NO_END = "batches do not end; the server ends without them"
ENDLESS_LOAD = """
import threading
from ganserve_server.repository import served
from ganserve_server.__main__ import main

def open_version(versions, version):
    if version.version == {version}:
        print("loading", flush=True)
        threading.Event().wait()
    return opened(versions, version)

opened, served.ServedVersions._open = served.ServedVersions._open, open_version
served.Scheduler.close = lambda scheduler: threading.Event().wait()
main()
"""


@pytest.mark.parametrize("version", [1, 2])
def test_loads_and_batches_that_never_end_do_not_outlive_stopped(version: int, tmp_path: Path) -> None:
    """Neither at the start, which loads version 1, nor later."""
    shutil.copytree(BUNDLED_MODELS / "mlp-mnist" / "1", tmp_path / "mlp-mnist" / "1")
    flags = ("--log-format=json", "--address=127.0.0.1:0", "--metrics-address=off", "--workers=1", "--drain-delay-s=0")
    command = [sys.executable, "-c", ENDLESS_LOAD.format(version=version), *flags, "--models", str(tmp_path)]
    with ended(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        events = []
        if version == 2:
            events.append(json.loads(process.stderr.readline())["event"])
            shutil.copytree(tmp_path / "mlp-mnist" / "1", tmp_path / "mlp-mnist" / "2")
        assert process.stdout.readline() == "loading\n"
        process.terminate()
        _, error = process.communicate(timeout=START_TIMEOUT_S)
        events += [json.loads(line)["event"] for line in error.splitlines()]
        assert process.returncode == 0
        assert events == ["serving", "model loading", "draining", NO_END, "stopped"][0 if version == 2 else -1 :]
