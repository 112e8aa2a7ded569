"""What services see of a transport: calls, methods, and what a call is told of its caller and of its work."""

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
    """Images that are made for a call: what there is to tell of it."""

    count: int

    @property
    def accepted(self) -> float:
        """When the first of them was queued, by time.monotonic."""

    @property
    def taken(self) -> int:
        """How many are in a batch, or have been; of those that were queued at once with the first."""

    @property
    def queue_s(self) -> float:
        """How long the first waited for its batch."""

    @property
    def compute_s(self) -> float:
        """What their batches took."""


class Caller(Protocol):
    """Who calls, where the server asks for that."""

    name: str

    @property
    def burst(self) -> float:
        """How many images may be asked for at once, where the rate is to be kept; without one, any number."""

    def take(self, images: int) -> None:
        """Count images that are asked for.

        Raises:
            ServingError: they are too many now.
        """

    def must_wait_s(self, images: int) -> float:
        """Count images and return 0, or if they are too many now the seconds until they may not be."""


class Call(Protocol):
    """One call over any transport. `reply` or `fail` ends it; `send` and `finish` answer with many messages.

    Methods of the classes that grpcio generates get it as their context: `write` and `abort` are theirs.
    """

    method: "Method | None"
    request_id: str
    started: float  # by time.perf_counter
    deadline: float | None  # by time.monotonic
    over: bool
    on_cancel: Callable[[], object] | None  # called if nobody waits for the answer any more
    # For metrics, log and traces; the method fills them in, and the guard the caller.
    caller: Caller | None
    model: str
    version: int | None
    work: Work | None
    encode_s: float
    throttled_s: float  # by the caller's rate, up to `throttled_until`, by time.monotonic
    throttled_until: float

    @property
    def path(self) -> str:
        """The method's path, such as /package.Service/Method."""

    @property
    def metadata(self) -> Mapping[bytes, bytes]:
        """The request's headers."""

    @property
    def partly_sent(self) -> bool:
        """Whether some of the answer was sent before the last of it."""

    @property
    def fairness_key(self) -> object:
        """Whose calls share a turn: the token's name; without a token the connection, perhaps a proxy's."""

    @property
    def peer(self) -> str:
        """The address that the call came from, perhaps a proxy's."""

    @property
    def pending_bytes(self) -> int:
        """Bytes of the answer that wait for the peer."""

    @property
    def unread_bytes(self) -> int:
        """Bytes of answers that wait for their peers, of all calls of the server."""

    def reply(self, message: bytes) -> None:
        """End the call with one message."""

    def send(self, *messages: bytes) -> None:
        """Send some of many messages: those that are small together cost little more than one."""

    def finish(self) -> None:
        """End the call after its last message."""

    def fail(self, error: BaseException) -> None:
        """End the call with an error's status. Unexpected exceptions are logged; the caller gets INTERNAL."""

    def consumed(self, message_bytes: int, messages: int = 1) -> None:
        """Let the peer send more of a stream of requests: some, of so many bytes together, are done with."""

    def soon(self, work: Callable[[float], None]) -> None:
        """Work once what has come is read, until about the time that it gets, by time.perf_counter.

        Connections share the loop's time by it: work that is not done by then calls this again.
        """

    def spawn(self, work: Coroutine[Any, Any, None], *, cancel: Callable[[], object] | None = None) -> None:
        """Run the call's work as a task, which ends (or `cancel` is called) if nobody waits for the answer any more."""

    async def drained(self) -> None:
        """Wait until nothing is pending."""

    async def write(self, message: Any) -> None:
        """Send one of many messages, and wait until the peer has taken it."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> NoReturn:
        """End the call with a status."""

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None if there is none."""


@dataclass(frozen=True, slots=True)
class Method:
    """How a method is called: `start` for one request, `open` for a stream of them."""

    start: Callable[[Call, bytes], None] | None = None
    open: Callable[[Call], RequestSink] | None = None
    awaited: bool = True  # by a drain
    guarded: bool = True  # for callers that may
    counts_images: bool = False  # itself, against its caller's rate


class Server(Protocol):
    """Listens, and leads calls to methods."""

    @property
    def load(self) -> tuple[int, int]:
        """How many connections and calls there are."""

    def kept_bytes(self) -> dict[str, int]:
        """Return how many bytes the server keeps for its peers, by what they are."""

    def add_method(self, path: str, method: Method) -> None:
        """Answer calls of a path, such as /package.Service/Method."""

    def add_registered_method_handlers(
        self, service: str, handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
    ) -> None:
        """Answer the methods of a servicer written for grpc.aio."""

    def start(self, sockets: Iterable[socket]) -> None:
        """Listen on sockets that are bound.

        Raises:
            OSError: somebody else does.
        """

    async def drain(self, timeout_s: float) -> None:
        """Take no more connections, let the calls that run finish, cut off those that take longer, and close."""


def read_message(read: Callable[[bytes], MessageT], content: bytes) -> MessageT:
    """Read a request's bytes.

    Raises:
        MalformedMessage: they are no such message.
    """
    try:
        return read(content)
    except DecodeError as error:
        raise MalformedMessage("the request is not a message of this method, by its .proto") from error
