"""Inputs of requests and cards at their limits: they are answered, or refused with the field and the limit."""

import asyncio
import io
import json
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tests.conftest import RunningServer, run_server
from tests.server.test_further_inputs import ALL, CLASSES, Inputs, load, model_of, pixels, save

from ganserve import AsyncClient, Client, InvalidRequestError, read_provenance
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.inference import grpc_service_pb2
from ganserve_server.repository.verify import ModelRejected

LATENT: dict[str, Any] = {"name": "latent", "latent": {"shape": [2]}}
NAMES = [f"attribute {number:03}".ljust(64, "+") for number in range(256)]


def with_attributes(*attributes: dict[str, Any]) -> Inputs:
    return [LATENT, {"name": "attributes", "attributes": {"attributes": list(attributes)}}]


def signs() -> onnx.ModelProto:
    """Return a model whose attribute x is a pixel of 1 / x, at least 0 and at most 255."""
    model = model_of(with_attributes({"name": "tilt", "minimum": -1, "maximum": 1}), [])
    nodes = model.graph.node
    place = next(index for index, node in enumerate(nodes) if node.op_type == "Identity")
    shown = nodes[place].output[0]
    nodes[place].CopyFrom(helper.make_node("Reciprocal", ["attributes"], ["reciprocal"]))
    nodes.insert(place + 1, helper.make_node("Clip", ["reciprocal", "nothing", "most"], [shown]))
    model.graph.initializer.append(helper.make_tensor("most", onnx.TensorProto.FLOAT, [], [255]))
    return model


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    repository = tmp_path_factory.mktemp("models")
    save(model_of(with_attributes(*({"name": name} for name in NAMES)), []), repository, "many")
    save(model_of(ALL, CLASSES), repository, "all")
    save(signs(), repository, "signs")
    noisy: Inputs = [LATENT, {"name": "noise", "latent": {"shape": [70_000], "defaultSeed": 3}}]
    save(in_rows(model_of(noisy, [], scale=20), 18, 3889), repository, "noisy")  # 70,002 pixels
    with run_server("--workers=1", f"--models={repository}") as server:
        yield server


def in_rows(model: onnx.ModelProto, height: int, width: int) -> onnx.ModelProto:
    """Return a model whose image, one row, is arranged in several rows."""
    model.graph.node[-1].output[0] = "row of all"
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, height, width, 1]), "rows"))
    model.graph.node.append(helper.make_node("Reshape", ["row of all", "rows"], ["image"]))
    for dimension, size in zip(model.graph.output[0].type.tensor_type.shape.dim[1:3], (height, width), strict=True):
        dimension.dim_value = size
    (entry,) = model.metadata_props
    entry.value = json.dumps({**json.loads(entry.value), "height": height, "width": width})
    return model


def noise(seed: int) -> list[int]:
    """Return the pixels of the noise of the model "noisy"."""
    values = np.random.RandomState(seed).standard_normal(70_000).astype(np.float32)
    return np.rint(100 + 20 * values).astype(np.uint8).tolist()


@pytest.fixture
def client_of_limits(limits: RunningServer) -> Iterator[Client]:
    with Client(limits.address) as client:
        yield client


