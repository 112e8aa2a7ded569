"""The GPU's way of running: over a stand-in of onnxruntime's CUDA provider, and for real on the CPU provider."""

# ruff: noqa: N802 - CUDA's names
import ctypes
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute import engine as engine_module
from ganserve_server.compute import gpu, watchdog
from ganserve_server.compute.engine import Engine, Provider, ProviderUnavailable, SessionRefused
from ganserve_server.compute.gpu import (
    CPU,
    CUDA,
    TENSORRT,
    BucketRunner,
    GpuOptions,
    agreeing_sizes,
    bucket_sizes,
    gpu_options,
)
from ganserve_server.compute.inputs import Draw, Feeds, Inputs
from ganserve_server.repository.verify import ModelRejected, load_version
from ganserve_server.settings import BUNDLED_MODELS, ServerSettings

SHAPE = (2, 2, 1)
LATENT_DIM = 4
Run = tuple[int, dict[str, NDArray[Any]]]  # graph, what was fed


class Value:
    """Stands for an OrtValue: memory of the host takes the device's place."""

    def __init__(self, array: NDArray[Any], device: tuple[str, int]) -> None:
        self.array, self.device = array, device

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: list[int], kind: Any, device: str, device_id: int) -> "Value":
        return cls(np.full(shape, 77, kind), (device, device_id))

    def update_inplace(self, rows: NDArray[Any]) -> None:
        assert rows.flags.c_contiguous
        assert rows.shape == self.array.shape
        assert rows.dtype == self.array.dtype
        self.array[...] = rows

    def numpy(self) -> NDArray[Any]:
        return self.array.copy()

    def data_ptr(self) -> int:
        return self.array.ctypes.data


class Options:
    """Stands for RunOptions."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.terminate = False

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class Binding:
    """Stands for an IOBinding."""

    def __init__(self) -> None:
        self.inputs: dict[str, Value] = {}
        self.outputs: dict[str, Value] = {}
        self.bind_ortvalue_input = self.inputs.__setitem__
        self.bind_ortvalue_output = self.outputs.__setitem__


class Machine:
    """Stands for onnxruntime on a machine with a GPU, or with less."""

    def __init__(self) -> None:
        self.works = [TENSORRT, CUDA, CPU]  # others are dropped without a word
        self.no_graphs = ""  # an error, when they are asked for
        self.no_capture = ""  # an error in the first run with graphs
        self.broken = ""  # an error of every session
        self.opened: list[Any] = []
        self.runs: list[Run] = []
        self.plain_runs = 0
        self.threads: set[int] = set()
        self.strange_sizes: set[int] = set()
        self.shifting = False  # images depend on their place in the batch
        self.fail_next = False
        self.compute: Callable[[dict[str, NDArray[Any]]], NDArray[np.uint8]] = pixels

    def open(self, model: bytes, options: Any, *, providers: list[Any], enable_fallback: int = 1) -> "Session":
        assert not enable_fallback
        self.opened.append(providers)
        named = dict(one if isinstance(one, tuple) else (one, {}) for one in providers)
        graphs = named.get(CUDA, {}).get("enable_cuda_graph") == "1"
        if self.broken or (graphs and self.no_graphs):
            raise RuntimeError(self.broken or self.no_graphs)
        return Session(self, model, [name for name in named if name in self.works], graphs=graphs)


class Session:
    """Stands for an InferenceSession. A CUDA graph is replayed with the addresses that it was captured with."""

    def __init__(self, machine: Machine, model: bytes, providers: list[str], *, graphs: bool) -> None:
        self.machine, self.model, self.providers, self.graphs = machine, model, providers, graphs
        self.captured: dict[str, list[int]] = {}

    def get_providers(self) -> list[str]:
        return self.providers

    def io_binding(self) -> Binding:
        return Binding()

    def run(self, names: list[str], feeds: dict[str, NDArray[Any]], _: object = None) -> list[NDArray[np.uint8]]:
        self.machine.plain_runs += 1
        return [self.machine.compute(feeds)]

    def end_profiling(self) -> str:
        return os.devnull  # without statistics of memory

    def run_with_iobinding(self, binding: Binding, options: Options) -> None:
        machine = self.machine
        if options.terminate:
            raise RuntimeError("Exiting due to terminate flag being set to true.")
        if machine.fail_next:
            machine.fail_next = False
            raise RuntimeError("out of memory")
        if self.graphs and machine.no_capture:
            raise RuntimeError(machine.no_capture)
        graph = options.entries["gpu_graph_id"]
        values = [*binding.inputs.values(), *binding.outputs.values()]
        addresses = [value.data_ptr() for value in values]
        assert self.captured.setdefault(graph, addresses) == addresses
        feeds = {name: value.array.copy() for name, value in binding.inputs.items()}
        machine.threads.add(threading.get_ident())
        machine.runs.append((int(graph), feeds))
        made = machine.compute(feeds)
        if len(made) in machine.strange_sizes:
            made = made + np.uint8(1)
        if machine.shifting:
            made = made + np.arange(len(made), dtype=np.uint8).reshape(-1, 1, 1, 1)
        (output,) = binding.outputs.values()
        output.array[...] = made


def pixels(feeds: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    shades = feeds["latent"] * 40 + 100 + feeds["label"][:, None]
    return shades.astype(np.uint8).reshape(-1, *SHAPE)


class Library:
    """Stands for libcudart: the device's memory is the host's, so a copy is a copy."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.refuses = False
        self.copied: list[int] = []
        self.fail_copy = False
        self.device: int | None = None

    def cudaSetDevice(self, device: int) -> int:
        self.device = device
        return 0

    def cudaHostRegister(self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: int) -> int:
        if self.refuses:
            return 1
        assert address.value
        self.locked[address.value] = size.value
        return 0

    def cudaHostUnregister(self, address: ctypes.c_void_p) -> int:
        assert address.value
        del self.locked[address.value]
        return 0

    def cudaGetLastError(self) -> int:
        return 0

    def cudaMemcpy(self, to: ctypes.c_void_p, of: ctypes.c_void_p, size: ctypes.c_size_t, kind: int) -> int:
        assert kind == 2
        if self.fail_copy:
            return 700
        self.copied.append(size.value)
        ctypes.memmove(to, of, size.value)
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(onnxruntime, "InferenceSession", made.open)
    monkeypatch.setattr(onnxruntime, "OrtValue", Value)
    monkeypatch.setattr(onnxruntime, "RunOptions", Options)
    monkeypatch.setattr(engine_module, "load_cuda_libraries", lambda: None)
    monkeypatch.setattr(engine_module, "nvidia_driver", lambda: True)
    monkeypatch.setattr(engine_module, "why_no_cuda", lambda: "no libcurand")
    monkeypatch.setattr(engine_module, "why_no_tensorrt", lambda: "no libnvinfer")
    monkeypatch.setattr(gpu, "cuda_libraries", dict)  # none: no memory can be locked
    return made


