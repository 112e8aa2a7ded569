"""A real server on a real port, for every test that wants one."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ganserve import Client

START_TIMEOUT_S = 60
DATA_ROOT = Path(__file__).parent / "data"


@dataclass
class RunningServer:
    process: "subprocess.Popen[str]"
    events: "queue.Queue[dict[str, Any]]"
    address: str = ""
    metrics_address: str = ""
    admin_address: str = ""

    def wait_for(self, event: str) -> dict[str, Any]:
        """Read the server's log up to this event."""
        while True:
            line = self.events.get(timeout=START_TIMEOUT_S)
            if line["event"] == event:
                return line

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=START_TIMEOUT_S)


@contextmanager
def run_server(*flags: str | Path) -> Iterator[RunningServer]:
    program = Path(sys.executable).with_name("ganserve-server")
    command = [program, "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--log-format", "json", *flags]
    with subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True) as process:
        server = RunningServer(process, queue.Queue())

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                try:
                    server.events.put(json.loads(line))
                except json.JSONDecodeError:
                    server.events.put({"event": line})

        reader = threading.Thread(target=read)
        reader.start()
        try:
            serving = server.wait_for("serving")
            server.address, server.metrics_address = serving["address"], serving["metrics_address"]
            server.admin_address = serving["admin_address"] or ""
            yield server
        finally:
            process.kill()
            reader.join()


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """Run the server with the bundled models."""
    with run_server() as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


@pytest.fixture
def start_server() -> Iterator[Callable[..., RunningServer]]:
    """Start servers of a test's own, by flags, of one process if those don't say otherwise; they end with the test."""
    with ExitStack() as servers:
        yield lambda *flags: servers.enter_context(run_server("--workers=1", *flags))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """A few hundred real digits, as torchvision lays them out."""
    return DATA_ROOT


@pytest.fixture(scope="session", autouse=True)
def cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of it, in programs that tests start too."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
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
