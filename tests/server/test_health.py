"""gRPC health on a real server: who watches, who only asks, and peers that read nothing."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.conftest import WORKERS, RunningServer
from tests.server.test_administration import administration
from tests.server.test_lifecycle import publish
from tests.server.test_security import write_tokens
from tests.server.test_start_and_drain import wait_for_sample
from tests.wire import INITIAL_WINDOW_SIZE, WINDOW_UPDATE, Peer, head

from ganserve.v1 import administration_pb2 as pb
from ganserve_server.services import health
from ganserve_server.settings import BUNDLED_MODELS

Start = Callable[..., RunningServer]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
HEALTH = "/grpc.health.v1.Health/"
NOT_FOUND, RESOURCE_EXHAUSTED, UNAUTHENTICATED = (
    code.value[0]
    for code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED)
)


def asked(service: str) -> bytes:
    return health_pb2.HealthCheckRequest(service=service).SerializeToString()


def told(message: bytes) -> int:
    return health_pb2.HealthCheckResponse.FromString(message).status


@contextlib.contextmanager
def watching(address: str, service: str) -> Iterator[Iterator[int]]:
    with grpc.insecure_channel(address) as channel:
        responses = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=service), timeout=60
        )
        yield (response.status for response in responses)
        responses.cancel()


def watch(peer: Peer, *services: str) -> list[int]:
    """Begin to watch; return the streams once each is answered with headers."""
    streams = [peer.start(asked(service), head(HEALTH + "Watch")) for service in services]
    while not all(stream in peer.answers for stream in streams):
        assert peer.read() is not None
    return streams


def stalled_watches(address: str, *services: str) -> Peer:
    """Return a peer that watches, and whose windows let no byte of an answer pass."""
    peer = Peer(address, {INITIAL_WINDOW_SIZE: 0})
    watch(peer, *services)
    return peer


def unload(server: RunningServer, model: str) -> None:
    with administration(server) as stub:
        stub.UnloadModel(pb.UnloadModelRequest(model=model))


def load(server: RunningServer, model: str) -> None:
    with administration(server) as stub:
        stub.LoadModel(pb.LoadModelRequest(model=model))


def test_a_watcher_that_reads_nothing_keeps_no_news_from_others_and_no_model_from_loading(
    start_server: Start, tmp_path: Path
) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 1, name="other")
    server = start_server("--models", tmp_path, "--reload", "off", "--admin-address", "127.0.0.1:0")
    with (
        stalled_watches(server.address, "", "other"),
        watching(server.address, "other") as other,
        watching(server.address, "") as whole,
    ):
        assert (next(other), next(whole)) == (SERVING, SERVING)
        for _ in range(2):
            unload(server, "other")
            assert next(other) == NOT_SERVING
            load(server, "other")
            assert next(other) == SERVING
        unload(server, "digits")
        unload(server, "other")
        assert (next(other), next(whole)) == (NOT_SERVING, NOT_SERVING)


@pytest.mark.parametrize("workers", WORKERS)
def test_watchers_that_read_nothing_do_not_hold_up_the_drain(workers: str, start_server: Start) -> None:
    flags = ("--drain-delay-s", "0", "--drain-timeout-s", "0.5")
    server = start_server("--workers", workers, *flags)
    with contextlib.ExitStack() as peers:
        for _ in range(3):
            peers.enter_context(stalled_watches(server.address, "", "mlp-mnist", "nothing"))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 0
    events = []
    while (event := server.events.get())["event"] != "stopped":
        events.append(event["event"])
    assert "workers do not end; they are killed" not in events


def test_a_drain_is_told_to_watchers_before_they_are_cut_off(start_server: Start) -> None:
    server = start_server("--drain-delay-s", "0")
    with watching(server.address, "mlp-mnist") as statuses, watching(server.address, "nothing") as unknown:
        assert (next(statuses), next(unknown)) == (SERVING, UNKNOWN)
        server.process.send_signal(signal.SIGTERM)
        assert next(statuses) == NOT_SERVING
        for ended in (statuses, unknown):
            with pytest.raises(grpc.RpcError) as caught:
                next(ended)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.process.wait(timeout=30) == 0


def test_a_watcher_that_reads_again_gets_the_latest_status_and_none_between(
    start_server: Start, tmp_path: Path
) -> None:
    publish(tmp_path, 1)
    server = start_server("--models", tmp_path, "--reload", "off", "--admin-address", "127.0.0.1:0")
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 0}) as peer:
        (stream,) = watch(peer, "digits")
        for _ in range(3):
            unload(server, "digits")
            load(server, "digits")
        unload(server, "digits")
        peer.send(WINDOW_UPDATE, 0, stream, (1000).to_bytes(4, "big"))
        while len(peer.answers[stream].data) < 14:  # of two messages
            assert peer.read() is not None
        peer.ping()
        assert [told(message) for message in peer.answers[stream].messages] == [SERVING, NOT_SERVING]


def test_watchers_of_a_model_are_told_when_it_comes_and_goes(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    server = start_server("--models", tmp_path, "--reload", "off", "--admin-address", "127.0.0.1:0")
    with watching(server.address, "other") as statuses:
        assert next(statuses) == UNKNOWN
        publish(tmp_path, 1, name="other")
        load(server, "other")
        assert next(statuses) == SERVING
        unload(server, "other")
        assert next(statuses) == NOT_SERVING
        load(server, "other")
        assert next(statuses) == SERVING


def test_what_is_unknown_is_not_found_by_check(server: RunningServer) -> None:
    with Peer(server.address) as peer:
        assert peer.call(asked("nothing"), head(HEALTH + "Check")).status == NOT_FOUND
        (message,) = peer.call(asked("mlp-mnist"), head(HEALTH + "Check")).messages
        assert told(message) == SERVING


def listed(message: bytes) -> dict[str, int]:
    response = health._HealthListResponse.FromString(message)
    return {name: one.status for name, one in response.statuses.items()}  # type: ignore[attr-defined]


def test_all_services_are_listed_and_nothing_is_logged(start_server: Start) -> None:
    server = start_server("--access-log", "all")
    with grpc.insecure_channel(server.address) as channel:
        ask = channel.unary_unary(HEALTH + "List")
        for _ in range(1000):
            message = ask(b"")
    models = (folder.name for folder in BUNDLED_MODELS.iterdir() if folder.is_dir())
    services = ("ganserve.v1.GenerationService", "inference.GRPCInferenceService")
    assert listed(message) == dict.fromkeys(("", *models, *services), SERVING)
    assert server.stop() == 0
    assert server.events.get()["event"] == "draining"
    assert server.events.get()["event"] == "stopped"


def test_the_message_of_list_is_the_published_one() -> None:
    response = health._HealthListResponse()
    response.statuses["a"].status = SERVING  # type: ignore[attr-defined]
    assert response.SerializeToString() == b"\x0a\x07\x0a\x01a\x12\x02\x08\x01"


def test_more_services_than_the_protocol_allows_are_not_listed() -> None:
    servicer = health.HealthServicer()
    for number in range(100):
        servicer.set(str(number), SERVING)  # and the server's own
    with pytest.raises(health.TooManyServices):
        servicer._list(None, b"")  # type: ignore[arg-type]


def test_with_tokens_anybody_may_check_and_watch_but_not_list(start_server: Start, tmp_path: Path) -> None:
    (token,) = write_tokens(tmp_path / "tokens.toml", {"name": "a", "roles": ["generate"]})
    server = start_server("--tokens-file", tmp_path / "tokens.toml")
    with Peer(server.address) as peer, watching(server.address, "mlp-mnist") as statuses:
        (message,) = peer.call(asked(""), head(HEALTH + "Check")).messages
        assert told(message) == SERVING
        assert next(statuses) == SERVING
        assert peer.call(b"", head(HEALTH + "List")).status == UNAUTHENTICATED
        answer = peer.call(b"", head(HEALTH + "List", ("authorization", f"Bearer {token}")))
        assert "mlp-mnist" in listed(answer.messages[0])


@pytest.mark.parametrize("method", ["Check", "Watch", "List"])
@pytest.mark.parametrize("content", [b"\xff", b"\x0a\x01\xff", b"\x0a\x05a"])
def test_what_is_no_message_is_an_error_of_the_caller(method: str, content: bytes, server: RunningServer) -> None:
    with Peer(server.address) as peer:
        answer = peer.call(content, head(HEALTH + method))
    # List's request has no fields: any others are let pass, as everywhere in protobuf.
    assert answer.status == (0 if method == "List" and content == b"\x0a\x01\xff" else 3)


def test_watchers_of_one_connection_are_bounded(server: RunningServer) -> None:
    with Peer(server.address) as peer, Peer(server.address) as other:
        *streams, last = watch(peer, *[""] * 101)
        assert peer.answers[last].status == RESOURCE_EXHAUSTED
        assert not any(peer.answers[stream].ended for stream in streams)
        (one,) = watch(other, "")
        assert not other.answers[one].ended


def test_when_watchers_are_too_many_those_that_have_most_lose_some(start_server: Start) -> None:
    server = start_server()
    with contextlib.ExitStack() as peers:
        greedy = [peers.enter_context(Peer(server.address)) for _ in range(10)]
        for peer in greedy:
            watch(peer, *[""] * 100)
        with watching(server.address, "") as statuses:
            assert next(statuses) == SERVING
        ended = 0
        for peer in greedy:
            peer.ping()
            ended += sum(answer.ended for answer in peer.answers.values())
        assert ended == 1
        assert server.scrape()['ganserve_rejections_total{reason="too_many_watchers"}'] == 1
    wait_for_sample(server, "ganserve_calls", lambda calls: calls == 0)
    # All that they had is free again.
    with Peer(server.address) as peer:
        streams = watch(peer, *[""] * 100)
        assert not any(peer.answers[stream].ended for stream in streams)
