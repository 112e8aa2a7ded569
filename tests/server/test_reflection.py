"""Reflection, by its two versions."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2 as pb
from tests.conftest import RunningServer
from tests.server.test_security import write_tokens
from tests.wire import CANCEL, RST_STREAM, Answer, Peer, head, message

from ganserve_server.services import reflection
from ganserve_server.services.reflection import ReflectionServicer

Start = Callable[..., RunningServer]
SERVICES = [
    "ganserve.v1.GenerationService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
]


def path(version: str) -> str:
    return f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"


@pytest.fixture(params=["v1", "v1alpha"])
def ask(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[Callable[..., list[Any]]]:
    """Send requests on one stream; return the responses. The messages of both versions are the same on the wire."""
    with grpc.insecure_channel(server.address) as channel:
        method = channel.stream_stream(
            path(request.param),
            pb.ServerReflectionRequest.SerializeToString,
            pb.ServerReflectionResponse.FromString,
        )
        yield lambda *requests: list(method(iter(requests)))


def files_of(response: Any) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    files = map(descriptor_pb2.FileDescriptorProto.FromString, response.file_descriptor_response.file_descriptor_proto)
    return {file.package: file for file in files}


def test_all_services_are_listed_and_each_is_described(ask: Callable[..., list[Any]]) -> None:
    (response,) = ask(pb.ServerReflectionRequest(list_services=""))
    assert [service.name for service in response.list_services_response.service] == SERVICES
    for name, described in zip(
        SERVICES, ask(*(pb.ServerReflectionRequest(file_containing_symbol=name) for name in SERVICES)), strict=True
    ):
        package, _, short = name.rpartition(".")
        assert short in [service.name for service in files_of(described)[package].service]


def test_v1_is_described_with_its_own_names(ask: Callable[..., list[Any]]) -> None:
    (response,) = ask(pb.ServerReflectionRequest(file_containing_symbol="grpc.reflection.v1.ServerReflection"))
    file = files_of(response)["grpc.reflection.v1"]
    (method,) = file.service[0].method
    assert method.input_type == ".grpc.reflection.v1.ServerReflectionRequest"
    assert "v1alpha" not in str(file)
    (again,) = ask(pb.ServerReflectionRequest(file_by_filename=file.name))
    assert files_of(again)["grpc.reflection.v1"] == file


def test_health_is_described_with_list(ask: Callable[..., list[Any]]) -> None:
    (response,) = ask(pb.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health"))
    (service,) = files_of(response)["grpc.health.v1"].service
    assert sorted(method.name for method in service.method) == ["Check", "List", "Watch"]


def test_what_is_unknown_is_an_error_in_its_turn(ask: Callable[..., list[Any]]) -> None:
    extension = pb.ExtensionRequest(containing_type="ganserve.v1.Model", extension_number=-1)
    requests = [
        pb.ServerReflectionRequest(file_by_filename="nothing.proto"),
        pb.ServerReflectionRequest(file_containing_symbol=".."),
        pb.ServerReflectionRequest(file_containing_extension=extension),
        pb.ServerReflectionRequest(all_extension_numbers_of_type="\0"),
        pb.ServerReflectionRequest(),
    ]
    responses = ask(*requests, pb.ServerReflectionRequest(list_services=""))
    codes = [response.error_response.error_code for response in responses[:-1]]
    not_found, invalid = grpc.StatusCode.NOT_FOUND.value[0], grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert codes == [not_found] * 4 + [invalid]
    assert responses[-1].HasField("list_services_response")


def test_a_large_request_is_refused(ask: Callable[..., list[Any]]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(pb.ServerReflectionRequest(host="a" * 5000, list_services=""))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


class Call:
    """A call of a connection without a peer, which does what is put off a piece at a time."""

    over, pending_bytes, fairness_key = False, 0, "connection"

    def __init__(self, todo: deque[tuple["Call", Callable[[float], None]]]) -> None:
        self.todo = todo
        self.sent: list[bytes] = []

    def soon(self, work: Callable[[float], None]) -> None:
        self.todo.append((self, work))

    def send(self, *messages: bytes) -> None:
        self.sent += messages

    def consumed(self, message_bytes: int, messages: int) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        raise error


def test_streams_answer_in_their_connections_turns_some_requests_at_a_time() -> None:
    """Not as tasks, of which each would have one step in each iteration of the event loop."""
    todo: deque[tuple[Call, Callable[[float], None]]] = deque()
    calls: list[Any] = [Call(todo) for _ in range(3)]
    servicer = ReflectionServicer((), ())
    content = pb.ServerReflectionRequest(list_services="").SerializeToString()
    for call in calls:
        take, _ = servicer._open(call)
        for _ in range(150):
            take(content)
    assert [call for call, _ in todo] == calls  # each waits once, and nothing is answered outside a turn
    assert not any(call.sent for call in calls)
    turns = []
    while todo:
        call, work = todo.popleft()
        before = len(call.sent)
        work(0.0)
        turns.append((calls.index(call), len(call.sent) - before))
    assert [number for number, _ in turns[:9]] == [0, 1, 2] * 3
    assert max(count for _, count in turns) <= 64
    assert [len(call.sent) for call in calls] == [150] * 3


def test_a_file_is_serialised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    servicer = ReflectionServicer((), ())
    content = pb.ServerReflectionRequest(file_containing_symbol=SERVICES[3]).SerializeToString()
    first = servicer.answer(content)
    monkeypatch.delattr(reflection, "_response")
    assert servicer.answer(content) == first
    assert pb.ServerReflectionResponse.FromString(first).original_request.file_containing_symbol == SERVICES[3]


def test_a_connection_has_twenty_streams_at_a_time(server: RunningServer) -> None:
    asked = message(pb.ServerReflectionRequest(list_services="").SerializeToString())
    with Peer(server.address) as peer, Peer(server.address) as other:
        streams = [peer.head(head(path("v1alpha" if number % 2 else "v1"))) for number in range(20)]

        def ask_one_more(peer: Peer) -> Answer:
            stream = peer.head(head(path("v1")))
            peer.body(stream, asked)
            return peer.answer(stream)

        for _ in range(2):
            refused = ask_one_more(peer)
            assert refused.status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert "20 streams of reflection" in refused.blocks[-1]["grpc-message"]
        assert ask_one_more(other).status == 0
        # A place is free when a stream ends: with its last request, by an error, or by its caller's leaving.
        peer.body(streams[0], asked)
        assert peer.answer(streams[0]).status == 0
        assert ask_one_more(peer).status == 0
        too_large = message(pb.ServerReflectionRequest(host="a" * 5000).SerializeToString())
        peer.body(streams[1], too_large, end=False)
        assert peer.answer(streams[1]).status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert ask_one_more(peer).status == 0
        peer.send(RST_STREAM, 0, streams[2], CANCEL.to_bytes(4, "big"))
        assert ask_one_more(peer).status == 0
        for _ in range(3):
            peer.head(head(path("v1")))
        assert ask_one_more(peer).status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_asks_for_a_token_and_can_be_turned_off(version: str, start_server: Start, tmp_path: Any) -> None:
    write_tokens(tmp_path / "tokens.toml", {"name": "a", "roles": ["generate"]})
    guarded = start_server("--tokens-file", tmp_path / "tokens.toml")
    without = start_server("--reflection", "off")
    for server, code in ((guarded, grpc.StatusCode.UNAUTHENTICATED), (without, grpc.StatusCode.UNIMPLEMENTED)):
        with Peer(server.address) as peer:
            assert peer.answer(peer.head(head(path(version)))).status == code.value[0]
