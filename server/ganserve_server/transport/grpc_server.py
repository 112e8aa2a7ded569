"""gRPC over HTTP/2, the server's side: messages, deadlines, statuses, and the way to the methods.

A method is a function that is given a call and the request's bytes, and that later replies through the call: so the
methods that are called most cost no task. The servicers of grpcio's own packages (health, reflection) run unchanged:
`add_registered_method_handlers` takes what the generated code registers.
"""

import asyncio
import base64
import contextlib
import functools
import itertools
import logging
import random
import re
import ssl
import time
import urllib.parse
import uuid
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from socket import socket
from typing import Any, NoReturn

import grpc

from ganserve_server.errors import MalformedMessage, MessageTooLarge, ServingError, Unavailable, status_details
from ganserve_server.transport.http2 import GOAWAY_GRACE_S, PROTOCOL_ERROR, Backlog, Connection, Fields, Stream, literal
from ganserve_server.transport.interface import Caller, Method, RequestSink, Work, read_message
from ganserve_server.workers import Board, Turns

_log = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,64}")
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_TIMEOUT_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_HEADERS = (
    b"\x88" + literal(b"content-type", b"application/grpc") + literal(b"grpc-accept-encoding", b"identity,deflate,gzip")
)
_GRPC_STATUS_OK = literal(b"grpc-status", b"0")
_CONTENT_TYPE = re.compile(rb"application/grpc(\+proto)?(;.*)?")  # grpc-web and JSON are other protocols
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")  # RFC 9110's token, in lower case
_NO_VALUE = re.compile(rb"[\0\r\n]")
_OF_HTTP1 = (b"connection", b"proxy-connection", b"transfer-encoding", b"keep-alive", b"upgrade")
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
_PREFIX = 5  # bytes before a message: compressed or not, and its length
_CLOSE_GRACE_S = 1.0
_AGED_GRACE_S = 2 * GOAWAY_GRACE_S
_HANDSHAKE_TIMEOUT_S = 10.0
_BACKLOG = 1024
_YIELD_S = 0.001  # in which a worker with fewer connections takes the next
_ACCEPT_PAUSE_S = 1.0  # where there are no more file descriptors
_KEPT_WITH_MESSAGE = 64  # bytes that Python keeps beside a message's own
_HOLDS_MUCH = 64 << 10  # bytes of an unfinished request
# Answers beyond it that a peer does not read. One answer more may come: the largest is 256 MiB.
_MAX_KEPT_BYTES = 128 << 20
_SMALL_ANSWER = 16 << 10
_MAX_UNGUARDED_BYTES = 4096  # of a request that all may send


@dataclass(frozen=True, slots=True)
class Head:
    """What a request's headers say."""

    path: str
    timeout_s: float | None
    length: int | None  # of the body, if told
    encoding: bytes  # of the messages
    request_id: str | None
    metadata: Mapping[bytes, bytes]
    refusal: bytes | None  # the HTTP status of a request that is not gRPC


def read_head(fields: Fields) -> Head:
    """Read a request's headers.

    Raises:
        ValueError: they break HTTP/2's rules (RFC 9113, 8.2 and 8.3).
    """
    pseudo: dict[bytes, bytes] = {}
    metadata: dict[bytes, bytes] = {}
    for name, value in fields:
        if name.startswith(b":"):
            if metadata or name in pseudo or name not in (b":method", b":path", b":scheme", b":authority"):
                raise ValueError("a pseudo-header is unknown, late, or there twice")
            pseudo[name] = value
        elif not _NAME.fullmatch(name) or _NO_VALUE.search(value) or name in _OF_HTTP1:
            raise ValueError("a header is not one of HTTP/2")
        elif name == b"te" and value != b"trailers":
            raise ValueError("te is trailers, or absent")
        else:
            metadata[name] = value
    if not (pseudo.get(b":path") and b":method" in pseudo and b":scheme" in pseudo):
        raise ValueError("a pseudo-header is missing")
    length = metadata.get(b"content-length")
    if length is not None and not length.isdigit():
        raise ValueError("content-length is a number")
    refusal = None
    timeout = metadata.get(b"grpc-timeout")
    in_time = None if timeout is None else _TIMEOUT.fullmatch(timeout)
    if pseudo[b":method"] != b"POST":
        refusal = b"405"
    elif not _CONTENT_TYPE.fullmatch(metadata.get(b"content-type", b"")):
        refusal = b"415"
    elif timeout is not None and in_time is None:
        refusal = b"400"  # a deadline that cannot be read is not none at all
    request_id = metadata.get(REQUEST_ID_KEY.encode(), b"")
    return Head(
        path=pseudo[b":path"].decode("latin-1"),
        timeout_s=int(in_time[1]) * _TIMEOUT_UNITS_S[in_time[2]] if in_time else None,
        length=None if length is None else int(length),
        encoding=metadata.get(b"grpc-encoding", b"identity"),
        request_id=request_id.decode() if _REQUEST_ID.fullmatch(request_id) else None,
        metadata=metadata,
        refusal=refusal,
    )


