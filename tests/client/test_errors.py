import pickle
import re
import string
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from tests.client.servers import serving

import ganserve
from ganserve import GanserveError, InvalidRequestError, OverloadedError, UnavailableError, _statuses, errors
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

End = Callable[..., grpc.RpcError]


@pytest.fixture(scope="module")
def end() -> Iterator[End]:
    """Give the error of a call that a server ends with this status, text and trailing metadata."""
    ends: list[tuple[grpc.StatusCode, tuple[tuple[str, str | bytes], ...], str]] = []

    def behave(number: int, request: Any, context: Any) -> None:
        code, trailer, said = ends[number]
        context.set_trailing_metadata(trailer)
        context.abort(code, said)

    with serving(behave) as (address, _), grpc.insecure_channel(address) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateImages

        def ended(
            code: grpc.StatusCode, *trailer: tuple[str, str | bytes], said: str = "what was wrong"
        ) -> grpc.RpcError:
            ends.append((code, trailer, said))
            with pytest.raises(grpc.RpcError) as caught:
                call(pb.GenerateImagesRequest())
            return caught.value

        yield ended


def details(message: error_details_pb2.RetryInfo | error_details_pb2.ErrorInfo) -> tuple[str, bytes]:
    packed = any_pb2.Any()
    packed.Pack(message)
    return "grpc-status-details-bin", status_pb2.Status(details=[packed]).SerializeToString()


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_an_exception(end: End, code: grpc.StatusCode) -> None:
    error = _statuses.translate(end(code, ("x-request-id", "id-1")), "here:1")
    assert isinstance(error, GanserveError)
    assert type(error) is not GanserveError
    assert (error.code, error.request_id) == (code, "id-1")
    assert "what was wrong" in str(error)
    assert error.reason


def test_the_server_may_name_the_reason(end: End) -> None:
    info = error_details_pb2.ErrorInfo(reason="queue_full")
    error = _statuses.translate(end(grpc.StatusCode.RESOURCE_EXHAUSTED, details(info)), "here:1")
    assert error.reason == "queue_full"
    assert _statuses.translate(end(grpc.StatusCode.RESOURCE_EXHAUSTED), "here:1").reason == "overloaded"


def test_an_error_of_the_server_asks_to_be_reported_with_its_id(end: End) -> None:
    error = _statuses.translate(end(grpc.StatusCode.INTERNAL, ("x-request-id", "id-1")), "here:1")
    assert "id-1" in str(error)


def test_an_overloaded_server_says_when_to_come_back(end: End) -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=250_000_000))
    error = _statuses.translate(end(grpc.StatusCode.RESOURCE_EXHAUSTED, details(retry)), "here:1")
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == pytest.approx(0.25)


def test_unreadable_details_do_not_hide_the_error(end: End) -> None:
    broken = ("grpc-status-details-bin", b"\xff\xff\xff")
    error = _statuses.translate(end(grpc.StatusCode.INVALID_ARGUMENT, broken), "here:1")
    assert isinstance(error, InvalidRequestError)
    assert error.field is None


def test_an_unreachable_server_is_named_with_what_to_do(end: End) -> None:
    error = _statuses.translate(end(grpc.StatusCode.UNAVAILABLE), "here:1")
    assert isinstance(error, UnavailableError)
    assert "here:1" in str(error)
    assert "GANSERVE_ADDRESS" in str(error)


def test_the_docstring_draws_every_exception() -> None:
    assert errors.__doc__ is not None
    tree = {line.strip("├│└─ ").split(" ")[0] for line in errors.__doc__.splitlines() if "Error" in line}
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GanserveError)}
    assert len(defined) >= len(set(_statuses.ERROR_OF_STATUS.values()))
    assert {kind.__name__ for kind in defined} <= tree
    assert {kind.__name__ for kind in defined} <= set(ganserve.__all__)


