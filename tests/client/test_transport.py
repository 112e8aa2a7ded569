"""Addresses, certificates, tokens, keepalive, load balancing, forks, and the budget of retries."""

import asyncio
import gc
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from tests.client.servers import WAIT_S, Gate, Twin, answer, ask, both, chunks, each_answer, gate, honest, serving
from tests.conftest import RunningServer
from tests.wire import ACK, PING, PREFACE

from ganserve import (
    AsyncClient,
    AuthenticationError,
    Client,
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
    _endpoint,
    _retries,
)
from ganserve._readiness import Readiness
from ganserve.v1 import generation_pb2 as pb


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GANSERVE_")]:
        monkeypatch.delenv(name)


# Addresses.


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("here:50051", "dns:///here:50051"),
        ("a.b-c.svc.cluster.local:1", "dns:///a.b-c.svc.cluster.local:1"),
        ("10.0.0.1:50051", "ipv4:10.0.0.1:50051"),
        ("10.0.0.1:50051, 10.0.0.2:50052", "ipv4:10.0.0.1:50051,10.0.0.2:50052"),
        ("[::1]:50051", "ipv6:[::1]:50051"),
        ("[::1]:1,[fe80::1]:2", "ipv6:[::1]:1,[fe80::1]:2"),
        ("dns:///here:1", "dns:///here:1"),
        ("unix:/run/ganserve.sock", "unix:/run/ganserve.sock"),
    ],
)
def test_an_address_is_asked_of_dns_unless_it_is_one_of_ip(address: str, target: str) -> None:
    client = Client(address)
    assert (client.address, client._calls.endpoint.target) == (address, target)


@pytest.mark.parametrize(
    "address",
    [
        "here",
        "here:",
        ":1",
        "here:0",
        "here:65536",
        "a:1,b:2",
        "10.0.0.1:1,[::1]:1",
        "10.0.0.1:1,",
        "::1:1",
        "a b:1",
        7,
    ],
)
@both
def test_what_is_no_address_is_refused(twin: Twin, address: Any) -> None:
    with pytest.raises(InvalidRequestError, match="address is"):
        twin(address)


@both
def test_calls_go_to_all_addresses_in_turn(twin: Twin) -> None:
    with serving(honest) as (first, one), serving(honest) as (second, other):
        with Client(f"{first},{second}") as client:
            while not (one.requests and other.requests):  # until both are connected
                client.generate("any")
            for servicer in (one, other):
                servicer.requests.clear()
            for _ in range(20):
                client.generate("any")
        assert len(one.requests) == len(other.requests) == 10
        assert ask(twin, f"{first},{second}", "generate", "any", seed=1).seeds == (1,)


class Dns:
    """A name server that knows one name: its addresses, which a test may change."""

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            query, sender = self._socket.recvfrom(4096)
            if not query:
                return
            end = query.index(b"\0", 12) + 5  # of the question: name, type, class
            of_ipv4 = query[end - 4 : end - 2] == b"\0\1"
            answers = self.addresses if of_ipv4 else []
            head = query[:2] + b"\x84\0" + struct.pack(">4H", 1, len(answers), 0, 0)
            records = b"".join(
                b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 0, 4) + socket.inet_aton(address) for address in answers
            )
            self._socket.sendto(head + query[12:end] + records, sender)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()


@pytest.fixture
def dns() -> Iterator[Dns]:
    made = Dns([])
    yield made
    made.close()


def test_replicas_that_come_and_go_are_followed(dns: Dns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_endpoint, "DNS_MIN_INTERVAL_S", 0.05)
    with ExitStack() as old, serving(honest, "127.0.0.3:0") as (second, stays):
        port = second.rpartition(":")[2]
        _, goes = old.enter_context(serving(honest, f"127.0.0.2:{port}"))
        dns.addresses = ["127.0.0.2", "127.0.0.3"]
        with Client(f"dns://127.0.0.1:{dns.port}/replicas.test:{port}") as client:
            while not (goes.requests and stays.requests):
                client.generate("any")
            with serving(honest, f"127.0.0.4:{port}") as (_, comes):
                dns.addresses = ["127.0.0.3", "127.0.0.4"]
                old.close()  # its connection ends: DNS is asked again
                while not comes.requests:
                    client.generate("any")


