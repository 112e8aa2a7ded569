"""How calls are made: on a connection of the client's own, again where that helps, and as their requests were meant.

`Calls` for threads and `AsyncCalls` for asyncio. `_streams` reads the calls that have many answers.
"""

import asyncio
import os
import threading
import time
import weakref
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ganserve._endpoint import Endpoint
from ganserve._forks import check_fork, enter_call, leave_call, leave_to_parent, lose_in_fork
from ganserve._messages import correct, question_about, reword, to_health
from ganserve._retries import Attempts, RetryPolicy
from ganserve._statuses import REQUEST_ID_KEY, too_late, translate
from ganserve.errors import (
    GanserveError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    ServerError,
)
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

_SHORTEST_TIMEOUT_S = 0.001
_GENERATE_EACH = f"/{pb.DESCRIPTOR.services_by_name['GenerationService'].full_name}/GenerateEach"


class Stubs:
    """The methods of a channel."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        service = pb_grpc.GenerationServiceStub(channel)
        self.generate_images = service.GenerateImages
        self.stream_images = service.StreamImages
        # Requests that are alike are serialised by who makes them.
        self.generate_each = channel.stream_stream(
            _GENERATE_EACH, response_deserializer=pb.GenerateEachResponse.FromString
        )
        self.list_models = service.ListModels
        self.get_model = service.GetModel
        self.health = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]


class _Calls:
    """What both have in common: where the calls go, and what their ends mean."""

    def __init__(self, endpoint: Endpoint, *, retries: bool) -> None:
        self.endpoint = endpoint
        self.address = endpoint.address
        self.metadata = endpoint.metadata
        self.policy = RetryPolicy(enabled=retries)
        self._closing = threading.Event()
        self._stubs: Stubs | None = None
        self._lock = threading.Lock()
        _all.add(self)

    @property
    def closed(self) -> bool:
        """Whether no more calls are made."""
        return self._closing.is_set()

    def to_one_address(self, target: str) -> Self:
        """Return an object that calls one of the addresses only, without retries."""
        return type(self)(self.endpoint.of_one_address(target), retries=False)

    def check_open(self) -> None:
        """Raise RequestCancelledError if no more calls are made."""
        if self.closed:
            raise RequestCancelledError("this client is closed", reason="closed")

    def named(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call that is to have this id."""
        return (*(self.metadata or ()), (REQUEST_ID_KEY, request_id))

    def after_fork(self) -> None:
        """Begin anew in a child process: the parent's connections are not its own."""
        closed, self._closing = self.closed, threading.Event()
        if closed:
            self._closing.set()
        self._lock = threading.Lock()
        self.policy.after_fork()
        if self._stubs is not None:
            leave_to_parent(self._stubs.channel)
            self._stubs = None

    def _translated(
        self, error: grpc.RpcError, timeout_s: float, request_id: str | None, *, late: bool
    ) -> GanserveError:
        if late:
            return too_late(self.address, timeout_s, request_id)
        return translate(error, self.address, closed=self.closed, timeout_s=timeout_s, request_id=request_id)

    def _closed_meanwhile(self) -> RequestCancelledError:
        return RequestCancelledError("the client was closed during the call", reason="closed")


