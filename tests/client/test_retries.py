"""Calls and streams that fail: made again within the deadline, resumed, or a typed error."""

import asyncio
import socket
import threading
import time
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from tests.client.servers import (
    CHUNK,
    DRAWN_SEED,
    WAIT_S,
    Gate,
    Twin,
    abort_overloaded,
    answer,
    ask,
    both,
    breaks_after,
    chunks,
    fails_first,
    gate,
    honest,
    honest_stream,
    read_until_the_end,
    serving,
)

from ganserve import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    GanserveError,
    MessageTooLargeError,
    OverloadedError,
    ServerError,
    UnavailableError,
    _endpoint,
    _readiness,
    _retries,
)
from ganserve.v1 import generation_pb2 as pb

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@both
def test_a_call_that_no_server_took_is_made_again(twin: Twin) -> None:
    with serving(fails_first(grpc.StatusCode.UNAVAILABLE, 2)) as (address, servicer):
        assert ask(twin, address, "generate", "any", seed=5).seeds == (5,)
        assert len(servicer.requests) == 3
        assert len({request.SerializeToString() for request in servicer.requests}) == 1


@both
@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code.name not in ("OK", "UNAVAILABLE", "CANCELLED")]
)
def test_what_may_not_help_is_not_made_again(twin: Twin, code: grpc.StatusCode) -> None:
    with serving(fails_first(code)) as (address, servicer):
        with pytest.raises(GanserveError) as caught:
            ask(twin, address, "generate", "any", seed=5)
        made = [request for request in servicer.requests if isinstance(request, pb.GenerateImagesRequest)]
        assert (caught.value.code, len(made)) == (code, 1)


@both
def test_retries_can_be_turned_off(twin: Twin) -> None:
    with serving(fails_first(grpc.StatusCode.UNAVAILABLE)) as (address, servicer):
        with pytest.raises(UnavailableError):
            ask(twin, address, "models", options={"retries": False})
        assert len(servicer.requests) == 1


@both
def test_an_overloaded_server_is_asked_again_when_it_says(twin: Twin) -> None:
    times = []

    def behave(number: int, request: Any, context: Any) -> Any:
        times.append(time.monotonic())
        if number == 0:
            abort_overloaded(context, 0.3)
        return answer(request)

    with serving(behave) as (address, _):
        assert ask(twin, address, "generate", "any", seed=5).seeds == (5,)
    assert times[1] - times[0] >= 0.3


@both
def test_no_retry_goes_past_the_deadline(twin: Twin) -> None:
    def behave(number: int, request: Any, context: Any) -> None:
        abort_overloaded(context, 10)

    with serving(behave) as (address, servicer):
        started = time.monotonic()
        with pytest.raises(OverloadedError) as caught:
            ask(twin, address, "generate", "any", timeout_s=5)
        assert time.monotonic() - started < 5
    assert (caught.value.retry_after_s, caught.value.request_id, len(servicer.requests)) == (10, "id-1", 1)


@both
def test_a_server_that_never_gets_better_is_given_up_within_the_deadline(twin: Twin) -> None:
    with serving(fails_first(grpc.StatusCode.UNAVAILABLE, 10**6)) as (address, servicer):
        started = time.monotonic()
        with pytest.raises(UnavailableError, match=r"tried \d+ times"):
            ask(twin, address, "generate", "any", timeout_s=0.8)
        assert time.monotonic() - started < 1.5
    assert len(servicer.requests) > 1


