"""Waiting for a server: what is logged meanwhile, until it is ready, and what was wrong in the end."""

import itertools
from typing import Any

import grpc
import pytest
from tests.client.servers import (
    WAIT_S,
    Twin,
    abort_overloaded,
    answer,
    ask,
    both,
    chunks,
    fails_first,
    serving,
    serving_status,
)
from tests.conftest import RunningServer

from ganserve import (
    AuthenticationError,
    DeadlineExceededError,
    ModelNotFoundError,
    _retries,
    _wait_log,
)
from ganserve.v1 import generation_pb2 as pb

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def waits(caplog: pytest.LogCaptureFixture) -> list[tuple[str, bool]]:
    """Return what was logged, and whether it is a wait or its end."""
    return [
        (record.getMessage(), record.waiting_s is not None) for record in caplog.records if record.name == "ganserve"
    ]


@both
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_what_is_waited_for_is_logged_and_so_is_its_end(
    twin: Twin, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        if number == 0:
            abort_overloaded(context, 0.1)
        return chunks(request) if method == "stream" else answer(request)

    with serving(behave) as (address, _), caplog.at_level("INFO", "ganserve"):
        ask(twin, address, method, "any", count=2, timeout_s=20)
        (text, waiting), (end, still) = waits(caplog)
        assert (text.startswith("the queue is full; trying again for up to "), waiting) == (True, True)
        assert (end[:14], still) == ("answered after", False)
        caplog.clear()
        ask(twin, address, method, "any", count=2)
        assert waits(caplog) == []


@both
def test_waiting_until_ready_is_logged(twin: Twin, caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda number, request, context: serving_status(1 + (number == 0))) as (address, _):
        with caplog.at_level("INFO", "ganserve"):
            ask(twin, address, "wait_until_ready", WAIT_S, model="any")
        (text, waiting), (_, still) = waits(caplog)
    assert "model any is not ready: the server answers that it is not serving; asking again for up to" in text
    assert (waiting, still) == (True, False)


@both
def test_a_long_wait_is_told_ever_more_seldom_and_each_try_in_debug(
    twin: Twin, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_wait_log, "_LOG_AGAIN_S", 0.2)
    monkeypatch.setattr(_retries, "_LONGEST_DELAY_S", 0.02)

    def behave(number: int, request: Any, context: Any) -> Any:
        if number % 2:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"what was wrong, {number} times")
        return serving_status(2)

    with serving(behave) as (address, servicer):
        with caplog.at_level("DEBUG", "ganserve"), pytest.raises(DeadlineExceededError):
            ask(twin, address, "wait_until_ready", 2, model="any")
        tries = [record for record in caplog.records if hasattr(record, "waiting_s")]
        told = [record.waiting_s for record in tries if record.levelname == "INFO"]
    assert len(tries) == len(servicer.requests) - 1 > 20
    assert 2 + 2 <= len(told) <= 2 + 4  # each reason once; then after 0.2 s, 0.4, 0.8 and 1.6
    assert all(later >= 2 * sooner for sooner, later in itertools.pairwise(told[2:]))


@both
def test_a_wrong_token_is_an_error_that_does_not_repeat_it(twin: Twin) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        if dict(context.invocation_metadata()).get("authorization") != "Bearer right":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is wrong")
        return answer(request)

    with serving(behave) as (address, servicer):
        assert ask(twin, address, "generate", "any", seed=1, options={"token": "right"}).seeds == (1,)
        for token in ("wrong-one", None):
            with pytest.raises(AuthenticationError, match="GANSERVE_TOKEN") as caught:
                ask(twin, address, "generate", "any", options={"token": token})
            assert "wrong-one" not in str(caught.value)
        assert len(servicer.requests) == 3


@both
def test_waiting_until_ready_ends_when_it_is(twin: Twin) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        if number == 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        if number == 1:
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        if number == 2:
            return pb.ListModelsResponse()
        return serving_status(2 if number == 3 else 1)

    with serving(behave) as (address, servicer):
        ask(twin, address, "wait_until_ready", WAIT_S, model="any")
    names = [getattr(request, "service", "which there are") for request in servicer.requests]
    assert names == ["any", "any", "which there are", "any", "any"]


@both
def test_who_waits_for_a_model_of_another_name_is_told_so_meanwhile(
    twin: Twin, server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    meant = "it has cdcgan-fashion-mnist, cdcgan-mnist, dcgan-mnist, mlp-mnist; did you mean 'mlp-mnist'?"
    with caplog.at_level("INFO", "ganserve"), pytest.raises(DeadlineExceededError) as caught:
        ask(twin, server.address, "wait_until_ready", 2.5, model="mpl-mnist")
    assert meant in waits(caplog)[0][0]
    assert str(caught.value).endswith(meant)


@both
@pytest.mark.parametrize(
    ("behave", "why"),
    [
        (lambda number, request, context: serving_status(2), "not serving"),
        (fails_first(grpc.StatusCode.NOT_FOUND, 10**6), "what was wrong"),
    ],
)
def test_waiting_until_ready_says_what_was_wrong_in_the_end(twin: Twin, behave: Any, why: str) -> None:
    with serving(behave) as (address, _), pytest.raises(DeadlineExceededError, match=f"model any.*{why}"):
        ask(twin, address, "wait_until_ready", 0.5, model="any")


@both
def test_waiting_until_ready_ends_at_once_where_waiting_cannot_help(twin: Twin) -> None:
    with serving(fails_first(grpc.StatusCode.UNAUTHENTICATED)) as (address, _), pytest.raises(AuthenticationError):
        ask(twin, address, "wait_until_ready", WAIT_S)


@both
def test_the_health_of_an_unknown_model_is_an_error(twin: Twin) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        if number == 0:
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return pb.ListModelsResponse(models=[pb.Model(name="many")])

    with serving(behave) as (address, servicer), pytest.raises(ModelNotFoundError, match="did you mean 'many'"):
        ask(twin, address, "health", "any")
    assert len(servicer.requests) == 2
