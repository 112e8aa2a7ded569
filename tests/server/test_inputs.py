"""What a model's inputs are and how requests become them; with a third input, which only this test knows."""

import asyncio

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.engine import Engine
from ganserve_server.compute.gpu import BucketRunner, GpuOptions, tensorrt_providers
from ganserve_server.compute.inputs import Draw, Inputs, ModelInput, TensorType
from ganserve_server.compute.model import ModelVersion
from ganserve_server.errors import InvalidRequest
from ganserve_server.inference import grpc_service_pb2
from ganserve_server.observe.metrics import Metrics
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.scheduler import Scheduler
from ganserve_server.services.open_inference import _draw


def style_of(seeds: NDArray[np.uint32]) -> NDArray[np.float32]:
    return np.stack([seeds, seeds + 1], 1).astype(np.float32)


STYLE = ModelInput("style", np.dtype(np.float32), (2,), of_seeds=style_of)
INPUTS = Inputs([*Inputs.of(pb.ModelCard(latent_dim=3)), STYLE])
CARD = pb.ModelCard(latent_dim=3, height=1, width=2, channels=1)


def styled_model() -> bytes:
    """Return a model whose image, 1x2, shows the style: its values are the pixels."""
    nodes = [
        helper.make_node("ReduceSum", ["latent", "axis"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "nothing"], ["zeros"]),
        helper.make_node("Add", ["style", "zeros"], ["values"]),
        helper.make_node("Cast", ["values"], ["bytes"], to=TensorProto.UINT8),
        helper.make_node("Reshape", ["bytes", "shape"], ["image"]),
    ]
    weights = [
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("nothing", TensorProto.FLOAT, [1], [0.0]),
        helper.make_tensor("shape", TensorProto.INT64, [4], [-1, 1, 2, 1]),
    ]
    inputs = [
        helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["n", 3]),
        helper.make_tensor_value_info("style", TensorProto.FLOAT, ["n", 2]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 1, 2, 1])
    graph = helper.make_graph(nodes, "styled", inputs, [image], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def model() -> ModelVersion:
    engine = Engine(styled_model(), INPUTS, "cpu", 1)
    engine.warm_up((1, 2, 1))
    engine.measure()
    return ModelVersion("styled", 1, "sha256:0", CARD, engine, b"")


def infer_request(**tensors: NDArray[np.float32]) -> grpc_service_pb2.ModelInferRequest:
    request = grpc_service_pb2.ModelInferRequest(model_name="styled")
    for name, values in tensors.items():
        datatype = "UINT32" if name == "seed" else "FP32"
        request.inputs.add(name=name, datatype=datatype, shape=values.shape)
        request.raw_input_contents.append(values.tobytes())
    return request


def made(model: ModelVersion, *draws: Draw) -> list[list[list[int]]]:
    """Make draws together, through the queue; return the pixels of each image of each."""

    async def make() -> list[list[list[int]]]:
        scheduler = Scheduler(1)
        batcher = Batcher(model, 8, 100, metrics=Metrics(), scheduler=scheduler)
        try:
            answers = await asyncio.gather(*(batcher.make(draw, fairness_key="a", deadline=None) for draw in draws))
            return [answer.pixels.reshape(-1, 2).tolist() for answer in answers]
        finally:
            scheduler.close()

    return asyncio.run(make())


def test_a_third_input_passes_through_the_protocol_and_the_queue(model: ModelVersion) -> None:
    seeds, style = np.array([7, 9], np.uint32), np.array([[10, 20], [30, 40]], np.float32)
    by_seed = _draw(infer_request(seed=seeds), model, 8, 1.0)
    beside_seed = _draw(infer_request(seed=seeds, style=style), model, 8, 0.5)
    by_latent = _draw(infer_request(latent=np.ones((2, 3), np.float32), style=style + 1), model, 8, 1.0)
    assert made(model, by_seed, beside_seed, by_latent) == [
        [[7, 8], [9, 10]],
        [[10, 20], [30, 40]],
        [[11, 21], [31, 41]],
    ]
    assert made(model, beside_seed.part(1, 2)) == [[[30, 40]]]


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"latent": (2, 3)}, "style"),
        ({"latent": (2, 3), "style": (1, 2)}, "style"),
        ({"latent": (2, 3), "style": (2, 3)}, "style"),
        ({"style": (2, 2)}, "inputs"),
        ({"latent": (2, 3), "style": (2, 2), "noise": (2,)}, "inputs"),
        ({"latent": (2, 3), "style": (2, 2), "label": (2,)}, "label"),
    ],
)
def test_a_third_input_that_does_not_fit_is_named(
    tensors: dict[str, tuple[int, ...]], field: str, model: ModelVersion
) -> None:
    request = infer_request(**{name: np.zeros(shape, np.float32) for name, shape in tensors.items()})
    with pytest.raises(InvalidRequest) as caught:
        _draw(request, model, 8, 1.0)
    assert caught.value.field == field


def test_a_third_input_fills_the_buckets_of_a_gpu(model: ModelVersion) -> None:
    session = onnxruntime.InferenceSession(styled_model(), providers=["CPUExecutionProvider"])
    probes = INPUTS.feeds([INPUTS.probes(np.arange(4, dtype=np.uint32))])
    runner = BucketRunner(session, (1, 2, 1), probes, 4, device="cpu")
    feeds = INPUTS.feeds([INPUTS.probes(np.array([5, 50, 100], np.uint32))])
    assert runner.run(feeds).reshape(-1, 2).tolist() == [[5, 6], [50, 51], [100, 101]]
    options = dict(tensorrt_providers(GpuOptions(max_batch_size=16), INPUTS)[0][1])
    assert options["trt_profile_max_shapes"] == "latent:16x3,style:16x2"


def test_latents_are_drawn_as_the_contract_says() -> None:
    draws = [
        Draw(2, np.array([3, 4], np.uint32), {"style": np.zeros((2, 2))}, 0.5),
        Draw(1, None, {"latent": np.full((1, 3), 7, np.float32), "style": np.ones((1, 2))}, 0.5),
    ]
    drawn = [np.random.RandomState(seed).standard_normal(3).astype(np.float32) * np.float32(0.5) for seed in (3, 4)]
    feeds = INPUTS.feeds(draws)
    assert feeds["latent"].tolist() == [*(each.tolist() for each in drawn), [7.0, 7.0, 7.0]]
    assert feeds["style"].tolist() == [[0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"latent": ("float32", "n", 3), "style": ("float32", "n", 2)}, []),
        ({"latent": ("float32", "n", 3)}, ["no input style"]),
        ({"latent": ("float64", "n", 3), "style": ("float32", "n", 2)}, ["latent is float64 [n, 3]"]),
        ({"latent": ("float32", "n", 3), "style": ("float32", 1, 2)}, ["style is float32 [1, 2]"]),
        ({"latent": ("float32", "n", 4), "style": ("float32", "n", 2)}, ["latent is float32 [n, 4]"]),
        ({"latent": ("float32", "n", 3), "style": ("float32", "n", "k")}, ["style is float32 [n, k]"]),
        ({"latent": ("float32",), "z": ("float32", "n", 2)}, ["no input style", "latent is float32 w", "the input z"]),
    ],
)
def test_each_input_of_a_file_that_is_not_that_of_its_card_is_named(
    found: dict[str, tuple[str, *tuple[int | str, ...]]], said: list[str]
) -> None:
    wrong = INPUTS.mismatches({name: TensorType(dtype, tuple(shape)) for name, (dtype, *shape) in found.items()})
    assert len(wrong) == len(said)
    assert all(each in text for each, text in zip(said, wrong, strict=True))
