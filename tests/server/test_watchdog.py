"""Batches that take too long: only the callers of their model are affected."""

import asyncio
import concurrent.futures
import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tests.conftest import RunningServer
from tests.model_files import model_of_picture
from tests.server.test_scheduler import HeldEngine, begin, draw, make, queue_of, settle
from tests.server.test_start_and_drain import wait_for_sample

from ganserve import Client
from ganserve.errors import GanserveError
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute import watchdog
from ganserve_server.compute.batching import BatchLimits, Shapes
from ganserve_server.compute.engine import Engine
from ganserve_server.compute.inputs import Feeds
from ganserve_server.errors import BatchTimedOut
from ganserve_server.observe.metrics import Metrics
from ganserve_server.queueing.scheduler import Scheduler
from ganserve_server.repository.verify import CARD_KEY, ModelRejected, load_version
from ganserve_server.settings import BUNDLED_MODELS

Start = Callable[..., RunningServer]

WAIT_S = 60
LIMIT_S = 1.0
STUCK_LIMIT_S = 2.0  # enough for the operators before the product, which can be ended, on a machine under load
CARD = pb.ModelCard(latent_dim=2, height=1, width=1, channels=1)
# Latents of one image. The first value is the number of rounds of a Loop, the second one the rows of a product.
QUICK, ENDLESS, STUCK = [0.0, 0.0], [1e15, 0.0], [0.0, 3000.0]


def graph_of(nodes: list[onnx.NodeProto], **weights: Any) -> onnx.ModelProto:
    latent = helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["N", 2])
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, 1, 1])
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", [latent], [image], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def publish(repository: Path, model: onnx.ModelProto, name: str = "hostile") -> Path:
    model.metadata_props.add(key=CARD_KEY, value=json_format.MessageToJson(CARD))
    path = repository / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(model.SerializeToString())
    return path


