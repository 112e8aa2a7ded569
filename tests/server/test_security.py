"""Who gets in: TLS, mutual TLS, tokens and their roles and rates, and files that change while the server runs."""

import asyncio
import concurrent.futures
import datetime
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.conftest import WORKERS, RunningServer
from tests.programs import run
from tests.server.test_start_and_drain import calls_logged, failing_start, wait_for_sample
from tests.wire import (
    GENERATE,
    GOAWAY,
    INITIAL_WINDOW_SIZE,
    NO_ERROR,
    PING,
    STREAM,
    WINDOW_UPDATE,
    Peer,
    head,
    message,
    request,
)

from ganserve import (
    AuthenticationError,
    Client,
    GanserveError,
    OverloadedError,
    UnavailableError,
)
from ganserve.v1 import administration_pb2 as admin_pb
from ganserve.v1 import administration_pb2_grpc as admin_pb_grpc
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server import errors
from ganserve_server.auth import tls, token_file, tokens
from ganserve_server.auth.security import Security
from ganserve_server.errors import RateLimited
from ganserve_server.services.wire import varint
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.rates import SharedRates

Start = Callable[..., RunningServer]
CA = trustme.CA()
MAX_WINDOW = 2**31 - 1


def write_certificate(folder: Path, authority: trustme.CA = CA, **options: Any) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    issued = authority.issue_cert("127.0.0.1", "localhost", **options)
    chain, key = folder / "tls.crt", folder / "tls.key"
    chain.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return chain, key


@pytest.fixture
def ca_file(tmp_path: Path) -> str:
    file = tmp_path / "ca.pem"
    CA.cert_pem.write_to_path(file)
    return str(file)


@pytest.fixture
def with_tls(tmp_path: Path) -> tuple[str | Path, ...]:
    chain, key = write_certificate(tmp_path / "server")
    return ("--tls-certificate-file", chain, "--tls-key-file", key)


def write_tokens(file: Path, *entries: dict[str, Any]) -> list[str]:
    """Write a tokens file; return the tokens."""
    made = [token_file.new_token() for _ in entries]
    file.unlink(missing_ok=True)
    for (_, digest), entry in zip(made, entries, strict=True):
        token_file.add(file, {"name": "somebody", "roles": ["generate"], "sha256": digest} | entry)
    return [token for token, _ in made]


# TLS.


@pytest.mark.parametrize("workers", WORKERS)
def test_calls_by_tls_are_answered(workers: str, start_server: Start, with_tls: tuple[str, ...], ca_file: str) -> None:
    running = start_server(*with_tls, "--workers", workers)
    with Client(running.address, ca_file=ca_file) as client:
        assert len(client.generate("mlp-mnist", count=3000, seed=1)) == 3000
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1", "h2"])
    host, _, port = running.address.rpartition(":")
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host) as peer:
        assert peer.selected_alpn_protocol() == "h2"
        assert peer.version() == "TLSv1.3"
        end = ssl.cert_time_to_seconds(str(peer.getpeercert()["notAfter"]))  # type: ignore[index]
    assert running.scrape()['ganserve_certificate_expiry_timestamp_seconds{certificate="server"}'] == end


def test_callers_who_trust_another_authority_or_speak_no_tls_get_no_answer(
    start_server: Start, with_tls: tuple[str, ...], tmp_path: Path
) -> None:
    running = start_server(*with_tls)
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    with Client(running.address, ca_file=str(other), timeout_s=2) as client, pytest.raises(AuthenticationError):
        client.models()
    with Client(running.address, tls=False, retries=False) as client, pytest.raises(UnavailableError):
        client.models()
    with pytest.raises(ssl.SSLCertVerificationError):
        serial_of(running.address, str(other))
    wait_for_sample(running, 'ganserve_tls_failures_total{reason="refused_by_peer"}', lambda count: count > 0)
    wait_for_sample(running, 'ganserve_tls_failures_total{reason="no_tls"}', lambda count: count > 0)
    assert not [name for name in running.scrape() if "expiry" in name and "client_ca" in name]


def test_peers_that_only_look_are_not_logged(start_server: Start, with_tls: tuple[str, ...]) -> None:
    running = start_server(*with_tls)
    host, _, port = running.address.rpartition(":")
    for _ in range(300):
        socket.create_connection((host, int(port))).close()
    wait_for_sample(running, 'ganserve_tls_failures_total{reason="closed"}', lambda count: count == 300)
    assert running.stop() == 0
    assert running.events.get(timeout=30)["event"] == "draining"