# Certificates and tokens.


class Authority:
    """Who signs the certificates of a test, and the files that a client wants."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        self._authority.cert_pem.write_to_path(self.ca_file)
        mine = self._authority.issue_cert("client@example.org")
        self.certificate_file, self.key_file = str(folder / "certificate.pem"), str(folder / "key.pem")
        mine.cert_chain_pems[0].write_to_path(self.certificate_file)
        mine.private_key_pem.write_to_path(self.key_file)

    def server(self, name: str = "127.0.0.1", *, mutual: bool = False) -> grpc.ServerCredentials:
        issued = self._authority.issue_cert(name)
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        return grpc.ssl_server_credentials(
            [(issued.private_key_pem.bytes(), chain)],
            self._authority.cert_pem.bytes() if mutual else None,
            require_client_auth=mutual,
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@both
def test_calls_are_encrypted_by_argument_or_environment(
    twin: Twin, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(honest, credentials=authority.server()) as (address, servicer):
        options = {"ca_file": authority.ca_file, "token": "secret"}
        assert ask(twin, address, "generate", "any", seed=1, options=options).seeds == (1,)
        monkeypatch.setenv("GANSERVE_ADDRESS", address)
        monkeypatch.setenv("GANSERVE_TLS", "1")
        monkeypatch.setenv("GANSERVE_CA_FILE", authority.ca_file)
        monkeypatch.setenv("GANSERVE_TOKEN", "secret-2")
        assert ask(twin, None, "generate", "any", seed=1).seeds == (1,)  # type: ignore[arg-type]
    assert [sent["authorization"] for sent in servicer.metadata] == ["Bearer secret", "Bearer secret-2"]


@both
def test_both_sides_can_show_certificates(twin: Twin, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retries, "_PATIENCE_BEFORE_FIRST_ANSWER_S", 0.2)
    with serving(honest, credentials=authority.server(mutual=True)) as (address, _):
        options = {"ca_file": authority.ca_file}
        with pytest.raises((UnavailableError, AuthenticationError), match="certificate_file"):
            ask(twin, address, "models", options=options)
        options |= {"certificate_file": authority.certificate_file, "key_file": authority.key_file}
        assert ask(twin, address, "generate", "any", seed=1, options=options).seeds == (1,)
        monkeypatch.setenv("GANSERVE_CERTIFICATE_FILE", authority.certificate_file)
        monkeypatch.setenv("GANSERVE_KEY_FILE", authority.key_file)
        options = {"ca_file": authority.ca_file}
        assert ask(twin, address, "generate", "any", seed=1, options=options).seeds == (1,)


@both
def test_several_addresses_can_be_encrypted_by_one_certificate(twin: Twin, authority: Authority) -> None:
    with (
        serving(honest, credentials=authority.server()) as (first, _),
        serving(honest, credentials=authority.server()) as (second, _),
    ):
        options = {"ca_file": authority.ca_file}
        assert ask(twin, f"{first},{second}", "generate", "any", seed=1, options=options).seeds == (1,)


@both
def test_a_certificate_of_a_stranger_or_another_host_is_not_trusted(
    twin: Twin, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path)
    for credentials, ca_file in (
        (authority.server(), stranger.ca_file),
        (authority.server("elsewhere.example.org"), authority.ca_file),
    ):
        with serving(honest, credentials=credentials) as (address, servicer):
            with pytest.raises(AuthenticationError, match="GANSERVE_CA_FILE") as caught:
                ask(twin, address, "generate", "any", options={"ca_file": ca_file, "token": "secret"})
            assert caught.value.reason == "certificate"
            assert not servicer.requests


@both
def test_encryption_that_only_one_side_wants_is_said(
    twin: Twin, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retries, "_PATIENCE_BEFORE_FIRST_ANSWER_S", 0.2)
    with serving(honest) as (address, _), pytest.raises(AuthenticationError, match="does not speak TLS") as caught:
        ask(twin, address, "models", options={"tls": True})
    assert caught.value.reason == "not_encrypted"
    with (
        serving(honest, credentials=authority.server()) as (address, _),
        pytest.raises(UnavailableError, match="Does it require TLS"),
    ):
        ask(twin, address, "models")


@both
@pytest.mark.parametrize("address", ["10.0.0.1:1", "example.org:1", "127.0.0.1:1,10.0.0.1:1", "dns:///example.org:1"])
def test_a_token_leaves_the_machine_only_encrypted_or_on_demand(twin: Twin, address: str) -> None:
    with pytest.raises(InvalidRequestError, match="plain text") as caught:
        twin(address, token="secret")
    assert "secret" not in str(caught.value)
    twin(address, token="secret", tls=False)
    twin(address, token="secret", tls=True)
    for local in ("localhost:1", "127.0.0.2:1", "[::1]:1", "unix:/run/ganserve.sock"):
        twin(local, token="secret")


@both
def test_a_token_is_in_no_text(twin: Twin) -> None:
    client = twin("127.0.0.1:1", token="secret")
    assert "secret" not in repr(client) + str(client) + repr(client._calls.endpoint)
    for token in ("secret\n", "secret secret\n", "geheimnüs"):
        with pytest.raises(InvalidRequestError, match="token") as caught:
            twin("127.0.0.1:1", token=token)
        assert token.strip() not in str(caught.value)


@both
def test_files_that_are_no_certificates_are_refused_at_once(twin: Twin, authority: Authority, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    mine, key = authority.certificate_file, authority.key_file
    for options, text in (
        ({"ca_file": tmp_path / "absent.pem"}, "absent.pem.*No such file"),
        ({"ca_file": nothing}, "nothing.pem.*no certificates"),
        ({"certificate_file": mine}, "both"),
        ({"certificate_file": mine, "key_file": nothing}, "and its key"),
        ({"certificate_file": key, "key_file": mine}, "and its key"),
        ({"tls": False, "ca_file": authority.ca_file}, "tls is off"),
    ):
        with pytest.raises(InvalidRequestError, match=text):
            twin("127.0.0.1:1", **options)  # type: ignore[arg-type]


def test_a_switch_is_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANSERVE_TLS", "perhaps")
    with pytest.raises(InvalidRequestError, match="GANSERVE_TLS"):
        Client("127.0.0.1:1")


# Connections.


@both
def test_two_clients_have_connections_of_their_own_which_end_with_them(twin: Twin) -> None:
    ended = [threading.Event(), threading.Event()]

    with serving(honest) as (address, _):

        def handle(door: Gate, number: int, connection: socket.socket) -> None:
            door.pass_on(connection, address)
            ended[number].set()

        async def use(door: Gate) -> None:
            first, second = AsyncClient(door.address), AsyncClient(door.address)
            await first.generate("any")
            await second.generate("any")
            await first.close()
            assert await asyncio.to_thread(ended[0].wait, WAIT_S)
            await second.generate("any")
            await second.close()

        def use_blocking(door: Gate) -> None:
            with Client(door.address) as second:
                with Client(door.address) as first:
                    first.generate("any")
                    second.generate("any")
                assert ended[0].wait(WAIT_S)
                second.generate("any")

        with gate(handle) as door:
            use_blocking(door) if twin is Client else asyncio.run(use(door))
            assert door.connections == 2


@pytest.mark.parametrize(
    ("method", "ending"),
    [
        ("generate", "read"),
        *((method, ending) for method in ("stream", "generate_each") for ending in ("read", "left", "lost")),
    ],
)
async def test_connections_end_with_their_async_client_and_not_with_its_garbage(method: str, ending: str) -> None:
    """A call that exists keeps its connection open, so no call may be left in a cycle of references."""
    connections: list[tuple[socket.socket, threading.Event]] = []
    dropped = threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        if method == "generate":
            return answer(request)
        answers = chunks(request) if method == "stream" else map(each_answer, request)
        return paused(answers) if number == 0 else answers

    def paused(answers: Iterator[Any]) -> Iterator[Any]:
        yield next(answers)
        if ending == "lost":
            dropped.wait(WAIT_S)
        yield from answers

    def handle(door: Gate, number: int, connection: socket.socket) -> None:
        connections.append((connection, ended := threading.Event()))
        door.pass_on(connection, address)
        ended.set()

    with serving(behave) as (address, _), gate(handle) as door:
        gc.collect()
        gc.disable()
        try:
            client = AsyncClient(door.address)
            if method == "generate":
                await client.generate("any")
            else:
                given: Any = {"count": 12} if method == "stream" else {"seeds": range(12)}
                images = getattr(client, method)("any", **given)
                await anext(images)
                if ending == "lost":
                    connections[0][0].shutdown(socket.SHUT_RDWR)
                    dropped.set()
                if ending == "left":
                    await images.aclose()
                else:
                    assert len([image async for image in images]) == 11
            await client.close()
            assert len(connections) == 1 + (ending == "lost")
            for _, ended in connections:
                assert await asyncio.to_thread(ended.wait, WAIT_S)
        finally:
            gc.enable()


@both
def test_an_idle_connection_is_kept_alive(twin: Twin, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_endpoint, "KEEPALIVE_S", 0.02)
    enough, pings, rest = threading.Event(), Counter[str](), bytearray()

    def count(data: bytes) -> None:
        rest.extend(data)
        if rest.startswith(PREFACE):
            del rest[: len(PREFACE)]
        while len(rest) >= 9 and len(rest) >= (size := 9 + int.from_bytes(rest[:3], "big")):
            pings["sent"] += rest[3] == PING and not rest[4] & ACK
            del rest[:size]
        if pings["sent"] >= 3:  # gRPC sends one a second at most
            enough.set()

    def handle(door: Gate, number: int, connection: socket.socket) -> None:
        door.pass_on(connection, server.address, count)

    async def use(address: str) -> None:
        async with AsyncClient(address) as client:
            await client.models()
            assert await asyncio.to_thread(enough.wait, WAIT_S)
            await client.models()

    with gate(handle) as door:
        if twin is Client:
            with Client(door.address) as client:
                client.models()
                assert enough.wait(WAIT_S)
                client.models()
        else:
            asyncio.run(use(door.address))
        assert door.connections == 1


def test_the_client_takes_the_largest_answer_of_the_server() -> None:
    from ganserve_server.services import messages

    beside_pixels = pb.GenerateImagesResponse(seeds=[2**32 - 1] * 10**6, labels=[2**32 - 1] * 10**6).ByteSize()
    assert messages._MAX_PIXEL_BYTES + beside_pixels <= _endpoint.MAX_ANSWER_BYTES


def test_the_budget_bounds_retries() -> None:
    budget = _retries.RetryBudget()
    taken = sum(budget.withdraw() for _ in range(2000))
    assert 1000 <= taken <= 1010  # time gives ten a second
    for _ in range(50):
        budget.deposit()
    assert 10 <= sum(budget.withdraw() for _ in range(50)) <= 15


def test_the_delays_are_jittered_and_bounded() -> None:
    for failures, most in ((1, 0.1), (2, 0.2), (5, 1.6), (6, 2.0), (10**6, 2.0)):
        delays = [_retries.full_jitter_s(failures) for _ in range(300)]
        assert 0 <= min(delays) < 0.2 * most < 0.8 * most < max(delays) <= most


# Forks, in processes of their own: one that goes wrong hangs or crashes.

FORK = """
import asyncio, os, sys, threading
from ganserve import AsyncClient, Client, UnavailableError
address, case = sys.argv[1:]
client, aclient = Client(address), AsyncClient(address)
stop = threading.Event()
if case in ("used", "used by asyncio"):
    client.generate("mlp-mnist", seed=1)
