"""Converts gRPC's statuses and texts to the SDK's exceptions."""

import logging
import re
from collections.abc import Coroutine, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from ganserve.errors import (
    AuthenticationError,
    DeadlineExceededError,
    GanserveError,
    InvalidRequestError,
    MessageTooLargeError,
    ModelNotFoundError,
    OverloadedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
)

REQUEST_ID_KEY = "x-request-id"
_DETAILS_KEY = "grpc-status-details-bin"
_NO_GRPC = "Expected SETTINGS frame as the first frame"  # gRPC's text for HTTP/1, SSH and other protocols
_WRITE_FAILED = "Internal error from Core"
_SIZES = re.compile(r"(\d+) vs\. (\d+)")
_CERTIFICATE_SIGNS = ("CERTIFICATE", "in peer certificate", "Verification Check", "verification check", "_ALERT_")
_ARGUMENT_OF_FIELD = {
    "labels": "label",
    "label_names": "label",
    "inputs.attributes": "attributes",
    "inputs.seeds": "input_seeds",
}
# The parts of gRPC's texts that surround the cause, in the order of removal.
_NOISE = [
    (re.compile(pattern, re.DOTALL), words)
    for pattern, words in (
        (r"^.*last error: ", ""),
        (r"^[A-Z_]+: (?:ipv[46]|unix[\w-]*|vsock):\S+: ", ""),
        (r"^Stream removed \((.*)\)$", r"\1"),
        (r"^RST_STREAM \((.*)\)$", r"\1"),
        (r"^Failed to connect to remote host: ", ""),
        (r"^connect failed: addr: \S+ error: ", ""),
        (r"^connect: ", ""),
        (r"^(?:errors resolving|DNS resolution failed for) .*: ([^:\]]+)\]?$", r"\1"),
        (r"^.*OPENSSL_internal:", ""),
        (r"(?:: Invalid certificate verification context)?: OK$", ""),
        (r"^Custom verification check failed with error: [A-Z_]+: ", ""),
        (r"^Received http2 header with status: ", "HTTP status "),
        (r"; Debug Text: $| \(\d+\)$", ""),
        (r"[\s.;]+$", ""),
    )
]
_log = logging.getLogger("ganserve")

