"""What is asked of every replica, and not just of the next."""

import contextlib
import json
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from tests.client.program import ganserve
from tests.client.servers import WAIT_S, Twin, answer, ask, both, serving, serving_status
from tests.conftest import RunningServer

from ganserve import (
    AsyncClient,
    AuthenticationError,
    Client,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    UnavailableError,
    _replicas,
)
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.settings import BUNDLED_MODELS

MODEL = "mlp-mnist"


def publish(repository: Path, version: int) -> None:
    beside = repository / f".{version}"
    shutil.copytree(BUNDLED_MODELS / MODEL / "1", beside)
    (repository / MODEL).mkdir(parents=True, exist_ok=True)
    beside.rename(repository / MODEL / str(version))


@pytest.fixture
def two(start_server: Callable[..., RunningServer], tmp_path: Path) -> list[tuple[RunningServer, Path]]:
    """Two replicas, each with a repository of its own; the first has version 2 already."""
    made = []
    for name, versions in (("one", (1, 2)), ("other", (1,))):
        for version in versions:
            publish(tmp_path / name, version)
        made.append((start_server("--models", tmp_path / name), tmp_path / name))
    return made


def addresses(two: list[tuple[RunningServer, Path]]) -> str:
    return ",".join(server.address for server, _ in two)


@both
def test_each_replica_says_whether_it_serves_a_version(twin: Twin, two: list[tuple[RunningServer, Path]]) -> None:
    (one, _), (other, _) = two
    found = ask(twin, addresses(two), "replicas", MODEL, 2)
    assert [(replica.address, replica.serving) for replica in found] == [(one.address, True), (other.address, False)]
    assert found[0].error is None
    assert isinstance(found[1].error, ModelNotFoundError)
    assert "it has 1" in str(found[1])
    assert [replica.serving for replica in ask(twin, addresses(two), "replicas", MODEL)] == [True, True]
    assert [replica.serving for replica in ask(twin, addresses(two), "replicas", "nothing")] == [False, False]
    other.process.kill()
    other.process.wait()
    found = ask(twin, addresses(two), "replicas")
    assert [replica.serving for replica in found] == [True, False]
    assert isinstance(found[1].error, UnavailableError)


def test_a_replica_that_lacks_a_version_or_a_model_gets_no_more_calls_than_the_others(
    two: list[tuple[RunningServer, Path]],
) -> None:
    """What the SDK asks to explain an error must not take the turn of those that would answer."""
    with Client(addresses(two)) as client:
        newest = set[int]()
        while len(newest) < 2:  # until both are connected
            newest.add(client.generate(MODEL).version)
        for arguments in ({"version": 2}, {"model": "mlp-mnits"}):
            before = [calls_of(server) for server, _ in two]
            for _ in range(20):
                with contextlib.suppress(ModelNotFoundError):
                    client.generate(**({"model": MODEL} | arguments))  # type: ignore[arg-type]
            assert [calls_of(server) - made for (server, _), made in zip(two, before, strict=True)] == [10, 10]


def calls_of(server: RunningServer) -> float:
    return sum(count for name, count in server.scrape().items() if name.startswith("ganserve_requests_total"))


@both
def test_a_version_is_waited_for_until_the_last_replica_has_it(
    twin: Twin, two: list[tuple[RunningServer, Path]]
) -> None:
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.extend(ask(twin, addresses(two), "wait_for_version", MODEL, 2, WAIT_S))
    )
    waiting.start()
    server, repository = two[1]
    assert server.wait_for("call")["code"] == "NOT_FOUND"  # it was asked, and did not have it
    publish(repository, 2)
    waiting.join()
    assert [replica.address for replica in found] == [server.address for server, _ in two]
    assert all(replica.serving for replica in found)


@both
def test_what_is_lacking_is_told_when_the_time_is_over(twin: Twin, two: list[tuple[RunningServer, Path]]) -> None:
    with pytest.raises(DeadlineExceededError) as caught:
        ask(twin, addresses(two), "wait_for_version", MODEL, 2, 0.5)
    text = str(caught.value)
    assert caught.value.reason == "not_ready"
    assert text.startswith(f"version 2 of {MODEL} at each address of {addresses(two)} was not ready within 0.5 s")
    assert f"1 of 2 do not serve it: {two[1][0].address} NOT SERVING" in text


@both
def test_a_replica_that_drains_does_not_serve(twin: Twin, start_server: Callable[..., RunningServer]) -> None:
    draining = start_server("--drain-delay-s", "3600")
    draining.process.terminate()
    draining.wait_for("draining")
    (found,) = ask(twin, draining.address, "replicas", MODEL, 1)
    assert (found.serving, found.error, str(found)) == (False, None, f"{draining.address} NOT SERVING")


def healthy(number: int, request: Any, context: Any) -> Any:
    if isinstance(request, pb.GetModelRequest):
        return pb.GetModelResponse()
    return answer(request) if isinstance(request, pb.GenerateImagesRequest) else serving_status(1)


@both
def test_the_certificate_of_each_replica_is_for_the_name_they_share(twin: Twin, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("127.0.0.2")
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(issued.private_key_pem.bytes(), chain)])
    with (
        serving(healthy, "127.0.0.2:0", credentials) as (first, one),
        serving(healthy, "127.0.0.3:0", credentials) as (second, other),
    ):
        options = {"ca_file": tmp_path / "ca.pem", "token": "secret"}
        found = ask(twin, f"{first}, {second}", "replicas", "any", 1, options=options)
        assert [(replica.address, replica.serving) for replica in found] == [(first, True), (second, True)]
        (found,) = ask(twin, second, "replicas", options=options)
        assert isinstance(found.error, AuthenticationError)
    assert {sent["authorization"] for sent in one.metadata + other.metadata} == {"Bearer secret"}


