"""gRPC health (grpc.health.v1): whether the server, its services and each model are serving.

Setting a status does not wait for watchers. Each watcher gets the latest status after it has read the previous one. A
peer that reads nothing costs one message, and delays neither other watchers nor a reload nor a drain.
"""

import asyncio
from collections import Counter
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, message_factory, text_format
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2

from ganserve_server.errors import ServingError
from ganserve_server.transport.answering import Aborted
from ganserve_server.transport.interface import Call, Method, Server, read_message

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
MAX_WATCHERS_PER_CONNECTION = 100
MAX_WATCHERS = 1000
_MAX_LISTED = 100  # set by the protocol

# The package grpcio-health-checking has List only in versions that need protobuf 6.
_LIST_MESSAGES = """
message_type { name: "HealthListRequest" }
message_type {
  name: "HealthListResponse"
  field {
    name: "statuses" json_name: "statuses" number: 1 label: LABEL_REPEATED
    type: TYPE_MESSAGE type_name: ".grpc.health.v1.HealthListResponse.StatusesEntry"
  }
  nested_type {
    name: "StatusesEntry"
    field { name: "key" json_name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field {
      name: "value" json_name: "value" number: 2 label: LABEL_OPTIONAL
      type: TYPE_MESSAGE type_name: ".grpc.health.v1.HealthCheckResponse"
    }
    options { map_entry: true }
  }
}
"""


def _describe() -> FileDescriptor:
    """Return the descriptor of health.proto, with List."""
    file = descriptor_pb2.FileDescriptorProto.FromString(health_pb2.DESCRIPTOR.serialized_pb)
    if all(method.name != "List" for method in file.service[0].method):
        text_format.Merge(_LIST_MESSAGES, file)
        messages = f".{file.package}.HealthList"
        file.service[0].method.add(name="List", input_type=f"{messages}Request", output_type=f"{messages}Response")
    # In its own pool: protobuf refuses two definitions of the same name in one pool.
    pool: Any = DescriptorPool()
    descriptor: FileDescriptor = pool.AddSerializedFile(file.SerializeToString())
    return descriptor


DESCRIPTOR = _describe()
SERVICE = DESCRIPTOR.services_by_name["Health"].full_name
_HealthListRequest, _HealthListResponse = (
    message_factory.GetMessageClass(DESCRIPTOR.message_types_by_name[name])
    for name in ("HealthListRequest", "HealthListResponse")
)


class TooManyServices(ServingError):  # noqa: N818
    """There are more services than one response may list."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "too_many_services"


class TooManyWatchers(ServingError):  # noqa: N818
    """There are too many calls of Watch."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "too_many_watchers"


class HealthServicer:
    """The service."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": NOT_SERVING}
        self._shutting_down = False
        self._watchers: dict[Call, asyncio.Event] = {}  # oldest first; set: the status may have changed
        self._watchers_of: Counter[object] = Counter()  # by connection

    def add_to(self, server: Server) -> None:
        """Answer the service's calls."""
        server.add_method(f"/{SERVICE}/Check", Method(start=self._check, awaited=False, guarded=False))
        server.add_method(f"/{SERVICE}/Watch", Method(start=self._watch, awaited=False, guarded=False))
        # Guarded: it names all models, which no other call reveals without a token.
        server.add_method(f"/{SERVICE}/List", Method(start=self._list, awaited=False))

    def status(self, service: str) -> int | None:
        """Return the status of a service, "" for the server; None for an unknown one."""
        return self._statuses.get(service)

    def set(self, service: str, status: int) -> None:
        """Set a service's status, unless the server is shutting down."""
        if not self._shutting_down and self._statuses.get(service) != status:
            self._statuses[service] = status
            self._wake()

    def set_serving(self, service: str, serving: bool) -> None:
        """Set a service's status to SERVING or NOT_SERVING, unless the server is shutting down."""
        self.set(service, SERVING if serving else NOT_SERVING)

    def enter_graceful_shutdown(self) -> None:
        """Set all services to NOT_SERVING permanently."""
        self._shutting_down = True
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._wake()

    def _wake(self) -> None:
        for changed in self._watchers.values():
            changed.set()

    def _check(self, call: Call, content: bytes) -> None:
        service = read_message(health_pb2.HealthCheckRequest.FromString, content).service
        status = self._statuses.get(service)
        if status is None:
            # Without a text, like grpcio's own service: clients add their own text.
            raise Aborted(grpc.StatusCode.NOT_FOUND, "")
        call.reply(_response(status))

    def _list(self, call: Call, content: bytes) -> None:
        read_message(_HealthListRequest.FromString, content)
        if len(self._statuses) > _MAX_LISTED:
            raise TooManyServices(
                f"the server has {len(self._statuses)} services; List returns at most {_MAX_LISTED}, so use Check"
            )
        response: Any = _HealthListResponse()
        for service, status in self._statuses.items():
            response.statuses[service].status = status
        call.reply(response.SerializeToString())

    def _watch(self, call: Call, content: bytes) -> None:
        service = read_message(health_pb2.HealthCheckRequest.FromString, content).service
        call.spawn(self._send_updates(call, service))

    async def _send_updates(self, call: Call, service: str) -> None:
        self._make_room(call)
        changed = self._watchers[call] = asyncio.Event()
        self._watchers_of[call.fairness_key] += 1
        sent = None
        try:
            while True:
                changed.clear()
                status = self._statuses.get(service, _UNKNOWN)
                if status != sent:
                    sent = status
                    await call.write(_response(status))
                await changed.wait()
        finally:
            self._forget(call)

    def _make_room(self, call: Call) -> None:
        """Make room for a call of Watch: if there are too many, end the oldest of the connection with the most."""
        mine = self._watchers_of[call.fairness_key]
        if mine >= MAX_WATCHERS_PER_CONNECTION:
            raise TooManyWatchers(
                f"a connection may have at most {MAX_WATCHERS_PER_CONNECTION} calls of Watch; end some first"
            )
        if len(self._watchers) >= MAX_WATCHERS:
            error = TooManyWatchers(
                f"the server already has {MAX_WATCHERS} calls of Watch, which is its limit; try again later"
            )
            connection, most = self._watchers_of.most_common(1)[0]
            if most <= mine + 1:
                raise error
            oldest = next(one for one in self._watchers if one.fairness_key == connection)
            self._forget(oldest)
            oldest.fail(error)

    def _forget(self, call: Call) -> None:
        if self._watchers.pop(call, None) is not None:
            self._watchers_of[call.fairness_key] -= 1
            if not self._watchers_of[call.fairness_key]:
                del self._watchers_of[call.fairness_key]


def _response(status: int) -> bytes:
    return health_pb2.HealthCheckResponse(status=status).SerializeToString()