ERROR_OF_STATUS: dict[grpc.StatusCode, type[GanserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNIMPLEMENTED: ServerError,
    grpc.StatusCode.ABORTED: ServerError,
    grpc.StatusCode.ALREADY_EXISTS: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}
_STATUS_OF_NUMBER: dict[int, grpc.StatusCode] = {status.value[0]: status for status in ERROR_OF_STATUS}


def translate(
    error: Any, address: str, *, closed: bool = False, timeout_s: float | None = None, request_id: str | None = None
) -> GanserveError:
    """Return the SDK's exception for a grpc.RpcError of a blocking or an asyncio stub.

    Args:
        error: the error.
        address: the server's address.
        closed: whether the client was closed during the call.
        timeout_s: the timeout of the call, including its retries; None if there is none.
        request_id: the id that the call was sent with, if any.
    """
    code: grpc.StatusCode = error.code()
    trailer: Sequence[tuple[str, str | bytes]] = tuple(error.trailing_metadata() or ())
    metadata = dict(trailer)
    answered_id = metadata.get(REQUEST_ID_KEY)
    answered_id = answered_id if isinstance(answered_id, str) else None
    details = error.details()
    if code is grpc.StatusCode.CANCELLED and answered_id is None and not closed:
        # The client did not cancel it: a server that was shutting down dropped the call before it began.
        code = grpc.StatusCode.UNAVAILABLE
    if code is grpc.StatusCode.INTERNAL and details == _WRITE_FAILED:
        code, details = grpc.StatusCode.UNAVAILABLE, "the call ended while requests were being sent"
    translated = _translated(code, details, address, answered_id, timeout_s)
    if isinstance(translated, DeadlineExceededError):
        translated.request_id = answered_id or request_id
    _read_details(translated, metadata.get(_DETAILS_KEY))
    return translated


class FirstStatus:
    """Keeps the status that an asyncio call with a stream of requests ends with; a callback of its end.

    If the call ends while a request is being written, grpc.aio overwrites the status with "Internal error from Core"
    (grpc#36066).
    """

    def __init__(self) -> None:
        self._error: grpc.aio.AioRpcError | None = None

    def __call__(self, call: Any) -> None:
        code, details = _result(call.code()), _result(call.details())
        if code is not grpc.StatusCode.OK:
            self._error = grpc.aio.AioRpcError(
                code, grpc.aio.Metadata(), _result(call.trailing_metadata()), details=details
            )

    def of(self, error: Any) -> Any:
        """Return the error that the call ended with, which `error` may have overwritten."""
        overwritten = error.code() is grpc.StatusCode.INTERNAL and error.details() == _WRITE_FAILED
        return self._error if overwritten and self._error is not None else error


def _result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("the coroutine waits")


def translate_answer(code: int, reason: str, text: str, address: str, request_id: str) -> GanserveError:
    """Return the exception for an error that answers one request of a stream: the same as for a single call."""
    translated = _translated(_STATUS_OF_NUMBER.get(code, grpc.StatusCode.UNKNOWN), text, address, request_id)
    translated.reason = reason or translated.reason
    if isinstance(translated, OverloadedError):
        translated.retry_after_s = 0.0  # the answer has no delay; the stream's other requests take time anyway
    return translated


def too_late(address: str, timeout_s: float | None, request_id: str | None) -> GanserveError:
    """Return the exception for an answer that missed a timeout that the SDK, and not gRPC, measures."""
    late = _translated(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", address, None, timeout_s)
    late.request_id = request_id
    return late


def _translated(
    code: grpc.StatusCode, details: str | None, address: str, request_id: str | None, timeout_s: float | None = None
) -> GanserveError:
    kind, reason, advice = ERROR_OF_STATUS[code], None, ""
    text, answered = details or code.name, request_id is not None
    if not answered:
        _log.debug("gRPC says %s: %s", code.name, text)
        text = in_words(text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        kind = MessageTooLargeError
        code = grpc.StatusCode.INVALID_ARGUMENT
        if "CLIENT: Received" in text:
            text = (
                f"the answer is larger than this client accepts ({text}); request fewer images per call, or use a "
                "stream"
            )
        else:
            text = f"the request is larger than the server accepts ({text}); send fewer latents per call"
    elif code is grpc.StatusCode.UNAVAILABLE and not answered and "WRONG_VERSION_NUMBER" in text:
        kind, reason = AuthenticationError, "not_encrypted"
        text = f"the server at {address} does not speak TLS"
        advice = "use {no_tls} (GANSERVE_TLS=0) for plain text"
    elif not answered and "does not match SSL server name" in text:
        kind, reason = AuthenticationError, "certificate"
        text = f"the certificate of {address} is not for this host: its subjectAltName is missing or has another name"
    elif code is grpc.StatusCode.UNAVAILABLE and not answered and any(sign in text for sign in _CERTIFICATE_SIGNS):
        kind, reason = AuthenticationError, "certificate"
        text = f"this client and {address} do not trust each other ({text})"
        advice = (
            "{ca_file} (GANSERVE_CA_FILE) sets the authority that signed the server's certificate; {certificate} "
            "set the client's certificate"
        )
    elif code is grpc.StatusCode.UNAVAILABLE and "Cancelling all calls" in text:
        reason, text = "shut_down", f"the server at {address} shut down before the call was done; try again"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        why = f" ({text})" if text.casefold() != "deadline exceeded" else ""
        timeout = "the timeout" if timeout_s is None else f"the timeout of {timeout_s:.4g} s"
        text = f"no complete answer from {address} within {timeout}{why}"
        advice = "set {timeout} to allow more time"
    elif code is grpc.StatusCode.UNAVAILABLE and not answered and _NO_GRPC in text:
        reason = "unreachable"
        text = f"{address} answers, but not as gRPC does (HTTP/2)"
        advice = (
            "is it the port of the server's metrics, or of another program? {address} or GANSERVE_ADDRESS sets "
            "another address"
        )
    elif code is grpc.StatusCode.UNAVAILABLE and not answered:
        reason = "unreachable"
        # A server that expects TLS, or a client certificate, closes the connection without an error.
        wants = "Does it require TLS ({tls}) or a client certificate ({certificate})? " * ("closed" in text)
        text = f"no answer from {address} ({text})"
        advice = f"is ganserve-server running there? {wants}{{address}} or GANSERVE_ADDRESS sets another address"
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        reason, text = "unimplemented", f"the server at {address} does not support ganserve.v1 ({text})"
    elif code is grpc.StatusCode.NOT_FOUND and not details:  # as the health service answers
        text = f"the server at {address} has no model of this name"
        advice = "`models` lists its models"
    elif kind is OverloadedError and not answered:
        text = f"the server at {address} is overloaded ({text})"
    elif kind is AuthenticationError:
        text = f"the server at {address} refused the call ({text})"
        advice = "set the token with {token} or GANSERVE_TOKEN"
    elif kind is ServerError:
        hint = f"report the request id {request_id} to its operator" if answered else "there is no request id"
        text = f"the server at {address} failed ({code.name}: {text}); {hint}"
    translated = kind(text, advice=advice, code=code, reason=reason, request_id=request_id)
    if isinstance(translated, MessageTooLargeError) and (sizes := _SIZES.search(text)):
        translated.size_bytes, translated.limit_bytes = int(sizes[1]), int(sizes[2])
    return translated


def in_words(text: str) -> str:
    """Return the core of gRPC's text on a failed connection, such as "connection refused"."""
    for noise, words in _NOISE:
        text = noise.sub(words, text)
    return text[0].lower() + text[1:] if text[1:2].islower() else text


def _read_details(error: GanserveError, content: str | bytes | None) -> None:
    if not isinstance(content, bytes):
        return
    try:
        details = status_pb2.Status.FromString(content).details
        for detail in details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                reason = error_details_pb2.ErrorInfo.FromString(detail.value).reason
                error.reason = reason.lower() or error.reason
            elif isinstance(error, InvalidRequestError) and detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
                field = violations[0].field if violations else None
                error.field = field and _ARGUMENT_OF_FIELD.get(field, field)
            elif isinstance(error, OverloadedError) and detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                error.retry_after_s = max(0.0, delay.seconds + delay.nanos / 1e9)
    except DecodeError:
        # Unreadable details must not hide the error itself.
        return
