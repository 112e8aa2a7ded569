import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

import ganserve
from ganserve import GanserveError, InvalidRequestError, OverloadedError, UnavailableError, errors


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, *trailer: tuple[str, str | bytes]) -> None:
        self._code, self._trailer = code, trailer

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "what was wrong"

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._trailer


def details(message: error_details_pb2.RetryInfo | error_details_pb2.ErrorInfo) -> tuple[str, bytes]:
    packed = any_pb2.Any()
    packed.Pack(message)
    return "grpc-status-details-bin", status_pb2.Status(details=[packed]).SerializeToString()


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_an_exception(code: grpc.StatusCode) -> None:
    error = errors.translate(FakeRpcError(code, ("x-request-id", "id-1")), "here:1")
    assert isinstance(error, GanserveError)
    assert type(error) is not GanserveError
    assert (error.code, error.request_id) == (code, "id-1")
    assert "what was wrong" in str(error)
    assert error.reason


def test_the_server_may_name_the_reason() -> None:
    info = error_details_pb2.ErrorInfo(reason="queue_full")
    error = errors.translate(FakeRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, details(info)), "here:1")
    assert error.reason == "queue_full"
    assert errors.translate(FakeRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED), "here:1").reason == "overloaded"


def test_an_error_of_the_server_asks_to_be_reported_with_its_id() -> None:
    error = errors.translate(FakeRpcError(grpc.StatusCode.INTERNAL, ("x-request-id", "id-1")), "here:1")
    assert "id-1" in str(error)


def test_an_overloaded_server_says_when_to_come_back() -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=250_000_000))
    error = errors.translate(FakeRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, details(retry)), "here:1")
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == pytest.approx(0.25)


def test_unreadable_details_do_not_hide_the_error() -> None:
    broken = ("grpc-status-details-bin", b"\xff\xff\xff")
    error = errors.translate(FakeRpcError(grpc.StatusCode.INVALID_ARGUMENT, broken), "here:1")
    assert isinstance(error, InvalidRequestError)
    assert error.field is None


def test_an_unreachable_server_is_named_with_what_to_do() -> None:
    error = errors.translate(FakeRpcError(grpc.StatusCode.UNAVAILABLE), "here:1")
    assert isinstance(error, UnavailableError)
    assert "here:1" in str(error)
    assert "GANSERVE_ADDRESS" in str(error)


def test_the_docstring_draws_every_exception() -> None:
    assert errors.__doc__ is not None
    tree = {line.strip("├│└─ ").split(" ")[0] for line in errors.__doc__.splitlines() if "Error" in line}
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GanserveError)}
    assert len(defined) >= len(set(errors.ERROR_OF_STATUS.values()))
    assert {kind.__name__ for kind in defined} <= tree
    assert {kind.__name__ for kind in defined} <= set(ganserve.__all__)
