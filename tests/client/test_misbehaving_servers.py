"""Servers that stop, stall, lie or speak another version: a typed error, or none at all, and nothing is left behind."""

import asyncio
import gc
import itertools
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hpack import Encoder
from tests.client.servers import (
    CHUNK,
    DRAWN_SEED,
    WAIT_S,
    Gate,
    Twin,
    Way,
    abort_overloaded,
    answer,
    ask,
    both,
    chunks,
    each_answer,
    each_error,
    gate,
    honest,
    honest_each,
    honest_stream,
    serving,
    serving_status,
    until_it_fails,
    ways,
)
from tests.conftest import RunningServer
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
    Client,
    DeadlineExceededError,
    GanserveError,
    GeneratedImage,
    InvalidRequestError,
    MessageTooLargeError,
    ModelNotFoundError,
    OverloadedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
    _endpoint,
    _forks,
    _readiness,
    _retries,
    _wait_log,
)
from ganserve.v1 import generation_pb2 as pb


@pytest.fixture(autouse=True)
def _nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Threads of a test end with it; gRPC's own take a moment."""
    before = set(threading.enumerate())
    yield
    caplog.get_records("call").clear()  # they hold the frames of calls
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), f"{thread} is left"


def fails_first(code: grpc.StatusCode, times: int = 1) -> Any:
    def behave(number: int, request: Any, context: Any) -> Any:
        if number < times:
            context.abort(code, "what was wrong")
        return answer(request)

    return behave


def breaks_after(code: grpc.StatusCode, sent: int, times: int = 1) -> Any:
    """Streams that break after so many chunks, and then one that does not."""

    def behave(number: int, request: Any, context: Any) -> Any:
        for index, chunk in enumerate(chunks(request)):
            if number < times and index == sent:
                context.abort(code, "broken")
            yield chunk
        if number < times and sent * CHUNK >= request.count:
            context.abort(code, "broken")

    return behave


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
        _read_until_the_end(connection)
        ended.set()

    with gate(handle) as silent:
        with pytest.raises((DeadlineExceededError, UnavailableError)):
            ask(twin, silent.address, "models", timeout_s=0.3)
        assert ended.wait(5), "a connection is left open"


@both
@pytest.mark.parametrize("method", ["stream", "stream_batches", "generate_each"])
def test_closing_an_iterator_cancels_the_stream(twin: Twin, method: str) -> None:
    told = threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        context.add_callback(told.set)
        yield from map(each_answer, request) if method == "generate_each" else chunks(request)
        told.wait(WAIT_S)

    endless: Any = {"seeds": itertools.count()} if method == "generate_each" else {"count": 10**6, "seed": 1}
    calls: list[Any] = []  # held, as a traceback or a debugger does: gRPC cancels what nobody holds by itself

    def hold(client: Client | AsyncClient) -> None:
        stubs = client._calls.connected()
        name = "generate_each" if method == "generate_each" else "stream_images"
        start = getattr(stubs, name)
        setattr(stubs, name, lambda *given, **named: calls.append(start(*given, **named)) or calls[-1])

    async def use(address: str) -> None:
        async with AsyncClient(address) as client:
            hold(client)
            images = getattr(client, method)("any", **endless)
            await anext(images)
            await images.aclose()
            assert await asyncio.to_thread(told.wait, WAIT_S)

    with serving(behave) as (address, _):
        if twin is AsyncClient:
            asyncio.run(use(address))
            return
        with Client(address) as client:
            hold(client)
            images = getattr(client, method)("any", **endless)
            next(images)
            images.close()
            assert told.wait(WAIT_S)


