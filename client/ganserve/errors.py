"""What can go wrong, as exceptions. grpc.RpcError never leaves the SDK.

GanserveError
├── InvalidRequestError      an argument is wrong; `field` names it
├── ModelNotFoundError       no such model or version
├── AuthenticationError      the token is wrong, missing, or not allowed to do this
├── OverloadedError          the server's queue is full; safe to retry after `retry_after_s`
├── UnavailableError         nobody answers, or the server is starting or draining; safe to retry
├── DeadlineExceededError    the timeout passed
├── RequestCancelledError    the call was cancelled
├── NoProvenanceError        a file does not say how its image was made
└── ServerError              the server failed; report it with `request_id`
"""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

REQUEST_ID_KEY = "x-request-id"
_DETAILS_KEY = "grpc-status-details-bin"


class GanserveError(Exception):
    """The root of all errors of the SDK."""

    def __init__(self, text: str, *, code: grpc.StatusCode | None = None, request_id: str | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.request_id = request_id


class InvalidRequestError(GanserveError):
    """An argument is wrong: the text says which, the limit, and what to do."""

    field: str | None = None


class ModelNotFoundError(GanserveError):
    """The server has no such model or version; the text says which it has."""


class AuthenticationError(GanserveError):
    """The token is missing or wrong, or its role does not allow this."""


class OverloadedError(GanserveError):
    """The server has more to do than it will queue. Safe to retry."""

    retry_after_s: float | None = None


class UnavailableError(GanserveError):
    """The server cannot be reached, is starting, or is draining. Safe to retry."""


class DeadlineExceededError(GanserveError):
    """The answer did not come within the timeout."""


class RequestCancelledError(GanserveError):
    """The call was cancelled before its answer came."""


class NoProvenanceError(GanserveError):
    """The file is no image, or does not say how it was made; the text says what was looked for."""


class ServerError(GanserveError):
    """The server failed, or speaks another protocol."""


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


def translate(error: Any, address: str, *, closed: bool = False) -> GanserveError:
    """Turn a grpc.RpcError (of either kind of stub) into the SDK's exception for its status.

    Args:
        error: the error.
        address: of the server.
        closed: whether the client was closed meanwhile.
    """
    code: grpc.StatusCode = error.code()
    trailer: Sequence[tuple[str, str | bytes]] = tuple(error.trailing_metadata() or ())
    metadata = dict(trailer)
    text = error.details() or code.name
    answered = REQUEST_ID_KEY in metadata
    if code is grpc.StatusCode.CANCELLED and not (answered or closed):
        # Not by us: a server that was shutting down dropped the call before it began.
        code = grpc.StatusCode.UNAVAILABLE
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        code = grpc.StatusCode.INVALID_ARGUMENT
        text = f"the request is larger than the server takes ({text}); send fewer latents a call"
    if code is grpc.StatusCode.UNAVAILABLE and "Cancelling all calls" in text:
        text = f"the server at {address} shut down before the call was done; try again"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and not answered:
        text = f"no complete answer from {address} within the timeout ({text}); timeout_s or --timeout allows more"
    elif code is grpc.StatusCode.UNAVAILABLE and not answered:
        text = (
            f"no answer from {address} ({text}); is ganserve-server running there? "
            "The address is Client(address), --address or GANSERVE_ADDRESS"
        )
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        text = f"the server at {address} does not answer ganserve.v1 ({text})"
    request_id = metadata.get(REQUEST_ID_KEY)
    translated = ERROR_OF_STATUS[code](text, code=code, request_id=request_id if isinstance(request_id, str) else None)
    _read_details(translated, metadata.get(_DETAILS_KEY))
    return translated


def _read_details(error: GanserveError, content: str | bytes | None) -> None:
    if not isinstance(content, bytes):
        return
    try:
        details = status_pb2.Status.FromString(content).details
        for detail in details:
            if isinstance(error, InvalidRequestError) and detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
                error.field = violations[0].field if violations else None
            elif isinstance(error, OverloadedError) and detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                error.retry_after_s = delay.ToNanoseconds() / 1e9
    except DecodeError:
        # Details that cannot be read must not hide the error itself.
        return
