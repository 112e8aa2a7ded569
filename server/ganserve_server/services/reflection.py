"""Server reflection (v1 and v1alpha), which describes the services and their messages to clients such as grpcurl.

Both versions have the same messages apart from the package name, so one servicer answers both.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, text_format
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2 as pb

from ganserve_server.errors import MessageTooLarge, ServingError
from ganserve_server.services.request_stream import RequestStream, StreamedRequest
from ganserve_server.services.wire import embedded, tag
from ganserve_server.transport.interface import Call, Method, RequestSink, Server, read_message
from ganserve_server.transport.limits import MAX_REFLECTION_STREAMS

_V1ALPHA = pb.DESCRIPTOR.package
_V1 = _V1ALPHA.removesuffix("alpha")
SERVICES = tuple(f"{package}.ServerReflection" for package in (_V1, _V1ALPHA))
_MAX_REQUEST_BYTES = 4096  # the response contains the request
_REQUEST_TAG = tag(pb.ServerReflectionResponse.ORIGINAL_REQUEST_FIELD_NUMBER)


class TooManyStreams(ServingError):  # noqa: N818
    """The caller has too many streams of reflection."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "too_many_streams"


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

        for file in (*files, pb.DESCRIPTOR):
            add(file)
        pool.AddSerializedFile(_describe_v1().SerializeToString())
        self._pool = pool
        names = [{"name": name} for name in sorted((*services, *SERVICES))]
        self._services = _response(list_services_response={"service": names})
        self._described: dict[str, bytes] = {}  # responses with a file and its dependencies, by the file's name
        self._streams: Counter[object] = Counter()  # by connection or caller

    def add_to(self, server: Server) -> None:
        """Answer the calls of both versions."""
        for service in SERVICES:
            server.add_method(f"/{service}/ServerReflectionInfo", Method(open=self._open, awaited=False))

    def _open(self, call: Call) -> RequestSink:
        if self._streams[call.fairness_key] >= MAX_REFLECTION_STREAMS:
            error = TooManyStreams(
                f"a connection, or a token, may have at most {MAX_REFLECTION_STREAMS} streams of reflection at a "
                "time; end some first"
            )
            call.soon(lambda _: call.fail(error))  # later: the connection does not know the call yet
            return lambda _: None, lambda: None
        return _Stream(self, call, self._streams).sink

    def answer(self, content: bytes) -> bytes:
        """Return the response to a request, both serialised.

        Raises:
            ServingError: the request is too large, or malformed.
        """
        if len(content) > _MAX_REQUEST_BYTES:
            raise MessageTooLarge(
                f"the request has {len(content)} bytes; a request of reflection may have at most {_MAX_REQUEST_BYTES}"
            )
        request = read_message(pb.ServerReflectionRequest.FromString, content)
        try:
            found = self._find(request)
        except KeyError:
            found = _NOT_FOUND
        return embedded(_REQUEST_TAG, content) + found

    def _find(self, request: pb.ServerReflectionRequest) -> bytes:
        """Return the response without the field that repeats the request.

        Raises:
            KeyError: the requested name or number is unknown.
        """
        pool = self._pool
        match request.WhichOneof("message_request"):
            case "list_services":
                return self._services
            case "file_by_filename":
                return self._describe(pool.FindFileByName(request.file_by_filename))
            case "file_containing_symbol":
                return self._describe(pool.FindFileContainingSymbol(request.file_containing_symbol))
            case "file_containing_extension":
                wanted = request.file_containing_extension
                extended = pool.FindMessageTypeByName(wanted.containing_type)
                return self._describe(pool.FindExtensionByNumber(extended, wanted.extension_number).file)
            case "all_extension_numbers_of_type":
                extended = pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
                numbers = sorted(extension.number for extension in pool.FindAllExtensions(extended))
                found = {"base_type_name": extended.full_name, "extension_number": numbers}
                return _response(all_extension_numbers_response=found)
        return _NO_QUESTION

    def _describe(self, file: FileDescriptor) -> bytes:
        if file.name not in self._described:
            files: dict[str, bytes] = {}

            def add(one: FileDescriptor) -> None:
                if one.name not in files:
                    files[one.name] = one.serialized_pb
                    for needed in one.dependencies:
                        add(needed)

            add(file)
            self._described[file.name] = _response(file_descriptor_response={"file_descriptor_proto": files.values()})
        return self._described[file.name]


class _Stream(RequestStream):
    """One stream of reflection requests, which are answered in the connection's turns."""

    __slots__ = ("_holder", "_servicer", "_streams")

    def __init__(self, servicer: ReflectionServicer, call: Call, streams: "Counter[object]") -> None:
        super().__init__(call)
        call.work = None  # no images
        self._servicer, self._streams = servicer, streams
        self._holder: object = call.fairness_key
        streams[self._holder] += 1

    def take(self, content: bytes) -> StreamedRequest:
        """Answer a request."""
        request = StreamedRequest()
        request.answer = self._servicer.answer(content)
        return request

    def send_answers(self) -> None:
        """Send the answers; this may end the stream."""
        super().send_answers()
        if self._call.over:
            self._leave()

    def _cancel(self) -> None:
        super()._cancel()
        self._leave()

    def _leave(self) -> None:
        """Free the stream's place, once."""
        holder, self._holder = self._holder, None
        if holder is not None:
            self._streams[holder] -= 1
            if not self._streams[holder]:
                del self._streams[holder]


def _response(**fields: Any) -> bytes:
    return pb.ServerReflectionResponse(**fields).SerializeToString()


def _error(code: grpc.StatusCode) -> bytes:
    number, text = code.value
    return _response(error_response={"error_code": number, "error_message": text})


_NOT_FOUND, _NO_QUESTION = _error(grpc.StatusCode.NOT_FOUND), _error(grpc.StatusCode.INVALID_ARGUMENT)


def _describe_v1() -> descriptor_pb2.FileDescriptorProto:
    """Return the descriptor of v1's file, which the package grpcio-reflection lacks."""
    file = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    text = text_format.MessageToString(file).replace(_V1ALPHA, _V1)
    file = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    file.name = "grpc/reflection/v1/reflection.proto"
    return file