@pytest.fixture
def library(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(gpu, "cuda_libraries", lambda: {"libcublas.so.13": None, "libcudart.so.13": None})
    libraries = {"libcudart.so.13": made, None: ctypes.CDLL(None)}
    monkeypatch.setattr(gpu.ctypes, "CDLL", libraries.__getitem__)
    return made


def open_engine(provider: Provider = "cuda", max_batch_size: int = 8, **options: Any) -> Engine:
    options = {"gpu": GpuOptions(max_batch_size=max_batch_size), "classes": 3} | options
    card = pb.ModelCard(latent_dim=LATENT_DIM, class_names=map(str, range(options.pop("classes"))))
    return Engine(b"model", Inputs.of(card), provider, 1, **options)


def warm_engine(provider: Provider = "cuda", max_batch_size: int = 8) -> Engine:
    engine = open_engine(provider, max_batch_size)
    engine.warm_up(SHAPE)
    return engine


def draw(count: int, first: int = 1000) -> Draw:
    seeds = np.arange(first, first + count, dtype=np.uint32)
    return Draw(count, seeds, {"label": np.arange(count) % 3}, 1.0)


def wanted(count: int, first: int = 1000) -> NDArray[np.uint8]:
    seeds = range(first, first + count)
    latents = np.stack([np.random.RandomState(seed).standard_normal(LATENT_DIM) for seed in seeds])
    return pixels({"latent": latents.astype(np.float32), "label": np.arange(count) % 3})


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12]), (17, [1, 2, 4, 8, 16, 17])]
)
def test_buckets_are_powers_of_two_up_to_the_largest_batch(largest: int, sizes: list[int]) -> None:
    assert bucket_sizes(largest) == sizes


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 12), (12, 12)])
def test_a_batch_is_filled_up_to_the_next_bucket_and_cut_again(machine: Machine, count: int, bucket: int) -> None:
    engine = warm_engine(max_batch_size=12)
    engine.run([draw(12)])  # what it leaves behind must not be seen again
    machine.runs.clear()
    made = engine.run([draw(count)])
    ((graph, feeds),) = machine.runs
    assert graph == bucket
    assert feeds["latent"].shape == (bucket, LATENT_DIM)
    assert feeds["label"].shape == (bucket,)
    assert not feeds["latent"][count:].any()
    assert not feeds["label"][count:].any()
    assert np.array_equal(made, wanted(count))
    assert engine.padding(count) == bucket - count
    assert machine.plain_runs == 0


