"""What can be wrong with a request: each class is one gRPC status. The call answers with it."""

from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

_MAX_TEXT = 400  # characters


class ServingError(Exception):
    """The root. The text goes to the caller: what was wrong, the limit, and what to do."""

    code: grpc.StatusCode
    reason: str  # short and stable, for metrics

    def __init__(self, text: str) -> None:
        # The text repeats what the caller sent, and travels three times in trailers, of which gRPC allows 8 KiB: a
        # longer one would reach the caller as another error.
        super().__init__(text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…")

    def details(self) -> Sequence[any_pb2.Any]:
        """Return the google.rpc details that go with the status."""
        return ()


class InvalidRequest(ServingError):  # noqa: N818
    """A field of the request is wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "invalid"

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field

    def details(self) -> Sequence[any_pb2.Any]:
        """Name the field."""
        violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=str(self))
        return (_packed(error_details_pb2.BadRequest(field_violations=[violation])),)


class MalformedMessage(ServingError):  # noqa: N818
    """The bytes are no message of the method."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "malformed"


class MessageTooLarge(ServingError):  # noqa: N818
    """The request has more bytes than the server takes."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "too_large"


class ModelNotFound(ServingError):  # noqa: N818
    """No such model, or no such version of it."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "not_found"


class PermissionDenied(ServingError):  # noqa: N818
    """The caller may not do this here."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "permission_denied"


class ModelNotLoaded(ServingError):  # noqa: N818
    """None of a model's versions can be served."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "not_loaded"


class QueueFull(ServingError):  # noqa: N818
    """More images are waiting than the server will hold."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "queue_full"

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s

    def details(self) -> Sequence[any_pb2.Any]:
        """Say when to try again."""
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(self.retry_after_s * 1000)))
        return (_packed(error_details_pb2.RetryInfo(retry_delay=delay)),)


class Unavailable(ServingError):  # noqa: N818
    """The server is shutting down."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "draining"


class DeadlineTooShort(QueueFull):
    """The images would be made only after the caller's deadline."""

    reason = "deadline_too_short"


class DeadlineExceeded(ServingError):  # noqa: N818
    """The caller's deadline passed while the images were waiting."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "deadline"


class EngineFailed(ServingError):  # noqa: N818
    """The engine raised; the log has the cause, the caller has not."""

    code = grpc.StatusCode.INTERNAL
    reason = "engine"


def status_details(error: ServingError) -> bytes:
    """Serialise the error as a google.rpc.Status, for the trailer `grpc-status-details-bin`."""
    status = status_pb2.Status(code=error.code.value[0], message=str(error), details=error.details())
    serialized: bytes = status.SerializeToString()
    return serialized


def _packed(message: error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