if case == "stream":
    images = client.stream("mlp-mnist", count=10**6, seed=1)
    next(images)
if case == "stream of requests":
    images = client.generate_each("mlp-mnist", range(10**6))
    next(images)
if case == "busy":
    running = threading.Barrier(3)
    def work():
        client.generate("mlp-mnist", seed=1)
        running.wait()
        while not stop.is_set():
            client.generate("mlp-mnist", count=256, seed=1)
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    running.wait()
    from ganserve import _forks
    while not _forks._inside:
        pass
if case == "connected":
    loop = asyncio.new_event_loop()
    loop.run_until_complete(aclient.models())
if (pid := os.fork()) == 0:
    try:
        if case in ("used by asyncio", "connected"):
            print(asyncio.run(aclient.generate("mlp-mnist", seed=5, timeout_s=20)).seeds, flush=True)
        else:
            print(client.generate("mlp-mnist", seed=5, timeout_s=20).seeds, flush=True)
    except UnavailableError as error:
        print(error.reason, flush=True)
    os._exit(0)
print(os.waitpid(pid, 0)[1], flush=True)
stop.set()
print(client.generate("mlp-mnist", seed=6).seeds, flush=True)
if case == "connected":
    print(loop.run_until_complete(aclient.generate("mlp-mnist", seed=7)).seeds, flush=True)
