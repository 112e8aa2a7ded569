"""Server reflection, versions v1 and v1alpha, which tells clients such as grpcurl the services and their messages.

Both versions have the same messages apart from the package name, so one servicer answers both.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, text_format
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection, reflection_pb2

from ganserve_server.errors import MessageTooLarge
from ganserve_server.transport.interface import Call, Server

_V1ALPHA = reflection_pb2.DESCRIPTOR.package
_V1 = _V1ALPHA.removesuffix("alpha")
SERVICES = tuple(f"{package}.ServerReflection" for package in (_V1, _V1ALPHA))
_MAX_REQUEST_BYTES = 4096  # the response repeats it


class ReflectionServicer:
    """The service.

    Args:
        services: the names of the other services.
        files: the descriptors of all services.
    """

    def __init__(self, services: Iterable[str], files: Iterable[FileDescriptor]) -> None:
        pool: Any = DescriptorPool()

        def add(file: FileDescriptor) -> None:
            for needed in file.dependencies:
                add(needed)
            pool.AddSerializedFile(file.serialized_pb)

        for file in (*files, reflection_pb2.DESCRIPTOR):
            add(file)
        pool.AddSerializedFile(_describe_v1().SerializeToString())
        self._servicer: Any = reflection.aio.ReflectionServicer((*services, *SERVICES), pool)

    def add_to(self, server: Server) -> None:
        """Answer the calls of both versions."""
        handler: Any = grpc.stream_stream_rpc_method_handler(
            self._answer,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        for service in SERVICES:
            server.add_registered_method_handlers(service, {"ServerReflectionInfo": handler})

    async def _answer(
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], context: Call
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        """Answer one request after the other; let the event loop run between two."""
        async for response in self._servicer.ServerReflectionInfo(_checked(requests), context):
            yield response
            await asyncio.sleep(0)


async def _checked(
    requests: AsyncIterator[reflection_pb2.ServerReflectionRequest],
) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    async for request in requests:
        if (size := request.ByteSize()) > _MAX_REQUEST_BYTES:
            raise MessageTooLarge(f"the request has {size} bytes; one of reflection may have {_MAX_REQUEST_BYTES}")
        yield request


def _describe_v1() -> descriptor_pb2.FileDescriptorProto:
    """Return the descriptor of v1, which the package grpcio-reflection lacks."""
    file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    text = text_format.MessageToString(file).replace(_V1ALPHA, _V1)
    file = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    file.name = "grpc/reflection/v1/reflection.proto"
    return file