def test_a_connection_by_tls_costs_little_memory(start_server: Start, with_tls: tuple[str, ...], ca_file: str) -> None:
    running = start_server(*with_tls)
    context = ssl.create_default_context(cafile=ca_file)
    with ExitStack() as peers:

        def connect(count: int) -> float:
            for _ in range(count):
                peer = peers.enter_context(Peer(running.address, tls=context))
                assert peer.call(request()).status == 0
            return running.scrape()["process_resident_memory_bytes"]

        before = connect(50)
        assert (connect(200) - before) / 200 < 150_000


def test_old_tls_is_refused(start_server: Start, with_tls: tuple[str, ...], ca_file: str) -> None:
    running = start_server(*with_tls)
    context = ssl.create_default_context(cafile=ca_file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES256-GCM-SHA384")  # no forward secrecy
    host, _, port = running.address.rpartition(":")
    with socket.create_connection((host, int(port))) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname=host)
    wait_for_sample(running, 'ganserve_tls_failures_total{reason="old_tls"}', lambda count: count == 1)


def test_mutual_tls_lets_in_who_has_a_certificate_of_the_authority(
    start_server: Start, with_tls: tuple[str, ...], ca_file: str, tmp_path: Path
) -> None:
    running = start_server(*with_tls, "--tls-client-ca-file", ca_file)
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    mine = write_certificate(tmp_path / "mine")
    others = write_certificate(tmp_path / "others", trustme.CA())
    expired = write_certificate(tmp_path / "expired", not_before=now - 2 * day, not_after=now - day)
    with Client(
        running.address, ca_file=ca_file, certificate_file=str(mine[0]), key_file=str(mine[1]), timeout_s=20
    ) as client:
        assert len(client.generate("mlp-mnist", count=2)) == 2
    refused: list[tuple[str, dict[str, str]]] = [
        ("no_certificate", {}),
        ("untrusted_certificate", {"certificate_file": str(others[0]), "key_file": str(others[1])}),
        ("expired_certificate", {"certificate_file": str(expired[0]), "key_file": str(expired[1])}),
    ]
    for reason, given in refused:
        with Client(running.address, ca_file=ca_file, timeout_s=1, **given) as client, pytest.raises(GanserveError):  # type: ignore[arg-type]
            client.models()
        wait_for_sample(running, f'ganserve_tls_failures_total{{reason="{reason}"}}', lambda count: count > 0)
    assert 'ganserve_requests_total{code="OK",method="ListModels",model="other",version=""}' not in running.scrape()


def test_callers_with_certificates_have_no_sessions_to_resume(
    start_server: Start, with_tls: tuple[str, ...], ca_file: str, tmp_path: Path
) -> None:
    """A certificate that has ended since would go on letting in; of TLS 1.2, which keeps sessions, there is none."""
    running = start_server(*with_tls, "--tls-client-ca-file", ca_file)
    context = ssl.create_default_context(cafile=ca_file)
    context.load_cert_chain(*write_certificate(tmp_path / "mine"))
    with Peer(running.address, tls=context) as peer:
        assert peer.call(request()).status == 0
        assert isinstance(peer.socket, ssl.SSLSocket)
        assert peer.socket.session is None or not peer.socket.session.has_ticket
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        Peer(running.address, tls=context)
    wait_for_sample(running, 'ganserve_tls_failures_total{reason="old_tls"}', lambda count: count == 1)


def serial_of(address: str, ca_file: str) -> str:
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=ca_file)
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host) as peer:
        return str(peer.getpeercert()["serialNumber"])  # type: ignore[index]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_new_certificate_is_taken_without_a_restart_and_a_bad_one_is_not(
    workers: str, start_server: Start, with_tls: tuple[str, ...], ca_file: str, tmp_path: Path
) -> None:
    running = start_server(*with_tls, "--workers", workers)
    loaded = 'ganserve_file_reloads_total{kind="certificates",outcome="loaded"}'
    rejected = 'ganserve_file_reloads_total{kind="certificates",outcome="rejected"}'
    with Client(running.address, ca_file=ca_file) as client:
        client.generate("mlp-mnist")
        before = serial_of(running.address, ca_file)
        new = write_certificate(tmp_path / "new")
        new[1].replace(tmp_path / "server" / "tls.key")
        new[0].replace(tmp_path / "server" / "tls.crt")
        wait_for_sample(running, loaded, lambda count: count >= int(workers))
        after = serial_of(running.address, ca_file)
        assert after != before
        told = running.wait_for("read again")
        assert (told["kind"], told["serial"]) == ("certificates", after)
        end = running.scrape()['ganserve_certificate_expiry_timestamp_seconds{certificate="server"}']
        assert datetime.datetime.fromisoformat(told["server_ends"]).timestamp() == end
        kept_before = running.scrape().get(rejected, 0)
        write_certificate(tmp_path / "third")[1].replace(tmp_path / "server" / "tls.key")
        wait_for_sample(running, rejected, lambda count: count >= kept_before + int(workers))
        assert serial_of(running.address, ca_file) == after
        client.generate("mlp-mnist")  # on the connection of old
    assert "is not the key of" in running.wait_for("what was read before stays in use")["reason"]


