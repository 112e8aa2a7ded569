"""`generate_each` from servers that fail, refuse, lie or are slow: each image once and in order, or a typed error."""

import asyncio
import itertools
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.client.servers import (
    WAIT_S,
    Twin,
    Way,
    answer,
    ask,
    both,
    each_answer,
    each_error,
    honest_each,
    serving,
    until_it_fails,
    ways,
)

from ganserve import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    GanserveError,
    InvalidRequestError,
    ModelNotFoundError,
    ServerError,
)
from ganserve.v1 import generation_pb2 as pb

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
