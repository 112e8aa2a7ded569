"""Around every call of GenerationService: a request id, the metrics, and errors as gRPC statuses."""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ganserve_server.errors import MalformedMessage, ServingError, Unavailable, status_details
from ganserve_server.lifecycle import ModelTable
from ganserve_server.metrics import OTHER, Metrics
from ganserve_server.settings import AccessLog

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,64}")
REQUEST_ID_KEY = "x-request-id"
_HAND_OVER_S = 0.1


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the service's handlers; health and reflection pass through."""

    def __init__(self, service: str, table: ModelTable, metrics: Metrics, access_log: AccessLog) -> None:
        self._access_log = access_log
        self._prefix = f"/{service}/"
        self._table = table
        self._metrics = metrics
        self._running = 0
        self._refusing = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, timeout_s: float) -> int:
        """Refuse new calls and wait for those that run, at most `timeout_s`; return how many still run."""
        self._refusing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                # Calls that gRPC has read but not yet handed over would be cancelled by a stop: let them be refused.
                await asyncio.sleep(_HAND_OVER_S)
                await self._idle.wait()
        return self._running

    def _begin(self, method: str, context: Any) -> "_Watch":
        """Count the call as running until gRPC is done with it: its answer sent, not only returned to gRPC."""
        self._running += 1
        self._idle.clear()
        context.add_done_callback(self._end)
        return _Watch(self._metrics, method, context, self._access_log)

    def _end(self, _context: Any) -> None:
        self._running -= 1
        if not self._running:
            self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Replace the handler by one that watches it."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        method = handler_call_details.method.removeprefix(self._prefix)
        # gRPC would answer bytes that are no message with UNKNOWN and a stack trace in the log: they are read here.
        if handler.unary_stream:

            async def stream(content: bytes, context: Any) -> AsyncIterator[Any]:
                watch = self._begin(method, context)
                chunks = None
                try:
                    request = self._read(content, handler, watch)
                    chunks = handler.unary_stream(request, context)
                    async for chunk in chunks:
                        yield chunk
                    watch.finish(grpc.StatusCode.OK)
                except BaseException as error:
                    if chunks is not None:
                        await chunks.aclose()
                    await watch.fail(error)
                    raise

            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)

        async def unary(content: bytes, context: Any) -> Any:
            watch = self._begin(method, context)
            try:
                response = await handler.unary_unary(self._read(content, handler, watch), context)
            except BaseException as error:
                await watch.fail(error)
                raise
            watch.finish(grpc.StatusCode.OK)
            return response

        return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)

    def _read(self, content: bytes, handler: Any, watch: "_Watch") -> Any:
        """Deserialise the request, and name its model for the metrics: a name that is none of ours is no label."""
        if self._refusing:
            raise Unavailable("the server is shutting down; ask another, or again later")
        try:
            request = handler.request_deserializer(content)
        except DecodeError as error:
            raise MalformedMessage(
                "the request is not a message of this method, by ganserve/v1/generation.proto"
            ) from error
        name = getattr(getattr(request, "generate", request), "model", "")
        if name in self._table:
            watch.model = name
        return request


class _Watch:
    """One call: its id, its start, and its end."""

    def __init__(self, metrics: Metrics, method: str, context: Any, access_log: AccessLog) -> None:
        self._metrics = metrics
        self._access_log = access_log
        self._method = method
        self.model = OTHER
        self._context = context
        self._started = time.perf_counter()
        given = next((value for key, value in context.invocation_metadata() or () if key == REQUEST_ID_KEY), "")
        self._id = given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        context.set_trailing_metadata(((REQUEST_ID_KEY, self._id),))

    def finish(self, code: grpc.StatusCode, text: str = "") -> None:
        """Count the call, and log it if it is of those that are logged."""
        took = time.perf_counter() - self._started
        self._metrics.requests.labels(self._method, self.model, code.name).inc()
        self._metrics.request_seconds.labels(self._method, self.model).observe(took)
        # A caller that leaves is no error.
        failed = code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED)
        if self._access_log == "all" or (self._access_log == "errors" and failed):
            call = {"method": self._method, "model": self.model, "code": code.name, "seconds": round(took, 6)}
            # Without the peer: gRPC's own code crashes when asked for that of a call that is over.
            _log.info("call", extra=call | {"request_id": self._id} | ({"reason": text} if text else {}))

    async def fail(self, error: BaseException) -> None:
        """Count the call and end it with the error's status; what nobody foresaw is logged and told to nobody."""
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            left_s = self._context.time_remaining()
            late = left_s is not None and left_s <= 0
            self.finish(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED)
            return
        trailer: tuple[tuple[str, str | bytes], ...] = ((REQUEST_ID_KEY, self._id),)
        if isinstance(error, ServingError):
            self.finish(error.code, str(error))
            self._metrics.rejections.labels(error.reason).inc()
            trailer += (("grpc-status-details-bin", status_details(error)),)
            await self._context.abort(error.code, str(error), trailer)
        else:
            self.finish(grpc.StatusCode.INTERNAL)
            _log.error("internal error", exc_info=error, extra={"request_id": self._id, "method": self._method})
            await self._context.abort(grpc.StatusCode.INTERNAL, "internal error", trailer)
