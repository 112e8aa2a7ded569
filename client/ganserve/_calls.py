"""Makes calls on the client's own connection: retries them, and corrects requests if their meaning is clear.

`Calls` is for threads and `AsyncCalls` for asyncio. `_streams` and `_each` read the calls with many answers.
"""

import asyncio
import os
import threading
import time
import weakref
from typing import Any, Self

import grpc

from ganserve._endpoint import Endpoint
from ganserve._forks import (
    check_fork,
    enter_call,
    leave_call,
    leave_to_parent,
    lose_in_fork,
)
from ganserve._messages import Stubs, correct, explain_missing_label, is_serving, question_about
from ganserve._retries import Attempts, RetryPolicy
from ganserve._statuses import REQUEST_ID_KEY, too_late, translate
from ganserve.errors import (
    GanserveError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    ServerError,
)

_SHORTEST_TIMEOUT_S = 0.001


class _BaseCalls:
    """The common part of `Calls` and `AsyncCalls`: the endpoint, the translation of errors, and forks."""

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
        """Whether the client is closed."""
        return self._closing.is_set()

    def to_one_address(self, target: str) -> Self:
        """Return an object that calls only one of the addresses, without retries."""
        return type(self)(self.endpoint.of_one_address(target), retries=False)

    def check_open(self) -> None:
        """Raise RequestCancelledError if the client is closed."""
        if self.closed:
            raise RequestCancelledError("this client is closed", reason="closed")

    def metadata_with(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call with this request id."""
        return (*(self.metadata or ()), (REQUEST_ID_KEY, request_id))

    def after_fork(self) -> None:
        """Start afresh in a child process: the connections belong to the parent."""
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


class Calls(_BaseCalls):
    """Blocking calls; safe to share between threads."""

    def connected(self) -> Stubs:
        """Return the methods to call; connects if there is no connection."""
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
        """Make a call with one answer, and return the answer.

        Args:
            method: an attribute of `Stubs`.
            request: the request.
            timeout_s: for the call with its retries.
            once: make one attempt, without retries and corrections.

        Raises:
            GanserveError: the call failed.
        """
        given_s, deadline = timeout_s, time.monotonic() + timeout_s
        attempts = None
        while True:
            # The call has no request id, although an id would identify a timed-out call in the server's log: a new id
            # for each call defeats the compression of headers, and costs 60 µs of a call's 400 µs.
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
            request = self.prepare_retry(failure, request, attempts, deadline) or request
            timeout_s = deadline - time.monotonic()

    def failure(
        self, error: Exception, timeout_s: float, request_id: str | None = None, *, late: bool = False
    ) -> GanserveError:
        """Return the failure that ended a call; raise the error if it is not a failure of the call.

        Args:
            error: the exception that the call raised.
            timeout_s: the timeout of the call, including its retries.
            request_id: the id that the call was sent with, if any.
            late: whether the call took too long.
        """
        if isinstance(error, grpc.RpcError):
            return self._translated(error, timeout_s, request_id, late=late)
        if not self.closed:
            raise error
        raise self._closed_meanwhile() from None  # gRPC's ValueError for a closed channel

    def prepare_retry(self, failure: GanserveError, request: Any, attempts: Attempts, deadline: float) -> Any:
        """Wait until a failed call may be repeated; return the corrected request, or None to repeat it unchanged.

        Raises:
            GanserveError: the failure, if a retry is useless or not allowed.
        """
        corrected = self.corrected(failure, request, deadline)
        if corrected is None:
            self.pause(attempts.delay_s(failure, deadline))
        return corrected

    def corrected(self, failure: GanserveError, request: Any, deadline: float) -> Any:
        """Return the corrected form of a request that the server refused; None if no further call can help.

        Raises:
            GanserveError: the failure, whose text now says what the caller probably meant.
        """
        explain_missing_label(failure, request)
        question = question_about(failure, request)
        if question is None:
            return None
        left_s = max(_SHORTEST_TIMEOUT_S, deadline - time.monotonic())
        try:
            answer = self.unary(*question, left_s, once=True)
        except GanserveError:
            raise failure from None
        return correct(failure, request, answer)

    def serving(self, request: Any, timeout_s: float) -> bool:
        """Ask once for the health of a server or a model. The error for an unknown model lists the known ones."""
        deadline = time.monotonic() + timeout_s
        try:
            return is_serving(self.unary("health", request, timeout_s, once=True))
        except ModelNotFoundError as error:
            self.corrected(error, request, deadline)
            raise

    def pause(self, delay_s: float) -> None:
        """Wait, and raise RequestCancelledError if the client is closed meanwhile."""
        if self._closing.wait(delay_s):
            raise self._closed_meanwhile()

    def close(self) -> None:
        """End the running calls, and make no more."""
        with self._lock:
            self._closing.set()
            stubs, self._stubs = self._stubs, None
        if stubs is not None:
            stubs.channel.close()


class AsyncCalls(_BaseCalls):
    """Calls for asyncio. They belong to the event loop of the first call until that loop is closed."""

    _loop: asyncio.AbstractEventLoop | None = None

    def after_fork(self) -> None:
        """Start afresh in a child process, as Calls.after_fork does."""
        if self._stubs is not None:
            # Its thread waits inside gRPC even without calls.
            lose_in_fork("an AsyncClient connected")
        super().after_fork()

    def connected(self) -> Stubs:
        """Return the methods to call; connects if there is no connection."""
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
        """Make a call with one answer, as Calls.unary does."""
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
            request = await self.prepare_retry(failure, request, attempts, deadline) or request
            timeout_s = deadline - time.monotonic()

    def failure(
        self, error: BaseException, timeout_s: float, request_id: str | None = None, *, late: bool = False
    ) -> GanserveError:
        """Return the failure that ended a call, as Calls.failure does.

        A cancelled call or a closed channel is a failure of the call; a cancelled task is not, and its owner must see
        the CancelledError.
        """
        if isinstance(error, grpc.RpcError):
            return self._translated(error, timeout_s, request_id, late=late)
        if not (isinstance(error, asyncio.CancelledError) and _cancelled()):
            if self.closed:
                raise self._closed_meanwhile() from None
            if late:
                return too_late(self.address, timeout_s, request_id)
        raise error

    async def prepare_retry(self, failure: GanserveError, request: Any, attempts: Attempts, deadline: float) -> Any:
        """Wait until a failed call may be repeated, as Calls.prepare_retry does."""
        corrected = await self.corrected(failure, request, deadline)
        if corrected is None:
            await asyncio.sleep(attempts.delay_s(failure, deadline))
        return corrected

    async def corrected(self, failure: GanserveError, request: Any, deadline: float) -> Any:
        """Return the corrected form of a request that the server refused, as Calls.corrected does."""
        explain_missing_label(failure, request)
        question = question_about(failure, request)
        if question is None:
            return None
        left_s = max(_SHORTEST_TIMEOUT_S, deadline - time.monotonic())
        try:
            answer = await self.unary(*question, left_s, once=True)
        except GanserveError:
            raise failure from None
        return correct(failure, request, answer)

    async def serving(self, request: Any, timeout_s: float) -> bool:
        """Ask once for the health of a server or a model, as Calls.serving does."""
        deadline = time.monotonic() + timeout_s
        try:
            return is_serving(await self.unary("health", request, timeout_s, once=True))
        except ModelNotFoundError as error:
            await self.corrected(error, request, deadline)
            raise

    async def close(self) -> None:
        """End the running calls, and make no more."""
        self._closing.set()
        stubs, self._stubs = self._stubs, None
        if stubs is not None and self._loop is asyncio.get_running_loop():
            await stubs.channel.close()


def readable(answer: Any) -> Any:
    """Return the answer of a call for asyncio.

    Raises:
        ServerError: the answer is None: grpc.aio could not parse it.
    """
    if answer is None:
        raise ServerError("the server's answer cannot be read: it uses another protocol")
    return answer


def _cancelled() -> bool:
    """Return whether the current task has been cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


_all: "weakref.WeakSet[_BaseCalls]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for calls in tuple(_all):
        calls.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