async def test_a_cancelled_task_cancels_its_call() -> None:
    came, told = threading.Event(), threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        context.add_callback(told.set)
        came.set()
        told.wait(WAIT_S)
        return answer(request)

    with serving(behave) as (address, _):
        async with AsyncClient(address) as client:
            task = asyncio.create_task(client.generate("any"))
            assert await asyncio.to_thread(came.wait, WAIT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(told.wait, WAIT_S)


def holds(method: str, came: threading.Event) -> Any:
    """Answer once the client is gone; `came` is set when a call is there."""
    over = threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        context.add_callback(over.set)
        came.set()
        over.wait(WAIT_S)
        return iter(()) if method == "generate_each" else chunks(request) if method == "stream" else answer(request)

    return behave


@pytest.mark.parametrize("method", ["generate", "stream", "generate_each"])
def test_closing_the_client_ends_its_calls(method: str) -> None:
    came = threading.Event()
    with serving(holds(method, came)) as (address, _):
        client = Client(address)
        calls: dict[str, Callable[[], Iterable[GeneratedImage]]] = {
            "generate": lambda: client.generate("any"),
            "stream": lambda: client.stream("any", count=1),
            "generate_each": lambda: client.generate_each("any", [1]),
        }
        closing = threading.Thread(target=lambda: (came.wait(WAIT_S), client.close()))
        closing.start()
        with pytest.raises(RequestCancelledError, match="closed"):
            list(calls[method]())
        closing.join()
        with pytest.raises(RequestCancelledError, match="closed"):
            client.generate("any")


@pytest.mark.parametrize("method", ["generate", "stream", "generate_each"])
async def test_closing_the_async_client_ends_its_calls(method: str) -> None:
    came = threading.Event()
    with serving(holds(method, came)) as (address, _):
        client = AsyncClient(address)

        async def call() -> None:
            if method == "generate":
                await client.generate("any")
            else:
                images = client.stream("any", count=1) if method == "stream" else client.generate_each("any", [1])
                _ = [image async for image in images]

        task = asyncio.create_task(call())
        assert await asyncio.to_thread(came.wait, WAIT_S)
        await client.close()
        with pytest.raises(RequestCancelledError, match="closed"):
            await task


def test_closing_the_client_ends_a_wait_for_the_next_try() -> None:
    came = threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        came.set()
        abort_overloaded(context, 20)

    with serving(behave) as (address, _):
        client = Client(address)

        def close() -> None:
            came.wait(WAIT_S)
            while _forks._inside:  # the call is not over
                pass
            client.close()

        closing = threading.Thread(target=close)
        closing.start()
        started = time.monotonic()
        with pytest.raises(RequestCancelledError, match="closed"):
            client.generate("any", timeout_s=60)
        assert time.monotonic() - started < 10
        closing.join()


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


# One image for each seed, over a stream of requests.


@both
@pytest.mark.parametrize("answered", [0, 1, 150])
def test_images_that_have_not_come_when_a_call_breaks_are_asked_for_again(twin: Twin, answered: int) -> None:
    def behave(number: int, requests: Any, context: Any) -> Any:
        for place, request in enumerate(requests):
            if number < 2 and place == answered:
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
            yield each_answer(request)

    seeds, labels = [7 * place for place in range(400)], [place % 10 for place in range(400)]
    with serving(behave) as (address, servicer):
        images = ask(twin, address, "generate_each", "any", seeds, label=labels)
    assert [image.seed for image in images] == seeds
    assert [image.label for image in images] == labels
    first, second, third = servicer.requests
    assert (second[0].seed, third[0].seed) == (seeds[answered], seeds[2 * answered])
    assert not first[0].HasField("version")
    if answered:
        assert {request.version for request in [*first[1:], *second, *third]} == {3}


@both
@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
def test_requests_that_were_sent_away_are_made_again_and_their_images_keep_their_order(
    twin: Twin, code: grpc.StatusCode
) -> None:
    refused: set[int] = set()

    def behave(number: int, requests: Any, context: Any) -> Any:
        for request in requests:
            if request.seed % 100 in (50, 51, 53) and request.seed not in refused:
                refused.add(request.seed)
                yield each_error(code, "queue_full", "the queue is full")
            else:
                yield each_answer(request)

    with serving(behave) as (address, servicer):
        images = ask(twin, address, "generate_each", "any", range(400))
    assert [image.seed for image in images] == list(range(400))
    assert [image.pixels.item() for image in images] == [seed % 256 for seed in range(400)]
    assert len(refused) == 12
    asked = [request.seed for requests in servicer.requests for request in requests]
    assert sorted(asked) == sorted([*range(400), *refused])  # what was answered meanwhile is not asked for again


@both
def test_a_server_that_has_room_for_few_requests_is_sent_fewer(twin: Twin) -> None:
    def behave(number: int, requests: Any, context: Any) -> Any:
        for place, request in enumerate(requests):
            full = each_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full", "the queue is full")
            yield each_answer(request) if place < 10 else full

    with serving(behave) as (address, servicer):
        images = ask(twin, address, "generate_each", "any", range(200))
    assert [image.seed for image in images] == list(range(200))
    assert sum(len(requests) for requests in servicer.requests) < 1200  # 200, 190, 180, … were 2100


@both
def test_a_server_that_has_room_again_is_sent_more(twin: Twin) -> None:
    """Two refusals leave 64 requests in flight. 120 images make it 66: the square root of 64² + 2 · 120 is 65.8."""

    def behave(number: int, requests: Any, context: Any) -> Any:
        if number == 0:
            yield each_answer(next(requests))
        if number < 2:
            for _ in requests:
                yield each_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full", "the queue is full")
            return
        waiting = deque(itertools.islice(requests, 64))
        for _ in range(120):
            yield each_answer(waiting.popleft())
            waiting.append(next(requests))
        waiting.extend(itertools.islice(requests, 2))  # would wait for ever if no more were in flight
        yield from map(each_answer, itertools.chain(waiting, requests))

    with serving(behave) as (address, _):
        images = ask(twin, address, "generate_each", "any", range(400), timeout_s=WAIT_S)
    assert [image.seed for image in images] == list(range(400))


@both
@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        ((grpc.StatusCode.INVALID_ARGUMENT, "invalid", "it is wrong"), InvalidRequestError, "^it is wrong$"),
        ((grpc.StatusCode.NOT_FOUND, "not_found", "there is none"), ModelNotFoundError, "^there is none$"),
        (
            (grpc.StatusCode.INTERNAL, "engine", "it failed"),
            ServerError,
            "INTERNAL: it failed.*request id [0-9a-f]{32} ",
        ),
        ((grpc.StatusCode.DEADLINE_EXCEEDED, "deadline", "it was late"), DeadlineExceededError, "timeout_s"),
        ((grpc.StatusCode.OK, "none", "what"), ServerError, "what"),
    ],
)
def test_an_error_is_raised_where_its_image_would_be(
    twin: Twin, error: tuple[grpc.StatusCode, str, str], kind: type[GanserveError], told: str
) -> None:
    def behave(number: int, requests: Any, context: Any) -> Any:
        for request in requests:
            yield each_error(*error) if request.seed == 70 else each_answer(request)

    with serving(behave) as (address, servicer):
        images, raised = until_it_fails(twin, address, "any", range(0, 10**6, 10))
    assert [image.seed for image in images] == list(range(0, 70, 10))
    assert type(raised) is kind
    assert re.search(told, str(raised))
    assert isinstance(raised, GanserveError)
    assert raised.reason == error[1]
    assert raised.request_id == servicer.metadata[0]["x-request-id"]
    assert len(servicer.requests) == 1