class Http2Call(Stream):
    """One call. `reply` or `fail` ends it; `write` and `finish` answer with many messages."""

    __slots__ = (
        "_body",
        "_headers_sent",
        "_holds_much",
        "_inflated",
        "_most",
        "_sink",
        "_size",
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

    def __init__(self, server: "GrpcServer", connection: Connection[Head], stream_id: int, head: Head) -> None:
        super().__init__(stream_id)
        self.server, self.connection, self.head = server, connection, head
        self.method = server.methods.get(head.path)
        self.started = time.perf_counter()
        self.request_id = head.request_id or server.new_request_id()
        self.caller: Caller | None = None
        self.denied: ServingError | None = None  # why nothing of it is read
        # For metrics, log and traces; the method fills them in.
        self.model = ""
        self.version: int | None = None
        self.work: Work | None = None
        self.encode_s = 0.0
        self.throttled_s = 0.0  # by its caller's rate, up to `throttled_until`, by time.monotonic
        self.throttled_until = 0.0
        self.over = False
        self.on_cancel: Callable[[], object] | None = None  # called if nobody waits for the answer any more
        self.deadline: float | None = None  # by time.monotonic
        self._timer: asyncio.TimerHandle | None = None
        if head.timeout_s is not None:
            self.deadline = time.monotonic() + head.timeout_s
            self._timer = server.loop.call_later(head.timeout_s, self._expire)
        self._body: bytes | bytearray = b""
        self._size = 0  # bytes kept of the request, and of messages that are not consumed
        self._inflated = 0  # by how much messages that are not consumed are larger than they came
        self._holds_much = False
        self._headers_sent = False
        self._sink: RequestSink | None = None
        self._most = server.max_request_bytes
        if head.refusal is None:
            self._admit()

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
        """Bytes of answers that wait for their peers, of all calls of the server."""
        return self.server.backlog.bytes

    @property
    def partly_sent(self) -> bool:
        """Whether some of the answer was sent before the last of it."""
        return self._headers_sent

    @property
    def turn_of(self) -> object:
        """Who takes turns with others: whose token it is; without one the connection, perhaps a proxy's."""
        return self.connection if self.caller is None else self.caller.name

    @property
    def peer(self) -> str:
        """The address that the call came from, perhaps a proxy's."""
        return _address(self.connection.transport.get_extra_info("peername"))

    def _admit(self) -> None:
        """Find out who calls, and open the method; what is denied is so before its body comes."""
        server, method = self.server, self.method
        try:
            if method is None:
                raise NoSuchMethod(f"there is no method {self.head.path}")
            if not method.guarded:
                self._most = _MAX_UNGUARDED_BYTES
            elif server.guard is not None:
                server.guard(self)
        except ServingError as error:
            self.denied = error
            # Not here: the connection does not know of this call yet. What comes before that is not read.
            server.loop.call_soon(self.fail, error)
        else:
            if method.open is not None:
                self._sink = method.open(self)

    # The request.

    def on_data(self, data: bytes) -> None:
        """Keep the message's bytes, or hand on each message of a stream of requests."""
        if self.over or self.denied is not None:
            return
        if self.head.refusal is not None:
            self._refuse(self.head.refusal)
            return
        if self._body:
            # A bytearray grows in place: bytes would be copied again and again.
            self._body = self._body if isinstance(self._body, bytearray) else bytearray(self._body)
            self._body += data
        else:
            self._body = data
        self._keep(len(data))
        most = self._most
        if self.over:
            return
        if len(self._body) >= _PREFIX and (size := int.from_bytes(self._body[1:_PREFIX], "big")) > most:
            self.fail(MessageTooLarge(f"the request is larger than max ({size} vs. {most} bytes)"))
        elif self._sink is not None:
            self._read_stream()
        elif len(self._body) > most + _PREFIX:
            self.fail(MalformedMessage("the request has more bytes than its message"))

    def on_end(self) -> None:
        """Start the method: the request is complete."""
        if self.over or self.denied is not None:
            return
        method, body, head = self.method, self._body, self.head
        if head.refusal is not None:
            self._refuse(head.refusal)
            return
        if self._sink is None:
            if head.length is not None and head.length != self._size:
                self.connection.abort(self, PROTOCOL_ERROR)
                return
            self._forget_body()
        assert method is not None
        try:
            if self._sink is not None:
                if body:
                    raise MalformedMessage("the last message is incomplete")
                self._sink[1]()
            elif len(body) < _PREFIX or len(body) != _PREFIX + int.from_bytes(body[1:_PREFIX], "big"):
                raise MalformedMessage("the method takes one message, and one whole")
            else:
                assert method.start is not None
                method.start(self, self._message(body[0], bytes(body[_PREFIX:])))
        except Exception as error:
            self.fail(error)

    def on_reset(self) -> None:
        """Stop the work: the peer wants no answer, or is gone."""
        if not self.over:
            late = self.deadline is not None and self.deadline <= time.monotonic()
            self._end(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED, "")
            self._cancel()

    def _read_stream(self) -> None:
        assert self._sink is not None
        take, body, position = self._sink[0], self._body, 0
        try:
            while len(body) - position >= _PREFIX:
                size = int.from_bytes(body[position + 1 : position + _PREFIX], "big")
                end = position + _PREFIX + size
                if size > self._most:
                    raise MessageTooLarge(f"a request is larger than max ({self._most} bytes)")
                if end > len(body):
                    break
                message = self._message(body[position], bytes(body[position + _PREFIX : end]))
                # Counted until it is consumed: a method may keep what it cannot take yet.
                self._keep(len(message) + _KEPT_WITH_MESSAGE - (end - position))
                self._inflated += len(message) - size
                position = end
                if not self.over:
                    take(message)
                if self.over:
                    return
        except Exception as error:
            self.fail(error)
            return
        if isinstance(body, bytearray):
            del body[:position]
        else:
            self._body = body[position:]

    def _message(self, compressed: int, message: bytes) -> bytes:
        if not compressed:
            return message
        bits = _WINDOW_BITS.get(self.head.encoding)
        if compressed > 1:
            raise MalformedMessage("a message is compressed (1) or not (0)")
        if bits is None:
            raise UnknownCompression(f"messages compressed by {self.head.encoding.decode('latin-1')} cannot be read")
        most = self._most
        inflate = zlib.decompressobj(bits)
        try:
            message = inflate.decompress(message, most + 1)
        except zlib.error as error:
            raise MalformedMessage("the message cannot be decompressed") from error
        if len(message) > most:
            raise MessageTooLarge(f"the request is larger than max once decompressed ({most} bytes)")
        if not inflate.eof:
            raise MalformedMessage("the compressed message is incomplete")
        return message

    def _refuse(self, status: bytes) -> None:
        """Answer what is not gRPC as HTTP does."""
        self._end(grpc.StatusCode.UNIMPLEMENTED, "")
        self.connection.send(self, literal(b":status", status), b"", b"")

    def _keep(self, size: int) -> None:
        self._size += size
        server = self.server
        server.buffered_bytes += size
        if self._size > _HOLDS_MUCH and not self._holds_much:
            self._holds_much = True
            server.holders[self] = None
        if server.buffered_bytes > server.max_buffered_bytes:
            server.make_room(self)

    def _forget_body(self) -> None:
        self.server.buffered_bytes -= self._size
        self._size, self._body = 0, b""
        if self._holds_much:
            self._holds_much = False
            self.server.holders.pop(self, None)

    # The answer.

    def reply(self, message: bytes) -> None:
        """End the call with one message."""
        if not self.over and self._has_room(len(message)):
            self._end(grpc.StatusCode.OK, "")
            self.on_cancel = None  # knows the call: each would keep the other
            headers = None if self._headers_sent else _HEADERS
            self.connection.send(self, headers, _framed(message), self._trailers(_GRPC_STATUS_OK))

    def send(self, *messages: bytes) -> None:
        """Send some of many messages: those that are small together cost little more than one."""
        size = sum(map(len, messages))
        if len(messages) > 1 and size > _SMALL_ANSWER:
            for message in messages:
                self.send(message)
        elif not self.over and self._has_room(size):
            headers, self._headers_sent = None if self._headers_sent else _HEADERS, True
            self.connection.send(self, headers, b"".join(map(_framed, messages)), None)

    def finish(self) -> None:
        """End the call after its last message."""
        if not self.over:
            self._end(grpc.StatusCode.OK, "")
            self.on_cancel = None
            headers = None if self._headers_sent else _HEADERS
            self.connection.send(self, headers, b"", self._trailers(_GRPC_STATUS_OK))

    def fail(self, error: BaseException) -> None:
        """End the call with an error's status; what nobody foresaw is logged and told to nobody."""
        if self.over:
            return
        details = b""
        if isinstance(error, ServingError):
            code, text, details = error.code, str(error), status_details(error)
            self.server.on_refused(self, error)
        elif isinstance(error, _Aborted):
            code, text = error.code, error.text
        else:
            code, text = grpc.StatusCode.INTERNAL, "internal error"
            _log.error(
                "internal error", exc_info=error, extra={"request_id": self.request_id, "method": self.head.path}
            )
        self._end(code, text)
        fields = self._trailers(_status(code, text, details))
        if self._headers_sent:
            self.connection.send(self, None, b"", fields)
        else:
            # Without a message, headers and trailers are one.
            self._headers_sent = True
            self.connection.send(self, _HEADERS + fields, b"", b"")
        self._cancel()

    def consumed(self, message_bytes: int, messages: int = 1) -> None:
        """Let the peer send more of a stream of requests: some, of so many bytes together, are done with."""
        if self.over:
            return
        kept = message_bytes + messages * _KEPT_WITH_MESSAGE
        self._size -= kept
        self.server.buffered_bytes -= kept
        # The peer's window is of bytes as they came: compressed.
        read = message_bytes + messages * _PREFIX
        came = max(0, read - self._inflated)
        self._inflated -= read - came
        self.connection.consumed(self, came)

    def spawn(self, work: Coroutine[Any, Any, None], *, cancel: Callable[[], object] | None = None) -> None:
        """Run the call's work as a task, which ends (or `cancel` is called) if nobody waits for the answer any more."""
        self.server.spawn(self, work, cancel=cancel)

    def _has_room(self, size: int) -> bool:
        """Fail the call if its answer would only be kept, beside many others that are not read."""
        kept = self.connection.kept_bytes
        if (not kept and size <= _SMALL_ANSWER) or (
            kept <= _MAX_KEPT_BYTES and self.server.backlog.bytes <= self.server.max_backlog_bytes
        ):
            return True
        self.fail(AnswersUnread("too many answers wait for being read; read them, or ask for fewer at a time"))
        return False

    def _trailers(self, status: bytes) -> bytes:
        return status + literal(b"x-request-id", self.request_id.encode())

    def _expire(self) -> None:
        self.fail(_Aborted(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the answer was complete"))

    def _end(self, code: grpc.StatusCode, text: str) -> None:
        self.over = True
        self._forget_body()
        self._sink = None
        if self._timer is not None:
            self._timer.cancel()
        self.server.on_finished(self, code, text)

    def _cancel(self) -> None:
        if self.on_cancel is not None:
            on_cancel, self.on_cancel = self.on_cancel, None
            on_cancel()

    # What the servicers of grpcio's packages call.

    async def write(self, message: Any) -> None:
        """Send one of many messages, and wait until the peer has taken it."""
        self.send(message if isinstance(message, bytes) else message.SerializeToString())
        await self.drained()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> NoReturn:
        """End the call with a status."""
        raise _Aborted(code, details)

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None if there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()


_MESSAGE_SAFE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


@functools.lru_cache(256)  # under overload the same is said thousands of times a second
def _status(code: grpc.StatusCode, text: str, details: bytes) -> bytes:
    """Write the header fields that tell a call's end."""
    status = literal(b"grpc-status", str(code.value[0]).encode())
    if text:
        status += literal(b"grpc-message", urllib.parse.quote(text, safe=_MESSAGE_SAFE).encode())
    if details:
        status += literal(b"grpc-status-details-bin", base64.b64encode(details).rstrip(b"="))
    return status


def _address(place: Any) -> str:
    """Write what a socket says of its peer."""
    return f"{place[0]}:{place[1]}" if place else ""


def _framed(message: bytes) -> bytes:
    return b"\x00" + len(message).to_bytes(4, "big") + message


class _Aborted(Exception):  # noqa: N818
    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


class NoSuchMethod(ServingError):  # noqa: N818
    """The server has no such method."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "no_such_method"


class UnknownCompression(ServingError):  # noqa: N818
    """The request is compressed in a way that the server cannot read."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "compression"


class AnswersUnread(ServingError):  # noqa: N818
    """The server keeps more answers than it will, for peers that do not read theirs."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "unread"


class GrpcServer:
    """Listens, and leads calls to methods.

    Args:
        on_finished: called at each call's end, with its status and text.
        on_refused: called before it with the error, for those that end with one.
        max_connections: at a time; one more is closed at once.
        on_turned_away: called for each of those.
        max_streams: calls at a time on one connection; a client keeps more waiting on its side.
        max_request_bytes: in one message; as given, a thousand latents of a thousand values.
        unawaited_services: whose calls are not for metrics, and are cut off by a drain.
        max_buffered_bytes: of requests that are not complete, all connections together.
        max_backlog_bytes: of answers that are not read, all connections together: large ones beyond it are refused.
        board: where the workers that share the sockets, if there are others, tell their connections.
        unguarded_services: that all may call.
        guard: finds a call's caller, at its headers, and raises a ServingError if he may not call; None: all may.
        tls: gives what a new connection is greeted with; None: plain text.
        on_tls_failure: called with the reason and the peer's address when it and this side do not agree on TLS.
        max_connection_age_s: give or take a tenth, until a connection is drained: so that a load balancer's long-lived
            ones spread over replicas that were added; 0: never.
        on_aged: called for each that is.
    """

    def __init__(
        self,
        *,
        on_finished: Callable[[Http2Call, grpc.StatusCode, str], None],
        on_refused: Callable[[Http2Call, ServingError], None],
        max_connections: int,
        max_streams: int,
        max_request_bytes: int = 4 << 20,
        unawaited_services: Collection[str] = (),
        max_buffered_bytes: int = 256 << 20,
        max_backlog_bytes: int = 1 << 30,
        board: Board | None = None,
        unguarded_services: Collection[str] = (),
        guard: Callable[[Http2Call], None] | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
        on_tls_failure: Callable[[OSError, str], None] = lambda *_: None,
        max_connection_age_s: float = 0.0,
        on_aged: Callable[[], None] = lambda: None,
        on_turned_away: Callable[[], None] = lambda: None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.methods: dict[str, Method] = {}
        self.max_request_bytes, self.max_buffered_bytes = max_request_bytes, max_buffered_bytes
        self.buffered_bytes = 0
        self.max_backlog_bytes, self.backlog = max_backlog_bytes, Backlog()
        self.holders: OrderedDict[Http2Call, None] = OrderedDict()  # unfinished calls that hold much, oldest first
        self._draining = False
        self.running = 0
        self._on_finished, self.on_refused = on_finished, on_refused
        self._unawaited_services, self._unguarded_services = unawaited_services, unguarded_services
        self.guard, self._tls, self._on_tls_failure = guard, tls, on_tls_failure
        self._max_connection_age_s, self._on_aged = max_connection_age_s, on_aged
        self._max_connections, self._on_turned_away = max_connections, on_turned_away
        self._max_streams = max_streams
        self._connections: set[Connection[Head]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._listening: list[socket] = []
        self._accepted = 0  # sockets that are not closed yet
        self._board = board
        self._turns = None if board is None else Turns(board)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = itertools.count()
        self._id_prefix = uuid.uuid4().hex[:24]

    @property
    def load(self) -> tuple[int, int]:
        """How many connections and calls there are."""
        return len(self._connections), self.running

    def new_request_id(self) -> str:
        """Return an id that no other call has."""
        return f"{self._id_prefix}{next(self._ids) & 0xFFFFFFFF:08x}"

    def add_method(self, path: str, method: Method) -> None:
        """Answer calls of a path, such as /package.Service/Method."""
        self.methods[path] = method

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Do nothing: generated code registers the same handlers by the next method too."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, "grpc.RpcMethodHandler[Any, Any]"]
    ) -> None:
        """Answer the methods of a servicer written for grpc.aio; of its context, it has what `Http2Call` has."""
        awaited, guarded = service not in self._unawaited_services, service not in self._unguarded_services
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            if path in self.methods:
                continue
            if handler.request_streaming:
                opener = functools.partial(self._open_stream_stream, handler)
                self.add_method(path, Method(open=opener, awaited=awaited, guarded=guarded))
            else:
                start = self._start_unary_stream if handler.response_streaming else self._start_unary_unary
                self.add_method(path, Method(start=functools.partial(start, handler), awaited=awaited, guarded=guarded))

    def start(self, sockets: Iterable[socket]) -> None:
        """Listen on sockets that are bound.

        Raises:
            OSError: somebody else does.
        """
        self._count_connections()
        for bound in sockets:
            bound.setblocking(False)
            bound.listen(_BACKLOG)
            self._listening.append(bound)
            self.loop.add_reader(bound, self._accept, bound)

    async def drain(self, timeout_s: float) -> None:
        """Take no more connections, let the calls that run finish, cut off those that take longer, and close."""
        self._draining = True
        listening, self._listening = self._listening, []
        for bound in listening:
            self.loop.remove_reader(bound)
            bound.close()
        for connection in tuple(self._connections):
            connection.drain()
            self._cut_off_unawaited(connection, "the server is shutting down")
        await self._emptied(timeout_s)
        calls = [call for connection in self._connections for call in connection.streams.values()]
        if calls:
            _log.warning("calls cut off", extra={"calls": len(calls), "drain_timeout_s": timeout_s})
        for call in calls:
            assert isinstance(call, Http2Call)
            call.fail(Unavailable("the server has shut down before the call was done"))
        await self._emptied(_CLOSE_GRACE_S)
        for connection in tuple(self._connections):
            connection.transport.abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @staticmethod
    def _cut_off_unawaited(connection: Connection[Head], reason: str) -> None:
        for call in tuple(connection.streams.values()):
            assert isinstance(call, Http2Call)
            if call.method is not None and not call.method.awaited:
                call.fail(Unavailable(reason))

    async def _emptied(self, timeout_s: float) -> None:
        """Wait until there are no connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()

    def spawn(
        self, call: Http2Call, work: Coroutine[Any, Any, None], *, cancel: Callable[[], object] | None = None
    ) -> None:
        """Run a call's work as a task, which ends (or `cancel` is called) if nobody waits for the answer any more."""
        task = self.loop.create_task(self._guarded(call, work))
        call.on_cancel = cancel or task.cancel
        self._tasks.add(task)

        def done(task: "asyncio.Task[None]") -> None:
            self._tasks.discard(task)
            work.close()  # cancelled before its first step, it would be warned of as never awaited

        task.add_done_callback(done)

    def make_room(self, call: Http2Call) -> None:
        """Fail calls until the others have room: those first that have held much for longest, else this one.

        Not the newest: a peer that never finishes its requests would then keep everybody else out.
        """
        error = MessageTooLarge("too many unfinished requests; send fewer at a time")
        while self.buffered_bytes > self.max_buffered_bytes and self.holders:
            self.holders.popitem(last=False)[0].fail(error)
        if self.buffered_bytes > self.max_buffered_bytes:
            call.fail(error)

    def on_finished(self, call: Http2Call, code: grpc.StatusCode, text: str) -> None:
        """Take note of a call's end."""
        self.running -= 1
        if self._board is not None:
            self._board.set_calls(self.running)
        self._on_finished(call, code, text)

    @staticmethod
    async def _guarded(call: Http2Call, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            call.fail(error)

    def _accept(self, listening: socket) -> None:
        """Take one connection, if no other worker that can has fewer: the one that has is woken too."""
        pause_s = 0.0
        if self._turns is not None and not self._turns.mine():
            pause_s = _YIELD_S
        else:
            try:
                accepted, place = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("a connection cannot be accepted", extra={"reason": str(error)})
                pause_s = _ACCEPT_PAUSE_S
            else:
                if self._turns is not None:
                    self._turns.take()
                if self._accepted >= self._max_connections:
                    # Without a word: gRPC's clients would take a GOAWAY for a connection that was there, and connect
                    # again at once, thousands of times a second.
                    accepted.close()
                    self._on_turned_away()
                    return
                accepted.setblocking(False)
                self._accepted += 1
                self._count_connections()
                task = self.loop.create_task(self._adopt(accepted, _address(place)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        if pause_s:
            self.loop.remove_reader(listening)
            self.loop.call_later(pause_s, self._accept_again, listening)

    def _accept_again(self, listening: socket) -> None:
        if listening in self._listening:
            self.loop.add_reader(listening, self._accept, listening)

    async def _adopt(self, accepted: socket, peer: str) -> None:
        tls: dict[str, Any] = {}
        if self._tls is not None:
            tls = {"ssl": self._tls(), "ssl_handshake_timeout": _HANDSHAKE_TIMEOUT_S, "ssl_shutdown_timeout": 1.0}
        try:
            await self.loop.connect_accepted_socket(self._new_connection, accepted, **tls)
        except OSError as error:
            if tls:
                self._on_tls_failure(error, peer)
            accepted.close()
            self._accepted -= 1
            self._count_connections()

    def _new_connection(self) -> Connection[Head]:
        return Connection(
            read_head=read_head,
            open_stream=self._open,
            max_streams=self._max_streams,
            stream_window=self.max_request_bytes + _PREFIX,
            backlog=self.backlog,
            on_made=self._made,
            on_lost=self._lost,
        )

    def _made(self, connection: Connection[Head]) -> None:
        self._connections.add(connection)
        self._empty.clear()
        if self._draining:
            connection.drain()  # it was accepted before the listeners were closed
        elif self._max_connection_age_s:
            age_s = self._max_connection_age_s * random.uniform(0.9, 1.1)
            connection.end_later(age_s, self._age)

    def _age(self, connection: Connection[Head]) -> None:
        self._on_aged()
        connection.drain()
        # Later: a probe that has come is answered, and a watcher may still be on its way.
        reason = "the connection has been open for long; call again on another"
        self.loop.call_later(_AGED_GRACE_S, self._cut_off_unawaited, connection, reason)

    def _lost(self, connection: Connection[Head]) -> None:
        self._connections.discard(connection)
        self._accepted -= 1
        self._count_connections()
        if not self._connections:
            self._empty.set()

    def _count_connections(self) -> None:
        if self._board is not None:
            self._board.set_connections(self._accepted)

    def _open(self, connection: Connection[Head], stream_id: int, head: Head) -> Http2Call:
        self.running += 1
        if self._board is not None:
            self._board.set_calls(self.running)
        call = Http2Call(self, connection, stream_id, head)
        if self._draining and call.method is not None and not call.method.awaited:
            self.loop.call_soon(call.fail, Unavailable("the server is shutting down"))
        return call

    # grpc.aio's ways of writing a method.

    def _start_unary_unary(self, handler: Any, call: Http2Call, content: bytes) -> None:
        self.spawn(call, self._answer(handler, call, read_message(handler.request_deserializer, content)))

    async def _answer(self, handler: Any, call: Http2Call, request: Any) -> None:
        call.reply(handler.response_serializer(await handler.unary_unary(request, call)))

    def _start_unary_stream(self, handler: Any, call: Http2Call, content: bytes) -> None:
        self.spawn(
            call,
            self._answer_all(handler, call, handler.unary_stream, read_message(handler.request_deserializer, content)),
        )

    def _open_stream_stream(self, handler: Any, call: Http2Call) -> RequestSink:
        requests: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def each() -> AsyncIterator[Any]:
            while (content := await requests.get()) is not None:
                call.consumed(len(content))
                yield read_message(handler.request_deserializer, content)

        self.spawn(call, self._answer_all(handler, call, handler.stream_stream, each()))
        return requests.put_nowait, lambda: requests.put_nowait(None)

    @staticmethod
    async def _answer_all(
        handler: Any,
        call: Http2Call,
        method: Callable[[Any, Http2Call], AsyncIterator[Any] | Awaitable[None]],
        request: Any,
    ) -> None:
        responses = method(request, call)
        if isinstance(responses, AsyncIterator):
            async for response in responses:
                await call.write(handler.response_serializer(response))
        else:
            await responses
        call.finish()
