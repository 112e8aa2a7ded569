"""What both transports share: methods, request ids, the status of an error, and tasks."""

import asyncio
import functools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import grpc

from ganserve_server.errors import ServingError, status_details
from ganserve_server.shared.scoreboard import Scoreboard
from ganserve_server.transport.interface import Call, Method, RequestSink, read_message
from ganserve_server.transport.limits import Limits

CallT = TypeVar("CallT")

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,64}")


class Aborted(Exception):  # noqa: N818
    """Ends a call with a status that no ServingError has."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


class NoSuchMethod(ServingError):  # noqa: N818
    """The server has no such method."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "no_such_method"


class AnswersUnread(ServingError):  # noqa: N818
    """The bytes of unread answers exceed their limit, or one answer was unread for too long."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "unread"


def request_id_of(metadata: Mapping[bytes, bytes]) -> str | None:
    """Return the request id that the caller sent, or None if it sent none or an invalid one."""
    given = metadata.get(REQUEST_ID_KEY.encode(), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else None


class Reporter(Protocol):
    """Is notified of errors that end calls."""

    on_refused: Callable[[Any, ServingError], None]
    on_internal_error: Callable[[Any, BaseException], None]


def outcome(call: Call, error: BaseException, reporter: Reporter) -> tuple[grpc.StatusCode, str, bytes]:
    """Report an error; return its status, text and details: INTERNAL for unexpected exceptions."""
    if isinstance(error, ServingError):
        reporter.on_refused(call, error)
        return error.code, str(error), status_details(error)
    if isinstance(error, Aborted):
        return error.code, error.text, b""
    reporter.on_internal_error(call, error)
    return grpc.StatusCode.INTERNAL, "internal error", b""


def spawn(
    call: Call,
    work: Coroutine[Any, Any, None],
    tasks: set[asyncio.Task[None]],
    cancel: Callable[[], object] | None,
) -> None:
    """Run a call's work as a task. If nobody waits for the answer any more, cancel the task, or call `cancel`."""
    task = asyncio.get_running_loop().create_task(_guarded(call, work))
    call.on_cancel = cancel or task.cancel
    tasks.add(task)

    def done(task: "asyncio.Task[None]") -> None:
        tasks.discard(task)
        work.close()  # if cancelled before its first step, Python would warn that it was never awaited

    task.add_done_callback(done)


async def _guarded(call: Call, work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception as error:
        call.fail(error)


class BaseServer(Generic[CallT]):
    """The methods that a server dispatches calls to, and the callbacks that report calls.

    Args:
        on_finished: called at each call's end, with its status and text.
        on_refused: called with the ServingError that ends a call, before `on_finished`.
        on_internal_error: called with an unexpected exception, which the caller does not get.
        limits: bounds on the memory, work and time that peers can take.
        board: where the workers that share the sockets publish their connections and calls; None: a single process.
        guard: identifies a call's caller from the headers; raises a ServingError if the call is not allowed. None:
            everyone may call.
    """

    def __init__(
        self,
        *,
        on_finished: Callable[[CallT, grpc.StatusCode, str], None],
        on_refused: Callable[[CallT, ServingError], None],
        on_internal_error: Callable[[CallT, BaseException], None],
        limits: Limits,
        board: Scoreboard | None = None,
        guard: Callable[[CallT], None] | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.methods: dict[str, Method] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.limits, self.guard = limits, guard
        self.on_refused, self.on_internal_error = on_refused, on_internal_error
        self._on_finished, self._board = on_finished, board
        self._draining = False

    def add_method(self, path: str, method: Method) -> None:
        """Answer calls of a path, such as /package.Service/Method."""
        self.methods[path] = method

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Do nothing: generated code also registers the same handlers with `add_registered_method_handlers`."""

    def add_registered_method_handlers(
        self, service: str, handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
    ) -> None:
        """Answer the methods of a servicer written for grpc.aio; the context that they get is a `Call`."""
        for path, method in _methods_of(service, handlers):
            self.methods.setdefault(path, method)


def _methods_of(
    service: str, handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
) -> Iterator[tuple[str, Method]]:
    """Yield the path and the method of each handler."""
    for name, handler in handlers.items():
        if handler.request_streaming:
            method = Method(open=functools.partial(_open_stream, handler))
        else:
            method = Method(start=functools.partial(_start, handler))
        yield f"/{service}/{name}", method


def _start(handler: Any, call: Call, content: bytes) -> None:
    request = read_message(handler.request_deserializer, content)
    if handler.response_streaming:
        call.spawn(_answer_all(handler, call, handler.unary_stream, request))
    else:
        call.spawn(_answer(handler, call, request))


async def _answer(handler: Any, call: Call, request: Any) -> None:
    call.reply(handler.response_serializer(await handler.unary_unary(request, call)))


def _open_stream(handler: Any, call: Call) -> RequestSink:
    requests: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def each() -> AsyncIterator[Any]:
        while (content := await requests.get()) is not None:
            call.consumed(len(content))
            yield read_message(handler.request_deserializer, content)

    call.spawn(_answer_all(handler, call, handler.stream_stream, each()))
    return requests.put_nowait, lambda: requests.put_nowait(None)


async def _answer_all(
    handler: Any, call: Call, method: Callable[[Any, Call], AsyncIterator[Any] | Awaitable[None]], request: Any
) -> None:
    responses = method(request, call)
    if isinstance(responses, AsyncIterator):
        async for response in responses:
            await call.write(handler.response_serializer(response))
    else:
        await responses
    call.finish()