@both
@pytest.mark.parametrize("answered", [0, 1, 3])
def test_a_stream_of_requests_that_ends_before_all_are_answered_is_an_error(twin: Twin, answered: int) -> None:
    def behave(number: int, requests: Any, context: Any) -> Any:
        yield from map(each_answer, itertools.islice(requests, answered))
        next(requests)  # a call that ends while one is sent would be made again

    with serving(behave) as (address, _), pytest.raises(ServerError, match=f"after {answered} of"):
        ask(twin, address, "generate_each", "any", range(answered + 1))


@both
def test_more_answers_than_requests_are_an_error(twin: Twin) -> None:
    def behave(number: int, requests: Any, context: Any) -> Any:
        for request in requests:
            yield each_answer(request)
        yield each_answer(request)

    with serving(behave) as (address, _):
        images, raised = until_it_fails(twin, address, "any", range(4))
    assert [image.seed for image in images] == [0, 1, 2, 3]
    assert isinstance(raised, ServerError)
    assert "more answers than the 4" in str(raised)


@both
@pytest.mark.parametrize("change", [{"version": 9}, {"digest": "sha256:2"}, {"seeds": [1]}, {"seeds": []}])
def test_images_of_other_models_or_seeds_than_asked_for_are_an_error(twin: Twin, change: dict[str, Any]) -> None:
    def behave(number: int, requests: Any, context: Any) -> Any:
        for request in requests:
            made = answer(request)
            if request.seed == 20:
                for field in change:
                    made.ClearField(field)
                made.MergeFrom(pb.GenerateImagesResponse(**change))
            yield pb.GenerateEachResponse(response=made)

    with serving(behave) as (address, _):
        images, raised = until_it_fails(twin, address, "any", [10, 20, 30])
    assert [image.seed for image in images] == [10]
    assert isinstance(raised, ServerError)


