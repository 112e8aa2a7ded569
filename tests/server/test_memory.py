"""The memory of a batch: it is measured when a model is loaded, and bounds the number of images."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tests.conftest import RunningServer
from tests.server.test_batching import pixel_norm

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.batching import Batching, BatchLimits
from ganserve_server.compute.engine import Engine
from ganserve_server.compute.inputs import Draw
from ganserve_server.repository.verify import CARD_KEY, load_version

MIB = 1 << 20
LATENT = 16
WIDTH = MIB // 4 // LATENT  # float32 values for each number of the latent: an image takes 1 MiB


def wide_model(path: Path) -> None:
    """Write a generator of 4x4 pixels that repeats its latent up to 1 MiB, and takes the largest values."""
    weights = {
        "column": np.array([-1, LATENT, 1], np.int64),
        "wide": np.array([1, LATENT, WIDTH], np.int64),
        "axis": np.array([2], np.int64),
        "shape": np.array([-1, 4, 4, 1], np.int64),
        "grey": np.float32(20),
        "middle": np.float32(128),
    }
    nodes = [
        helper.make_node("Reshape", ["latent", "column"], ["columns"]),
        helper.make_node("Expand", ["columns", "wide"], ["large"]),
        helper.make_node("ReduceMax", ["large", "axis"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "grey"], ["scaled"]),
        helper.make_node("Add", ["scaled", "middle"], ["shifted"]),
        helper.make_node("Cast", ["shifted"], ["levels"], to=TensorProto.UINT8),
        helper.make_node("Reshape", ["levels", "shape"], ["image"]),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "wide",
            [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["N", LATENT])],
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 4, 4, 1])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    card = pb.ModelCard(latent_dim=LATENT, height=4, width=4, channels=1)
    model.metadata_props.add(key=CARD_KEY, value=json_format.MessageToJson(card))
    path.parent.mkdir(parents=True)
    onnx.save(model, path)


def load(path: Path, limits: BatchLimits) -> Engine:
    return load_version("wide", 1, path, max_model_mib=64, provider="cpu", threads=2, limits=limits).engine


def draw(count: int) -> Draw:
    return Draw(count, np.arange(count, dtype=np.uint32), {}, 1.0)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    path = tmp_path / "wide" / "1" / "model.onnx"
    wide_model(path)
    return path


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each run of onnxruntime."""
    sizes: list[int] = []
    run = onnxruntime.InferenceSession.run

    def counted(self: Any, names: list[str], feeds: dict[str, NDArray[Any]], options: Any = None) -> Any:
        sizes.append(len(feeds["latent"]))
        return run(self, names, feeds, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", counted)
    return sizes


# An image takes a little more than its 1 MiB.
@pytest.mark.parametrize(
    ("images", "memory_mib", "largest"), [(64, 4, 3), (64, 5, 4), (2, 4, 2), (64, 1, 1), (64, 4000, 64)]
)
def test_a_batch_has_as_many_images_as_fit_into_its_memory(
    wide: Path, images: int, memory_mib: int, largest: int
) -> None:
    engine = load(wide, BatchLimits(images, memory_mib * MIB))
    assert 1.0 < engine.image_bytes / MIB < 1.01
    assert engine.largest_batch == largest


@pytest.mark.parametrize("limits", [BatchLimits(1, 64 * MIB), BatchLimits(2, 64 * MIB), BatchLimits(64, 3 * MIB)])
def test_loading_runs_no_larger_batch_than_serving(wide: Path, limits: BatchLimits, batches: list[int]) -> None:
    engine = load(wide, limits)
    assert max(batches) == engine.largest_batch == min(limits.images, 2)


@pytest.mark.parametrize(("images", "largest", "batching"), [(1, 1, Batching.SINGLES), (2, 2, Batching.PAIRS)])
def test_a_lone_image_is_not_made_as_two_if_all_are_made_alone(
    tmp_path: Path, images: int, largest: int, batching: Batching, batches: list[int]
) -> None:
    path = tmp_path / "norm" / "1" / "model.onnx"
    pixel_norm(path)
    engine = load(path, BatchLimits(images))
    engine.run([draw(1)])
    assert (max(batches), engine.batching, engine.padding(1)) == (largest, batching, largest - 1)


def test_the_memory_of_large_images_is_given_back(wide: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024

    engine = load(wide, BatchLimits())
    before = resident()
    engine.run([draw(64)])
    assert resident() - before < 32  # of 64 MiB


def test_without_a_folder_for_the_profile_memory_limits_nothing(
    wide: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(wide / "missing"))
    engine = load(wide, BatchLimits(64, MIB))
    assert (engine.image_bytes, engine.largest_batch) == (0, 64)
    (record,) = caplog.records
    assert str(wide / "missing") in record.__dict__["reason"]


def test_a_model_with_loops_is_not_measured(wide: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its profile would have an entry for each round of each loop."""
    model = onnx.load(wide)
    body = helper.make_graph(
        [helper.make_node("Identity", ["more"], ["go_on"]), helper.make_node("Identity", ["before"], ["after"])],
        "round",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.int64), "rounds"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    place = next(index for index, node in enumerate(model.graph.node) if node.op_type == "Add")
    model.graph.node[place].input[0] = "turned"
    model.graph.node.insert(place, helper.make_node("Loop", ["rounds", "true", "scaled"], ["turned"], body=body))
    onnx.save(model, wide)
    engine = load(wide, BatchLimits(64, MIB))
    assert (engine.image_bytes, engine.largest_batch) == (0, 64)
    (record,) = caplog.records
    assert "loops" in record.__dict__["reason"]


# 10 images: 3 + 3 + 3 + 1, and 10 times one.
@pytest.mark.parametrize(("memory_mib", "largest", "count"), [(4, 3, 4), (1, 1, 10)])
def test_a_server_makes_as_many_images_at_once_as_fit_into_the_memory(
    start_server: Callable[..., RunningServer], wide: Path, memory_mib: int, largest: int, count: int
) -> None:
    models = wide.parent.parent.parent
    server = start_server(f"--models={models}", f"--batch-memory-mib={memory_mib}")
    with Client(server.address) as client:
        made = client.generate("wide", count=10, seed=5)
    for index, image in enumerate(made):
        latent = np.random.RandomState(5 + index).standard_normal(LATENT).astype(np.float32)
        assert image.pixels.ravel().tolist() == (latent * np.float32(20) + np.float32(128)).astype(np.uint8).tolist()
    batches = {name: value for name, value in server.scrape().items() if name.startswith("ganserve_batch_size")}
    assert batches['ganserve_batch_size_count{model="wide"}'] == count
    assert batches['ganserve_batch_size_sum{model="wide"}'] == 10
    shutil.copytree(wide.parent, models / "wide" / "2.tmp")
    (models / "wide" / "2.tmp").rename(models / "wide" / "2")
    loaded = server.wait_for("model loaded")
    assert (loaded["largest_batch"], loaded["image_mib"]) == (largest, pytest.approx(1.0, abs=0.01))