def hostile(least_rounds: int = 1) -> onnx.ModelProto:
    """Return a model that is quick for ordinary latents, and takes for ever or very long for others."""

    def value(name: str, kind: int, shape: list[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still_on"]), helper.make_node("Add", ["sum", "one"], ["more"])],
        "body",
        [value("round", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("sum", TensorProto.INT64, [])],
        [value("still_on", TensorProto.BOOL, []), value("more", TensorProto.INT64, [])],
        [numpy_helper.from_array(np.array(1), "one")],
    )
    nodes = [
        helper.make_node("ReduceMax", ["latent", "images"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Max", ["whole", "least"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "first"], ["rounds"]),
        helper.make_node("Loop", ["rounds", "yes", "zero"], ["turns"], body=body),
        helper.make_node("Slice", ["sizes", "ones", "twos"], ["rows"]),
        helper.make_node("Concat", ["rows", "rows"], ["shape"], axis=0),
        helper.make_node(
            "ConstantOfShape", ["shape"], ["matrix"], value=helper.make_tensor("", TensorProto.INT64, [1], [1])
        ),
        # Of whole numbers, for which onnxruntime has no fast kernel: 0.5 s for 1,000 rows, and 8 MB a matrix.
        helper.make_node("MatMul", ["matrix", "matrix"], ["product"]),
        helper.make_node("ReduceMax", ["product"], ["most"], keepdims=0),
        helper.make_node("Add", ["turns", "most"], ["both"]),
        helper.make_node("Mul", ["both", "zero"], ["nothing"]),
        helper.make_node("ReduceMax", ["latent", "values"], ["grey"], keepdims=1),
        helper.make_node("Cast", ["nothing"], ["no_grey"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["grey", "no_grey"], ["level"]),
        helper.make_node("Reshape", ["level", "picture"], ["pixels"]),
        helper.make_node("Clip", ["pixels", "black", "white"], ["levels"]),
        helper.make_node("Cast", ["levels"], ["image"], to=TensorProto.UINT8),
    ]
    return graph_of(
        nodes,
        images=np.array([0]),
        values=np.array([1]),
        least=np.array([least_rounds, 1]),
        first=np.array(0),
        ones=np.array([1]),
        twos=np.array([2]),
        yes=np.array(True),
        zero=np.array(0),
        picture=np.array([-1, 1, 1, 1]),
        black=np.float32(0),
        white=np.float32(255),
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish(tmp_path, hostile())
    (tmp_path / "mlp-mnist").symlink_to(BUNDLED_MODELS / "mlp-mnist")
    return tmp_path


class Stream:
    """Calls for a good model, one after the other: the versions that answered, the errors, and the longest call."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.errors: list[Exception] = []
        self.longest_s = 0.0


@contextlib.contextmanager
def other_callers(address: str, model: str = "mlp-mnist") -> Iterator[Stream]:
    """Call a good model until the block ends, at least once after its last step."""
    stream, end = Stream(), threading.Event()

    def work() -> None:
        with Client(address) as client:
            last = False
            while not last:
                last = end.is_set()
                started = time.monotonic()
                try:
                    stream.versions.append(client.generate(model, seed=1, timeout_s=WAIT_S).version)
                except Exception as error:
                    stream.errors.append(error)
                stream.longest_s = max(stream.longest_s, time.monotonic() - started)

    caller = threading.Thread(target=work)
    caller.start()
    try:
        yield stream
    finally:
        end.set()
        caller.join()


def failure_of(address: str, latent: list[float], count: int = 1) -> GanserveError:
    with Client(address) as client, pytest.raises(GanserveError) as raised:
        client.generate("hostile", latents=[latent] * count, timeout_s=WAIT_S)
    return raised.value


def health_of(address: str, model: str) -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=model)
        status: int = health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S).status
        return status


def test_a_batch_that_never_ends_hurts_only_the_callers_of_its_model(start_server: Start, repository: Path) -> None:
    server = start_server("--models", repository, "--threads=2", f"--batch-timeout-s={LIMIT_S}")
    with Client(server.address) as client, other_callers(server.address) as others:
        assert client.generate("hostile", latents=[QUICK]).pixels.shape == (1, 1, 1, 1)
        with concurrent.futures.ThreadPoolExecutor() as callers:
            failures = list(callers.map(lambda count: failure_of(server.address, ENDLESS, count), [1, 1, 1, 300]))
        assert {(one.code, one.reason) for one in failures} <= {
            (grpc.StatusCode.INTERNAL, "batch_timeout"),
            (grpc.StatusCode.FAILED_PRECONDITION, "not_loaded"),  # of a call that came after the first was ended
        }
        assert failures[0].reason == "batch_timeout"
        later = failure_of(server.address, QUICK)
        assert (later.code, later.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "not_loaded")
        assert "took longer than 1 s, the limit set by --batch-timeout-s" in later.text
        assert [model.name for model in client.models()] == ["mlp-mnist"]
        assert health_of(server.address, "hostile") == health_pb2.HealthCheckResponse.NOT_SERVING
        assert health_of(server.address, "mlp-mnist") == health_pb2.HealthCheckResponse.SERVING
    assert not others.errors
    assert others.longest_s < 10 * LIMIT_S
    line = server.wait_for("a batch did not end; its version is taken out of service")
    assert (line["model"], line["version"], line["limit_s"]) == ("hostile", 1, LIMIT_S)
    assert line["digest"].startswith("sha256:")
    assert LIMIT_S <= line["seconds"] < 10 * LIMIT_S
    samples = server.scrape()
    assert samples['ganserve_batches_timed_out_total{model="hostile"}'] >= 1
    assert samples['ganserve_batches_timed_out_total{model="mlp-mnist"}'] == 0
    assert samples["ganserve_threads_lost_total"] == 0
    assert samples['ganserve_queue_images{model="hostile"}'] == 0
    assert samples['ganserve_files_rejected{kind="models"}'] == 1
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("reloaded")
    assert failure_of(server.address, QUICK).reason == "not_loaded"
    file = repository / "hostile" / "1" / "model.onnx"
    shutil.copy(file, file.with_name("changed"))
    file.with_name("changed").rename(file)
    assert server.wait_for("model loaded")["model"] == "hostile"
    with Client(server.address) as client:
        assert client.generate("hostile", latents=[QUICK]).pixels.shape == (1, 1, 1, 1)
    assert server.scrape()['ganserve_files_rejected{kind="models"}'] == 0
    assert server.stop() == 0


def test_a_thread_that_does_not_come_back_is_replaced_and_holds_up_no_end(
    start_server: Start, repository: Path
) -> None:
    server = start_server("--models", repository, "--threads=1", f"--batch-timeout-s={STUCK_LIMIT_S}")
    with other_callers(server.address) as others:
        assert failure_of(server.address, STUCK).reason == "batch_timeout"
        server.wait_for("a thread does not come back from a batch; another one takes its place")
        answered = len(others.versions)
    assert len(others.versions) > answered
    assert not others.errors
    assert server.scrape()["ganserve_threads_lost_total"] == 1
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 20


def test_a_batch_that_nobody_waits_for_ends_with_the_server_and_is_no_failure(
    start_server: Start, repository: Path
) -> None:
    server = start_server("--models", repository, "--batch-timeout-s=60")
    with Client(server.address) as client, pytest.raises(GanserveError):
        client.generate("hostile", latents=[ENDLESS], timeout_s=0.5)
    assert server.stop() == 0
    events = set()
    while "stopped" not in events:
        events.add(server.events.get(timeout=WAIT_S)["event"])
    assert "the engine failed" not in events


@pytest.mark.slow  # starts three workers, and waits for two drains
def test_a_worker_with_a_thread_that_does_not_come_back_is_replaced_while_others_serve(
    start_server: Start, repository: Path
) -> None:
    server = start_server("--models", repository, "--threads=2", "--workers=2", f"--batch-timeout-s={STUCK_LIMIT_S}")
    with other_callers(server.address) as others:
        assert failure_of(server.address, STUCK).reason == "batch_timeout"
        assert server.wait_for("a worker ended; it is replaced")["status"] == 70
        server.wait_for("worker started")
    assert not others.errors
    assert server.stop() == 0


async def test_a_batch_that_comes_back_late_is_not_delivered_and_its_core_is_not_counted_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "_GRACE_S", 0.0)
    late, good, metrics = HeldEngine(), HeldEngine(), Metrics()
    overdue: list[str] = []
    lost = asyncio.Event()
    scheduler = Scheduler(1, limit_s=0.2, on_overdue=lambda _, reason: overdue.append(reason), on_lost=lost.set)
    batcher, others = queue_of(late, scheduler, metrics), queue_of(good, scheduler, metrics)
    tasks = [begin(batcher, 0)]
    await late.wait_for_batch()
    tasks += [begin(batcher, seed) for seed in (1, 2)]  # one ready, one in the queue
    for task in tasks:
        with pytest.raises(BatchTimedOut, match=r"took longer than 0\.2 s"):
            await task
    assert len(overdue) == 1
    with pytest.raises(BatchTimedOut):
        await make(batcher, draw(5))
    await lost.wait()
    for released in range(3):  # by the thread that has taken the place
        good.released.release()
        assert (await make(others, draw(released))).pixels.ravel().tolist() == [released]
    late.released.release()
    await asyncio.to_thread(scheduler.close)
    await settle()
    assert late.batches == [[0]]
    assert metrics.registry.get_sample_value("ganserve_images_total", {"model": "held", "version": "1"}) == 3
    assert scheduler._free == 1
    await batcher.retire()


async def test_other_models_compute_while_a_batch_takes_much_longer_than_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "LATE_PART", 0.001)
    held, good = HeldEngine(), HeldEngine()
    scheduler = Scheduler(1, limit_s=WAIT_S)
    batcher, others = queue_of(held, scheduler), queue_of(good, scheduler)
    tasks = [begin(batcher, 0)]
    await held.wait_for_batch()
    await settle()
    for seed in range(3):
        good.released.release()
        assert (await make(others, draw(seed))).pixels.ravel().tolist() == [seed]
    tasks.append(begin(batcher, 1))  # starts only when the other one has ended
    await settle()
    assert held.batches == [[0]]
    for _ in tasks:
        held.released.release()
    assert [(await task).pixels.ravel().tolist() for task in tasks] == [[0], [1]]
    assert scheduler._free == 1
    await asyncio.to_thread(scheduler.close)


class ObedientEngine(HeldEngine):
    """Fails as soon as its batch is asked to end, and never ends otherwise."""

    def compute(self, feeds: Feeds, *, wide: bool = False, run: watchdog.Run | None = None) -> NDArray[np.uint8]:
        assert run is not None
        assert run.options is not None
        while not run.options.terminate:
            time.sleep(0.001)
        raise RuntimeError("Exiting due to terminate flag being set to true.")


async def test_a_batch_that_ends_as_soon_as_it_is_asked_to_counts_as_one_that_took_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end_and_wait(run: watchdog.Run) -> None:
        end(run)
        time.sleep(0.3)  # the batch ends meanwhile

    end = watchdog.Run.end
    monkeypatch.setattr(watchdog.Run, "end", end_and_wait)
    overdue: list[str] = []
    scheduler = Scheduler(1, limit_s=0.1, on_overdue=lambda _, reason: overdue.append(reason))
    with pytest.raises(BatchTimedOut):
        await make(queue_of(ObedientEngine(), scheduler), draw(0))
    assert len(overdue) == 1
    await asyncio.to_thread(scheduler.close)


def test_only_models_whose_shapes_follow_from_the_number_of_images_are_predictable() -> None:
    mlp = onnx.load(BUNDLED_MODELS / "mlp-mnist" / "1" / "model.onnx")
    assert Shapes(mlp).predictable_images(5) == 5
    assert Shapes(model_of_picture(np.zeros((2, 3, 1), np.uint8))).predictable_images(5) == 5  # a Shape, and an Expand
    assert Shapes(hostile()).predictable_images(5) == 0
    to_shape = [
        helper.make_node("ReduceMax", ["latent"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["size"], to=TensorProto.INT64),
    ]
    ranged = [
        *to_shape,
        helper.make_node("Range", ["zero", "size", "one"], ["many"]),
        helper.make_node("Cast", ["many"], ["image"], to=TensorProto.UINT8),
    ]
    assert Shapes(graph_of(ranged, zero=np.array(0), one=np.array(1))).predictable_images(5) == 0
    boxes = [
        helper.make_node("Unsqueeze", ["latent", "axes"], ["picture"]),
        helper.make_node("Concat", ["latent", "latent"], ["boxes"], axis=1),
        helper.make_node("RoiAlign", ["picture", "boxes", "zeros"], ["cut"]),
        helper.make_node("Cast", ["cut"], ["image"], to=TensorProto.UINT8),
    ]
    assert Shapes(graph_of(boxes, axes=np.array([1, 2]), zeros=np.array([0]))).predictable_images(5) == 0
    number = helper.make_tensor_value_info("sum", TensorProto.INT64, [])
    counted = [
        helper.make_node("Range", ["zero", "size", "one"], ["many"]),
        helper.make_node("ReduceSum", ["many"], ["sum"], keepdims=0),
    ]
    branched = [
        *to_shape,
        helper.make_node("Greater", ["size", "one"], ["large"]),
        helper.make_node(
            "If",
            ["large"],
            ["sum"],
            then_branch=helper.make_graph(counted, "then", [], [number]),
            else_branch=helper.make_graph([helper.make_node("Identity", ["one"], ["sum"])], "else", [], [number]),
        ),
        helper.make_node("Cast", ["sum"], ["image"], to=TensorProto.UINT8),
    ]
    assert Shapes(graph_of(branched, zero=np.array(0), one=np.array(1))).predictable_images(5) == 0
    # With three images, the shape is one of the values.
    sometimes = [
        *to_shape,
        helper.make_node("Unsqueeze", ["size", "axis"], ["sizes"]),
        helper.make_node("Concat", ["four", "four", "four", "sizes"], ["choices"], axis=0),
        helper.make_node("Shape", ["latent"], ["count"], end=1),
        helper.make_node("Gather", ["choices", "count"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Cast", ["zeros"], ["image"], to=TensorProto.UINT8),
    ]
    assert Shapes(graph_of(sometimes, axis=np.array([0]), four=np.array([4]))).predictable_images(5) == 2


def load(path: Path, limit_s: float) -> Engine:
    return load_version(
        "m", 1, path, max_model_mib=1, provider="cpu", threads=1, limits=BatchLimits(seconds=limit_s)
    ).engine


def test_a_model_that_is_too_slow_for_the_limit_is_rejected_with_both_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = publish(tmp_path, hostile(least_rounds=10**15), "endless")
    with pytest.raises(ModelRejected, match=r"too slowly, or never: it did not end within 0\.2 s.*--batch-timeout-s"):
        load(endless, 0.2)
    path = publish(tmp_path, hostile())
    assert load(path, 6.0).inline_images == 0
    monkeypatch.setattr(Engine, "seconds_for", lambda *_: 4.0)
    with pytest.raises(ModelRejected, match=r"takes 4 s .* it may take 3 s, .* set --batch-timeout-s 12"):
        load(path, 6.0)


@pytest.mark.slow
def test_the_time_in_which_the_process_stands_still_does_not_count(start_server: Start, repository: Path) -> None:
    limit_s = 6.0
    server = start_server("--models", repository, "--threads=1", f"--batch-timeout-s={limit_s}")
    with Client(server.address) as client, concurrent.futures.ThreadPoolExecutor() as caller:
        started = time.monotonic()
        client.generate("hostile", latents=[[1e5, 0.0]], timeout_s=WAIT_S)
        rounds = 1e5 / (time.monotonic() - started)  # of a batch of about a second
        call = caller.submit(client.generate, "hostile", latents=[[rounds, 0.0]], timeout_s=WAIT_S)
        wait_for_sample(server, "ganserve_calls", lambda calls: calls == 1)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(limit_s + 2)
        server.process.send_signal(signal.SIGCONT)
        assert call.result().pixels.shape == (1, 1, 1, 1)
    assert server.scrape()['ganserve_batches_timed_out_total{model="hostile"}'] == 0