os._exit(0)
"""


FORK_WHILE_READING = """
import os, signal, sys
from ganserve import Client, UnavailableError
address, method, then = sys.argv[1:]
asks = {"count": 10**6, "seed": 0} if method.startswith("stream") else {"seeds": range(10**6)}
images = getattr(Client(address), method)("mlp-mnist", **asks)
next(images)
if (pid := os.fork()) == 0:
    signal.alarm(20)
    try:
        if then == "read":
            for _ in range(1000):
                next(images)
        elif then == "close":
            images.close()
    except UnavailableError as error:
        print(error.reason, flush=True)
    del images
    os._exit(0)
print(os.waitpid(pid, 0)[1], flush=True)
print(len([next(images) for _ in range(1000)]), flush=True)
os._exit(0)
"""


# Not of AsyncClient, whose child gRPC may crash by itself, before a line of it has run.
@pytest.mark.parametrize(("then", "said"), [("read", ["forked"]), ("close", []), ("forget", [])])
@pytest.mark.parametrize("method", ["stream", pytest.param("stream_batches", marks=pytest.mark.slow), "generate_each"])
def test_an_iterator_goes_on_where_it_was_opened_and_not_in_a_forked_child(
    server: RunningServer, method: str, then: str, said: list[str]
) -> None:
    command = [sys.executable, "-c", FORK_WHILE_READING, server.address, method, then]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == [*said, "0", "1000"], done.stderr


@pytest.mark.parametrize(
    ("case", "child"),
    [
        ("new", "(5,)"),
        ("used", "(5,)"),
        ("used by asyncio", "(5,)"),
        ("stream", "forked"),
        ("stream of requests", "forked"),
        ("busy", "forked"),
        ("connected", "forked"),
    ],
)
def test_a_client_survives_a_fork_or_says_that_it_does_not(server: RunningServer, case: str, child: str) -> None:
    command = [sys.executable, "-c", FORK, server.address, case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    wanted = [child, "0", "(6,)"] + ["(7,)"] * (case == "connected")
    assert done.stdout.splitlines() == wanted, done.stderr


def test_a_wait_ends_with_what_was_wrong_rather_than_a_probe_without_time() -> None:
    wrong = UnavailableError("no server answers")
    Readiness(10, "x").delay_s(wrong)
    with pytest.raises(DeadlineExceededError, match="no server answers"):
        Readiness(0.04, "x").delay_s(wrong)
