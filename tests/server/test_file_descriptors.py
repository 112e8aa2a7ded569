"""Servers with few file descriptors: new callers are refused at once, and nobody waits for a descriptor."""

import contextlib
import json
import os
import resource
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from tests.conftest import RunningServer
from tests.programs import ended, installed
from tests.server.test_start_and_drain import wait_for_sample
from tests.wire import Peer

from ganserve import Client

Start = Callable[..., RunningServer]
FEW = 64  # open files
TURNED_AWAY = 'ganserve_connections_turned_away_total{reason="descriptors"}'


@contextlib.contextmanager
def limited(limit: str, *flags: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a server with a limit on open files, such as "-S -n 64"."""
    common = ("--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--log-format=json")
    program = f"ulimit {limit}; exec {shlex.join([installed('ganserve-server'), *common, *flags])}"
    with ended(subprocess.Popen(["bash", "-c", program], stderr=subprocess.PIPE, text=True)) as process:
        yield process
        process.terminate()


def events_up_to(process: "subprocess.Popen[str]", last: str) -> list[dict[str, object]]:
    assert process.stderr is not None
    events: list[dict[str, object]] = []
    while not events or events[-1]["event"] != last:
        events.append(json.loads(process.stderr.readline()))
    return events


def is_taken(connection: socket.socket) -> bool:
    """Send HTTP/2's preface; return whether the server answers rather than closes the connection. Waits for neither."""
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        return bool(connection.recv(9))
    except ConnectionError:
        return False


def connect(address: str, times: int) -> list[socket.socket]:
    """Open connections one after the other; return those that the server takes."""
    taken = []
    for _ in range(times):
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=30)
        if is_taken(connection):
            taken.append(connection)
        else:
            connection.close()
    return taken


@pytest.mark.parametrize("flags", [(), pytest.param(("--workers=2",), marks=pytest.mark.slow)])
def test_with_few_descriptors_new_callers_are_refused_at_once(flags: tuple[str, ...], transport: str) -> None:
    with limited(f"-n {FEW}", f"--transport={transport}", *flags) as process:
        *before, serving = events_up_to(process, "serving")
        (warning,) = (event for event in before if "too few file descriptors" in str(event["event"]))
        most = int(str(warning["connections"])) * (2 if flags else 1)
        assert FEW // 8 < most < (FEW * 2 if flags else FEW)
        server = RunningServer(process, None, None, str(serving["address"]), str(serving["metrics_address"]))  # type: ignore[arg-type]
        connections = connect(server.address, 2 * FEW)
        try:
            assert len(connections) == most
            if transport == "own":
                assert server.scrape()[TURNED_AWAY] == 2 * FEW - most
        finally:
            for connection in connections:
                connection.close()
        with Client(server.address) as client:
            client.generate("mlp-mnist", seed=1)


@pytest.mark.parametrize(("workers", "least"), [(1, 64), (10, 72)])
def test_a_server_that_could_not_even_start_says_how_many_descriptors_it_needs(workers: int, least: int) -> None:
    with limited(f"-n {least - 1}", f"--workers={workers}") as process:
        reason = events_up_to(process, "cannot start")[-1]["reason"]
        assert f"the limit on open files is {least - 1}" in str(reason)
        assert f"at least {least}" in str(reason)
        assert process.wait(60) == 1


def test_the_limit_on_open_files_is_raised_as_far_as_it_may_be() -> None:
    with limited(f"-S -n {FEW}") as process:
        events_up_to(process, "serving")
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard > FEW


def test_a_connection_for_which_there_is_no_descriptor_is_closed_at_once(start_server: Start) -> None:
    running = start_server()
    pid = running.process.pid
    with Peer(running.address) as caller:
        caller.ping()
        limit = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 10
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        connections = connect(running.address, 100)
        caller.ping()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert 1 <= len(connections) < 20
        assert running.scrape()[TURNED_AWAY] == 100 - len(connections)
        later = connect(running.address, 1)
        assert later
        for connection in connections + later:
            connection.close()
    running.stop()
    events = []
    while "stopped" not in events:
        events.append(running.events.get(timeout=60)["event"])
    # The watch of the repository may have wanted a descriptor, too.
    assert events.count("a connection cannot be accepted") == 1


def test_a_new_certificate_that_cannot_be_read_for_want_of_descriptors_is_read_later(
    start_server: Start, tmp_path: Path
) -> None:
    def write(authority: trustme.CA) -> None:
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(tmp_path / "new.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / "new.crt")
        (tmp_path / "new.key").replace(tmp_path / "tls.key")
        (tmp_path / "new.crt").replace(tmp_path / "tls.crt")

    authority = trustme.CA()
    write(authority)
    running = start_server("--tls-certificate-file", tmp_path / "tls.crt", "--tls-key-file", tmp_path / "tls.key")
    pid = running.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    write(authority)
    kept = running.wait_for("what was read before stays in use")
    assert "Too many open files" in kept["reason"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    running.wait_for("read again")
    wait_for_sample(running, 'ganserve_files_rejected{kind="certificates"}', lambda rejected: rejected == 0)