@both
@pytest.mark.parametrize("answered", [0, 1, 3])
def test_an_image_that_does_not_come_is_waited_for_no_longer_than_the_timeout(twin: Twin, answered: int) -> None:
    told = threading.Event()

    def behave(number: int, requests: Any, context: Any) -> Any:
        context.add_callback(told.set)
        yield from map(each_answer, itertools.islice(requests, answered))
        told.wait(WAIT_S)

    with serving(behave) as (address, servicer):
        started = time.monotonic()
        images, raised = until_it_fails(twin, address, "any", itertools.count(), timeout_s=0.5)
        assert 0.4 < time.monotonic() - started < 5
        assert told.wait(WAIT_S)
    assert len(images) == answered
    assert isinstance(raised, DeadlineExceededError)
    assert "within the timeout of 0.5 s; set timeout_s" in str(raised)
    assert raised.request_id == servicer.metadata[0]["x-request-id"]
    assert len(servicer.requests) == 1


@ways
def test_the_timeout_is_for_the_next_image_and_not_for_who_reads_them(twin: Twin, given: Way) -> None:
    """Nor for the seeds: it ends while the reader holds an image, and while the next seed is being thought of."""
    timeout_s, passed_s = 0.7, 0.9

    def seeds() -> Iterator[int]:
        for seed in range(2):
            time.sleep(passed_s)
            yield seed

    async def read(address: str) -> int:
        read = 0
        async with AsyncClient(address) as client:
            async for _ in client.generate_each("any", given(seeds()), timeout_s=timeout_s):
                read += 1
                await asyncio.sleep(passed_s)
        return read

    with serving(honest_each) as (address, servicer):
        if twin is AsyncClient:
            assert asyncio.run(read(address)) == 2
        else:
            with Client(address) as client:
                for _ in client.generate_each("any", seeds(), timeout_s=timeout_s):
                    time.sleep(passed_s)
        assert [request.seed for request in servicer.requests[0]] == [0, 1]
        assert len(servicer.requests) == 1


@both
def test_a_name_of_a_class_is_put_right_once_for_all_its_images(twin: Twin) -> None:
    def behave(number: int, requests: Any, context: Any) -> Any:
        if isinstance(requests, pb.GetModelRequest):
            return pb.GetModelResponse(model=pb.Model(name="any", card=pb.ModelCard(class_names=["Bag", "Coat"])))
        return (
            each_error(grpc.StatusCode.INVALID_ARGUMENT, "invalid", f"there is no {request.label_names[0]!r}")
            if request.label_names[0] not in ("Bag", "Coat")
            else each_answer(request)
            for request in requests
        )

    with serving(behave) as (address, servicer):
        images = ask(
            twin, address, "generate_each", "any", range(500), label=["Coat", "coat", "BAG", "bag", "Bag"] * 100
        )
        assert [image.seed for image in images] == list(range(500))
        assert [isinstance(asked, pb.GetModelRequest) for asked in servicer.requests].count(True) == 3
        images, raised = until_it_fails(twin, address, "any", range(500), label=["Bag"] * 300 + ["bga"] * 200)
    assert len(images) == 300
    assert str(raised) == "there is no 'bga'; did you mean 'Bag'?"
    assert getattr(raised, "field", None) == "label"