@pytest.mark.parametrize("authority", [trustme.CA(), trustme.CA(key_type=trustme.KeyType.RSA)])
@pytest.mark.parametrize("year", [2031, 2049, 2050, 2080])
def test_the_end_of_a_certificate_is_read(authority: trustme.CA, year: int, tmp_path: Path) -> None:
    end = datetime.datetime(year, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)
    chain, key = write_certificate(tmp_path / "some", authority, not_after=end)
    settings = ServerSettings(tls_certificate_file=str(chain), tls_key_file=str(key))
    assert tls.Certificates(settings, None).reload()["server_ends"] == end.isoformat()


@pytest.mark.parametrize("cut", [200, 400, 600])
def test_half_a_certificate_is_told(cut: int, with_tls: tuple[str, Path], tmp_path: Path) -> None:
    chain = Path(with_tls[1])
    chain.write_bytes(chain.read_bytes()[:cut])
    assert "certificates and a key in PEM" in failing_start(*with_tls, code=1)


def test_wrong_files_are_told_at_the_start(with_tls: tuple[str, Path], tmp_path: Path) -> None:
    other = write_certificate(tmp_path / "other")[1]
    assert "--tls-key-file" in failing_start(*with_tls[:2], code=1)
    assert "--tls-certificate-file" in failing_start("--tls-client-ca-file", other, code=1)
    assert "is not the key of" in failing_start(*with_tls[:3], other, code=1)
    assert "nothing.key cannot be read: No such file" in failing_start(*with_tls[:3], tmp_path / "nothing.key", code=1)
    assert "nothing.toml cannot be used: No such file" in failing_start(
        "--tokens-file", tmp_path / "nothing.toml", code=1
    )
    other.write_bytes(other.read_bytes().replace(b"-----BEGIN EC", b"-----BEGIN ENCRYPTED"))
    assert "PEM" in failing_start(*with_tls[:3], other, code=1)


# Tokens.


