"""ModelStreamInfer of the Open Inference Protocol, by Triton's clients and by frames."""

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tests.conftest import START_TIMEOUT_S, RunningServer
from tests.server.test_generate_each import resident_mib
from tests.server.test_inference_protocol import tensors
from tests.server.test_start_and_drain import calls_logged, wait_for_sample
from tests.wire import CANCEL, EACH, INITIAL_WINDOW_SIZE, RST_STREAM, Peer, head, message
from tests.wire import request as one_image
from tritonclient.utils import InferenceServerException

from ganserve.v1 import generation_pb2 as generation_pb
from ganserve_server.inference import grpc_service_pb2 as pb
from ganserve_server.services.request_stream import RequestStream, StreamedRequest

Start = Callable[..., RunningServer]
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
MODELS = ("mlp-mnist", "cdcgan-mnist", "dcgan-mnist")


def request(
    *seeds: int, model: str = "mlp-mnist", version: str = "", truncation: float | None = None, **fields: Any
) -> bytes:
    built = pb.ModelInferRequest(model_name=model, model_version=version, **fields)
    built.inputs.add(name="seed", datatype="UINT32", shape=[len(seeds)])
    built.raw_input_contents.append(np.array(seeds, "<u4").tobytes())
    if truncation is not None:
        built.parameters["truncation"].double_param = truncation
    return built.SerializeToString()


def read(content: bytes) -> pb.ModelStreamInferResponse:
    return pb.ModelStreamInferResponse.FromString(content)


@pytest.fixture
def stream(server: RunningServer) -> Iterator[Callable[..., Any]]:
    """Call the method with serialised messages."""
    with grpc.insecure_channel(server.address) as channel:
        yield channel.stream_stream(METHOD, response_deserializer=read)


class Results:
    """What Triton's client calls back with."""

    def __init__(self) -> None:
        self._results: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def __call__(self, result: Any, error: Any) -> None:
        self._results.put((result, error))

    def take(self, count: int) -> list[tuple[Any, Any]]:
        return [self._results.get(timeout=START_TIMEOUT_S) for _ in range(count)]