class Calls(_Calls):
    """Calls that block; safe to share between threads."""

    def connected(self) -> Stubs:
        """Return the methods to call; connect first if need be."""
        if (stubs := self._stubs) is not None:
            return stubs
        with self._lock:
            self.check_open()
            if self._stubs is None:
                check_fork()
                credentials, target, options = self.endpoint.credentials, self.endpoint.target, self.endpoint.options()
                self._stubs = Stubs(
                    grpc.insecure_channel(target, options)
                    if credentials is None
                    else grpc.secure_channel(target, credentials, options)
                )
            return self._stubs

    def unary(self, method: str, request: Any, timeout_s: float, *, once: bool = False) -> Any:
        """Make a call that has one answer, and return that; `once` makes it just once, as it is.

        Raises:
            GanserveError: it failed.
        """
        given_s, deadline = timeout_s, time.monotonic() + timeout_s
        attempts = None
        while True:
            # Without a request id, by which a timeout could be found in the server's log: a new one for each call
            # defeats the compression of headers, and takes 60 µs of a call's 400.
            send = getattr(self.connected(), method)
            thread = threading.get_ident()
            enter_call(thread)
            try:
                response = send(request, timeout=timeout_s, metadata=self.metadata)
            except (grpc.RpcError, ValueError) as error:
                failure = self.failure(error, given_s)
            else:
                self.policy.succeeded()
                if attempts is not None:
                    attempts.answered()
                return response
            finally:
                leave_call(thread)
            if once:
                raise failure
            attempts = attempts or Attempts(self.policy)
            request = self.again(failure, request, attempts, deadline) or request
            timeout_s = deadline - time.monotonic()

    def failure(
        self, error: Exception, timeout_s: float, request_id: str | None = None, *, late: bool = False
    ) -> GanserveError:
        """Return what the end of a call means; raise it if it is none.

        Args:
            error: how it ended.
            timeout_s: what it was given, with its retries.
            request_id: that it was given, if it was.
            late: whether it took too long.
        """
        if isinstance(error, grpc.RpcError):
            return self._translated(error, timeout_s, request_id, late=late)
        if not self.closed:
            raise error
        raise self._closed_meanwhile() from None  # gRPC's ValueError for a closed channel

    def again(self, failure: GanserveError, request: Any, attempts: Attempts, deadline: float) -> Any:
        """Return when a call that failed may be made again: what its request meant, or None where that was sound.

        Raises:
            GanserveError: the failure, if another try is of no use.
        """
        corrected = self.corrected(failure, request, deadline)
        if corrected is None:
            self.pause(attempts.delay_s(failure, deadline))
        return corrected

    def corrected(self, failure: GanserveError, request: Any, deadline: float) -> Any:
        """Return what was meant by a request that the server refused; None if asking the server can't tell.

        Raises:
            GanserveError: the failure, which then says what was probably meant.
        """
        reword(failure, request)
        question = question_about(failure, request)
        if question is None:
            return None
        method = "list_models" if isinstance(question, pb.ListModelsRequest) else "get_model"
        try:
            answer = self.unary(method, question, max(_SHORTEST_TIMEOUT_S, deadline - time.monotonic()), once=True)
        except GanserveError:
            raise failure from None
        return correct(failure, request, answer)

    def serving(self, request: health_pb2.HealthCheckRequest, timeout_s: float) -> bool:
        """Ask once for the health of a server or a model; the error for a model that it has not says which it has."""
        deadline = time.monotonic() + timeout_s
        try:
            return to_health(self.unary("health", request, timeout_s, once=True))
        except ModelNotFoundError as error:
            self.corrected(error, request, deadline)
            raise

    def pause(self, delay_s: float) -> None:
        """Wait for so long, or until no more calls are made."""
        if self._closing.wait(delay_s):
            raise self._closed_meanwhile()

    def close(self) -> None:
        """End the calls that are running, and make no more."""
        with self._lock:
            self._closing.set()
            stubs, self._stubs = self._stubs, None
        if stubs is not None:
            stubs.channel.close()