@pytest.fixture
def stub(limits: RunningServer) -> Iterator[pb_grpc.GenerationServiceStub]:
    with grpc.insecure_channel(limits.address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def test_a_call_may_set_256_attributes_of_1024_images(client_of_limits: Client) -> None:
    values = np.random.RandomState(0).randint(0, 2, (256, 1024))
    batch = client_of_limits.generate("many", seed=1, attributes=dict(zip(NAMES, values, strict=True)))
    assert np.array_equal(batch.pixels[:, 0, 2:, 0].T, values)
    assert batch.attributes == {name: tuple(each) for name, each in zip(NAMES, values.tolist(), strict=True)}


@pytest.mark.parametrize("encoding", [pb.ENCODING_PNG, pb.ENCODING_JPEG, pb.ENCODING_WEBP])
def test_the_metadata_of_files_holds_the_most_and_longest_attributes(
    encoding: pb.Encoding, stub: pb_grpc.GenerationServiceStub
) -> None:
    request = pb.GenerateImagesRequest(model="many", count=2, seed=1, encoding=encoding)
    for number, name in enumerate(NAMES):
        request.inputs.attributes.add(name=name, values=[number / 256, 0.1])
    made = [read_provenance(file) for file in stub.GenerateImages(request).files]
    assert made[0].attributes == {name: number / 256 for number, name in enumerate(NAMES)}
    assert made[1].attributes == dict.fromkeys(NAMES, float(np.float32(0.1)))


@pytest.mark.parametrize("encoding", [pb.ENCODING_PNG, pb.ENCODING_JPEG, pb.ENCODING_WEBP])
@pytest.mark.parametrize("count", [12, 17])  # 17 x 256 values are too many; 12 x 256 of 20 digits are too long
def test_a_sheet_with_too_many_attributes_for_its_metadata_says_that_it_lacks_them(
    encoding: pb.Encoding, count: int, stub: pb_grpc.GenerationServiceStub
) -> None:
    request = pb.GenerateImagesRequest(model="many", count=count, seed=1, encoding=encoding)
    request.layout = pb.LAYOUT_CONTACT_SHEET
    values = np.random.RandomState(0).uniform(0, 1, count)
    for name in NAMES:
        request.inputs.attributes.add(name=name, values=values)
    made = read_provenance(stub.GenerateImages(request).files[0])
    assert (made.count, made.seed, made.seeds, made.attributes) == (count, None, None, None)


def test_a_batch_of_much_noise_has_that_of_each_call(client_of_limits: Client) -> None:
    """The server draws it outside the event loop."""
    calls = [(1, None), (2, {"noise": 5}), (3, None), (4, {"noise": 6}), (2**32 - 1, {"noise": 3})]

    async def together() -> list[list[int]]:
        async with AsyncClient(client_of_limits.address) as client:
            made = [client.generate("noisy", seed=seed, input_seeds=seeds) for seed, seeds in calls]
            return [batch.pixels.ravel().tolist() for batch in await asyncio.gather(*made)]

    made = asyncio.run(together())
    assert [row[2:] for row in made] == [noise(3), noise(5), noise(3), noise(6), noise(3)]
    latents = [np.random.RandomState(seed).standard_normal(2).astype(np.float32) for seed, _ in calls]
    assert [row[:2] for row in made] == [np.rint(100 + 20 * each).tolist() for each in latents]


def test_an_attribute_of_all_images_of_a_stream_is_one_number(client_of_limits: Client) -> None:
    """Otherwise the provenance of a picture of many images would be too long for a file."""
    values = [number % 2 for number in range(1100)]
    batch = client_of_limits.generate("many", seed=1, attributes={NAMES[0]: values, NAMES[1]: 1})
    assert batch.attributes == {**dict.fromkeys(NAMES, 0.0), NAMES[0]: tuple(values), NAMES[1]: 1.0}
    picture = io.BytesIO()
    batch.sheet().save(picture, "PNG")
    assert read_provenance(picture.getvalue()).attributes == batch.attributes


def test_a_notebook_shows_a_batch_without_images(client_of_limits: Client) -> None:
    batch = client_of_limits.generate("all", seed=1, attributes={"age": [20, 30]})
    assert "age 20 to 30" in batch._repr_html_()
    assert "0 images" in batch[:0]._repr_html_()


def test_scattered_seeds_are_made_again_with_attributes_in_a_list(client_of_limits: Client) -> None:
    made: Any = {"attributes": {"age": [20, 40]}, "seeds": (7, 3), "labels": (0, 0), "count": 2, "input_seeds": None}
    batch = client_of_limits.reproduce(replace(client_of_limits.generate("all", seed=7).provenance, **made))
    assert (batch.seeds, [row[8] for row in pixels(batch)]) == ((7, 3), [20, 40])


def test_attributes_are_read_in_any_encoding_of_protobuf(stub: pb_grpc.GenerationServiceStub) -> None:
    name, unknown = b"\x0a\x03age", b"\x78\x05"  # field 1, and a field 15 of a newer client
    unpacked = b"".join(b"\x15" + struct.pack("<f", value) for value in (20, 30))
    packed = b"\x12\x04" + struct.pack("<f", 40)
    request = pb.GenerateImagesRequest(model="all", seed=1)
    request.inputs.attributes.append(pb.AttributeValues.FromString(unknown + unpacked + packed + name + unknown))
    answer = stub.GenerateImages(request)
    assert list(answer.pixels[8::11]) == [20, 30, 40]
    assert next(list(each.values) for each in answer.inputs.attributes if each.name == "age") == [20, 30, 40]


def test_minus_zero_is_zero(client_of_limits: Client) -> None:
    batch = client_of_limits.generate("signs", seed=1, attributes={"tilt": [0.5, -0.5, 0.0, -0.0]})
    assert [row[2] for row in pixels(batch)] == [2, 0, 255, 255]
    batch = client_of_limits.generate("signs", seed=1, attributes={"tilt": [0.0, -0.0]})
    assert [row[2] for row in pixels(batch)] == [255, 255]
    assert batch.attributes == {"tilt": 0.0}


def test_the_number_of_images_is_that_of_the_longest_list(stub: pb_grpc.GenerationServiceStub) -> None:
    request = pb.GenerateImagesRequest(model="all", seed=1, labels=[2])
    request.inputs.attributes.add(name="age", values=[20, 30, 40])
    answer = stub.GenerateImages(request)
    assert (answer.count, list(answer.labels)) == (3, [2, 2, 2])
    request.labels[:] = [2, 1]
    with pytest.raises(grpc.RpcError, match="labels has 2 values for 3 images"):
        stub.GenerateImages(request)


def test_attributes_of_scattered_seeds_must_be_a_mapping(client_of_limits: Client) -> None:
    wrong: Any = np.array([20.0, 30.0])
    with pytest.raises(InvalidRequestError, match="mapping from names") as caught:
        next(client_of_limits.generate_each("all", [1], attributes=wrong))
    assert caught.value.field == "attributes"


class WithGradient:
    """An array that refuses to be read, as torch's tensors with gradients do."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [WithGradient(), 1e300, [20, 1e300]])
def test_values_that_no_message_can_hold_are_invalid_arguments(value: Any, client_of_limits: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client_of_limits.generate("all", attributes={"age": value})
    assert caught.value.field == "attributes"
    with pytest.raises(InvalidRequestError) as caught:
        client_of_limits.generate("all", latents=value if isinstance(value, WithGradient) else [0, 1e300], label=0)
    assert caught.value.field == "latents"


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_the_open_inference_protocol_refuses_noise_that_is_not_finite(number: float, limits: RunningServer) -> None:
    request = grpc_service_pb2.ModelInferRequest(model_name="all")
    request.inputs.add(name="seed", datatype="UINT32", shape=[1]).contents.uint_contents.append(1)
    request.inputs.add(name="noise", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(number)
    with grpc.insecure_channel(limits.address) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=grpc_service_pb2.ModelInferRequest.SerializeToString,
        )
        with pytest.raises(grpc.RpcError, match="noise has values that are not finite") as caught:
            infer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("inputs", "classes", "text"),
    [
        ([LATENT, {"name": "label", "latent": {"shape": [1]}}], CLASSES, "'label': give it another name"),
        ([LATENT, {"name": "seed", "latent": {"shape": [1]}}], [], "'seed': give it another name"),
        ([LATENT, {"name": "no\nise", "latent": {"shape": [1]}}], [], "printable"),
        ([LATENT, {"name": "no=ise", "latent": {"shape": [1]}}], [], "no '='"),
        ([LATENT, {"name": "n" * 65, "latent": {"shape": [1]}}], [], "1 to 64"),
        (
            [{"name": "latent", "latent": {"shape": [2], "distribution": "DISTRIBUTION_CAUCHY"}}],
            [],
            "DISTRIBUTION_CAUCHY",
        ),
        ([{"name": "latent", "latent": {"shape": [2], "distributoin": "DISTRIBUTION_UNIFORM"}}], [], "distributoin"),
        (with_attributes(*({"name": chr(0x1F600 + number) * 64} for number in range(60))), [], "at most 32768"),
    ],
)
def test_a_card_with_impossible_names_or_unknown_keys_of_inputs_is_rejected(
    inputs: Inputs, classes: list[str], text: str, tmp_path: Path
) -> None:
    model = model_of([{"name": each["name"], "latent": {"shape": [2]}} for each in inputs], [])
    (entry,) = model.metadata_props
    entry.value = json.dumps({**json.loads(entry.value), "inputs": inputs, "classNames": classes})
    with pytest.raises(ModelRejected, match=text):
        load(save(model, tmp_path, "m"))


@pytest.mark.parametrize("kind", ["attributes", "truncation"])
def test_a_model_that_mixes_images_of_a_batch_by_an_input_is_rejected(kind: str, tmp_path: Path) -> None:
    """By the mean of the batch's attributes, of which the default is 0; or of its latents, by 1 - truncation."""
    model = model_of([*with_attributes({"name": "tilt", "maximum": 100}), {"name": "truncation", "truncation": {}}], [])
    node = next(node for node in model.graph.node if node.op_type == "Concat")
    mixed = {"attributes": "attributes", "truncation": "off"}[kind]
    model.graph.initializer.append(helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1]))
    mixing = [
        helper.make_node("Sub", ["one", "truncation column"], ["less"]),
        helper.make_node("Mul", ["less", "latent shown"], ["off"]),
        helper.make_node("ReduceMean", [mixed], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Add", [node.input[0], "mean"], ["leaking"]),
    ]
    node.input[0] = "leaking"
    place = list(model.graph.node).index(node)
    for each in reversed(mixing):
        model.graph.node.insert(place, each)
    with pytest.raises(ModelRejected, match="in a batch with others"):
        load(save(model, tmp_path, "m"))


def test_a_model_may_have_many_classes_one_hot(tmp_path: Path) -> None:
    classes = [f"class {number}" for number in range(4000)]  # a square matrix of them would have 64 MB
    model = load(save(model_of([LATENT, {"name": "label", "label": {"oneHot": True}}], classes), tmp_path, "m"))
    draw = model.inputs.probes(np.array([7, 4001], np.uint32))
    tracemalloc.start()
    try:
        labels = model.engine.run([draw])[:, 0, 2:, 0]
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [np.flatnonzero(row).tolist() for row in labels] == [[7], [1]]
    assert most_bytes < 8 << 20


def test_the_longest_names_are_accepted(tmp_path: Path) -> None:
    assert len(json.dumps(["latent", "attributes", *NAMES])) < 32768
    assert list(load(save(model_of(with_attributes(*({"name": name} for name in NAMES)), []), tmp_path, "m")).inputs)