def refuse(number: int, request: Any, context: Any) -> Any:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")


@both
def test_a_replica_that_refuses_the_token_is_told_among_the_others(twin: Twin) -> None:
    with serving(refuse) as (first, _), serving(healthy) as (second, _):
        found = ask(twin, f"{first},{second}", "replicas", "any", 1)
        assert [(replica.address, replica.serving) for replica in found] == [(first, False), (second, True)]
        assert isinstance(found[0].error, AuthenticationError)
        with pytest.raises(AuthenticationError):  # no waiting fixes it
            ask(twin, f"{first},{second}", "wait_for_version", "any", 1)
        advice = "set the token with --token or GANSERVE_TOKEN"
        for flags in ((), ("--wait", "60")):
            done = ganserve("health", "any", "--every-address", *flags, address=f"{first},{second}")
            told, serves = done.stdout.splitlines()
            assert (done.returncode, serves) == (1, f"{second} SERVING"), done.stderr
            assert told == f"{first} UNKNOWN (the server at {first} refused the call (no token))"
            assert done.stderr == f"ganserve: the server at {first} refused the call (no token); {advice}\n"


@both
def test_what_is_wrong_for_all_replicas_is_an_error(twin: Twin) -> None:
    for target in ("xds:///here", "dns://127.0.0.1:53/here:50051", "dns:///here"):
        with pytest.raises(InvalidRequestError, match="cannot be listed"):
            ask(twin, target, "replicas")
    with pytest.raises(UnavailableError, match=r"no-such-name\.invalid has no addresses"):
        ask(twin, "no-such-name.invalid:1", "replicas")
    with pytest.raises(DeadlineExceededError, match=r"no-such-name\.invalid has no addresses"):
        ask(twin, "no-such-name.invalid:1", "wait_for_version", "any", 1, 0.2)
    with pytest.raises(InvalidRequestError, match="model is None"):
        ask(twin, "127.0.0.1:1", "replicas", None, 2)


async def test_a_closed_client_asks_nobody(server: RunningServer) -> None:
    blocking, asynchronous = Client(server.address), AsyncClient(server.address)
    blocking.close()
    await asynchronous.close()
    with pytest.raises(RequestCancelledError, match="closed"):
        blocking.replicas()
    with pytest.raises(RequestCancelledError, match="closed"):
        await asynchronous.replicas()


def test_a_name_stands_for_all_its_addresses(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.address.rpartition(":")[2]
    with Client(f"localhost:{port}") as client:
        assert [(replica.address, replica.serving) for replica in client.replicas()] == [(server.address, True)]
    kinds = {"both": ("::1", "10.0.0.2", "10.0.0.1"), "new": ("::1", "fe80::2"), "list": ("10.0.0.1", "10.0.0.1")}

    def known(name: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        of_ipv6 = [":" in ip for ip in kinds[name]]
        return [
            (socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
            for ip, six in zip(kinds[name], of_ipv6, strict=True)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", known)
    assert _replicas.targets("dns:///both:7") == ["ipv4:10.0.0.1:7", "ipv4:10.0.0.2:7"]
    assert _replicas.targets("dns:///new:7") == ["ipv6:[::1]:7", "ipv6:[fe80::2]:7"]
    assert _replicas.targets("dns:///list:7") == ["ipv4:10.0.0.1:7"]
    assert _replicas.targets("ipv4:10.0.0.1:1, 10.0.0.2:2") == ["ipv4:10.0.0.1:1", "ipv4:10.0.0.2:2"]
    assert _replicas.targets("unix:/run/ganserve.sock") == ["unix:/run/ganserve.sock"]


def test_the_program_asks_and_waits_for_every_address(two: list[tuple[RunningServer, Path]]) -> None:
    (one, _), (other, repository) = two
    everywhere = addresses(two)
    done = ganserve("health", MODEL, "--every-address", address=everywhere)
    assert (done.returncode, done.stdout) == (0, f"{one.address} SERVING\n{other.address} SERVING\n")
    done = ganserve("health", MODEL, "--version", "2", address=everywhere)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[0] == f"{one.address} SERVING"
    assert done.stdout.splitlines()[1].startswith(
        f"{other.address} NOT SERVING (model {MODEL} has no version 2; it has 1"
    )
    done = ganserve("health", MODEL, "--version", "2", "--json", address=everywhere)
    told = json.loads(done.stdout)
    assert (told["serving"], [replica["serving"] for replica in told["replicas"]]) == (False, [True, False])
    done = ganserve("health", MODEL, "--version", "2", "--every-address", "--wait", "0.3", address=everywhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{other.address} NOT SERVING" in done.stderr
    publish(repository, 2)
    done = ganserve("health", MODEL, "--version", "2", "--every-address", "--wait", "60", address=everywhere)
    assert (done.returncode, done.stdout) == (0, f"{one.address} SERVING\n{other.address} SERVING\n")
    assert ganserve("health", "--version", "2", address=everywhere).returncode == 2
    assert ganserve("health", "--every-address", address="127.0.0.1:1,127.0.0.2:1").returncode == 3
