"""The errors of requests. Each class has one gRPC status, with which the call ends."""

import functools

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "ganserve"
# The text repeats values that the caller sent. Trailers contain the text three times, percent-encoded and in base64,
# which takes up to six bytes for one. gRPC allows 8 KiB of trailers; with more, the caller would get another error.
_MAX_TEXT_BYTES = 1000


class ServingError(Exception):
    """The base class. The caller gets the text: what was wrong, the limit, and what to do."""

    code: grpc.StatusCode
    reason: str  # short and stable, for metrics and for programs
    field: str | None = None  # the wrong field of the request
    retry_after_s: float | None = None

    def __init__(self, text: str) -> None:
        super().__init__(shortened(text, _MAX_TEXT_BYTES))


def shortened(text: str, most_bytes: int) -> str:
    """Return a text, cut off after `most_bytes` bytes of UTF-8."""
    encoded = text.encode(errors="replace")
    return text if len(encoded) <= most_bytes else encoded[:most_bytes].decode(errors="ignore") + "…"


class InvalidRequest(ServingError):  # noqa: N818
    """A field of the request is wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "invalid"

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


class MalformedMessage(ServingError):  # noqa: N818
    """The bytes are not a message of the method."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "malformed"


class MessageTooLarge(ServingError):  # noqa: N818
    """The request has more bytes than the server takes."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "too_large"


class ModelNotFound(ServingError):  # noqa: N818
    """There is no such model, or no such version of it."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "not_found"


class PermissionDenied(ServingError):  # noqa: N818
    """The caller lacks the role that the call needs, or the address does not allow the call."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "permission_denied"


class Unauthenticated(ServingError):  # noqa: N818
    """The call has no valid token."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "unauthenticated"


class ModelNotLoaded(ServingError):  # noqa: N818
    """None of a model's versions can be served, or the version is out of service."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "not_loaded"


class QueueFull(ServingError):  # noqa: N818
    """Too many images already wait for the model."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "queue_full"

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text)
        self.retry_after_s = max(0.001, float(f"{retry_after_s:.2g}"))


class RateLimited(QueueFull):
    """The caller requests more images per second than its rate allows."""

    reason = "rate_limited"


class Unavailable(ServingError):  # noqa: N818
    """The server is shutting down."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "draining"


class DeadlineTooShort(QueueFull):
    """Because of the waiting images, these would be made only after the caller's deadline."""

    reason = "deadline_too_short"


class DeadlineExceeded(ServingError):  # noqa: N818
    """The caller's deadline passed while the images waited, or is too short even without waiting."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "deadline"


class EngineFailed(ServingError):  # noqa: N818
    """The engine raised an exception. The log has the cause; the caller does not get it."""

    code = grpc.StatusCode.INTERNAL
    reason = "engine"


class BatchTimedOut(EngineFailed):
    """A batch of the version took longer than a batch may: the version is taken out of service with all its calls."""

    reason = "batch_timeout"


def status_details(error: ServingError) -> bytes:
    """Serialise the error as a google.rpc.Status, for the trailer `grpc-status-details-bin`.

    It has an ErrorInfo with the reason and, if the error has them, the wrong field and the time until a retry.
    """
    return _status(error.code, str(error), error.reason, error.field, error.retry_after_s)


@functools.lru_cache(256)  # under overload the same status is needed thousands of times a second
def _status(code: grpc.StatusCode, text: str, reason: str, field: str | None, retry_after_s: float | None) -> bytes:
    details: list[Message] = []
    if field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    details.append(error_details_pb2.ErrorInfo(reason=reason.upper(), domain=DOMAIN))
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in details:
        status.details.add().Pack(detail)
    serialized: bytes = status.SerializeToString()
    return serialized
