"""A real server on a real port, for every test that wants one."""

import contextlib
import functools
import gc
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before NumPy and PyTorch are imported, here and in programs that tests start. Where several processes have two threads
# each on two cores, the threads wait for each other by spinning, and a training takes three times the CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from ganserve import Client
from tests.programs import Program, installed

START_TIMEOUT_S = 180
SETTLE_TIMEOUT_S = 60
# Gauges that are 0 when nothing is asked for, though peers may be connected.
IDLE = ("ganserve_calls", "ganserve_kept_bytes", "ganserve_queue_images")
# Tests that run over both transports: all of a module, or those that are named.
OVER_BOTH: dict[str, tuple[str, ...] | None] = {
    "test_file_descriptors": ("test_with_few_descriptors_new_callers_are_refused_at_once",),
    "test_generate": None,
    "test_generate_each": None,
    "test_inference_protocol": None,
    "test_security": (
        "test_calls_by_tls_are_answered",
        "test_only_tokens_of_the_file_may_call_and_only_in_their_roles",
        "test_tokens_come_and_go_without_a_restart",
        "test_a_call_without_a_token_is_refused_before_its_body_comes",
        "test_two_tokens_on_one_connection_take_turns",
        "test_a_withdrawn_token_is_no_longer_let_in",
    ),
    "test_start_and_drain": (
        "test_health_is_told_for_the_server_the_service_and_each_model",
        "test_reflection_describes_the_service",
        "test_metrics_count_what_was_done",
        "test_sigterm_finishes_what_runs_and_exits_0",
        "test_sigterm_under_load_ends_no_call_but_with_an_answer_or_unavailable",
        "test_watching_the_health_does_not_hold_up_the_end",
        "test_calls_that_failed_or_were_left_do_not_hold_up_the_end",
        "test_the_drain_timeout_cuts_off_what_is_left_and_says_so",
        "test_sigterm_says_not_serving_and_serves_on_for_the_drain_delay",
        "test_every_address_may_be_a_star",
        "test_a_taken_address_is_refused",
        "test_calls_are_logged_by_request_id",
    ),
    "test_transports": None,
    "test_administration": ("test_a_model_is_unloaded_and_loaded_again", "test_tritons_calls_do_the_same"),
    "test_tracing": ("test_a_call_is_a_span_in_its_callers_trace",),
}
_ONE_AT_A_TIME = "grpcio hands over one message of a stream at a time: those that come together are not seen together"
_LONG = "it takes long, and is about the engine"
NOT_OVER_GRPCIO = {
    "test_the_log_counts_each_batch_once_however_many_requests_were_in_it": _ONE_AT_A_TIME,
    "test_compatible_requests_that_came_together_wait_as_one": _ONE_AT_A_TIME,
    "test_a_group_has_no_more_requests_than_are_never_cut": _ONE_AT_A_TIME,
    "test_an_image_has_the_same_bytes_however_it_was_made": _LONG,
    "test_answers_that_were_sent_fill_no_memory": _LONG,
}
# Over grpcio in `make test-slow` only: what they are about costs much, and is not the transport's.
SLOW_OVER_GRPCIO = (
    "test_a_worker_that_is_killed_is_replaced_on_the_same_port",
    "test_for_a_reader_that_does_not_read_few_images_are_made",
    "test_thousands_of_wrong_requests_in_a_row_are_answered",
    "test_only_tokens_of_the_file_may_call_and_only_in_their_roles",
    "test_tokens_come_and_go_without_a_restart",
    "test_sigterm_under_load_ends_no_call_but_with_an_answer_or_unavailable",
)
# A second worker costs a start as much as the first; test_workers.py is about workers.
WORKERS = ["1", pytest.param("2", marks=pytest.mark.slow)]
DATA_ROOT = Path(__file__).parent / "data"