@both
@pytest.mark.parametrize(
    ("method", "arguments", "raised"),
    [
        ("wait_until_ready", (4.0,), DeadlineExceededError),
        ("wait_for_version", ("any", 2, 4.0), DeadlineExceededError),
        ("models", (), UnavailableError),
    ],
)
def test_what_nobody_answers_is_tried_until_just_before_the_deadline(
    twin: Twin, method: str, arguments: tuple[Any, ...], raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The back-off would not fit: what is tried again is tried at the end.
    for module in (_retries, _readiness):
        monkeypatch.setattr(module, "full_jitter_s", lambda failures: 0.0 if failures < 3 else 60.0)
        monkeypatch.setattr(module, "SHORTEST_TRY_S", 2.0)  # the last try has this long, on a busy machine too
    monkeypatch.setattr(_retries, "_PATIENCE_BEFORE_FIRST_ANSWER_S", 60.0)
    tried: list[float] = []

    def behave(number: int, request: Any, context: Any) -> None:
        tried.append(time.monotonic())
        context.abort(grpc.StatusCode.UNAVAILABLE, "starting")

    with serving(behave) as (address, _):
        started = time.monotonic()
        with pytest.raises(raised, match="starting"):
            ask(twin, address, method, *arguments, options={"timeout_s": 4.0})
        assert 1.8 < tried[-1] - started < 4
    assert len(tried) == 4


@both
def test_a_last_try_that_has_too_little_time_says_what_was_wrong_before(twin: Twin) -> None:
    over = threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        if number == 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        over.wait(WAIT_S)
        return answer(request)

    with serving(behave) as (address, _):
        with pytest.raises(DeadlineExceededError, match=r"tried 2 times; before that: .*starting"):
            ask(twin, address, "models", options={"timeout_s": 0.5})
        over.set()


@both
def test_a_client_without_a_budget_does_not_retry(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retries, "_BUDGET", 0.0)
    with serving(fails_first(grpc.StatusCode.UNAVAILABLE)) as (address, servicer):
        with pytest.raises(UnavailableError):
            ask(twin, address, "generate", "any")
        assert len(servicer.requests) == 1


@both
@pytest.mark.parametrize("seed", [None, 2**32 - 6])
@pytest.mark.parametrize("sent", [0, 2, 3, 4])
def test_a_stream_that_breaks_goes_on_with_the_next_image(twin: Twin, seed: int | None, sent: int) -> None:
    count = 3 * CHUNK + 2
    with serving(breaks_after(grpc.StatusCode.UNAVAILABLE, sent, 2)) as (address, servicer):
        images = ask(twin, address, "stream", "any", count=count, seed=seed, label=list(range(count)))
    first = DRAWN_SEED if seed is None else seed
    assert [image.seed for image in images] == [(first + index) % 2**32 for index in range(count)]
    assert [image.label for image in images] == list(range(count))
    if sent == 4:
        assert len(servicer.requests) == 1  # all came before it broke
        return
    second = servicer.requests[1]
    assert second.count == count - sent * CHUNK
    if sent:
        assert (second.version, second.seed) == (3, (first + sent * CHUNK) % 2**32)


def test_a_stream_of_own_latents_goes_on_with_the_next_latent() -> None:
    latents = np.arange(300, dtype=np.float32)[:, None].repeat(3, 1)
    with serving(breaks_after(grpc.StatusCode.UNAVAILABLE, 5)) as (address, servicer):
        batch = ask(Client, address, "generate", "any", latents=latents)
    assert batch.pixels.ravel().tolist() == [value % 256 for value in range(300)]
    assert servicer.requests[1].latents.values[:3] == [20, 20, 20]


@both
@pytest.mark.parametrize("seed", [None, 2**32 - 6])
def test_more_labels_than_a_call_brings_are_asked_for_in_several_calls_of_one_version(
    twin: Twin, seed: int | None
) -> None:
    count = 2500
    labels = [index % 1000 for index in range(count)]

    def behave(number: int, request: Any, context: Any) -> Any:
        for index, chunk in enumerate(chunks(request)):
            if number == 1 and index == 100:
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
            yield chunk

    with serving(behave) as (address, servicer):
        images = ask(twin, address, "stream", "any", count=count, seed=seed, label=labels)
    first = DRAWN_SEED if seed is None else seed
    assert [image.seed for image in images] == [(first + index) % 2**32 for index in range(count)]
    assert [image.label for image in images] == labels
    assert [request.count for request in servicer.requests] == [1024, 1024, 1024, 2500 - 1024 - 100 * CHUNK - 1024]
    assert [request.version for request in servicer.requests] == [0, 3, 3, 3]


@both
@pytest.mark.parametrize("change", [{"version": 9}, {"digest": "sha256:2"}, {"seeds": [1, 2, 3, 4]}])
def test_a_stream_does_not_go_on_with_other_images(twin: Twin, change: dict[str, Any]) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        for index, chunk in enumerate(chunks(request)):
            if number == 0 and index == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
            if number == 1:
                for field in change:
                    chunk.chunk.ClearField(field)
                chunk.chunk.MergeFrom(pb.GenerateImagesResponse(**change))
            yield chunk

    with serving(behave) as (address, _), pytest.raises(ServerError, match="after the first 4"):
        ask(twin, address, "stream_batches", "any", count=8, seed=10)


@both
def test_a_stream_that_ends_too_early_is_an_error(twin: Twin) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        yield next(chunks(request))

    with serving(behave) as (address, _), pytest.raises(ServerError, match="after 4 of 8"):
        ask(twin, address, "stream", "any", count=8, seed=1)


@both
@pytest.mark.parametrize("extra", [1, -CHUNK])
def test_a_stream_of_too_many_images_or_none_is_an_error(twin: Twin, extra: int) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        while True:
            yield pb.StreamImagesResponse(chunk=answer(request, 0, CHUNK + extra))

    with serving(behave) as (address, _), pytest.raises(ServerError, match="sends"):
        ask(twin, address, "stream", "any", count=CHUNK, seed=1)


@both
def test_an_answer_of_other_images_is_an_error(twin: Twin) -> None:
    for change in ({"count": 2}, {"pixels": b""}, {"height": 7}, {"seeds": [1, 2]}, {"encoding": 99}):

        def behave(number: int, request: Any, context: Any, change: dict[str, Any] = change) -> Any:
            response = answer(request)
            for field in change:
                response.ClearField(field)
            response.MergeFrom(pb.GenerateImagesResponse(**change))
            return response

        with serving(behave) as (address, _), pytest.raises(ServerError, match="answer"):
            ask(twin, address, "generate", "any", seed=1)


@both
def test_an_answer_larger_than_the_client_takes_names_both_sizes(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_endpoint, "MAX_ANSWER_BYTES", 1000)

    def behave(number: int, request: Any, context: Any) -> Any:
        return pb.GenerateImagesResponse(pixels=bytes(2000))

    with serving(behave) as (address, servicer), pytest.raises(MessageTooLargeError, match="fewer images") as caught:
        ask(twin, address, "generate", "any")
    assert (caught.value.size_bytes, caught.value.limit_bytes) == (2003, 1000)
    assert len(servicer.requests) == 1


@both
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_server_that_is_too_slow_is_left_and_told_so(twin: Twin, method: str) -> None:
    told = threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        context.add_callback(told.set)
        told.wait(WAIT_S)
        return chunks(request) if method == "stream" else answer(request)

    with serving(behave) as (address, servicer):
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=r"within the timeout of 0\.3 s.*timeout_s") as caught:
            ask(twin, address, method, "any", count=1, timeout_s=0.3)
        assert 0.2 < time.monotonic() - started < 5
        assert told.wait(WAIT_S)
    assert caught.value.request_id == servicer.metadata[0].get("x-request-id")
    assert bool(caught.value.request_id) == (method == "stream")
    assert len(servicer.requests) == 1