class AsyncCalls(_Calls):
    """Calls that are awaited. They belong to the event loop of the first, until that is closed."""

    _loop: asyncio.AbstractEventLoop | None = None

    def after_fork(self) -> None:
        """Do as Calls.after_fork does."""
        if self._stubs is not None:
            # Its thread waits inside gRPC, whether there are calls or not.
            lose_in_fork("an AsyncClient connected")
        super().after_fork()

    def connected(self) -> Stubs:
        """Return the methods to call; connect first if need be."""
        loop = asyncio.get_running_loop()
        if (stubs := self._stubs) is not None and self._loop is loop:
            return stubs
        self.check_open()
        check_fork()
        if stubs is not None and self._loop is not None and not self._loop.is_closed():
            raise InvalidRequestError("this AsyncClient is in use by another event loop; make one for each")
        credentials, target, options = self.endpoint.credentials, self.endpoint.target, self.endpoint.options()
        self._stubs = stubs = Stubs(
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
        )
        self._loop = loop
        return stubs

    async def unary(self, method: str, request: Any, timeout_s: float, *, once: bool = False) -> Any:
        """Make a call that has one answer, as Calls.unary does."""
        given_s, deadline = timeout_s, time.monotonic() + timeout_s
        attempts = None
        while True:
            send = getattr(self.connected(), method)
            try:
                response = readable(await send(request, timeout=timeout_s, metadata=self.metadata))
            except (grpc.RpcError, asyncio.CancelledError, grpc.aio.UsageError) as error:
                failure = self.failure(error, given_s)
            else:
                self.policy.succeeded()
                if attempts is not None:
                    attempts.answered()
                return response
            if once:
                raise failure
            attempts = attempts or Attempts(self.policy)
            request = await self.again(failure, request, attempts, deadline) or request
            timeout_s = deadline - time.monotonic()

    def failure(
        self, error: BaseException, timeout_s: float, request_id: str | None = None, *, late: bool = False
    ) -> GanserveError:
        """Return what the end of a call means, as Calls.failure does.

        It tells the end of a call, or of the channel, from that of a task, whose owner must see just that.
        """
        if isinstance(error, grpc.RpcError):
            return self._translated(error, timeout_s, request_id, late=late)
        if not (isinstance(error, asyncio.CancelledError) and _cancelled()):
            if self.closed:
                raise self._closed_meanwhile() from None
            if late:
                return too_late(self.address, timeout_s, request_id)
        raise error

    async def again(self, failure: GanserveError, request: Any, attempts: Attempts, deadline: float) -> Any:
        """Return when a call that failed may be made again, as Calls.again does."""
        corrected = await self.corrected(failure, request, deadline)
        if corrected is None:
            await asyncio.sleep(attempts.delay_s(failure, deadline))
        return corrected

    async def corrected(self, failure: GanserveError, request: Any, deadline: float) -> Any:
        """Return what was meant by a request that the server refused, as Calls.corrected does."""
        reword(failure, request)
        question = question_about(failure, request)
        if question is None:
            return None
        method = "list_models" if isinstance(question, pb.ListModelsRequest) else "get_model"
        left_s = max(_SHORTEST_TIMEOUT_S, deadline - time.monotonic())
        try:
            answer = await self.unary(method, question, left_s, once=True)
        except GanserveError:
            raise failure from None
        return correct(failure, request, answer)

    async def serving(self, request: health_pb2.HealthCheckRequest, timeout_s: float) -> bool:
        """Ask once for the health of a server or a model, as Calls.serving does."""
        deadline = time.monotonic() + timeout_s
        try:
            return to_health(await self.unary("health", request, timeout_s, once=True))
        except ModelNotFoundError as error:
            await self.corrected(error, request, deadline)
            raise

    async def close(self) -> None:
        """End the calls that are running, and make no more."""
        self._closing.set()
        stubs, self._stubs = self._stubs, None
        if stubs is not None and self._loop is asyncio.get_running_loop():
            await stubs.channel.close()


def readable(answer: Any) -> Any:
    """Return the answer of an awaited call.

    Raises:
        ServerError: it is None, by which grpc.aio tells of bytes that are no message.
    """
    if answer is None:
        raise ServerError("the server's answer cannot be read: it is of another protocol")
    return answer


def _cancelled() -> bool:
    """Whether somebody has cancelled the task that runs."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


_all: "weakref.WeakSet[_Calls]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for calls in tuple(_all):
        calls.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
