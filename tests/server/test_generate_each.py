"""A stream of requests, each answered in its turn."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from tests.conftest import RunningServer
from tests.server.test_scheduler import WAIT_S, HeldEngine, queue_of
from tests.server.test_start_and_drain import calls_logged
from tests.wire import EACH, Peer, head, message

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.observe.metrics import Metrics
from ganserve_server.queueing.scheduler import Scheduler
from ganserve_server.repository.table import ModelTable
from ganserve_server.services.generation import GenerationServicer
from ganserve_server.settings import ServerSettings
from ganserve_server.transport.grpc_server import GrpcServer
from ganserve_server.transport.limits import Limits

Start = Callable[..., RunningServer]


@pytest.fixture
async def stub(server: RunningServer) -> AsyncIterator[pb_grpc.GenerationServiceStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def request(**fields: object) -> pb.GenerateEachRequest:
    return pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(**fields))


async def test_requests_are_answered_in_order_with_what_single_calls_get(stub: pb_grpc.GenerationServiceStub) -> None:
    models = ("mlp-mnist", "cdcgan-mnist", "dcgan-mnist")
    # Many compatible ones in a row, which go through the queue together, and some that are not.
    wanted: list[dict[str, object]] = [
        {
            "model": models[seed // 20 % 3],
            "seed": seed,
            "count": 1 + 7 * (seed % 5 == 1),
            "truncation": 1 - seed % 7 // 6,
        }
        for seed in range(1000)
    ]
    for fields in wanted[::9]:
        if fields["model"] == "cdcgan-mnist":
            fields["labels"] = [3]
    for fields in wanted[::23]:
        if fields["model"] == "mlp-mnist":
            del fields["seed"]
            fields["count"] = 2
            fields["latents"] = pb.Latents(values=[0.5] * 200)
    answers = [answer async for answer in stub.GenerateEach(request(**fields) for fields in wanted)]
    assert [answer.response.seeds[:1] for answer in answers] == [[f["seed"]] if "seed" in f else [] for f in wanted]
    for fields, answer in list(zip(wanted, answers, strict=True))[::3]:
        alone = await stub.GenerateImages(pb.GenerateImagesRequest(**fields))  # type: ignore[arg-type]
        for one in (answer.response, alone):
            one.ClearField("queue_time")
            one.ClearField("compute_time")
        assert answer.response == alone


async def test_thousands_of_wrong_requests_in_a_row_are_answered(stub: pb_grpc.GenerationServiceStub) -> None:
    wrong = [request(model="mlp-mnist", truncation=3)] * 5000
    answers = [answer async for answer in stub.GenerateEach([*wrong, request(model="mlp-mnist", seed=7), *wrong])]
    assert [answer.error.reason for answer in answers] == ["invalid"] * 5000 + [""] + ["invalid"] * 5000
    assert answers[5000].response.seeds == [7]


@pytest.mark.parametrize("compatible", [True, False])
async def test_the_log_counts_each_batch_once_however_many_requests_were_in_it(
    compatible: bool, start_server: Start
) -> None:
    running = start_server("--access-log", "all", "--threads", "1")
    async with grpc.aio.insecure_channel(running.address) as channel:
        requests = [
            request(model="mlp-mnist", seed=seed, truncation=1 - (seed % 2) * (not compatible)) for seed in range(500)
        ]
        call = pb_grpc.GenerationServiceStub(channel).GenerateEach(requests)
        answers = [answer.response async for answer in call]
    computed_s = running.scrape()['ganserve_compute_seconds_sum{model="mlp-mnist"}']
    (logged,) = calls_logged(running)
    assert logged["images"] == len(answers) == 500
    assert logged["compute_s"] == pytest.approx(computed_s, abs=2e-6)
    assert computed_s < float(str(logged["seconds"]))
    assert sum(answer.compute_time.ToTimedelta().total_seconds() for answer in answers) > computed_s


async def test_an_error_answers_its_own_request_alone(stub: pb_grpc.GenerationServiceStub) -> None:
    requests = [
        request(model="mlp-mnist", seed=1),
        request(model="nothing", seed=1),
        request(model="mlp-mnist", seed=1, count=100_000),
        request(model="mlp-mnist", seed=2),
    ]
    answers = [answer async for answer in stub.GenerateEach(requests)]
    assert [answer.WhichOneof("outcome") for answer in answers] == ["response", "error", "error", "response"]
    assert (answers[1].error.code, answers[1].error.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "not_found")
    assert "count is 100000" in answers[2].error.message


async def test_an_image_may_be_answered_before_the_next_is_asked_for(stub: pb_grpc.GenerationServiceStub) -> None:
    call = stub.GenerateEach()
    for seed in range(20):
        await call.write(request(model="mlp-mnist", seed=seed))
        assert (await call.read()).response.seeds == [seed]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_files_are_answered_too(stub: pb_grpc.GenerationServiceStub) -> None:
    requests = [request(model="mlp-mnist", seed=seed, count=20, encoding=pb.ENCODING_PNG) for seed in range(5)]
    answers = [answer async for answer in stub.GenerateEach(requests)]
    assert [len(answer.response.files) for answer in answers] == [20] * 5


def test_compatible_requests_that_came_together_wait_as_one(start_server: Start) -> None:
    running = start_server()
    contents = (request(model="mlp-mnist", truncation=0.5 + seed // 4 / 4, seed=seed) for seed in range(8))
    with Peer(running.address) as peer:
        stream = peer.head(head(EACH))
        peer.body(stream, b"".join(message(content.SerializeToString()) for content in contents))
        assert len(peer.answer(stream).messages) == 8
    samples = running.scrape()
    assert samples['ganserve_images_total{model="mlp-mnist",version="1"}'] == 8
    assert samples['ganserve_queue_seconds_count{model="mlp-mnist"}'] == 2


def test_a_group_has_no_more_requests_than_are_never_cut(start_server: Start) -> None:
    running = start_server("--max-batch-size", "16")  # an eighth of it is 2
    contents = (request(model="mlp-mnist", seed=seed) for seed in range(5))
    with Peer(running.address) as peer:
        stream = peer.head(head(EACH))
        peer.body(stream, b"".join(message(content.SerializeToString()) for content in contents))
        assert len(peer.answer(stream).messages) == 5
    assert running.scrape()['ganserve_queue_seconds_count{model="mlp-mnist"}'] == 3  # 2 + 2 + 1


async def test_bulk_requests_leave_their_turns_to_interactive_ones_of_the_same_stream() -> None:
    engine, scheduler, table = HeldEngine(), Scheduler(1), ModelTable()
    batcher = queue_of(engine, scheduler, max_batch_size=8, max_queue_images=100)
    table.put(batcher)
    server = GrpcServer(
        on_finished=lambda *_: None, on_refused=lambda *_: None, on_internal_error=lambda *_: None, limits=Limits()
    )
    GenerationServicer(table, ServerSettings(), Metrics()).add_to(server)
    listening = socket.create_server(("127.0.0.1", 0))
    server.start([listening])
    interactive = [request(model="held", seed=seed) for seed in range(1, 10)]
    bulk = [request(model="held", seed=seed, priority=pb.PRIORITY_BULK) for seed in range(101, 110)]
    alternately = [one for pair in zip(interactive, bulk, strict=True) for one in pair]
    with Peer(f"127.0.0.1:{listening.getsockname()[1]}") as peer:
        stream = peer.head(head(EACH))
        for seed in (50, 60):  # one runs, and one stands ready
            peer.body(stream, message(request(model="held", seed=seed, count=8).SerializeToString()), end=False)
        await engine.wait_for_batch()
        peer.body(stream, b"".join(message(one.SerializeToString()) for one in alternately))
        async with asyncio.timeout(WAIT_S):
            while batcher.waiting < 18:  # noqa: ASYNC110  what comes over a socket sets no event
                await asyncio.sleep(0.001)
        engine.released.release(5)
        assert len((await asyncio.to_thread(peer.answer, stream)).messages) == 20
    # An eighth of the batch is bulk while interactive requests wait, then all that they leave.
    assert engine.batches[2:] == [[1, 2, 3, 4, 5, 6, 7, 101], [8, 9, *range(102, 108)], [108, 109]]
    await server.drain(10)
    await asyncio.to_thread(scheduler.close)


async def test_a_stream_that_is_left_leaves_nothing_in_the_queue(start_server: Start) -> None:

    running = start_server()
    async with grpc.aio.insecure_channel(running.address) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateEach()
        for seed in range(100):
            await call.write(request(model="cdcgan-mnist", seed=seed, count=1000))
        await call.read()
        call.cancel()
    # It ends at once only if nothing of it is left to be made.
    code = await asyncio.to_thread(running.stop)
    assert code == 0


async def test_for_a_reader_that_does_not_read_few_images_are_made(start_server: Start) -> None:
    running = start_server("--max-queue-images", "100000")
    images = 'ganserve_images_total{model="mlp-mnist",version="1"}'
    # Otherwise the client opens its window while the machine is busy: it then takes 70 MB that nobody reads.
    async with grpc.aio.insecure_channel(running.address, [("grpc.http2.bdp_probe", 0)]) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateEach()
        for seed in range(150):
            await call.write(request(model="mlp-mnist", seed=seed, count=1000))
        await call.read()
        made = 0.0
        while made < (now := running.scrape()[images]):
            made = now
            await asyncio.sleep(0.5)
        assert 0 < made < 60_000  # of 150,000, which are 118 MB
        call.cancel()


@pytest.mark.slow
async def test_a_reader_that_does_not_read_fills_no_memory(start_server: Start) -> None:
    running = start_server("--max-queue-images", "100000")
    async with grpc.aio.insecure_channel(running.address) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateEach()
        await call.write(request(model="mlp-mnist", seed=0))
        await call.read()
        before = resident_mib(running)
        writing = asyncio.create_task(write_all(call))
        # 4,000 answers of 50 images would be 157 MB: the server stops reading requests long before.
        await asyncio.wait({writing}, timeout=3)
        assert resident_mib(running) - before < 60
        answers = 0
        while answers < 4_000 and (await call.read()) is not grpc.aio.EOF:
            answers += 1
        assert answers == 4_000
        await writing


@pytest.mark.slow
async def test_answers_that_were_sent_fill_no_memory(start_server: Start) -> None:
    """Of 16 MB each: what only the collection of garbage would free was one of each, 190 MB."""
    running = start_server("--max-images-per-request", "20000")
    async with grpc.aio.insecure_channel(running.address, [("grpc.max_receive_message_length", -1)]) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateEach()
        resident: list[int] = []
        for seed in range(12):
            await call.write(request(model="mlp-mnist", seed=seed, count=20_000))
            assert (await call.read()).response.seeds[0] == seed
            resident.append(resident_mib(running))
    assert max(resident) - resident[0] < 100


async def test_what_a_full_queue_has_no_room_for_is_told_of_each_request_alone(start_server: Start) -> None:
    running = start_server("--max-queue-images", "20")
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        large = request(model="cdcgan-mnist", seed=0, count=1000)
        answers = [
            answer async for answer in stub.GenerateEach([large, *[request(model="cdcgan-mnist", seed=1)] * 200])
        ]
    refused = [answer.error for answer in answers if answer.HasField("error")]
    assert {error.reason for error in refused} == {"queue_full"}
    assert all("no room for 1 more" in error.message for error in refused)


def resident_mib(running: RunningServer) -> int:
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) >> 10


async def write_all(call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
    for seed in range(4_000):
        await call.write(request(model="mlp-mnist", seed=seed, count=50))
    await call.done_writing()