# What is told while a server is waited for.


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


# Names that are nearly right.


def knows(class_names: list[str], refusals: int) -> Any:
    """Refuse so many requests for their label names, and describe the model."""

    def refuse(request: Any, context: Any) -> None:
        violation = error_details_pb2.BadRequest.FieldViolation(field="label_names")
        packed = any_pb2.Any()
        packed.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        details = status_pb2.Status(details=[packed]).SerializeToString()
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no such class: {', '.join(request.label_names)}")

    def behave(number: int, request: Any, context: Any) -> Any:
        if isinstance(request, pb.GetModelRequest):
            return pb.GetModelResponse(model=pb.Model(name="any", card=pb.ModelCard(class_names=class_names)))
        if number < refusals:
            refuse(request, context)
        return answer(request)

    return behave


@both
def test_a_label_that_is_right_but_for_its_case_is_asked_for_as_it_is_written(twin: Twin) -> None:
    with serving(knows(["Bag", "Ankle boot", "Coat"], 1)) as (address, servicer):
        ask(twin, address, "generate", "any", label=["ankle Boot", "Coat"])
        assert [list(request.label_names) for request in servicer.requests[::2]] == [
            ["ankle Boot", "Coat"],
            ["Ankle boot", "Coat"],
        ]


@both
@pytest.mark.parametrize(
    ("class_names", "label", "end"),
    [
        (["BAG", "Bag"], "bag", "; did you mean 'Bag'?"),  # not one of the two at a guess
        (["Bag", "Coat"], "bga", "; did you mean 'Bag'?"),
        (["Bag", "Coat"], "hat at all", "no such class: hat at all"),
        (["Bag", "Coat"], "Bag", "no such class: Bag"),  # a server that refuses what it has
        ([], "bag", "no such class: bag"),
    ],
)
def test_a_label_that_is_not_sure_is_told(twin: Twin, class_names: list[str], label: str, end: str) -> None:
    with serving(knows(class_names, 10**6)) as (address, servicer):
        with pytest.raises(InvalidRequestError) as caught:
            ask(twin, address, "generate", "any", label=label)
        assert str(caught.value).endswith(end)
        assert len(servicer.requests) == 2


@both
def test_a_server_that_refuses_what_it_has_itself_is_asked_twice_at_most(twin: Twin) -> None:
    with serving(knows(["Bag"], 10**6)) as (address, servicer):
        with pytest.raises(InvalidRequestError):
            ask(twin, address, "generate", "any", label="bag")
        assert len([each for each in servicer.requests if isinstance(each, pb.GenerateImagesRequest)]) == 2


@both
@pytest.mark.parametrize(("method", "asked"), [("generate", 1), ("health", 2)])  # health's own error tells no names
def test_a_server_that_does_not_know_a_model_leaves_the_error_as_it_is(twin: Twin, method: str, asked: int) -> None:
    with serving(fails_first(grpc.StatusCode.NOT_FOUND, 10**6)) as (address, servicer):
        with pytest.raises(ModelNotFoundError, match=r"^what was wrong$"):
            ask(twin, address, method, "any")
        assert len(servicer.requests) == asked


# HTTP/2 without gRPC's rules, frame by frame.


def _read_until_the_end(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


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
        _read_until_the_end(connection)

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


# Tokens and health.


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
        ask(twin, server.address, "wait_until_ready", 0.5, model="mpl-mnist")
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