SETTINGS = "Failed parsing HTTP/2 (Expected SETTINGS frame as the first frame"
BACKENDS = "connections to all backends failing; last error: "
SSL = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            f"{BACKENDS}UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: Connection refused",
            "connection refused",
        ),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv6:%5B::1%5D:1: Failed to connect to remote "
            "host: connect: Connection refused (111)",
            "connection refused",
        ),
        (f"{BACKENDS}UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed", "socket closed"),
        (
            f"{BACKENDS}FAILED_PRECONDITION: unix:/run/no.sock: connect failed: addr: unix:/run/no.sock error: No such "
            "file or directory",
            "no such file or directory",
        ),
        (
            "errors resolving a.invalid:1: [field:hostname lookup error:address lookup failed for a.invalid:1: Domain "
            "name not found]",
            "domain name not found",
        ),
        (
            "DNS resolution failed for a.invalid:1: C-ares status is not ARES_SUCCESS qtype=A name=a.invalid "
            "is_balancer=0: Domain name not found",
            "domain name not found",
        ),
        (
            f"{BACKENDS}UNKNOWN: ipv4:127.0.0.1:1: {SSL}CERTIFICATE_VERIFY_FAILED: unable to get local issuer "
            "certificate: OK",
            "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
        ),
        (
            f"{BACKENDS}UNKNOWN: ipv4:127.0.0.1:1: Custom verification check failed with error: UNAUTHENTICATED: "
            "Hostname Verification Check failed.",
            "hostname Verification Check failed",
        ),
        ("Received http2 header with status: 503", "HTTP status 503"),
        ("Stream removed (GOAWAY received; Error code: 0; Debug Text: )", "GOAWAY received; Error code: 0"),
        (
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))",
            "received RST_STREAM with error code 2",
        ),
        ("", ""),
        (".", ""),
    ],
)
def test_what_grpc_says_of_a_connection_is_cut_down_to_what_happened(said: str, words: str) -> None:
    assert _statuses.in_words(said) == words


def test_a_text_of_the_server_is_left_as_it_is(end: End) -> None:
    said = "Stream removed (as you asked)."
    error = _statuses.translate(end(grpc.StatusCode.INVALID_ARGUMENT, ("x-request-id", "id-1"), said=said), "here:1")
    assert str(error) == said


TROUBLES = [
    (grpc.StatusCode.UNAVAILABLE, "Connection refused", "Client(address)", "--address"),
    (grpc.StatusCode.UNAVAILABLE, "Socket closed", "tls=True", "--tls"),
    (grpc.StatusCode.UNAVAILABLE, f"{SETTINGS}, got frame type 79)", "Client(address)", "--address"),
    (grpc.StatusCode.UNAVAILABLE, f"{SSL}WRONG_VERSION_NUMBER: OK", "tls=False", "--no-tls"),
    (grpc.StatusCode.UNAVAILABLE, f"{SSL}CERTIFICATE_VERIFY_FAILED: OK", "ca_file", "--ca-file"),
    (grpc.StatusCode.UNAUTHENTICATED, "who are you?", "Client(token=…)", "--token"),
    (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "timeout_s", "--timeout"),
]


@pytest.mark.parametrize(("code", "said", "argument", "flag"), TROUBLES)
def test_advice_names_arguments_or_the_programs_flags(
    end: End, code: grpc.StatusCode, said: str, argument: str, flag: str
) -> None:
    error = _statuses.translate(end(code, said=said), "here:1")
    assert argument in str(error)
    assert flag not in str(error)
    assert flag in error.with_names(errors.FLAGS)
    assert argument not in error.with_names(errors.FLAGS)
    for text in (str(error), error.with_names(errors.FLAGS)):
        assert not re.search(r"\bOK\b|\.;|[{}]", text)


def test_advice_names_nothing_that_has_no_name(end: End) -> None:
    assert errors.FLAGS.keys() == errors._ARGUMENTS.keys()
    named = set()
    for code, said, _, _ in TROUBLES:
        advice = _statuses.translate(end(code, said=said), "here:1").advice
        named |= {name for _, name, _, _ in string.Formatter().parse(advice) if name}
    assert named == errors.FLAGS.keys()


def test_an_error_can_go_to_another_process(end: End) -> None:
    error = _statuses.translate(end(grpc.StatusCode.UNAUTHENTICATED, ("x-request-id", "id-1")), "here:1")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.code, again.reason) == (type(error), str(error), error.code, error.reason)
    assert again.with_names(errors.FLAGS) == error.with_names(errors.FLAGS)