def reflects(address: str, metadata: tuple[tuple[str, str], ...] = ()) -> grpc.StatusCode:
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        try:
            list(stub.ServerReflectionInfo(asked, metadata=metadata))
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("workers", WORKERS)
def test_only_tokens_of_the_file_may_call_and_only_in_their_roles(
    workers: str, start_server: Start, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.toml"
    shop, ops = write_tokens(file, {"name": "shop"}, {"name": "ops", "roles": ["admin"]})
    flags = ("--tokens-file", file, "--admin-address", "127.0.0.1:0", "--access-log", "all", "--workers", workers)
    running = start_server(*flags)
    with Client(running.address, token=shop) as client:
        assert len(client.generate("mlp-mnist", count=2)) == 2
        assert len(list(client.stream("mlp-mnist", count=200))) == 200
    for wrong in (shop[:-1], "x" * 4096, "gs wrong"):
        with Client(running.address, token=wrong) as client, pytest.raises(AuthenticationError):
            client.generate("mlp-mnist")
    with Client(running.address) as client:
        with pytest.raises(AuthenticationError, match="a token is needed"):
            client.generate("mlp-mnist")
        with pytest.raises(AuthenticationError):
            next(iter(client.stream("mlp-mnist", count=200)))
        client.health()
    with Client(running.address, token=ops) as client, pytest.raises(AuthenticationError, match="'generate'"):
        client.generate("mlp-mnist")
    assert reflects(running.address) is grpc.StatusCode.UNAUTHENTICATED
    assert reflects(running.address, (("authorization", f"bearer  {shop}"),)) is grpc.StatusCode.OK
    assert reflects(running.address, (("authorization", f"Basic {shop}"),)) is grpc.StatusCode.UNAUTHENTICATED

    with grpc.insecure_channel(running.admin_address) as channel:
        admin = admin_pb_grpc.AdministrationServiceStub(channel)
        for token, code in (
            (shop, grpc.StatusCode.PERMISSION_DENIED),
            ("gs_wrong", grpc.StatusCode.UNAUTHENTICATED),
            (None, grpc.StatusCode.UNAUTHENTICATED),
        ):
            metadata = [] if token is None else [("authorization", f"Bearer {token}")]
            with pytest.raises(grpc.RpcError) as caught:
                admin.ReloadModels(admin_pb.ReloadModelsRequest(), metadata=metadata)
            assert caught.value.code() is code
        assert admin.ReloadModels(
            admin_pb.ReloadModelsRequest(), metadata=[("authorization", f"Bearer {ops}")]
        ).versions

    samples = running.scrape()
    assert samples['ganserve_caller_images_total{caller="shop"}'] == 202
    assert samples['ganserve_rejections_total{reason="unauthenticated"}'] >= 4
    assert running.stop() == 0
    events = [running.events.get_nowait() for _ in range(running.events.qsize())]
    assert [event["caller"] for event in events if event.get("caller")].count("shop") >= 2
    denied = [event for event in events if event.get("code") == "PERMISSION_DENIED"]
    assert {(event["event"], event["caller"]) for event in denied} == {("call", "ops"), ("admin call", "shop")}
    assert all(event["peer"].startswith("127.0.0.1:") for event in denied)
    log = json.dumps(events)
    assert "UNAUTHENTICATED" in log
    for secret in (shop, ops, shop[:-1], "gs_wrong", "x" * 100):
        assert secret not in log


def test_tokens_come_and_go_without_a_restart(start_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    first, *_ = write_tokens(file, {"name": "first"}, {"name": "other"}, {"name": "third"})
    running = start_server("--tokens-file", file)
    loaded = 'ganserve_file_reloads_total{kind="tokens",outcome="loaded"}'
    with Client(running.address, token=first) as client:
        client.generate("mlp-mnist")
        file.write_text("[[tokens]]\nname = 'first'\nsha_256 = ''\n")
        wait_for_sample(running, loaded.replace("loaded", "rejected"), lambda count: count == 1)
        client.generate("mlp-mnist")
        assert running.scrape()['ganserve_files_rejected{kind="tokens"}'] == 1
        assert "did you mean 'sha256'?" in running.wait_for("what was read before stays in use")["reason"]
        second, *_ = write_tokens(file, {"name": "second"}, {"name": "other"})
        wait_for_sample(running, loaded, lambda count: count == 1)
        told = running.wait_for("read again")
        differ = {key: told[key] for key in ("tokens", "added", "removed", "changed")}
        assert differ == {"tokens": 2, "added": ["second"], "removed": ["first", "third"], "changed": ["other"]}
        assert running.scrape()['ganserve_files_rejected{kind="tokens"}'] == 0
        with pytest.raises(AuthenticationError):
            client.generate("mlp-mnist")
    with Client(running.address, token=second) as client:
        client.generate("mlp-mnist")


def test_a_call_without_a_token_is_refused_before_its_body_comes(start_server: Start, tmp_path: Path) -> None:
    write_tokens(file := tmp_path / "tokens.toml", {})
    running = start_server("--tokens-file", file)
    with Peer(running.address) as peer:
        stream = peer.head(head())
        assert peer.answer(stream).status == grpc.StatusCode.UNAUTHENTICATED.value[0]
        # What is sent all the same, in one packet with the headers, is not read.
        stream = peer.new_id()
        peer.head(head(), stream=stream)
        peer.body(stream, message(request()))
        assert peer.answer(stream).status == grpc.StatusCode.UNAUTHENTICATED.value[0]
        each = peer.head(head("/ganserve.v1.GenerationService/GenerateEach"))
        assert peer.answer(each).status == grpc.StatusCode.UNAUTHENTICATED.value[0]
    assert running.scrape()['ganserve_images_total{model="mlp-mnist",version="1"}'] == 0


@pytest.mark.parametrize("path", ["/no.Such/Method", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"])
def test_without_a_token_nothing_large_is_kept(path: str, start_server: Start, tmp_path: Path) -> None:
    """Else the oldest unfinished requests, of those who have one, would make room for it."""
    (token,) = write_tokens(file := tmp_path / "tokens.toml", {})
    running = start_server("--tokens-file", file)
    unfinished = message(bytes(4 << 20))[: 1 << 20]
    with Peer(running.address) as mine, Peer(running.address) as other:
        body = message(request() + a_field_of(1 << 20))
        stream = mine.head(head(GENERATE, ("authorization", f"Bearer {token}")))
        mine.body(stream, body[:-1], end=False)
        mine.ping()
        for _ in range(300):  # together more than may be kept
            other.body(other.head(head(path)), unfinished, end=False)
        other.ping()
        assert {answer.status for answer in other.answers.values()} <= {
            grpc.StatusCode.UNIMPLEMENTED.value[0],
            grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
        }
        mine.body(stream, body[-1:])
        assert mine.answer(stream).status == 0


def a_field_of(size: int) -> bytes:
    """Write a field that no message has."""
    return b"\xfa\x7f" + varint(size) + bytes(size)


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_rate_is_kept_on_all_connections_and_workers_together(
    workers: str, start_server: Start, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.toml"
    slow, free = write_tokens(file, {"name": "slow", "images_per_s": 100.0, "burst_images": 50.0}, {"name": "free"})
    running = start_server("--tokens-file", file, "--workers", workers, "--access-log", "all")
    made = [0, 0, 0, 0]
    refused: list[OverloadedError] = []
    began = time.monotonic()

    def ask(number: int) -> None:
        with Client(running.address, token=slow, retries=False) as client:
            while sum(made) < 200 or not refused:
                assert time.monotonic() - began < 120
                try:
                    made[number] += len(client.generate("mlp-mnist", count=10))
                except OverloadedError as error:
                    refused.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    assert {error.reason for error in refused} == {"rate_limited"}
    assert all(error.retry_after_s and error.retry_after_s < 0.2 for error in refused)
    assert 200 <= sum(made) <= (50 + 100 * took) * 1.05
    with Client(running.address, token=free) as client:
        assert len(client.generate("mlp-mnist", count=1000)) == 1000
    # Retries wait as they are told, and a stream as long as it must.
    with Client(running.address, token=slow) as client:
        began = time.monotonic()
        assert len(list(client.stream("mlp-mnist", count=200))) == 200
        assert time.monotonic() - began > (200 - 50 - 64) / 100
        assert len(client.generate("mlp-mnist", count=10)) == 10
        with pytest.raises(grpc.RpcError) as caught:
            each_answer(running.address, slow, count=50)
        assert "rate_limited" in str(caught.value)
    samples = running.scrape()
    assert samples['ganserve_caller_limited_total{caller="slow",outcome="refused"}'] > len(refused)
    assert samples['ganserve_caller_limited_total{caller="slow",outcome="delayed"}'] >= 2
    assert not [name for name in samples if "limited" in name and "free" in name]
    throttled = [call for call in calls_logged(running) if "throttled_s" in call]
    assert [call["method"] for call in throttled] == ["StreamImages"]
    assert (200 - 50 - 64) / 100 < float(str(throttled[0]["throttled_s"])) < float(str(throttled[0]["seconds"]))


def test_how_long_a_rate_held_up_a_stream_is_logged_of_one_that_it_made_late(
    start_server: Start, tmp_path: Path
) -> None:
    (token,) = write_tokens(file := tmp_path / "tokens.toml", {"images_per_s": 1.0})
    running = start_server("--tokens-file", file)
    images = pb.StreamImagesRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=128))
    fields = head(STREAM, ("authorization", f"Bearer {token}"), ("grpc-timeout", "3S"))
    # A peer that leaves the deadline to the server: a client that ends the call itself may do so first.
    with Peer(running.address) as peer:
        assert peer.call(images.SerializeToString(), fields).status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    (call,) = calls_logged(running)
    assert call["code"] == "DEADLINE_EXCEEDED"
    assert 0.3 < float(str(call["throttled_s"])) < float(str(call["seconds"])) < 10  # the second chunk has 64 s to wait


async def test_a_stream_gets_at_a_time_what_its_rate_lets_pass_at_once(start_server: Start, tmp_path: Path) -> None:
    """A small model's messages are of 256 images for others: here they would come every 2.5 s."""
    (token,) = write_tokens(file := tmp_path / "tokens.toml", {"images_per_s": 100.0})
    running = start_server("--tokens-file", file)
    async with grpc.aio.insecure_channel(running.address) as channel:
        asked = pb.StreamImagesRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=364, seed=0))
        metadata = (("authorization", f"Bearer {token}"),)
        chunks = [
            answer.chunk
            async for answer in pb_grpc.GenerationServiceStub(channel).StreamImages(asked, metadata=metadata)
        ]
    assert [seed for chunk in chunks for seed in chunk.seeds] == list(range(364))
    assert max(chunk.count for chunk in chunks) <= 100


def each_answer(address: str, token: str, count: int) -> None:
    """Ask by GenerateEach until a request is refused."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        asked = (
            pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="mlp-mnist", count=count)) for _ in range(3)
        )
        for answer in stub.GenerateEach(asked, metadata=[("authorization", f"Bearer {token}")]):
            if answer.HasField("error"):
                raise grpc.RpcError(answer.error.reason)


async def test_two_tokens_on_one_connection_take_turns(start_server: Start, tmp_path: Path) -> None:
    """A proxy has one connection for many callers: turns by connection would let one keep out the others."""
    file = tmp_path / "tokens.toml"
    greedy, modest = write_tokens(file, {"name": "greedy"}, {"name": "modest"})
    running = start_server("--tokens-file", file, "--threads", "1", "--max-queue-images", "100000")
    order: list[str] = []

    async def ask(stub: Any, name: str, token: str) -> None:
        request = pb.GenerateImagesRequest(model="dcgan-mnist", count=500)
        await stub.GenerateImages(request, metadata=[("authorization", f"Bearer {token}")])
        order.append(name)

    async with grpc.aio.insecure_channel(running.address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub: Any = pb_grpc.GenerationServiceStub(channel)
        await asyncio.gather(*(ask(stub, "greedy", greedy) for _ in range(8)), ask(stub, "modest", modest))
    assert order.index("modest") < 4


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "1 to 1000 tables"),
        ("tokens = 3", "1 to 1000 tables"),
        ("[[token]]", "did you mean 'tokens'?"),
        ("[[tokens]]\nname = 'a'", "token 'a', sha256: Field required"),
        (f"[[tokens]]\nname = 'a'\nsha256 = '{'0' * 64}'\nroles = ['root']", "'generate' or 'admin'"),
        (f"[[tokens]]\nname = 'a'\nsha256 = '{'0' * 64}'\nroles = []", "roles"),
        (
            f"[[tokens]]\nname = 'a b'\nsha256 = '{'0' * 64}'\nroles = ['admin']",
            "token 'a b', name: it must be 1 to 64 letters",
        ),
        (f"[[tokens]]\nname = 'a'\nsha256 = '{'0' * 64}'\nroles = ['admin']\n" * 2, "'a' occurs twice"),
        ("[[tokens", "cannot be used"),
        ("tokens = " + "[" * 5000, "nested too deeply"),
        ("tokens = [1]", "token 'number 1', as a whole"),
        *(
            (f"[[tokens]]\nname = 'a'\nsha256 = '{'0' * 64}'\nroles = ['admin']\n{limit}", text)
            for limit, text in (
                ("images_per_s = 1e-12", "images_per_s: Input should be greater than or equal to 0.001"),
                ("images_per_s = inf", "images_per_s: Input should be a finite number"),
                ("images_per_s = true", "images_per_s: Input should be a valid number"),
                ("images_per_s = 1\nburst_images = inf", "burst_images: Input should be a finite number"),
                ("burst_images = 1", "burst_images needs images_per_s"),
            )
        ),
        (
            "[[tokens]]\nname = 'a'\nsha256 = 'gs_secret-itself'\nroles = ['admin']",
            "token 'a', sha256: it must be 64 hex",
        ),
    ],
)
def test_a_tokens_file_that_breaks_a_rule_is_told_and_no_secret_with_it(
    content: str, text: str, tmp_path: Path
) -> None:
    (file := tmp_path / "tokens.toml").write_text(content)
    told = failing_start("--tokens-file", file, code=1)
    assert text in json.loads(told.splitlines()[-1])["reason"]
    assert "gs_secret" not in told


def test_a_file_that_changes_while_the_server_starts_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = write_tokens(file := tmp_path / "tokens.toml", {})
    new: list[str] = []

    def read_and_change(read: Path) -> list[token_file.Token]:
        found = read_tokens(read)
        new[:] = new or write_tokens(file, {})
        return found

    read_tokens = tokens.read_tokens
    monkeypatch.setattr(tokens, "read_tokens", read_and_change)
    guard = Security(ServerSettings(tokens_file=str(file)), None, SharedRates())
    assert guard.tokens is not None

    def name_of(token: str) -> str:
        assert guard.tokens is not None
        return guard.tokens.identify({b"authorization": f"Bearer {token}".encode()}).name

    assert name_of(old) == "somebody"
    guard.refresh()
    assert name_of(new[0]) == "somebody"


def add(file: Path, name: str) -> None:
    token_file.add(file, {"name": name, "roles": ["generate"], "sha256": token_file.new_token()[1]})


def test_tokens_that_are_added_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: add(file, f"t{number}"), range(40)))
    assert {token.name for token in token_file.read_tokens(file)} == {f"t{number}" for number in range(40)}


def test_a_token_is_added_where_a_link_leads_and_owner_and_mode_stay(tmp_path: Path) -> None:
    """A server that is another user must be able to read it as before."""
    add(file := tmp_path / "real.toml", "first")
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 65534, 65534)
    before = file.stat()
    (link := tmp_path / "tokens.toml").symlink_to("real.toml")
    umask = os.umask(0o077)
    add(link, "second")
    os.umask(umask)
    after = file.stat()
    assert link.is_symlink()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert [token.name for token in token_file.read_tokens(file)] == ["first", "second"]
    with pytest.raises(ValueError, match="token 'second' already exists"):
        add(link, "second")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["real.toml", "tokens.toml"]


@pytest.mark.parametrize("kind", ["pipe", "loop"])
def test_a_token_is_not_written_in_place_of_what_is_no_file(kind: str, tmp_path: Path) -> None:
    place = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(place)
    before = place.lstat()
    text = "Too many levels" if kind == "loop" else "not a regular file"
    assert text in token_told("token", "add", "shop", "--file", place, status=2)
    assert place.lstat().st_ino == before.st_ino


HEAD = "# Who may call.\n\n# asked for by Ann\n"
FIRST = f'[[tokens]]\nname = "first"\nsha256 = "{"1" * 64}"\n# no more\nroles = ["generate"]  # nor less\n'
BETWEEN = '# until May\n\n# [[tokens]]\n# name = "nobody"\n\n'
SECOND = f'[[ tokens ]]\nname = "second"\nsha256 = "{"2" * 64}"\nimages_per_s = 2.5\nroles = ["admin", "generate"]\n'
END = "\n# the end\n"


def token_told(*words: str | Path, status: int = 0) -> str:
    done = run("ganserve-server", *words)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def test_tokens_are_listed_without_their_hashes(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    token = token_told("token", "add", "shop", "--file", file, "--images-per-s", "2.5").strip()
    token_told("--tokens-file", file, "token", "add", "ops", "--role", "admin")
    told = token_told("--tokens-file", file, "token", "list")
    assert [line.split() for line in told.splitlines()[1:]] == [["shop", "generate", "2.5"], ["ops", "admin"]]
    as_json = token_told("token", "list", "--file", file, "--json")
    assert json.loads(as_json) == [
        {"name": "shop", "roles": ["generate"], "images_per_s": 2.5, "burst_images": None},
        {"name": "ops", "roles": ["admin"], "images_per_s": None, "burst_images": None},
    ]
    digests = re.findall(r"[0-9a-f]{64}", file.read_text())
    assert len(digests) == 2
    for secret in (token, *digests):
        assert secret not in told + as_json
    assert "--file" in token_told("token", "list", status=2)
    assert "nothing.toml: No such file" in token_told("token", "list", "--file", tmp_path / "nothing.toml", status=2)


@pytest.mark.parametrize(
    ("name", "left"), [("first", (HEAD, BETWEEN, SECOND, END)), ("second", (HEAD, FIRST, BETWEEN, END))]
)
def test_a_withdrawn_token_is_gone_and_comments_stay(name: str, left: tuple[str, ...], tmp_path: Path) -> None:
    (file := tmp_path / "tokens.toml").write_text(HEAD + FIRST + BETWEEN + SECOND + END)
    file.chmod(0o640)
    token_told("token", "withdraw", name, "--file", file)
    assert file.read_text().split() == "".join(left).split()
    assert file.stat().st_mode & 0o777 == 0o640


def test_each_line_that_is_not_withdrawn_stays_byte_for_byte(tmp_path: Path) -> None:
    ends = "# written elsewhere\r\n# and here\n# Zoë\u2028sha256 = 1\r\n"
    before = (HEAD + FIRST).replace("\n", "\r\n") + ends + SECOND
    (file := tmp_path / "tokens.toml").write_bytes(before.encode())
    token_told("token", "withdraw", "first", "--file", file)
    assert file.read_bytes() == (HEAD.replace("\n", "\r\n") + ends + SECOND).encode()
    file.write_bytes(before.encode())
    token_told("token", "add", "third", "--file", file)
    assert file.read_bytes().startswith(before.rstrip().encode())
    assert file.read_bytes().count(b"\r\n") > before.count("\r\n")


def test_what_cannot_be_withdrawn_is_told_and_the_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    entries = [f'{{name = "t{number}", sha256 = "{f"{number}" * 64}", roles = ["admin"]}}' for number in range(2)]
    for content, name, text in (
        (FIRST + SECOND, "secnod", "no token 'secnod'; did you mean 'second'?"),
        (f"tokens = [{', '.join(entries)}]", "t1", "remove 't1' by hand"),
        (f"tokens = [{entries[0]}]", "t0", "'t0' is the only token"),
    ):
        file.write_text(content)
        assert text in token_told("token", "withdraw", name, "--file", file, status=2)
        assert file.read_text() == content
    assert "No such file" in token_told("token", "withdraw", "a", "--file", tmp_path / "nothing.toml", status=2)


def test_a_withdrawn_token_is_no_longer_let_in(start_server: Start, tmp_path: Path) -> None:
    (old, _) = write_tokens(file := tmp_path / "tokens.toml", {"name": "old"}, {"name": "new"})
    running = start_server("--tokens-file", file)
    with Client(running.address, token=old) as client:
        client.generate("mlp-mnist")
        token_told("token", "withdraw", "old", "--file", file)
        assert running.wait_for("read again")["removed"] == ["old"]
        with pytest.raises(AuthenticationError):
            client.generate("mlp-mnist")


def test_the_greatest_debt_and_the_longest_burst_are_counted() -> None:
    digest = token_file.new_token()[1]
    slowest = token_file.Token(name="a", sha256=digest, roles=("generate",), images_per_s=0.001, burst_images=1e9)
    caller = tokens.Principal(slowest, SharedRates())
    caller.take(1_000_000_000)  # a burst of 30,000 years, and the machine is younger
    with pytest.raises(RateLimited) as caught:
        caller.take(1)
    assert errors.status_details(caught.value)


# What is open to all, and ages.


def test_reflection_can_be_turned_off(start_server: Start) -> None:
    running = start_server("--reflection", "off")
    assert reflects(running.address) is grpc.StatusCode.UNIMPLEMENTED
    with Client(running.address) as client:
        client.generate("mlp-mnist")


async def test_connections_end_at_their_age_and_no_call_does(start_server: Start) -> None:
    running = start_server("--max-connection-age-s", "0.4")
    until = time.monotonic() + 3
    made = 0
    async with grpc.aio.insecure_channel(running.address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING  # type: ignore[union-attr]
        stub: Any = pb_grpc.GenerationServiceStub(channel)

        async def ask() -> None:
            nonlocal made
            while time.monotonic() < until:
                await stub.GenerateImages(pb.GenerateImagesRequest(model="mlp-mnist", count=2))
                made += 1

        stream = stub.StreamImages(
            pb.StreamImagesRequest(generate=pb.GenerateImagesRequest(model="dcgan-mnist", count=4000))
        )
        streamed, *_ = await asyncio.gather(count_images(stream), *(ask() for _ in range(8)))
        assert streamed == 4000
    assert made > 100
    assert running.scrape()["ganserve_connections_aged_total"] >= 4
    wait_for_sample(running, "ganserve_connections", lambda count: count == 0)


@pytest.mark.parametrize("by_tls", [False, True])
def test_an_aged_connection_is_kept_until_its_last_answer_is_read(
    by_tls: bool, start_server: Start, with_tls: tuple[str | Path, ...], ca_file: str
) -> None:
    running = start_server("--max-connection-age-s", "0.3", *(with_tls if by_tls else ()))
    tls = ssl.create_default_context(cafile=ca_file) if by_tls else None
    with Peer(running.address, {INITIAL_WINDOW_SIZE: MAX_WINDOW}, receive_buffer=4096, tls=tls) as peer:
        peer.send(WINDOW_UPDATE, 0, 0, (1 << 30).to_bytes(4, "big"))
        stream = peer.start(request(count=1024))
        wait_for_sample(running, "ganserve_connections_aged_total", lambda count: count == 1)
        until = time.monotonic() + 0.6  # in which all is written, and much of it not on its way yet
        while time.monotonic() < until:
            peer.send(PING, 0, 0, bytes(8))
            running.scrape()
        answer = peer.answer(stream)
        assert (answer.status, len(answer.images.seeds)) == (0, 1024)
        assert peer.closed_for() == NO_ERROR
    wait_for_sample(running, "ganserve_connections", lambda count: count == 0)


def test_a_watcher_that_comes_as_its_connection_ages_does_not_keep_it_open(start_server: Start) -> None:
    running = start_server("--max-connection-age-s", "0.3")
    with Peer(running.address) as peer:
        peer.until(GOAWAY)  # the first, which waits for what is on its way
        probe, watch = (peer.start(b"", head(f"/grpc.health.v1.Health/{name}")) for name in ("Check", "Watch"))
        assert peer.answer(probe).status == 0
        answer = peer.answer(watch)
        assert (len(answer.messages), answer.status) == (1, grpc.StatusCode.UNAVAILABLE.value[0])
        while peer.read() is not None:
            pass


async def count_images(stream: Any) -> int:
    return sum([len(response.chunk.seeds) async for response in stream])


def test_an_address_that_is_open_to_all_is_told(with_tls: tuple[str | Path, ...], tmp_path: Path) -> None:
    write_tokens(file := tmp_path / "tokens.toml", {})
    everywhere = ("--address", "0.0.0.0:0", "--models", tmp_path / "nothing")
    assert "anyone who reaches this address may call" in failing_start(*everywhere, code=1)
    assert "anyone who reaches this address may call" in failing_start(*everywhere, *with_tls, code=1)
    assert "tokens in plain text" in failing_start(*everywhere, "--tokens-file", file, code=1)
    assert "warning" not in failing_start(*everywhere, *with_tls, "--tokens-file", file, code=1)
    assert "warning" not in failing_start("--models", tmp_path / "nothing", code=1)
    admin = failing_start("--models", tmp_path / "nothing", "--admin-address", "0.0.0.0:0", code=1)
    assert json.loads(admin.splitlines()[0])["flag"] == "--admin-address"
