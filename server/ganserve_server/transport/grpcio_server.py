"""grpcio's server as a transport: its core (C++) does the I/O, and the services stay the same.

Every path gets a handler of raw bytes. `grpc.aio` does not report some facts to a server, so they are missing here: the
number of connections, failed TLS handshakes, calls that its core refuses, and calls that are cancelled before their
request is complete.
"""

import asyncio
import errno
import logging
import os
import time
import urllib.parse
import uuid
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from socket import AF_INET6, socket
from typing import Any, NoReturn, cast

import grpc

from ganserve_server.errors import MessageTooLarge, Unavailable
from ganserve_server.transport.answering import (
    REQUEST_ID_KEY,
    Aborted,
    AnswersUnread,
    BaseServer,
    NoSuchMethod,
    outcome,
    request_id_of,
    spawn,
)
from ganserve_server.transport.credentials import Pem
from ganserve_server.transport.interface import Caller, Method, Work
from ganserve_server.transport.limits import MAX_HEADER_LIST_BYTES, Limits

_log = logging.getLogger(__name__)

_CLOSE_GRACE_S = 1.0
_AGED_GRACE_S = 0.2
_QUIET_S, _LONGEST_QUIET_S = 0.1, 1.0
_LEAST_PING_INTERVAL_MS = 1000
_MOST_PENDING_CALLS = 10_000  # that Python has not taken yet; with the defaults (1000 to 3000), bursts were refused
_SMALL_ANSWER = 16 << 10
_SLICE_S = 0.002
_KEPT_WITH_MESSAGE = 64  # bytes of Python's overhead for each message
_CLOCKS_S = 0.005  # the difference between the core's and Python's clock on a deadline


