"""The interface between services and transports: calls, methods, and a call's caller and work."""

from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from socket import socket
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError

from ganserve_server.errors import MalformedMessage

MessageT = TypeVar("MessageT")
RequestSink = tuple[Callable[[bytes], None], Callable[[], None]]  # for a message, and for the end


class Work(Protocol):
    """The images that are made for a call: their number and their times, for metrics, log and traces."""

    count: int

    @property
    def accepted(self) -> float:
        """When the first image was queued, by time.monotonic."""

    @property
    def taken(self) -> int:
        """How many images of the first draw are in a batch, or were in one."""

    @property
    def queue_s(self) -> float:
        """How long the first image waited for its batch, in seconds."""

    @property
    def compute_s(self) -> float:
        """How long the images' batches took together, in seconds."""


class Caller(Protocol):
    """Who makes a call, on a server with tokens."""

    name: str

    @property
    def burst(self) -> float:
        """The most images that the rate allows at once; infinite without a rate."""

    def take(self, images: int) -> None:
        """Count requested images.

        Raises:
            ServingError: there are more than the rate allows now.
        """

    def must_wait_s(self, images: int) -> float:
        """Count images and return 0, or count nothing and return the seconds until the rate allows them."""


class Call(Protocol):
    """One call over any transport. `reply` or `fail` ends it; `send` and `finish` answer with many messages.

    Servicers that derive from grpcio's generated classes get it as their context: `write` and `abort` are for them.
    """

    method: "Method | None"
    request_id: str
    started: float  # by time.perf_counter
    deadline: float | None  # by time.monotonic
    over: bool
    on_cancel: Callable[[], object] | None  # called if nobody waits for the answer any more
    # For metrics, log and traces. The guard sets the caller, the method sets the rest.
    caller: Caller | None
    model: str
    version: int | None
    work: Work | None
    encode_s: float
    throttled_s: float  # waits for the caller's rate, including the current wait
    throttled_until: float  # the end of the current wait, by time.monotonic

    @property
    def path(self) -> str:
        """The method's path, such as /package.Service/Method."""

    @property
    def metadata(self) -> Mapping[bytes, bytes]:
        """The request's headers."""

    @property
    def partly_sent(self) -> bool:
        """Whether a part of the answer was sent before its end."""

    @property
    def fairness_key(self) -> object:
        """The key of calls that share a turn: the token's name; without a token the connection, perhaps a proxy's."""

    @property
    def peer(self) -> str:
        """The address that the call came from, perhaps a proxy's."""

    @property
    def pending_bytes(self) -> int:
        """Bytes of the answer that wait for the peer."""

    @property
    def unread_bytes(self) -> int:
        """Bytes of answers that wait for their peers, over all calls of the server."""

    def reply(self, message: bytes) -> None:
        """End the call with one message."""

    def send(self, *messages: bytes) -> None:
        """Send some of many messages. Together, small messages cost little more than one."""

    def finish(self) -> None:
        """End the call after its last message."""

    def fail(self, error: BaseException) -> None:
        """End the call with an error's status. Unexpected exceptions are logged; the caller gets INTERNAL."""

    def consumed(self, message_bytes: int, messages: int = 1) -> None:
        """Let the peer send more of a stream of requests: `messages` of `message_bytes` in total are processed."""

    def soon(self, work: Callable[[float], None]) -> None:
        """Call `work` after the received messages are read, with the end of its time by time.perf_counter.

        In this way connections share the event loop: work that is not done by that time calls `soon` again.
        """

    def spawn(self, work: Coroutine[Any, Any, None], *, cancel: Callable[[], object] | None = None) -> None:
        """Run the call's work as a task. If nobody waits for the answer any more, cancel the task, or call `cancel`."""

    async def drained(self) -> None:
        """Wait until nothing is pending."""

    async def write(self, message: Any) -> None:
        """Send one of many messages, and wait until none is pending."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> NoReturn:
        """End the call with a status."""

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None if there is none."""


@dataclass(frozen=True, slots=True)
class Method:
    """How a method is called: `start` for one request, `open` for a stream of them."""

    start: Callable[[Call, bytes], None] | None = None
    open: Callable[[Call], RequestSink] | None = None
    awaited: bool = True  # a drain waits for its calls
    guarded: bool = True  # the guard checks its callers
    counts_images: bool = False  # it counts its images against the caller's rate itself; other calls count as one


class Server(Protocol):
    """Listens, and dispatches calls to methods."""

    @property
    def load(self) -> tuple[int, int]:
        """How many connections and calls there are."""

    def kept_bytes(self) -> dict[str, int]:
        """Return how many bytes the server keeps for its peers, by pool."""

    def add_method(self, path: str, method: Method) -> None:
        """Answer calls of a path, such as /package.Service/Method."""

    def add_registered_method_handlers(
        self, service: str, handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
    ) -> None:
        """Answer the methods of a servicer written for grpc.aio."""

    def start(self, sockets: Iterable[socket]) -> None:
        """Listen on sockets that are bound.

        Raises:
            OSError: another program listens there.
        """

    async def drain(self, timeout_s: float) -> None:
        """Accept no more connections, let running calls finish, end calls that exceed the timeout, and close."""


def read_message(read: Callable[[bytes], MessageT], content: bytes) -> MessageT:
    """Read a request's bytes.

    Raises:
        MalformedMessage: they are not a message of the method.
    """
    try:
        return read(content)
    except DecodeError as error:
        raise MalformedMessage("the request is not a valid message of this method; see its .proto file") from error