@dataclass
class RunningServer:
    process: "subprocess.Popen[str]"
    events: "queue.Queue[dict[str, Any]]"
    log_ended: threading.Event
    address: str = ""
    metrics_address: str = ""
    admin_address: str = ""
    transport: str = ""

    def wait_for(self, event: str) -> dict[str, Any]:
        """Read the server's log up to this event.

        Raises:
            AssertionError: it does not come.
        """
        seen, until = [], time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            ended = self.log_ended.is_set()  # before the queue is found empty: nothing comes between
            try:
                line = self.events.get(timeout=0.1)
            except queue.Empty:
                if ended:
                    break
                continue
            if line["event"] == event:
                return line
            seen.append(line)
        if not self.log_ended.is_set():  # it may stand still: have it log where
            with contextlib.suppress(OSError):  # it has ended just now
                for pid in (*_children(self.process.pid), self.process.pid):
                    os.kill(pid, signal.SIGABRT)
            self.log_ended.wait(10)
            seen += [self.events.get_nowait() for _ in range(self.events.qsize())]
        raise AssertionError(f"{event!r} is not in the log of process {self.process.args}, which has {seen}")

    def scrape(self) -> dict[str, float]:
        """Read the metrics."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=START_TIMEOUT_S) as response:
            lines = response.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def settle(self, *idle: str) -> None:
        """Wait until gauges are 0; at once if the test has ended or stopped the server, or has no metrics of it.

        Args:
            idle: the gauges' names; those with labels are all meant.

        Raises:
            AssertionError: they are not.
        """
        until = time.monotonic() + SETTLE_TIMEOUT_S
        while self.metrics_address and self.process.poll() is None and not _is_stopped(self.process.pid):
            try:
                samples = self.scrape()
            except OSError as error:  # it ends, or has begun to
                left: object = error
            else:
                left = {name: value for name, value in samples.items() if value and name.partition("{")[0] in idle}
            if not left:
                return
            assert time.monotonic() < until, f"after all peers have left: {left}"
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=START_TIMEOUT_S)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_stopped(pid: int) -> bool:
    """Tell whether SIGSTOP has come to a process or one of its children."""
    try:
        pids = (pid, *_children(pid))
        states = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] for one in pids]
    except (FileNotFoundError, ProcessLookupError):  # one has ended meanwhile
        return False
    return "T" in states


@contextmanager
def run_server(*flags: str | Path) -> Iterator[RunningServer]:
    common = ("--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--log-format=json")
    command = [installed("ganserve-server"), *common, *map(str, flags)]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with Program(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        server = RunningServer(process, queue.Queue(), threading.Event())

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                try:
                    server.events.put(json.loads(line))
                except json.JSONDecodeError:
                    server.events.put({"event": line})
            server.log_ended.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            serving = server.wait_for("serving")
            server.address, server.metrics_address = serving["address"], serving["metrics_address"]
            server.admin_address = serving["admin_address"] or ""
            server.transport = serving["transport"]
            yield server
            server.settle(*IDLE)
        finally:
            process.kill()
            reader.join()


def pytest_sessionstart() -> None:
    """Have programs that tests start obey Ctrl-C, though these run in the background of a shell, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Generator[None, object, object]:
    """Leave what was imported out of garbage collection, which some tests ask for, and which else takes 0.1 s."""
    gc.collect()
    gc.freeze()
    try:
        return (yield)
    finally:
        gc.unfreeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests over both transports."""
    folder, _, module = metafunc.module.__name__.rpartition(".")
    names = OVER_BOTH.get(module, ()) if folder == "tests.server" else ()
    name = metafunc.function.__name__
    if "transport" in metafunc.fixturenames and (names is None or name in names):
        reason = NOT_OVER_GRPCIO.get(name)
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        marks += [pytest.mark.slow] if name in SLOW_OVER_GRPCIO else []
        metafunc.parametrize("transport", ["own", pytest.param("grpcio", marks=marks)], indirect=True)


@pytest.fixture(scope="session")
def transport(request: pytest.FixtureRequest) -> str:
    """The transport of servers that tests start: own, unless a test runs over both."""
    return str(getattr(request, "param", "own"))


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], RunningServer]]:
    """Run a server with the bundled models over each transport that is asked for, until all tests have ended."""
    with ExitStack() as stack:
        yield functools.cache(lambda transport: stack.enter_context(run_server("--transport", transport)))


@pytest.fixture(scope="session")
def server(transport: str, servers: Callable[[str], RunningServer]) -> RunningServer:
    """Run the server with the bundled models."""
    return servers(transport)


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


@pytest.fixture(autouse=True)
def nothing_is_left_on_the_shared_server(request: pytest.FixtureRequest) -> Iterator[None]:
    """Find the test that leaves a call behind; `client` stays connected."""
    yield
    if "server" in request.fixturenames:
        shared: RunningServer = request.getfixturevalue("server")
        shared.settle(*IDLE)


@pytest.fixture
def start_server(transport: str) -> Iterator[Callable[..., RunningServer]]:
    """Start servers of a test's own, by flags, of one process if those don't say otherwise; they end with the test."""
    with ExitStack() as servers:
        yield lambda *flags: servers.enter_context(run_server("--workers=1", f"--transport={transport}", *flags))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """A few hundred real digits, as torchvision lays them out."""
    return DATA_ROOT


@pytest.fixture(scope="session", autouse=True)
def cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache and state out of it, in programs that tests start too."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Give up root's right to read and write everything, if the tests have it."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)