class GrpcioCall:
    """One call, as services see it: their messages are queued here, and `_deliver` writes them to grpcio's context."""

    def __init__(self, server: "GrpcioServer", path: str, metadata: Mapping[bytes, bytes]) -> None:
        self.server, self.path, self.metadata = server, path, metadata
        self.method: Method | None = server.methods.get(path)
        self.request_id = request_id_of(metadata) or uuid.uuid4().hex
        self.started = time.perf_counter()
        self.deadline: float | None = None
        self.peer = ""
        self.over = self.partly_sent = False
        self.on_cancel: Callable[[], object] | None = None
        self.denied: Exception | None = None
        self.caller: Caller | None = None
        self.model, self.version = "", cast(int | None, None)
        self.work: Work | None = None
        self.encode_s = self.throttled_s = self.throttled_until = 0.0
        self.pending_bytes = 0
        self._outgoing: deque[bytes] = deque()
        self._woken = asyncio.Event()  # there is something to write, or the call is over
        self._drained = asyncio.Event()
        self.ageing: asyncio.TimerHandle | None = None  # ends the call when its connection has aged
        self._unconsumed = 0  # bytes of a stream of requests
        self._room = asyncio.Event()
        self._status: tuple[grpc.StatusCode, str, bytes] = (grpc.StatusCode.OK, "", b"")

    @property
    def fairness_key(self) -> object:
        """The key of calls that share a turn: the token's name; without a token the connection, perhaps a proxy's."""
        return self.peer if self.caller is None else self.caller.name

    @property
    def unread_bytes(self) -> int:
        """Bytes of answers that wait for their peers, over all calls of the server."""
        return self.server.backlog_bytes

    # For grpcio.

    def handler(self) -> "grpc.RpcMethodHandler[Any, Any]":
        """Identify the caller, and return the handler; a denied call is refused before its body arrives."""
        method = self.method
        try:
            if method is None:
                raise NoSuchMethod(f"there is no method {self.path}")
            if method.guarded and self.server.guard is not None:
                self.server.guard(self)
        except Exception as error:
            self.denied = error
        if self.denied is not None or (method is not None and method.open is not None):
            return grpc.stream_stream_rpc_method_handler(cast(Any, self._converse))
        # A streaming handler for all: grpcio takes as long for one message as for many.
        return grpc.unary_stream_rpc_method_handler(cast(Any, self._answer))

    async def _answer(self, request: bytes, context: Any) -> None:
        self._begin(context)
        try:
            self._check_size(request)
            assert self.method is not None
            assert self.method.start is not None
            self.method.start(self, request)
        except Exception as error:
            self.fail(error)
        await self._deliver(context)

    async def _converse(self, _: object, context: Any) -> None:
        self._begin(context)
        if self.denied is not None:
            self.fail(self.denied)
            await self._deliver(context)
            return
        reading = self.server.loop.create_task(self._read(context))
        try:
            await self._deliver(context)
        finally:
            reading.cancel()

    async def _read(self, context: Any) -> None:
        """Pass on each message of a stream of requests, but no more than the method has room for."""
        try:
            assert self.method is not None
            assert self.method.open is not None
            take, end = self.method.open(self)
            while (message := await context.read()) is not grpc.aio.EOF:
                self._check_size(message)
                self._unconsumed += len(message) + _KEPT_WITH_MESSAGE
                take(message)
                while self._unconsumed > self.server.limits.max_request_bytes and not self.over:
                    self._room.clear()
                    await self._room.wait()
            end()
        except Exception as error:
            self.fail(error)

    def _begin(self, context: Any) -> None:
        self.peer = urllib.parse.unquote(context.peer()).partition(":")[2]
        if (left_s := context.time_remaining()) is not None:
            self.deadline = time.monotonic() + left_s
        self.server.begun(self)

    def _check_size(self, message: bytes) -> None:
        assert self.method is not None
        most = self.server.limits.unguarded_request_bytes
        if not self.method.guarded and len(message) > most:
            raise MessageTooLarge(f"the request is larger than max ({len(message)} vs. {most} bytes)")

    async def _deliver(self, context: Any) -> None:
        """Write the method's messages, each after the peer has taken the one before; then write the status."""
        try:
            while self._outgoing or not self.over:
                if not self._outgoing:
                    self._woken.clear()
                    await self._woken.wait()
                    continue
                await self.server.answering.wait()
                message = self._outgoing.popleft()
                await context.write(message)
                self._forget(len(message))
            await self.server.answering.wait()
        except BaseException as error:
            self._leave()
            # For any other exception grpcio logs a traceback, whenever a caller resets its call.
            raise asyncio.CancelledError from error
        code, text, details = self._status
        trailers: list[tuple[str, str | bytes]] = [(REQUEST_ID_KEY, self.request_id)]
        if code is not grpc.StatusCode.OK:
            context.set_code(code)
            context.set_details(text)
        if details:
            trailers.append(("grpc-status-details-bin", details))
        context.set_trailing_metadata(tuple(trailers))

    def _leave(self) -> None:
        """Stop the work: the peer has reset the call or is gone, or its deadline has passed."""
        self._outgoing.clear()
        self._forget(self.pending_bytes)
        if not self.over:
            late = self.deadline is not None and self.deadline - _CLOCKS_S <= time.monotonic()
            self._end(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED, "", b"")
            self._cancel()

    def _forget(self, size: int) -> None:
        """Stop counting bytes that no longer wait for the peer."""
        self.pending_bytes -= size
        self.server.backlog_bytes -= size
        if not self.pending_bytes:
            self._drained.set()

    # For services.

    def reply(self, message: bytes) -> None:
        """End the call with one message."""
        self._queue(message)
        self.finish()

    def send(self, *messages: bytes) -> None:
        """Queue some of many messages."""
        self._queue(*messages)
        self.partly_sent = True

    def finish(self) -> None:
        """End the call after its last message."""
        if not self.over:
            self._end(grpc.StatusCode.OK, "", b"")
            self.on_cancel = None  # it refers to the call, which would make a reference cycle

    def fail(self, error: BaseException) -> None:
        """End the call with an error's status. Unexpected exceptions are logged; the caller gets INTERNAL."""
        if self.over:
            return
        self._end(*outcome(self, error, self.server))
        self._cancel()

    def consumed(self, message_bytes: int, messages: int = 1) -> None:
        """Read more of a stream of requests: `messages` of `message_bytes` in total are processed."""
        self._unconsumed -= message_bytes + messages * _KEPT_WITH_MESSAGE
        self._room.set()

    def soon(self, work: Callable[[float], None]) -> None:
        """Call `work` after the received messages are read, with the end of its time by time.perf_counter."""
        self.server.loop.call_soon(lambda: None if self.over else work(time.perf_counter() + _SLICE_S))

    def spawn(self, work: Coroutine[Any, Any, None], *, cancel: Callable[[], object] | None = None) -> None:
        """Run the call's work as a task. If nobody waits for the answer any more, cancel the task, or call `cancel`."""
        spawn(self, work, self.server.tasks, cancel)

    async def drained(self) -> None:
        """Wait until nothing is pending."""
        while self.pending_bytes:
            await self._drained.wait()

    async def write(self, message: Any) -> None:
        """Send one of many messages, and wait until none is pending."""
        self.send(message if isinstance(message, bytes) else message.SerializeToString())
        del message  # otherwise a second copy of it waits
        await self.drained()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> NoReturn:
        """End the call with a status."""
        raise Aborted(code, details)

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None if there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def _queue(self, *messages: bytes) -> None:
        """Queue messages for writing; fail the call if they are large and too many answers are already unread."""
        size = sum(map(len, messages))
        if self.over:
            return
        if size > _SMALL_ANSWER and self.server.backlog_bytes > self.server.limits.answer_bytes:
            self.fail(AnswersUnread("too many answers are unread; read them, or request fewer at a time"))
            return
        self._outgoing.extend(messages)
        self.pending_bytes += size
        self.server.backlog_bytes += size
        self._drained.clear()
        self._woken.set()

    def _end(self, code: grpc.StatusCode, text: str, details: bytes) -> None:
        self.over, self._status = True, (code, text, details)
        self._woken.set()
        self._room.set()
        self.server.ended(self, code, text)

    def _cancel(self) -> None:
        if self.on_cancel is not None:
            on_cancel, self.on_cancel = self.on_cancel, None
            on_cancel()