def test_tritons_client_gets_in_order_what_single_calls_get(server: RunningServer) -> None:
    results = Results()
    with triton.InferenceServerClient(server.address) as connected:
        connected.start_stream(results)
        wanted = [(MODELS[seed // 10 % 3], np.array([seed, seed + 1], np.uint32)) for seed in range(300)]
        for number, (model, seeds) in enumerate(wanted):
            connected.async_stream_infer(
                model, tensors(seed=seeds), request_id=str(number), enable_empty_final_response=number % 2 == 0
            )
        answers = results.take(len(wanted))
        connected.stop_stream()
        assert [error for _, error in answers] == [None] * len(wanted)
        assert [result.get_response().id for result, _ in answers] == [str(number) for number in range(len(wanted))]
        assert all(result.get_response().parameters["triton_final_response"].bool_param for result, _ in answers)
        for (model, seeds), (result, _) in list(zip(wanted, answers, strict=True))[::7]:
            alone = connected.infer(model, tensors(seed=seeds))
            assert result.as_numpy("image").tolist() == alone.as_numpy("image").tolist()
            assert result.get_response().model_version == "1"


def test_an_error_is_called_back_and_the_stream_goes_on(server: RunningServer) -> None:
    results = Results()
    seed = tensors(seed=np.array([1], np.uint32))
    with triton.InferenceServerClient(server.address) as connected:
        connected.start_stream(results)
        connected.async_stream_infer("mlp-mnist", seed)
        connected.async_stream_infer("nothing", seed)
        connected.async_stream_infer("mlp-mnist", seed, parameters={"truncation": "3"})
        connected.async_stream_infer("mlp-mnist", seed, sequence_id=1)
        connected.async_stream_infer("mlp-mnist", seed)
        answers = results.take(5)
        connected.stop_stream()
    assert [error is None for _, error in answers] == [True, False, False, False, True]
    assert all(isinstance(error, InferenceServerException) for _, error in answers[1:4])
    assert "nothing" in answers[1][1].message()


async def test_tritons_client_for_asyncio_gets_them_too(server: RunningServer) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for seed in range(20):
            yield {
                "model_name": "mlp-mnist",
                "inputs": tensors(triton_aio, seed=np.array([seed], np.uint32)),
                "request_id": str(seed),
            }

    async with triton_aio.InferenceServerClient(server.address) as connected:
        ids = [result.get_response().id async for result, error in connected.stream_infer(requests()) if error is None]
    assert ids == [str(seed) for seed in range(20)]


def test_the_failed_request_is_named_by_its_id(stream: Callable[..., Any]) -> None:
    contents = [request(1, id="a"), request(1, model="nothing", id="b"), b"\xff", request(id="c"), request(2, id="d")]
    answers = list(stream(iter(contents)))
    assert [bool(answer.error_message) for answer in answers] == [False, True, True, True, False]
    assert [answer.infer_response.id for answer in answers] == ["a", "b", "", "c", "d"]
    assert [len(answer.infer_response.raw_output_contents) for answer in answers] == [1, 0, 0, 0, 1]


def test_an_id_that_is_too_long_does_not_come_back(stream: Callable[..., Any]) -> None:
    first, second = stream(iter([request(1, id="a" * 1025), request(2, id="b" * 1024)]))
    assert first.error_message == "the id has 1025 bytes; it may have at most 1024"
    assert (first.infer_response.id, second.infer_response.id) == ("", "b" * 1024)


class FakeCall:
    """A call of no connection, which does what is put off when it is told."""

    over, pending_bytes, fairness_key = False, 0, "caller"

    def __init__(self) -> None:
        self.todo: list[Callable[[float], None]] = []
        self.consumed_bytes: list[tuple[int, int]] = []
        self.sent: list[bytes] = []

    def soon(self, work: Callable[[float], None]) -> None:
        self.todo.append(work)

    def work_on(self) -> None:
        while self.todo:
            self.todo.pop(0)(0.0)

    def send(self, *messages: bytes) -> None:
        self.sent += messages

    def consumed(self, message_bytes: int, messages: int) -> None:
        self.consumed_bytes.append((message_bytes, messages))

    def fail(self, error: BaseException) -> None:
        raise error


def test_requests_count_until_they_are_answered() -> None:
    requests: list[StreamedRequest] = []

    class Stream(RequestStream):
        def take(self, content: bytes) -> StreamedRequest:
            requests.append(StreamedRequest())
            return requests[-1]

    call: Any = FakeCall()
    stream = Stream(call)
    content = bytes(4 << 20)
    for _ in range(10):
        stream.sink[0](content)
    call.work_on()
    assert len(requests) == 4  # have 16 MiB
    requests[1].answer = b"second"
    stream.send_answers()
    assert (call.sent, call.consumed_bytes) == ([], [])
    requests[0].answer = b"first"
    stream.send_answers()
    call.work_on()
    assert call.sent == [b"first", b"second"]
    assert call.consumed_bytes == [(8 << 20, 2)]
    assert len(requests) == 6


def test_thousands_of_wrong_requests_in_a_row_are_answered(stream: Callable[..., Any]) -> None:
    wrong = [request(1, truncation=3.0)] * 5000
    answers = list(stream(iter([*wrong, request(7), *wrong])))
    assert [bool(answer.error_message) for answer in answers] == [True] * 5000 + [False] + [True] * 5000


def test_a_stream_without_requests_ends_well(stream: Callable[..., Any]) -> None:
    assert list(stream(iter(()))) == []


def test_an_image_may_be_answered_before_the_next_is_asked_for(stream: Callable[..., Any]) -> None:
    contents: queue.Queue[bytes] = queue.Queue()
    call = stream(iter(contents.get, b""))
    for seed in range(20):
        contents.put(request(seed, id=str(seed)))
        assert next(call).infer_response.id == str(seed)
    contents.put(b"")
    assert list(call) == []
    assert call.code() is grpc.StatusCode.OK


def test_a_request_has_its_own_timeout_and_the_stream_its_deadline(start_server: Start) -> None:
    server = start_server("--max-queue-images", "1000000", "--threads", "1")
    late = pb.ModelInferRequest.FromString(request(1))
    late.parameters["timeout"].int64_param = 1  # microseconds
    large = request(*range(1000), model="cdcgan-mnist")
    with grpc.insecure_channel(server.address) as channel:
        method = channel.stream_stream(METHOD, response_deserializer=read)
        first, second = method(iter([late.SerializeToString(), request(1)]))
        assert first.error_message
        assert not second.error_message
        with pytest.raises(grpc.RpcError) as caught:
            list(method(iter([large] * 1000), timeout=1))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_for_sample(server, 'ganserve_queue_images{model="cdcgan-mnist"}', lambda images: images == 0)


def test_a_stream_that_is_left_leaves_nothing_in_the_queue(start_server: Start) -> None:
    server = start_server("--max-queue-images", "1000000", "--access-log", "all")
    with Peer(server.address) as peer:
        opened = peer.head(head(METHOD))
        peer.body(opened, message(request(*range(1000), model="cdcgan-mnist")) * 200, end=False)
        wait_for_sample(server, 'ganserve_queue_images{model="cdcgan-mnist"}', lambda images: images > 0)
        peer.send(RST_STREAM, 0, opened, CANCEL.to_bytes(4, "big"))
        wait_for_sample(server, 'ganserve_queue_images{model="cdcgan-mnist"}', lambda images: images == 0)
        peer.ping()
    (logged,) = calls_logged(server)
    assert (logged["method"], logged["code"]) == ("ModelStreamInfer", "CANCELLED")


def each(count: int) -> bytes:
    asked = generation_pb.GenerateImagesRequest(model="mlp-mnist", seed=1, count=count)
    return generation_pb.GenerateEachRequest(generate=asked).SerializeToString()


@pytest.mark.parametrize(
    ("method", "content"), [(METHOD, request(*range(1000))), (EACH, each(1000))], ids=["infer", "each"]
)
def test_requests_are_begun_by_what_their_answers_take(method: str, content: bytes, start_server: Start) -> None:
    """16 MiB of pixels at a time, of 256 requests of 784,000 bytes."""
    server = start_server("--max-queue-images", "1000000")
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 0}) as peer:
        peer.body(peer.head(head(method)), message(content) * 256)
        made, queued = (
            'ganserve_images_total{model="mlp-mnist",version="1"}',
            'ganserve_queue_images{model="mlp-mnist"}',
        )
        wait_for_sample(server, made, lambda images: images >= 22_000)
        samples = server.scrape()
        assert samples[made] + samples[queued] <= 24_000


@pytest.mark.parametrize(("method", "content"), [(METHOD, request(1)), (EACH, each(1))], ids=["infer", "each"])
def test_small_requests_are_begun_until_a_mebibyte_of_answers_is_unread(
    method: str, content: bytes, start_server: Start
) -> None:
    server = start_server("--max-queue-images", "1000000")
    with Peer(server.address, {INITIAL_WINDOW_SIZE: 0}) as peer, Peer(server.address) as other:
        peer.body(peer.head(head(method)), message(content) * 4000)
        made = 'ganserve_images_total{model="mlp-mnist",version="1"}'
        wait_for_sample(server, made, lambda images: images >= 1000)
        for _ in range(20):  # turns of the event loop and of the engine, in which more would be begun
            assert other.call(one_image()).status == 0
        # An answer has more than its 784 pixels, and 256 requests run at a time: (1 << 20) / 784 + 256.
        assert server.scrape()[made] - 20 <= 1593


IMAGES = 'ganserve_images_total{model="mlp-mnist",version="1"}'


@pytest.mark.slow
async def test_a_reader_that_does_not_read_fills_no_memory(start_server: Start) -> None:
    server = start_server("--max-queue-images", "100000")
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream(METHOD)()
        await call.write(request(0))
        await call.read()
        before = resident_mib(server)

        async def write_all() -> None:
            for seed in range(4_000):
                await call.write(request(*range(seed, seed + 50)))
            await call.done_writing()

        writing = asyncio.create_task(write_all())
        # 4,000 answers of 50 images would be 157 MB: the server stops making images long before.
        made = 0.0
        while made < (now := server.scrape()[IMAGES]):
            made = now
            await asyncio.wait({writing}, timeout=1)
        assert made < 200_000
        assert resident_mib(server) - before < 60
        answers = 0
        while answers < 4_000 and (await call.read()) is not grpc.aio.EOF:
            answers += 1
        assert answers == 4_000
        await writing


def test_what_a_full_queue_has_no_room_for_is_told_of_each_request_alone(start_server: Start) -> None:
    server = start_server("--max-queue-images", "20")
    contents = [request(*range(1000), model="cdcgan-mnist"), *[request(1, model="cdcgan-mnist")] * 200]
    with grpc.insecure_channel(server.address) as channel:
        answers = list(channel.stream_stream(METHOD, response_deserializer=read)(iter(contents)))
    assert len(answers) == 201
    refused = [answer for answer in answers if answer.error_message]
    assert refused
    assert all("no room for 1 more" in answer.error_message for answer in refused)