@both
def test_a_server_that_says_nothing_is_left(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_endpoint, "CONNECT_TIMEOUT_S", 0.5)
    ended = threading.Event()

    def handle(_: Gate, number: int, connection: socket.socket) -> None:
        read_until_the_end(connection)
        ended.set()

    with gate(handle) as silent:
        with pytest.raises((DeadlineExceededError, UnavailableError)):
            ask(twin, silent.address, "models", timeout_s=0.3)
        assert ended.wait(5), "a connection is left open"


@both
def test_a_server_that_restarts_on_its_port_is_found_again(twin: Twin) -> None:
    with ExitStack() as second, ExitStack() as first:
        address, _ = first.enter_context(serving(honest_stream))

        async def restart() -> None:
            await asyncio.to_thread(first.close)
            second.enter_context(serving(honest_stream, address))

        async def read() -> list[int | None]:
            seeds = []
            async with AsyncClient(address) as client:
                async for image in client.stream("any", count=10**5, seed=0, timeout_s=WAIT_S):
                    seeds.append(image.seed)
                    if image.seed == CHUNK:
                        await restart()
                    if image.seed == 10**4:
                        break
            return seeds

        def read_blocking() -> list[int | None]:
            seeds = []
            with Client(address) as client:
                images = client.stream("any", count=10**5, seed=0, timeout_s=WAIT_S)
                for image in images:
                    seeds.append(image.seed)
                    if image.seed == CHUNK:
                        asyncio.run(restart())
                    if image.seed == 10**4:
                        break
                images.close()
            return seeds

        assert (read_blocking() if twin is Client else asyncio.run(read())) == list(range(10**4 + 1))


@both
def test_a_server_that_was_there_is_waited_for_longer_than_one_that_never_was(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retries, "_PATIENCE_BEFORE_FIRST_ANSWER_S", 0.0)
    with serving(honest) as (address, _):

        def handle(door: Gate, number: int, connection: socket.socket) -> None:
            if number == 0 or number > 4:
                door.pass_on(connection, address, lambda data: None)

        with gate(handle) as door:
            with pytest.raises(UnavailableError):
                ask(twin, "127.0.0.1:1", "models", timeout_s=WAIT_S)

            async def use() -> None:
                async with AsyncClient(door.address) as client:
                    await client.generate("any", seed=1)
                    door.drop()
                    await client.generate("any", seed=1, timeout_s=WAIT_S)

            def use_blocking() -> None:
                with Client(door.address) as client:
                    client.generate("any", seed=1)
                    door.drop()
                    client.generate("any", seed=1, timeout_s=WAIT_S)

            use_blocking() if twin is Client else asyncio.run(use())
            assert door.connections > 4
