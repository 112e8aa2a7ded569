"""The SDK's exceptions. grpc.RpcError never leaves the SDK.

GanserveError
├── InvalidRequestError      an argument is wrong; `field` names it
│   └── MessageTooLargeError     the request, or its answer, has more bytes than the other side takes
├── ModelNotFoundError       no such model or version
├── AuthenticationError      the token is wrong, missing, or not allowed to do this; or a certificate is not trusted
├── OverloadedError          the server has too much to do; safe to retry after `retry_after_s`
├── UnavailableError         no server answers, or it is starting or draining; safe to retry
├── DeadlineExceededError    the timeout passed
├── RequestCancelledError    the call was cancelled, or the client closed
├── NoProvenanceError        a file does not say how its image was made
└── ServerError              the server failed, or breaks the protocol; report it with `request_id`

Each error has a text that says what to do; `code`, the gRPC status, which is None if no call was made; `reason`, a
short and stable word for programs; and `request_id`, which identifies the call in the server's log. `request_id` is
None if no server answered. The exception is a stream that timed out: the client sends an id with each stream.
"""

from collections.abc import Mapping

import grpc

# The names of settings in advice: arguments of `Client`, or flags of the program `ganserve`.
_ARGUMENTS = {
    "address": "Client(address)",
    "tls": "tls=True",
    "no_tls": "tls=False",
    "ca_file": "ca_file",
    "certificate": "certificate_file and key_file",
    "token": "Client(token=…)",
    "timeout": "timeout_s",
}
FLAGS = {
    "address": "--address",
    "tls": "--tls",
    "no_tls": "--no-tls",
    "ca_file": "--ca-file",
    "certificate": "GANSERVE_CERTIFICATE_FILE and GANSERVE_KEY_FILE",
    "token": "--token",
    "timeout": "--timeout",
}


class GanserveError(Exception):
    """The base class of all errors of the SDK.

    >>> try:
    ...     client.generate("no-such-model")
    ... except GanserveError as error:
    ...     print(error.reason, error.request_id, error)
    not_found ... there is no model 'no-such-model'; there are ...
    """

    reason = "error"

    def __init__(
        self,
        text: str,
        *,
        advice: str = "",
        code: grpc.StatusCode | None = None,
        reason: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(text)
        self.advice = advice  # what to do, with {names} of settings
        self.code = code
        self.reason = reason or type(self).reason
        self.request_id = request_id

    @property
    def text(self) -> str:
        """What is wrong, without the advice on what to do."""
        return str(self.args[0])

    def __str__(self) -> str:
        return self.with_names(_ARGUMENTS)

    def with_names(self, names: Mapping[str, str]) -> str:
        """Return what is wrong and what to do, with `names` for the settings."""
        return f"{self.text}; {self.advice.format_map(names)}" if self.advice else self.text

    def add_text(self, more: str) -> None:
        """Append to the text of what is wrong, before the advice."""
        self.args = (self.text + more,)


class InvalidRequestError(GanserveError, ValueError):
    """An argument is wrong: the text says which, the limit, and what to do; `field` is its name.

    It is also a ValueError.
    """

    reason = "invalid"
    field: str | None = None


class MessageTooLargeError(InvalidRequestError):
    """A request or an answer has `size_bytes`, more than the receiver's `limit_bytes`; both are None if unknown."""

    reason = "too_large"
    size_bytes: int | None = None
    limit_bytes: int | None = None


class ModelNotFoundError(GanserveError):
    """The server has no such model or version; the text says which ones it has."""

    reason = "not_found"


class AuthenticationError(GanserveError):
    """The token is missing or wrong, or its role does not allow this; or one side's certificate is not trusted."""

    reason = "unauthenticated"


class OverloadedError(GanserveError):
    """The server's queue is full. Safe to retry, after `retry_after_s` if that is known."""

    reason = "overloaded"
    retry_after_s: float | None = None


class UnavailableError(GanserveError):
    """The server cannot be reached, is starting, or is draining. Safe to retry."""

    reason = "unavailable"


class DeadlineExceededError(GanserveError):
    """The answer did not arrive within the timeout."""

    reason = "deadline"


class RequestCancelledError(GanserveError):
    """The call was cancelled before its answer arrived."""

    reason = "cancelled"


class NoProvenanceError(GanserveError):
    """The file is not an image, or does not say how it was made; the text says what the SDK looked for."""

    reason = "no_provenance"


class ServerError(GanserveError):
    """The server failed, or speaks another protocol."""

    reason = "server"