def test_each_bucket_is_run_before_the_first_call_and_has_a_graph_of_its_own(machine: Machine) -> None:
    warm_engine()
    assert {graph for graph, _ in machine.runs} == {1, 2, 4, 8}
    assert all(len(feeds["latent"]) == graph for graph, feeds in machine.runs)
    assert machine.runs[0][0] == 8  # sets the size of the arena


def test_images_stay_as_they_were_when_the_next_batch_is_made(machine: Machine, library: Library) -> None:
    engine = warm_engine()
    first = engine.run([draw(5)])
    engine.run([draw(8, first=2000)])
    assert np.array_equal(first, wanted(5))


def test_more_images_than_the_largest_bucket_are_made_in_parts(machine: Machine) -> None:
    engine = warm_engine()
    machine.runs.clear()
    assert np.array_equal(engine.run([draw(19)]), wanted(19))
    assert [graph for graph, _ in machine.runs] == [8, 8, 8]
    assert engine.padding(19) == 5


def test_all_runs_on_one_thread_for_graphs_belong_to_a_thread(machine: Machine) -> None:
    engine = warm_engine()
    others = [threading.Thread(target=engine.run, args=([draw(3)],)) for _ in range(3)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert len(machine.threads) == 1
    assert machine.threads.isdisjoint({threading.get_ident(), *(thread.ident for thread in others)})


def test_a_run_that_fails_leaves_the_next_as_it_should_be(machine: Machine, library: Library) -> None:
    engine = warm_engine()
    machine.fail_next = True
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.run([draw(3)])
    assert np.array_equal(engine.run([draw(3)]), wanted(3))
    library.fail_copy = True
    with pytest.raises(RuntimeError, match="status is 700"):
        engine.run([draw(3)])
    library.fail_copy = False
    assert np.array_equal(engine.run([draw(3)]), wanted(3))


def test_copies_go_through_locked_memory_and_leave_the_padding_behind(machine: Machine, library: Library) -> None:
    engine = open_engine(gpu=GpuOptions(device=3, max_batch_size=8))
    engine.warm_up(SHAPE)
    assert library.device == 3
    assert sorted(library.locked.values()) == sorted([8 * LATENT_DIM * 4, 8 * 8, 8 * 4])
    library.copied.clear()
    assert np.array_equal(engine.run([draw(5)]), wanted(5))
    assert library.copied == [5 * 4]
    del engine
    assert not library.locked


def test_without_locked_memory_the_images_are_the_same(
    machine: Machine, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    library.refuses = True
    assert np.array_equal(warm_engine().run([draw(5)]), wanted(5))
    assert not library.copied
    assert "no memory could be locked" in caplog.text


def test_only_buckets_that_agree_with_the_largest_are_used(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.strange_sizes = {1, 4}
    engine = warm_engine()
    assert engine.buckets == [2, 8]
    assert np.array_equal(engine.run([draw(1)]), wanted(1))
    assert [engine.padding(count) for count in (1, 2, 3, 4, 8)] == [1, 0, 5, 4, 0]
    (record,) = [record for record in caplog.records if "different bytes" in record.message]
    assert record.__dict__["not_used"] == [1, 4]
    assert record.__dict__["buckets"] == [2, 8]
    assert record.__dict__["one_image_ms"] > 0


def test_buckets_that_all_agree_are_all_used_and_nothing_is_said(
    machine: Machine, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    assert warm_engine().buckets == [1, 2, 4, 8]
    assert not caplog.records


def test_images_that_depend_on_their_place_are_reported(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.shifting = True
    assert warm_engine(max_batch_size=4).buckets[-1] == 4
    assert "depend on its place" in caplog.text


def test_agreement_is_of_every_image_wherever_it_stands() -> None:
    def make(size: int, feeds: Feeds) -> NDArray[np.uint8]:
        made = feeds["latent"].astype(np.uint8)
        return np.where((made == 5) & (size == 2), 0, made)  # the last image of a part that is not full

    feeds = {"latent": np.arange(1, 6, dtype=np.float32)}
    assert agreeing_sizes(make, [1, 2, 4], feeds) == [1, 4]


def test_options_reach_the_session(machine: Machine) -> None:
    open_engine(gpu=GpuOptions(device=1, mem_limit_mib=256))
    ((name, options), last) = machine.opened[0]
    assert (name, last) == (CUDA, CPU)
    assert options["device_id"] == "1"
    assert options["gpu_mem_limit"] == str(256 << 20)
    assert options["enable_cuda_graph"] == "1"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    open_engine()
    assert "gpu_mem_limit" not in machine.opened[-1][0][1]


@pytest.mark.parametrize(("classes", "label"), [(3, True), (0, False)])
def test_tensorrt_is_told_the_shapes_of_all_buckets(machine: Machine, classes: int, label: bool) -> None:
    open_engine("tensorrt", gpu=GpuOptions(device=2, tensorrt_cache="/cache", max_batch_size=16), classes=classes)
    ((name, options), (second, _), last) = machine.opened[0]
    assert (name, second, last) == (TENSORRT, CUDA, CPU)
    assert options["trt_profile_min_shapes"] == "latent:1x4" + (",label:1" if label else "")
    assert options["trt_profile_max_shapes"] == "latent:16x4" + (",label:16" if label else "")
    assert options["trt_profile_opt_shapes"] == options["trt_profile_max_shapes"]
    assert options["trt_engine_cache_path"] == "/cache"
    assert options["device_id"] == "2"


def test_settings_become_options() -> None:
    settings = ServerSettings(gpu_device=2, gpu_mem_limit_mib=100, tensorrt_cache="/cache", max_batch_size=32)
    assert gpu_options(settings) == GpuOptions(2, 100, "/cache", 32)


@pytest.mark.parametrize(
    ("provider", "works", "reason"),
    [
        ("cuda", [CPU], "CUDA was requested, but onnxruntime would run on CPU: no libcurand"),
        ("tensorrt", [CUDA, CPU], "TensorRT was requested, but onnxruntime would run on CUDA: no libnvinfer"),
        ("tensorrt", [CPU], "TensorRT was requested, but onnxruntime would run on CPU: no libnvinfer"),
    ],
)
def test_a_session_that_drops_the_provider_in_silence_is_refused(
    machine: Machine, provider: Provider, works: list[str], reason: str
) -> None:
    machine.works = works
    with pytest.raises(ProviderUnavailable, match=reason):
        open_engine(provider)


def test_auto_goes_to_the_cpu_and_says_why(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.works = [CPU]
    engine = warm_engine("auto")
    assert engine.on_cpu
    assert engine.buckets == []
    assert engine.padding(3) == 0
    (record,) = [record for record in caplog.records if record.message == "the GPU is not used"]
    assert record.__dict__["reason"] == "no libcurand"
    machine.plain_runs = 0
    assert np.array_equal(engine.run([draw(3)]), wanted(3))
    assert machine.plain_runs == 1
    assert not machine.runs


def test_a_batch_on_a_gpu_that_takes_too_long_is_asked_to_end(machine: Machine) -> None:
    engine = warm_engine()
    run = watchdog.Run(60.0, options=onnxruntime.RunOptions())
    engine.compute(engine.feeds([draw(3)]), run=run)
    assert run.started < math.inf  # from when the GPU's thread began
    run.end()
    with pytest.raises(RuntimeError, match="terminate flag"):
        engine.compute(engine.feeds([draw(3)]), run=run)


def test_auto_takes_cuda_where_it_works(machine: Machine) -> None:
    engine = warm_engine("auto")
    assert engine.provider == CUDA
    assert not engine.on_cpu
    assert np.array_equal(engine.run([draw(3)]), wanted(3))


def test_a_provider_that_breaks_is_told_from_a_model_that_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_on_cpu_alone(model: bytes, options: Any, *, providers: list[Any], enable_fallback: int) -> Session:
        if providers != [CPU]:
            raise RuntimeError("CUDA failure 35: the driver is too old")
        return Session(machine, model, [CPU], graphs=False)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_cpu_alone)
    with pytest.raises(ProviderUnavailable, match="failure 35: the driver is too old"):
        open_engine("cuda")
    assert open_engine("auto").on_cpu
    monkeypatch.setattr(onnxruntime, "InferenceSession", machine.open)
    machine.broken = "the graph has a cycle"
    for provider in ("cuda", "tensorrt", "auto", "cpu"):
        with pytest.raises(SessionRefused, match="cycle"):
            open_engine(provider)


@pytest.mark.parametrize("when", ["no_graphs", "no_capture"])
def test_a_model_that_no_graph_can_hold_runs_without(
    machine: Machine, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    setattr(machine, when, "node 7 is not on CUDA")
    engine = warm_engine()
    assert engine.provider == CUDA
    assert np.array_equal(engine.run([draw(3)]), wanted(3))
    assert [providers[0][1]["enable_cuda_graph"] for providers in machine.opened] == ["1", "0"]
    (record,) = [record for record in caplog.records if record.message.startswith("no CUDA graphs")]
    assert record.__dict__["reason"] == "node 7 is not on CUDA"


def test_a_first_run_that_fails_without_graphs_too_is_an_error(machine: Machine) -> None:
    engine = open_engine("tensorrt")
    machine.fail_next = True
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.warm_up(SHAPE)


@pytest.mark.parametrize("max_batch_size", [1, 16])
def test_times_are_measured_of_the_buckets(machine: Machine, max_batch_size: int) -> None:
    engine = warm_engine(max_batch_size=max_batch_size)
    machine.runs.clear()
    engine.measure()
    assert {graph for graph, _ in machine.runs} == {1, max_batch_size}
    assert engine.seconds_for(max_batch_size) > 0
    assert not engine.wide_is_faster


def real_session(name: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = BUNDLED_MODELS / name / "1" / "model.onnx"
    return onnxruntime.InferenceSession(path, options, providers=[CPU])


@pytest.mark.parametrize("name", ["cdcgan-mnist", "mlp-mnist"])
def test_buckets_on_the_cpu_provider_make_the_bytes_of_a_plain_run(name: str) -> None:
    session = real_session(name)
    latent, *label = session.get_inputs()
    feeds: Feeds = {"latent": np.random.RandomState(0).standard_normal((64, latent.shape[1])).astype(np.float32)}
    if label:
        feeds["label"] = np.arange(64) % 10
    runner = BucketRunner(session, (28, 28, 1), feeds, 64, device="cpu")
    assert runner.sizes == [1, 2, 4, 8, 16, 32, 64]
    assert runner.steady
    for count in range(1, 65):
        part = {name: rows[64 - count :] for name, rows in feeds.items()}
        assert np.array_equal(runner.run(part), session.run(["image"], part)[0])


@pytest.fixture
def digits() -> onnxruntime.InferenceSession:
    return real_session("cdcgan-mnist")  # made before the stand-in takes onnxruntime's place


def test_a_version_loads_and_makes_its_golden_images_in_buckets(
    digits: onnxruntime.InferenceSession, machine: Machine, library: Library
) -> None:
    machine.compute = lambda feeds: digits.run(["image"], feeds)[0]

    def load() -> Engine:
        path = BUNDLED_MODELS / "cdcgan-mnist" / "1" / "model.onnx"
        options = GpuOptions(max_batch_size=4)
        return load_version("m", 1, path, max_model_mib=64, provider="cuda", threads=1, gpu=options).engine

    engine = load()
    assert (engine.provider, engine.buckets) == (CUDA, [1, 2, 4])
    labels = np.arange(3)
    made = engine.run([Draw(3, labels.astype(np.uint32), {"label": labels}, 1.0)])
    latents = np.stack([np.random.RandomState(seed).standard_normal(64) for seed in range(3)]).astype(np.float32)
    assert np.array_equal(made, digits.run(["image"], {"latent": latents, "label": labels})[0])
    assert machine.plain_runs == 0
    machine.compute = lambda feeds: np.zeros((len(feeds["latent"]), 28, 28, 1), np.uint8)
    with pytest.raises(ModelRejected, match="golden image"):
        load()
    machine.compute = lambda feeds: np.zeros((len(feeds["latent"]), 28, 27, 1), np.uint8)
    with pytest.raises(ModelRejected, match="fails when it runs"):
        load()
