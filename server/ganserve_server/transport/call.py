"""One gRPC call over HTTP/2: its deadline, request and answer. `headers` and `framing` have what is sent for it.

The bytes of an incomplete request are counted in one of the server's pools. The unread bytes of an answer are counted
in another pool until the peer reads them. If a pool evicts either, the call ends with RESOURCE_EXHAUSTED.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import grpc

from ganserve_server.errors import MalformedMessage, MessageTooLarge, ServingError, status_details
from ganserve_server.transport.answering import Aborted, AnswersUnread, NoSuchMethod, outcome, spawn
from ganserve_server.transport.framing import PREFIX_BYTES, decompressed, framed
from ganserve_server.transport.headers import ANSWER_HEADERS, STATUS_OK, Head, status_fields
from ganserve_server.transport.http2 import ENHANCE_YOUR_CALM, PROTOCOL_ERROR, Connection, Stream, literal
from ganserve_server.transport.interface import Caller, Method, RequestSink, Work
from ganserve_server.transport.limits import MAX_HEADER_LIST_BYTES, Limits
from ganserve_server.transport.pools import Holding, Pool

_KEPT_WITH_MESSAGE = 64  # bytes of Python's overhead for each message
_KEPT_WITH_CALL = 8192  # bytes of an open call: twice the measured size, because small objects are freed late
_KEPT_METADATA_BYTES = 1024  # larger headers are dropped once they are read, except the trace headers
_TRACE_HEADERS, _MOST_TRACE_BYTES = (b"traceparent", b"tracestate"), 512  # W3C Trace Context, 3.3.1.5
_SMALL_ANSWER = 16 << 10
_MESSAGES_A_LOOK = 64  # of a stream of requests, between two looks at the clock


class CallServer(Protocol):
    """The server, as its calls see it."""

    loop: asyncio.AbstractEventLoop
    methods: dict[str, Method]
    limits: Limits
    guard: Callable[["Http2Call"], None] | None
    tasks: set[asyncio.Task[None]]
    requests: Pool
    unguarded: Pool
    answers: Pool
    on_refused: Callable[["Http2Call", ServingError], None]
    on_internal_error: Callable[["Http2Call", BaseException], None]

    def new_request_id(self) -> str:
        """Return an id that no other call has."""

    def on_finished(self, call: "Http2Call", code: grpc.StatusCode, text: str) -> None:
        """Record a call that has ended."""


class Http2Call(Stream):
    """One call. `reply` or `fail` ends it; `write` and `finish` answer with many messages."""

    __slots__ = (
        "_began",
        "_body",
        "_headers_sent",
        "_inflated",
        "_kept",
        "_most",
        "_queued",
        "_received",
        "_sink",
        "_timer",
        "caller",
        "connection",
        "deadline",
        "denied",
        "encode_s",
        "head",
        "method",
        "model",
        "on_cancel",
        "over",
        "request_id",
        "server",
        "started",
        "throttled_s",
        "throttled_until",
        "version",
        "work",
    )

    def __init__(self, server: CallServer, connection: Connection[Head], stream_id: int, head: Head) -> None:
        super().__init__(stream_id)
        self.server, self.connection, self.head = server, connection, head
        self.method = server.methods.get(head.path)
        self.started = time.perf_counter()
        self.request_id = head.request_id or server.new_request_id()
        self.caller: Caller | None = None
        self.denied = False  # its body is not read
        # For metrics, log and traces; the method fills them in.
        self.model = ""
        self.version: int | None = None
        self.work: Work | None = None
        self.encode_s = 0.0
        self.throttled_s = 0.0  # waits for the caller's rate, including the current wait
        self.throttled_until = 0.0  # the end of the current wait, by time.monotonic
        self.over = False
        self.on_cancel: Callable[[], object] | None = None  # called if nobody waits for the answer any more
        self.deadline: float | None = None  # by time.monotonic
        self._timer: asyncio.TimerHandle | None = None
        if head.timeout_s is not None:
            self.deadline = time.monotonic() + head.timeout_s
            self._timer = server.loop.call_later(head.timeout_s, self._expire)
        self._body: bytes | bytearray = b""
        self._received = 0  # bytes of the body
        self._queued = 0  # bytes of messages that are not consumed
        self._inflated = 0  # how many more bytes those messages have than their compressed form
        self._kept: Holding | None = None  # the request, while it is not complete
        self._began = 0.0  # start of the incomplete message, by time.monotonic; 0: there is none
        self._headers_sent = False
        self._sink: RequestSink | None = None
        self._most = server.limits.max_request_bytes
        if head.refusal is None:
            self._admit()
        else:
            self.denied = True
            server.loop.call_soon(self._refuse, head.refusal)

    @property
    def path(self) -> str:
        """The method's path, such as /package.Service/Method."""
        return self.head.path

    @property
    def metadata(self) -> Mapping[bytes, bytes]:
        """The request's headers."""
        return self.head.metadata

    @property
    def unread_bytes(self) -> int:
        """Bytes of answers that wait for their peers, over all calls of the server."""
        return self.server.answers.bytes

    @property
    def partly_sent(self) -> bool:
        """Whether a part of the answer was sent before its end."""
        return self._headers_sent

    @property
    def fairness_key(self) -> object:
        """The key of calls that share a turn: the token's name; without a token the connection, perhaps a proxy's."""
        return self.connection if self.caller is None else self.caller.name

    @property
    def peer(self) -> str:
        """The address that the call came from, perhaps a proxy's."""
        return address_of(self.connection.transport.get_extra_info("peername"))

    @property
    def key(self) -> object:
        """The key of its share of the memory for requests and answers."""
        return self.fairness_key

    def _admit(self) -> None:
        """Identify the caller, and open the method; a denied call is refused before its body arrives."""
        server, method = self.server, self.method
        try:
            if self.head.size > MAX_HEADER_LIST_BYTES:
                raise HeadersTooLarge(f"the headers have {self.head.size} bytes; {MAX_HEADER_LIST_BYTES} are allowed")
            if method is None:
                raise NoSuchMethod(f"there is no method {self.head.path}")
            if not method.guarded:
                self._most = server.limits.unguarded_request_bytes
            elif server.guard is not None:
                server.guard(self)
                self.connection.trusted = True
        except ServingError as error:
            self.denied = True
            # Not here: the connection does not know this call yet. Data that arrives before `fail` is not read.
            server.loop.call_soon(self.fail, error)
        else:
            if method.open is not None:
                self._sink = method.open(self)
        if self.head.size > _KEPT_METADATA_BYTES:
            kept = {
                name: value
                for name, value in self.head.metadata.items()
                if name in _TRACE_HEADERS and len(value) <= _MOST_TRACE_BYTES and not self.denied
            }
            self.head = replace(self.head, path=self.head.path[:_KEPT_METADATA_BYTES], metadata=kept)

    # The request.

    def on_data(self, data: bytes, *, last: bool) -> bool:
        """Keep the message's bytes, or pass on each message of a stream of requests."""
        if self.over or self.denied:
            return False
        self._received += len(data)
        if self.head.length is not None and self._received > self.head.length:
            self.connection.abort(self, PROTOCOL_ERROR)
            return False
        if self._body:
            # A bytearray grows in place: bytes would be copied again and again.
            self._body = self._body if isinstance(self._body, bytearray) else bytearray(self._body)
            self._body += data
        else:
            self._body = data
        most = self._most
        if len(self._body) >= PREFIX_BYTES and (size := int.from_bytes(self._body[1:PREFIX_BYTES], "big")) > most:
            self.fail(MessageTooLarge(f"the request is larger than max ({size} vs. {most} bytes)"))
        elif self._sink is not None:
            return self.read_on()
        elif len(self._body) > most + PREFIX_BYTES:
            self.fail(MalformedMessage("the request has more bytes than its message"))
        elif not last:  # a request that arrives whole is never counted
            self._keep()
        return False

    def on_incomplete(self) -> None:
        """Count the call in its pool, and start the timeout of its request."""
        if not self.over and not self.denied:
            if self._sink is None:
                self._began = time.monotonic()
            self._keep()

    def on_end(self) -> None:
        """Start the method: the request is complete."""
        if self.over or self.denied:
            return
        method, body, head = self.method, self._body, self.head
        if head.length is not None and head.length != self._received:
            self.connection.abort(self, PROTOCOL_ERROR)
            return
        self._began = 0.0
        if self._sink is None:
            self._forget_request()
        assert method is not None
        try:
            if self._sink is not None:
                if body:
                    raise MalformedMessage("the last message is incomplete")
                self._sink[1]()
            elif len(body) < PREFIX_BYTES or len(body) != PREFIX_BYTES + int.from_bytes(body[1:PREFIX_BYTES], "big"):
                raise MalformedMessage("the method takes exactly one complete message")
            else:
                assert method.start is not None
                method.start(self, self._message(body, 0, len(body)))
        except Exception as error:
            self.fail(error)

    def on_reset(self) -> None:
        """Stop the work: the peer has reset the call, or is gone."""
        if not self.over:
            late = self.deadline is not None and self.deadline <= time.monotonic()
            self._end(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED, "")
            self._cancel()

    def read_on(self) -> bool:
        """Pass on the messages of a stream of requests until the turn ends; return whether more have arrived."""
        if self._sink is None or self.over:
            return False
        take, body, position, count, more = self._sink[0], self._body, 0, 0, False
        try:
            while len(body) - position >= PREFIX_BYTES and not more:
                compressed = body[position]
                size = int.from_bytes(body[position + 1 : position + PREFIX_BYTES], "big")
                end = position + PREFIX_BYTES + size
                if size > self._most:
                    raise MessageTooLarge(f"a request is larger than max ({self._most} bytes)")
                if end > len(body):
                    break
                message = self._message(body, position, end)
                # Counted until it is consumed: a method may keep messages that it cannot process yet.
                self._queued += len(message) + _KEPT_WITH_MESSAGE
                self._inflated += len(message) - size
                position = end
                take(message)
                if self.over:
                    return False
                count += 1
                if compressed or count % _MESSAGES_A_LOOK == 0:
                    more = time.perf_counter() > self.connection.until
        except Exception as error:
            self.fail(error)
            return False
        if isinstance(body, bytearray):
            del body[:position]
        else:
            self._body = body[position:]
        if more or not self._body:
            self._began = 0.0
        elif position or not self._began:
            self._began = time.monotonic()
        self._keep()
        return more

    def _message(self, body: bytes | bytearray, start: int, end: int) -> bytes:
        message = bytes(body[start + PREFIX_BYTES : end])
        return decompressed(message, body[start], self.head.encoding, self._most) if body[start] else message

    def _refuse(self, status: bytes) -> None:
        """Answer a request that is not gRPC with an HTTP status."""
        if not self.over:
            self._end(grpc.StatusCode.UNIMPLEMENTED, "")
            self.connection.send(self, literal(b":status", status), b"", b"")

    def _keep(self) -> None:
        """Count the bytes that are kept of the request; this may evict them."""
        if self._kept is None:
            assert self.method is not None
            pool = self.server.requests if self.method.guarded else self.server.unguarded
            self._kept = Holding(pool, self.key, self._evict_request)
        self._kept.resize(_KEPT_WITH_CALL + len(self._body) + self._queued)

    def _evict_request(self) -> None:
        self.fail(MessageTooLarge("too many unfinished requests; send fewer at a time"))

    def _forget_request(self) -> None:
        self._body, self._queued, self._began = b"", 0, 0.0
        if self._kept is not None:
            kept, self._kept = self._kept, None
            kept.resize(0)

    def look(self, now: float, body_timeout_s: float, write_timeout_s: float) -> None:
        """End the call if its peer takes too long to send a message or to read the answer."""
        if body_timeout_s and self._began and now - self._began > body_timeout_s:
            self.fail(RequestTooSlow(f"the request was not complete after {body_timeout_s:g} s"))
        elif write_timeout_s and self.holding is not None and now - self.holding.since > write_timeout_s:
            self.on_evicted()

    # The answer.

    def reply(self, message: bytes) -> None:
        """End the call with one message."""
        if not self.over:
            self._end(grpc.StatusCode.OK, "")
            self.on_cancel = None  # it refers to the call, which would make a reference cycle
            headers = None if self._headers_sent else ANSWER_HEADERS
            self.connection.send(self, headers, framed(message), self._trailers(STATUS_OK))

    def send(self, *messages: bytes) -> None:
        """Send some of many messages. Together, small messages cost little more than one."""
        size = sum(map(len, messages))
        if len(messages) > 1 and size > _SMALL_ANSWER:
            for message in messages:
                self.send(message)
        elif not self.over:
            if self._kept is not None:
                self._kept.progress()
            headers, self._headers_sent = None if self._headers_sent else ANSWER_HEADERS, True
            self.connection.send(self, headers, b"".join(map(framed, messages)), None)

    def finish(self) -> None:
        """End the call after its last message."""
        if not self.over:
            self._end(grpc.StatusCode.OK, "")
            self.on_cancel = None
            headers = None if self._headers_sent else ANSWER_HEADERS
            self.connection.send(self, headers, b"", self._trailers(STATUS_OK))

    def fail(self, error: BaseException) -> None:
        """End the call with an error's status. Unexpected exceptions are logged; the caller gets INTERNAL."""
        if self.over:
            return
        code, text, details = outcome(self, error, self.server)
        self._end(code, text)
        fields = self._trailers(status_fields(code, text, details))
        if self._headers_sent:
            self.connection.send(self, None, b"", fields)
        else:
            # Without a message, headers and trailers are one block (gRPC's Trailers-Only).
            self._headers_sent = True
            self.connection.send(self, ANSWER_HEADERS + fields, b"", b"")
        self._cancel()

    def consumed(self, message_bytes: int, messages: int = 1) -> None:
        """Let the peer send more of a stream of requests: `messages` of `message_bytes` in total are processed."""
        if self.over:
            return
        self._queued -= message_bytes + messages * _KEPT_WITH_MESSAGE
        if self._kept is not None:
            self._keep()
            self._kept.progress()
        # The peer's window counts bytes as they were received: compressed.
        read = message_bytes + messages * PREFIX_BYTES
        came = max(0, read - self._inflated)
        self._inflated -= read - came
        self.connection.consumed(self, came)

    def soon(self, work: Callable[[float], None]) -> None:
        """Call `work` in the connection's turn, after the received frames are read, with the end of the turn."""
        self.connection.soon(lambda: None if self.over else work(self.connection.until))

    def spawn(self, work: Coroutine[Any, Any, None], *, cancel: Callable[[], object] | None = None) -> None:
        """Run the call's work as a task. If nobody waits for the answer any more, cancel the task, or call `cancel`."""
        if self._kept is None and not self.over:
            self._keep()  # a task may take long, such as a stream that waits for its caller's rate
        spawn(self, work, self.server.tasks, cancel)

    def on_evicted(self) -> None:
        """End the call and drop its answer: the peer does not read it."""
        error = AnswersUnread(
            "too many answers are unread, or this answer has been unread for too long; read the answers"
        )
        unsent = self.connection.forget_answer(self)
        self.server.on_refused(self, error)
        if not self.over:
            self._end(error.code, str(error))
        if unsent and self.connection.writable:
            status = status_fields(error.code, str(error), status_details(error))
            self.connection.send(self, ANSWER_HEADERS + self._trailers(status), b"", b"")
        else:
            self.connection.reset(self, ENHANCE_YOUR_CALM)  # which gRPC reads as RESOURCE_EXHAUSTED
        self._cancel()

    def _trailers(self, status: bytes) -> bytes:
        return status + literal(b"x-request-id", self.request_id.encode())

    def _expire(self) -> None:
        self.fail(Aborted(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the answer was complete"))

    def _end(self, code: grpc.StatusCode, text: str) -> None:
        self.over = True
        self._forget_request()
        self._sink = None
        if self._timer is not None:
            self._timer.cancel()
        self.server.on_finished(self, code, text)

    def _cancel(self) -> None:
        if self.on_cancel is not None:
            on_cancel, self.on_cancel = self.on_cancel, None
            on_cancel()

    # For the servicers of grpcio's packages.

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


def address_of(place: Any) -> str:
    """Format a socket's peer address as HOST:PORT; empty if it is unknown."""
    return f"{place[0]}:{place[1]}" if place else ""


class HeadersTooLarge(ServingError):  # noqa: N818
    """The request's headers have more bytes than the server takes."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "headers_too_large"


class RequestTooSlow(ServingError):  # noqa: N818
    """The request was not complete in time."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "too_slow"
