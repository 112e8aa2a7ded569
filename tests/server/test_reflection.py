"""Reflection, by its two versions."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2 as pb
from tests.conftest import RunningServer
from tests.server.test_security import write_tokens
from tests.wire import Peer, head

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


async def test_between_two_requests_others_have_their_turn() -> None:
    async def requests() -> AsyncIterator[Any]:
        for _ in range(100):
            yield pb.ServerReflectionRequest(list_services="")

    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    async for _ in ReflectionServicer((), ())._answer(requests(), None):  # type: ignore[arg-type]
        pass
    task.cancel()
    assert turns >= 100


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_asks_for_a_token_and_can_be_turned_off(version: str, start_server: Start, tmp_path: Any) -> None:
    write_tokens(tmp_path / "tokens.toml", {"name": "a", "roles": ["generate"]})
    guarded = start_server("--tokens-file", tmp_path / "tokens.toml")
    without = start_server("--reflection", "off")
    for server, code in ((guarded, grpc.StatusCode.UNAUTHENTICATED), (without, grpc.StatusCode.UNIMPLEMENTED)):
        with Peer(server.address) as peer:
            assert peer.answer(peer.head(head(path(version)))).status == code.value[0]
