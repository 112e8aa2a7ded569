import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.client.program import TIMEOUT_S, command, ganserve
from tests.conftest import RunningServer
from tests.programs import Program, ended

PERCENTILES = ("p50", "p90", "p99", "p99.9", "max")


def images_made(server: RunningServer) -> float:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as page:
        found = re.findall(r"^ganserve_images_total\S* (\S+)", page.read().decode(), re.MULTILINE)
    return sum(map(float, found))


def test_a_closed_loop_is_measured(start_server: Callable[..., RunningServer]) -> None:
    server = start_server()
    arguments = ("bench", "cdcgan-mnist", "--concurrency", "3", "--count", "5", "--duration", "0.5")
    before = images_made(server)
    done = ganserve(*arguments, "--json", address=server.address)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["loop"], figures["concurrency"], figures["errors"]) == ("closed", 3, {})
    assert images_made(server) - before == 5 * (figures["calls"] + 1)  # one call finds out what the server refuses
    assert figures["images_per_second"] == pytest.approx(5 * figures["calls_per_second"])
    assert figures["calls_per_second"] == pytest.approx(figures["calls"] / figures["seconds"])
    latencies = [figures["latency_ms"][name] for name in PERCENTILES]
    assert latencies == sorted(latencies)
    # Little's law: calls in flight are calls a second times seconds a call.
    assert figures["calls_per_second"] * figures["latency_ms"]["mean"] / 1e3 == pytest.approx(3, rel=0.3)


def test_the_text_has_percentiles_and_a_histogram_of_every_call(server: RunningServer) -> None:
    done = ganserve("bench", "mlp-mnist", "--rate", "100", "--duration", "0.5", address=server.address)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in PERCENTILES)
    counted = re.findall(r"^ +[\d.]+ ms +(\d+) ?.*$", done.stdout, re.MULTILINE)
    assert sum(map(int, counted)) == 50
    assert "█" * 40 in done.stdout
    assert "p99.9 of 50 calls is the slowest" in done.stdout


def test_one_call_is_measured_too(server: RunningServer) -> None:
    done = ganserve("bench", "cdcgan-mnist", "--rate", "1", "--duration", "1", address=server.address)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^ +[\d.]+ ms +1 ", done.stdout, re.MULTILINE)


def test_an_open_loop_counts_from_when_a_call_was_meant_to_be_sent(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server()
    arguments = ("bench", "mlp-mnist", "--rate", "100", "--duration", "2", "--json")
    with ended(Program(command(*arguments, address=server.address), stdout=subprocess.PIPE)) as process:
        while images_made(server) < 10:
            assert process.poll() is None
        # The program itself is held up, for long enough to be seen: the calls of that time are sent late.
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.8)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=TIMEOUT_S)
    figures = json.loads(out)
    assert figures["calls"] == 200
    assert figures["latency_ms"]["max"] > 700
    assert figures["latency_ms"]["p90"] > 300  # 40 % of the calls were late, by 400 ms in the middle
    assert any("this program was itself" in warning for warning in figures["warnings"])


def test_refused_calls_are_counted_by_reason_and_not_made_again(start_server: Callable[..., RunningServer]) -> None:
    server = start_server("--max-queue-images", "64")
    arguments = ("bench", "mlp-mnist", "--concurrency", "16", "--count", "60", "--duration", "0.5")
    done = ganserve(*arguments, "--json", address=server.address)
    figures = json.loads(done.stdout)
    failed = figures["errors"]["queue_full"]
    assert (done.returncode, figures["calls"] > 0) == (1, True)
    assert done.stderr == f"ganserve: {failed:,} of {failed + figures['calls']:,} calls failed (queue_full)\n"
    assert set(figures["errors"]) == set(figures["first_errors"]) == {"queue_full"}
    assert "no room for 60 more" in figures["first_errors"]["queue_full"]
    shown = ganserve(*arguments, address=server.address).stdout
    assert re.search(r"^ +[\d,]+ queue_full: the queue of model mlp-mnist .*\(request id \w+\)$", shown, re.MULTILINE)
    assert "the latencies include only the calls that succeeded" in figures["warnings"]


def test_a_bench_that_is_mostly_refused_does_not_call_itself_the_bottleneck(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server("--max-queue-images", "1")
    arguments = ("bench", "mlp-mnist", "--concurrency", "64", "--duration", "1", "--json")
    figures = json.loads(ganserve(*arguments, address=server.address).stdout)
    assert figures["errors"]["queue_full"] > figures["calls"]
    # It was busy, with making calls that are refused.
    assert not any("bottleneck" in warning for warning in figures["warnings"])


@pytest.mark.parametrize("loop", [("--concurrency", "4"), ("--rate", "100")])
def test_ctrl_c_ends_a_bench_at_once_with_the_figures_so_far(
    start_server: Callable[..., RunningServer], loop: tuple[str, str]
) -> None:
    server = start_server()
    arguments = command("bench", "mlp-mnist", *loop, "--duration", "60", address=server.address)
    with ended(Program(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)) as process:
        while images_made(server) < 20:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "ganserve: interrupted\n")
    counted = re.findall(r"^ +[\d.]+ ms +(\d+) ?.*$", out, re.MULTILINE)
    assert sum(map(int, counted)) >= 10
    assert " calls failed" not in out


@contextmanager
def busy_core(core: int) -> Iterator[None]:
    """Keep two processes busy on a core."""
    burn = [sys.executable, "-c", "while True: pass"]
    with ExitStack() as processes:
        for _ in range(2):
            burner = processes.enter_context(subprocess.Popen(burn))
            processes.callback(burner.kill)
            os.sched_setaffinity(burner.pid, {core})
        yield


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the system counts no waiting for a core")
def test_a_bench_that_gets_too_little_of_a_core_says_that_it_is_the_bottleneck(server: RunningServer) -> None:
    core = min(os.sched_getaffinity(0))
    arguments = command(
        "bench", "mlp-mnist", "--concurrency", "50", "--duration", "1", "--json", address=server.address
    )
    with busy_core(core), ended(Program(arguments, stdout=subprocess.PIPE)) as process:
        os.sched_setaffinity(process.pid, {core})
        os.setpriority(os.PRIO_PROCESS, process.pid, 5)
        out, _ = process.communicate(timeout=TIMEOUT_S)
    figures = json.loads(out)
    assert figures["client_busy"] > 0.7
    assert any("this program was busy" in warning for warning in figures["warnings"])


def test_a_bench_of_what_the_server_has_not_is_refused(server: RunningServer) -> None:
    for arguments, status in ((("nothing",), 1), (("cdcgan-mnist", "--label", "ten"), 2)):
        done = ganserve("bench", *arguments, address=server.address)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert ganserve("bench", "mlp-mnist", address="127.0.0.1:1").returncode == 3