class GrpcioServer(BaseServer[GrpcioCall], grpc.GenericRpcHandler):
    """Listens, and dispatches calls to methods. Workers share the port by SO_REUSEPORT.

    Args:
        limits: only those of connections, streams, age, idle time, and the sizes of requests and unread answers apply.
        tls: returns certificate, key and authorities; called for each new connection. None: plain text.
        options: `BaseServer`'s.
    """

    def __init__(self, *, limits: Limits, tls: Callable[[], Pem] | None = None, **options: Any) -> None:
        super().__init__(limits=limits, **options)
        self.backlog_bytes = 0
        self._tls = tls
        self._calls: set[GrpcioCall] = set()
        self._peers: Counter[str] = Counter()  # of calls that run
        self._taken = 0
        self.answering = asyncio.Event()  # cleared while pending calls are taken, before the core stops
        self.answering.set()
        self._bound: list[socket] = []
        self._starting: asyncio.Task[None] | None = None
        arguments = [
            ("grpc.so_reuseport", int(self._board is not None)),
            ("grpc.max_allowed_incoming_connections", limits.max_connections),
            ("grpc.max_concurrent_streams", limits.max_streams),
            ("grpc.max_receive_message_length", limits.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", MAX_HEADER_LIST_BYTES),
            ("grpc.server.max_pending_requests", _MOST_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING_CALLS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_INTERVAL_MS),
        ]
        if limits.max_connection_age_s:
            arguments.append(("grpc.max_connection_age_ms", max(1, round(limits.max_connection_age_s * 1000))))
        if limits.idle_timeout_s:
            arguments.append(("grpc.max_connection_idle_ms", max(1, round(limits.idle_timeout_s * 1000))))
        self._server = grpc.aio.server(handlers=[self], options=arguments)

    @property
    def load(self) -> tuple[int, int]:
        """How many connections have calls, and how many calls there are."""
        return len(self._peers), len(self._calls)

    def kept_bytes(self) -> dict[str, int]:
        """Return how many bytes the server keeps for its peers; the core's own bytes are unknown."""
        return {"answers": self.backlog_bytes}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        """Answer a call of any path."""
        metadata = {
            name.encode(): value if isinstance(value, bytes) else value.encode()
            for name, value in handler_call_details.invocation_metadata or ()
        }
        return GrpcioCall(self, handler_call_details.method, metadata).handler()

    def start(self, sockets: Iterable[socket]) -> None:
        """Listen where sockets are bound. grpcio binds its own sockets there; the given ones hold the port until drain.

        Raises:
            OSError: another program listens there.
        """
        everywhere = False
        for bound in sockets:
            self._bound.append(bound)
            host, port = bound.getsockname()[:2]
            if host in ("0.0.0.0", "::"):
                if everywhere:  # the core listens on both for either
                    continue
                everywhere = True
            address = f"[{host}]:{port}" if bound.family == AF_INET6 else f"{host}:{port}"
            try:
                if self._tls is None:
                    self._server.add_insecure_port(address)
                else:
                    self._server.add_secure_port(address, _credentials(self._tls))
            except RuntimeError as error:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from error
        self._starting = self.loop.create_task(self._server.start())
        if self._board is not None:
            self._board.set_connections(0)

    async def drain(self, timeout_s: float) -> None:
        """Accept no more connections, let running calls finish, end calls that exceed the timeout, and close."""
        self._draining = True
        for bound in self._bound:
            bound.close()
        for call in tuple(self._calls):
            self._cut_off_unawaited(call, "the server is shutting down")
        await self._take_what_came()
        stopping = self.loop.create_task(self._server.stop(timeout_s + 2 * _CLOSE_GRACE_S))
        await asyncio.sleep(0)  # it has begun
        self.answering.set()
        await asyncio.wait((stopping,), timeout=timeout_s)
        if self._calls:
            _log.warning("calls cut off", extra={"calls": len(self._calls), "drain_timeout_s": timeout_s})
        for call in tuple(self._calls):
            call.fail(Unavailable("the server has shut down before the call was done"))
        await asyncio.wait((stopping,), timeout=_CLOSE_GRACE_S)
        await self._server.stop(None)
        await stopping
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _take_what_came(self) -> None:
        """Wait until no more calls arrive: when the core stops, it cancels the calls that Python has not taken.

        Meanwhile no call is answered. Callers that get no answer begin no other call, so that soon none is left in the
        core.
        """
        self.answering.clear()
        taken, until = -1, time.monotonic() + _LONGEST_QUIET_S
        while taken != self._taken and time.monotonic() < until:
            taken = self._taken
            await asyncio.sleep(_QUIET_S)

    def begun(self, call: GrpcioCall) -> None:
        """Record a call that has begun."""
        self._taken += 1
        self._calls.add(call)
        self._peers[call.peer] += 1
        self._tell_board()
        if call.method is None or call.method.awaited:
            return
        if self._draining:
            self.loop.call_soon(self._cut_off_unawaited, call, "the server is shutting down")
        elif self.limits.max_connection_age_s:
            # grpcio does not report when a connection has aged; by this time, this call's connection has.
            reason = "the connection has reached its maximum age; call again on another connection"
            age_s = self.limits.max_connection_age_s * 1.1 + _AGED_GRACE_S
            call.ageing = self.loop.call_later(age_s, self._cut_off_unawaited, call, reason)

    def ended(self, call: GrpcioCall, code: grpc.StatusCode, text: str) -> None:
        """Record a call that has ended."""
        self._calls.discard(call)
        self._peers[call.peer] -= 1
        if not self._peers[call.peer]:
            del self._peers[call.peer]
        self._tell_board()
        if call.ageing is not None:
            call.ageing.cancel()
        self._on_finished(call, code, text)

    def _tell_board(self) -> None:
        if self._board is not None:
            self._board.set_connections(len(self._peers))
            self._board.set_in_use(len(self._peers))
            self._board.set_calls(len(self._calls))

    @staticmethod
    def _cut_off_unawaited(call: GrpcioCall, reason: str) -> None:
        if call.method is not None and not call.method.awaited:
            call.fail(Unavailable(reason))


def _credentials(tls: Callable[[], Pem]) -> grpc.ServerCredentials:
    """Return credentials that use the current certificates for each new connection."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        pem = tls()
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.client_ca)

    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=tls().client_ca is not None
    )
