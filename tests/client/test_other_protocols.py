"""Servers that speak HTTP/2 without gRPC's rules, something else, or another version: a typed error, or an answer."""

import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hpack import Encoder
from tests.client.servers import (
    WAIT_S,
    Gate,
    Twin,
    answer,
    ask,
    both,
    fails_first,
    gate,
    honest,
    read_until_the_end,
    serving,
    serving_status,
)
from tests.wire import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    frame,
    message,
)

from ganserve import (
    AsyncClient,
    AuthenticationError,
    GanserveError,
    InvalidRequestError,
    MessageTooLargeError,
    OverloadedError,
    ServerError,
    UnavailableError,
    _retries,
)
from ganserve.v1 import generation_pb2 as pb

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# HTTP/2 without gRPC's rules, frame by frame.


def _frames(connection: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    stream = connection.makefile("rb")
    if stream.read(len(PREFACE)) != PREFACE:
        return
    connection.sendall(frame(SETTINGS, 0, 0))
    while len(head := stream.read(9)) == 9:
        kind, flags, number = head[3], head[4], int.from_bytes(head[5:], "big")
        payload = stream.read(int.from_bytes(head[:3], "big"))
        if kind == SETTINGS and not flags & ACK:
            connection.sendall(frame(SETTINGS, ACK, 0))
        yield kind, flags, number, payload


def _answering(connection: socket.socket, *parts: tuple[int, int, bytes]) -> None:
    """Answer each call with these frames: kind, flags and payload."""
    for kind, _, number, _ in _frames(connection):
        if kind == HEADERS:
            for answered, flags, payload in parts:
                stream = 0 if answered == GOAWAY else number
                connection.sendall(frame(answered, flags, stream, payload))


def _fields(*fields: tuple[str, str]) -> bytes:
    encoded: bytes = Encoder().encode(fields)
    return encoded


OK_HEADERS = (HEADERS, END_HEADERS, _fields((":status", "200"), ("content-type", "application/grpc")))


def _number(code: int) -> bytes:
    return code.to_bytes(4, "big")


def _http(status: str) -> tuple[int, int, bytes]:
    return HEADERS, END_HEADERS | END_STREAM, _fields((":status", status), ("content-type", "text/html"))


@both
@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([_http("503")], UnavailableError),
        ([_http("401")], AuthenticationError),
        ([_http("403")], AuthenticationError),
        ([_http("404")], ServerError),
        ([_http("200")], ServerError),
        ([(RST_STREAM, 0, _number(2))], ServerError),
        ([(RST_STREAM, 0, _number(11))], OverloadedError),
        ([OK_HEADERS, (DATA, END_STREAM, message(b""))], ServerError),
        (
            [
                OK_HEADERS,
                (DATA, 0, message(b"\xff\xff\xff")),
                (HEADERS, END_HEADERS | END_STREAM, _fields(("grpc-status", "0"))),
            ],
            ServerError,
        ),
        ([OK_HEADERS, (DATA, 0, b"\x00\x7f\xff\xff\xff")], MessageTooLargeError),
        ([OK_HEADERS, (HEADERS, END_HEADERS | END_STREAM, _fields(("grpc-status", "99")))], ServerError),
        ([(GOAWAY, 0, _number(0) + _number(0))], UnavailableError),
        ([(GOAWAY, 0, _number(0) + _number(11) + b"too_many_pings")], UnavailableError),
    ],
)
def test_what_is_no_answer_of_grpc_is_a_typed_error(
    twin: Twin, parts: list[tuple[int, int, bytes]], kind: type[GanserveError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retries, "_PATIENCE_BEFORE_FIRST_ANSWER_S", 0.5)
    with gate(lambda _, number, connection: _answering(connection, *parts)) as door:
        for method, options in (
            ("models", {}),
            ("stream", {"model": "any", "count": 2}),
            ("generate_each", {"model": "any", "seeds": [7, 3]}),
        ):
            with pytest.raises(kind) as caught:
                ask(twin, door.address, method, timeout_s=WAIT_S, **options)
            assert caught.value.reason
            assert caught.value.__cause__ is None


def test_the_status_of_a_stream_that_ends_during_a_write_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without FirstStatus, a fifth of these asyncio calls end with "the call ended while requests were being sent"."""
    monkeypatch.setattr(_retries, "_PATIENCE_BEFORE_FIRST_ANSWER_S", 0.0)
    refused = (RST_STREAM, 0, _number(11))
    with gate(lambda _, number, connection: _answering(connection, refused)) as door:
        for _ in range(30):
            with pytest.raises(OverloadedError):
                ask(AsyncClient, door.address, "generate_each", model="any", seeds=[7, 3], timeout_s=WAIT_S)


@both
@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", bytes(64)])
def test_what_is_no_http2_is_unavailable(twin: Twin, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retries, "_PATIENCE_BEFORE_FIRST_ANSWER_S", 0.5)

    def handle(_: Gate, number: int, connection: socket.socket) -> None:
        connection.sendall(said)
        read_until_the_end(connection)

    with gate(handle) as door, pytest.raises(UnavailableError, match=f"{door.address} answers, but not as gRPC"):
        ask(twin, door.address, "models", timeout_s=WAIT_S)


@both
@pytest.mark.parametrize("code", [0, 2, 11])
def test_a_connection_that_goes_away_costs_no_call(twin: Twin, code: int) -> None:
    with serving(honest) as (address, servicer):

        def handle(door: Gate, number: int, connection: socket.socket) -> None:
            if number < 2:
                _answering(connection, (GOAWAY, 0, _number(0) + _number(code)))
            else:
                door.pass_on(connection, address)

        with gate(handle) as door:
            assert ask(twin, door.address, "generate", "any", seed=5).seeds == (5,)
            assert len(servicer.requests) == 1


# Other versions of the protocol.


@both
def test_a_server_of_a_later_version_is_understood(twin: Twin) -> None:
    later = b"\xa2\x7d\x05hello" + b"\xa8\x7d\x63"  # fields 2004 and 2005

    def behave(number: int, request: Any, context: Any) -> Any:
        if isinstance(request, pb.ListModelsRequest):
            model = pb.Model(name="any", version=1, card=pb.ModelCard(latent_dim=7))
            model.card.MergeFromString(later)
            return pb.ListModelsResponse.FromString(pb.ListModelsResponse(models=[model]).SerializeToString() + later)
        if hasattr(request, "service"):
            return serving_status(99)
        return pb.GenerateImagesResponse.FromString(answer(request).SerializeToString() + later)

    with serving(behave) as (address, _):
        assert ask(twin, address, "generate", "any", seed=5).seeds == (5,)
        assert [model.latent_dim for model in ask(twin, address, "models")] == [7]
        assert ask(twin, address, "health") is False


@both
def test_a_server_of_an_earlier_version_is_understood(twin: Twin) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        if isinstance(request, pb.GetModelRequest):
            return pb.GetModelResponse(model=pb.Model(name="any", version=1))
        return pb.GenerateImagesResponse(count=1, height=1, width=1, channels=1, pixels=b"\x07")

    with serving(behave) as (address, _):
        batch = ask(twin, address, "generate", "any")
        assert (batch.seeds, batch.pixels.item(), batch.digest) == (None, 7, "")
        assert not ask(twin, address, "model", "any").conditional
        with pytest.raises(InvalidRequestError, match="latent_dim"):
            ask(twin, address, "interpolate", "any", 1, 2)


@both
def test_another_service_is_named_as_that(twin: Twin) -> None:
    with serving(fails_first(grpc.StatusCode.UNIMPLEMENTED)) as (address, _):
        with pytest.raises(ServerError, match=r"ganserve\.v1") as caught:
            ask(twin, address, "models")
        assert caught.value.reason == "unimplemented"
