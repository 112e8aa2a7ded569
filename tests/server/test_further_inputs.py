"""Models with more than a latent and a label: what each pixel is made of, worked out by hand, through a real server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf import json_format
from onnx import TensorProto, helper, numpy_helper
from tests.client.program import ganserve
from tests.conftest import RunningServer, run_server

from ganserve import AsyncClient, Client, InvalidRequestError, latents, read_provenance
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.compute.gpu import GpuOptions
from ganserve_server.inference import grpc_service_pb2
from ganserve_server.repository.verify import CARD_KEY, ModelRejected, load_version

Inputs = list[dict[str, Any]]
SMILING, AGE = (
    {"name": "smiling", "defaultValue": 0.25},
    {"name": "age", "minimum": 10, "maximum": 90, "defaultValue": 40},
)
GLASSES = {"name": "glasses", "binary": True}
ATTRIBUTES = {"name": "attributes", "attributes": {"attributes": [SMILING, AGE, GLASSES]}}
ALL: Inputs = [
    {"name": "latent", "latent": {"shape": [2, 1], "distribution": "DISTRIBUTION_UNIFORM"}},
    {"name": "style", "latent": {"shape": [1]}},
    {"name": "noise", "latent": {"shape": [1], "defaultSeed": 5}},
    {"name": "label", "label": {"oneHot": True}},
    ATTRIBUTES,
    {"name": "truncation", "truncation": {}},
]
SCALAR: Inputs = [ALL[0], {"name": "truncation", "truncation": {"scalar": True}}]
CLASSES = ["ant", "bee", "cat"]


def model_of(inputs: Inputs, classes: list[str], scale: float = 50.0) -> onnx.ModelProto:
    """Return a model whose image, one row of pixels, shows its inputs in the card's order.

    A latent's value x is the pixel 100 + scale·x, a one-hot label a pixel of 100 for its class, an attribute its value,
    and the truncation 100 times its value.
    """
    constants = {"hundred": np.float32(100), "scale": np.float32(scale), "nothing": np.float32(0)}
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    weights.append(numpy_helper.from_array(np.array([-1, 1]), "column"))
    weights.append(numpy_helper.from_array(np.array([1, 3]), "axes"))
    nodes, in_file, pixels, width = [], [], [], 0

    def node(kind: str, *names: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, names[:-1], names[-1:], **attributes))

    for each in inputs:
        name, shown = each["name"], f"{each['name']} shown"
        shape: list[int] = []
        if "latent" in each:
            shape = each["latent"]["shape"]
            node("Flatten", name, f"{name} flat")
            node("Mul", f"{name} flat", "scale", f"{name} scaled")
            node("Add", f"{name} scaled", "hundred", shown)
        elif "label" in each:
            shape = [len(classes)]
            node("Mul", name, "hundred", shown)
        elif "attributes" in each:
            shape = [len(each["attributes"]["attributes"])]
            node("Identity", name, shown)
        elif "scalar" in each["truncation"]:
            node("Mul", name, "hundred", f"{name} hundred")
            node("Mul", "latent shown", "nothing", "zeros")  # a pixel for each value of the latent
            node("Add", "zeros", f"{name} hundred", shown)
            width += 1
        else:
            node("Reshape", name, "column", f"{name} column")
            node("Mul", f"{name} column", "hundred", shown)
        scalar = "scalar" in each.get("truncation", {})
        in_file.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [] if scalar else ["n", *shape]))
        pixels.append(shown)
        width += int(np.prod(shape))
    node("Concat", *pixels, "row", axis=1)
    node("Round", "row", "whole")
    node("Cast", "whole", "bytes", to=TensorProto.UINT8)
    node("Unsqueeze", "bytes", "axes", "image")
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 1, width, 1])
    graph = helper.make_graph(nodes, "shown", in_file, [image], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    card = {"height": 1, "width": width, "channels": 1, "inputs": inputs, "classNames": classes}
    helper.set_model_props(model, {CARD_KEY: json_format.MessageToJson(json_format.ParseDict(card, pb.ModelCard()))})
    return model


def save(model: onnx.ModelProto, repository: Path, name: str) -> Path:
    file = repository / name / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    onnx.save(model, file)
    return file


def load(file: Path) -> Any:
    return load_version("m", 1, file, max_model_mib=64, provider="cpu", threads=1, gpu=GpuOptions())


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a model of all kinds of inputs, and one that takes a scalar truncation."""
    repository = tmp_path_factory.mktemp("models")
    save(model_of(ALL, CLASSES), repository, "all")
    save(model_of(SCALAR, []), repository, "scalar")
    with run_server("--workers=1", f"--models={repository}") as server:
        yield server


@pytest.fixture
def of_all(shown: RunningServer) -> Iterator[Client]:
    with Client(shown.address) as client:
        yield client


def drawn(seed: int, noise_seed: int = 5, style_seed: int | None = None) -> list[int]:
    """Return the pixels of the latents: two uniform numbers, one that continues their stream, and one of noise."""
    random = np.random.RandomState(seed)
    uniform, style = random.uniform(-1, 1, 2), random.standard_normal()
    if style_seed is not None:
        style = np.random.RandomState(style_seed).standard_normal()
    noise = np.random.RandomState(noise_seed).standard_normal()
    return np.rint(100 + 50 * np.array([*uniform, style, noise], np.float32)).astype(np.uint8).tolist()


def pixels(batch: Any) -> list[list[int]]:
    return batch.pixels[:, 0, :, 0].tolist()  # type: ignore[no-any-return]


def test_every_input_has_the_values_of_the_request_or_of_the_card(of_all: Client) -> None:
    # RandomState(1): uniform(-1, 1, 2) is -0.166, 0.441, then standard_normal() is -1.072; RandomState(5): 0.441.
    assert drawn(1)[:2] == [92, 122]
    batch = of_all.generate("all", count=2, seed=1, truncation=0.5)
    assert pixels(batch) == [[*drawn(1), 0, 100, 0, 0, 40, 0, 50], [*drawn(2), 0, 0, 100, 0, 40, 0, 50]]
    assert (batch.attributes, batch.input_seeds) == ({"smiling": 0.25, "age": 40, "glasses": 0}, {"noise": 5})
    given = {"smiling": [1.0, 0.5], "age": 90, "glasses": True}
    batch = of_all.generate("all", seed=1, label="ant", attributes=given, input_seeds={"noise": 7, "style": 9})
    first = [*drawn(1, 7, 9), 100, 0, 0, 1, 90, 1, 100]
    assert pixels(batch)[0] == first
    assert pixels(batch)[1][7:] == [0, 90, 1, 100]  # 0.5 rounds to the even number
    assert batch[1].attributes == {"smiling": 0.5, "age": 90, "glasses": 1}
    assert batch.input_seeds == {"style": 9, "noise": 7}


def test_a_stream_and_each_of_scattered_seeds_have_the_same_values(of_all: Client, shown: RunningServer) -> None:
    ages = [float(age) for age in range(10, 90)]
    batch = of_all.generate("all", seed=3, attributes={"age": ages})
    streamed = list(of_all.stream("all", count=80, seed=3, attributes={"age": ages}))
    assert [image.pixels[0, :, 0].tolist() for image in streamed] == pixels(batch)
    assert [row[8] for row in pixels(batch)] == ages
    assert [image.attributes["age"] for image in streamed if image.attributes] == ages
    how: dict[str, Any] = {"attributes": {"age": 77}, "input_seeds": {"style": 2}}
    one_by_one = [pixels(of_all.generate("all", seed=seed, **how))[0] for seed in (9, 3)]
    assert [image.pixels[0, :, 0].tolist() for image in of_all.generate_each("all", [9, 3], **how)] == one_by_one

    async def each() -> list[list[int]]:
        async with AsyncClient(shown.address) as client:
            return [image.pixels[0, :, 0].tolist() async for image in client.generate_each("all", [9, 3], **how)]

    assert asyncio.run(each()) == one_by_one
    plain = [image.pixels[0, :, 0].tolist() for image in of_all.generate_each("all", range(20))]
    assert plain == pixels(of_all.generate("all", count=20, seed=0))


def test_own_latents_need_a_seed_for_a_second_latent(of_all: Client) -> None:
    own = np.array([[0.5, -0.5]], np.float32)
    with pytest.raises(InvalidRequestError, match="style") as caught:
        of_all.generate("all", latents=own, label=0)
    assert caught.value.field == "input_seeds"
    batch = of_all.generate("all", latents=own, label=0, input_seeds={"style": 4}, truncation=0.5)
    assert pixels(batch) == [[125, 75, drawn(0, style_seed=4)[2], drawn(0)[3], 100, 0, 0, 0, 40, 0, 50]]


def test_one_batch_takes_images_of_different_scalar_truncation(of_all: Client) -> None:
    assert of_all.model("scalar").truncation == "input"
    requests = [(seed, truncation) for seed, truncation in enumerate([0.5, 0.5, 1.0, 0.0, 0.7])]

    async def together() -> list[list[int]]:
        async with AsyncClient(of_all.address) as client:
            made = [client.generate("scalar", seed=seed, truncation=truncation) for seed, truncation in requests]
            return [pixels(batch)[0] for batch in await asyncio.gather(*made)]

    wanted = [[*drawn(seed)[:2], *[round(100 * truncation)] * 2] for seed, truncation in requests]
    for _ in range(5):
        assert asyncio.run(together()) == wanted


@pytest.mark.parametrize(
    ("how", "field", "text"),
    [
        ({"attributes": {"smile": 1}}, "attributes", "no attribute 'smile'.*smiling, age, glasses"),
        ({"attributes": {"age": 91}}, "attributes", "'age' is 91.*from 10 to 90"),
        ({"attributes": {"age": float("nan")}}, "attributes", "'age' is nan"),
        ({"attributes": {"glasses": 0.5}}, "attributes", "'glasses' is 0.5.*0 or 1"),
        ({"attributes": {"age": [20, 30], "smiling": [0, 0, 1]}}, "attributes", "2 values for 3 images"),
        ({"attributes": {"age": "old"}}, "attributes", r"\['age'\].*number"),
        ({"attributes": [1]}, "attributes", "mapping"),
        ({"attributes": {"age": []}}, "attributes", r"\['age'\].*number"),
        ({"input_seeds": {"latent": 1}}, "input_seeds", "latent.*style, noise"),
        ({"input_seeds": {"nose": 1}}, "input_seeds", "nose.*style, noise"),
        ({"input_seeds": {"noise": -1}}, "input_seeds['noise']", "integer from 0"),
    ],
)
def test_wrong_values_of_inputs_are_refused(how: dict[str, Any], field: str, text: str, of_all: Client) -> None:
    with pytest.raises(InvalidRequestError, match=text) as caught:
        of_all.generate("all", **how)
    assert caught.value.field == field


def test_a_model_without_further_inputs_refuses_them(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="no attributes"):
        client.generate("mlp-mnist", attributes={"age": 1})
    with pytest.raises(InvalidRequestError, match="it has none"):
        client.generate("mlp-mnist", input_seeds={"noise": 1})
    batch = client.generate("mlp-mnist", seed=1)
    assert (batch.attributes, batch.input_seeds, batch[0].provenance.attributes) == (None, None, None)


def test_pictures_are_made_again_from_their_provenance(of_all: Client, tmp_path: Path) -> None:
    given = {"age": [20, 30, 40], "smiling": 0.5}
    batch = of_all.generate("all", seed=8, attributes=given, input_seeds={"style": 1})
    for index, file in enumerate(batch.save(tmp_path / "{seed}.png")):
        made = read_provenance(file)
        assert made.attributes == {"age": given["age"][index], "smiling": 0.5, "glasses": 0}  # type: ignore[index]
        assert made.input_seeds == {"style": 1, "noise": 5}
        assert pixels(of_all.reproduce(made)) == [pixels(batch)[index]]
    batch.sheet().save(tmp_path / "sheet.png")
    made = read_provenance(tmp_path / "sheet.png")
    assert made.attributes == {"age": (20, 30, 40), "smiling": 0.5, "glasses": 0}
    assert pixels(of_all.reproduce(made)) == pixels(batch)
    # Images whose seeds are not consecutive, with an attribute for each.
    rows = [batch[2:], batch[:1]]
    scattered = of_all.reproduce(
        type(made)(
            made.model,
            1,
            made.digest,
            10,
            1,
            1.0,
            2,
            (10, 8),
            (1, 2),
            None,
            {"age": (40, 20), "smiling": 0.5},
            {"style": 1},
        )
    )
    assert pixels(scattered) == [pixels(rows[0])[0], pixels(rows[1])[0]]
    walk = of_all.interpolate("all", 1, 2, 3, label=0, attributes={"age": [20, 30, 40]}, input_seeds={"style": 1})
    assert walk.interpolation is not None
    assert walk.interpolation.kind == "linear"  # the latents are uniform
    middle = latents([1, 2], 2, "uniform").mean(0)
    assert pixels(walk)[1][:2] == np.rint(100 + 50 * middle).tolist()
    assert pixels(of_all.reproduce(walk.provenance)) == pixels(walk)


def test_the_server_writes_the_further_inputs_into_its_files(shown: RunningServer) -> None:
    request = pb.GenerateImagesRequest(model="all", count=2, seed=1, encoding=pb.ENCODING_PNG)
    request.inputs.attributes.add(name="age", values=[20, 30])
    request.inputs.seeds["noise"] = 9
    with grpc.insecure_channel(shown.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        one = stub.GenerateImages(request)
        made = [read_provenance(file) for file in one.files]
        request.layout = pb.LAYOUT_CONTACT_SHEET
        sheet = read_provenance(stub.GenerateImages(request).files[0])
    assert [each.attributes for each in made] == [
        {"smiling": 0.25, "age": 20, "glasses": 0},
        {"smiling": 0.25, "age": 30, "glasses": 0},
    ]
    assert [each.input_seeds for each in made] == [{"noise": 9}, {"noise": 9}]
    assert sheet.attributes == {"smiling": 0.25, "age": (20, 30), "glasses": 0}


def test_the_command_line_sets_attributes_and_seeds_of_inputs(shown: RunningServer, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    flags = ("--attribute", "age=20,30", "--attribute", "glasses=1", "--input-seed", "noise=3", "--seed", "1")
    done = ganserve("generate", "all", "--count", "3", *flags, "-o", out, address=shown.address)
    assert done.returncode == 0, done.stderr
    made = read_provenance(out)
    assert made.attributes == {"smiling": 0.25, "age": (20, 30, 20), "glasses": 1}
    assert made.input_seeds == {"noise": 3}
    assert ganserve("reproduce", out, address=shown.address).returncode == 0
    told = ganserve("inspect", out).stdout
    assert "age 20, 30, 20" in told
    assert "noise 3" in told
    card = ganserve("models", "all", address=shown.address).stdout
    assert "age (10 to 90, default 40)" in card
    assert "glasses (0 or 1, default 0)" in card
    for wrong, text in (("age", "smiling=0.8"), ("age=x", "numbers"), ("age=1,2,3,4", "4 values for 3 images")):
        done = ganserve("generate", "all", "--count", "3", "--attribute", wrong, "-o", out, address=shown.address)
        assert done.returncode == 2
        assert text in done.stderr


def test_a_data_set_and_an_animation_have_attributes(shown: RunningServer, tmp_path: Path) -> None:
    data = tmp_path / "set.npz"
    flags = ("--attribute", "age=20", "--input-seed", "style=3")
    done = ganserve("stream", "all", "--count", "5", "--seed", "1", "--to", data, *flags, address=shown.address)
    assert done.returncode == 0, done.stderr
    images = np.load(data)["images"][:, 0, :, 0].tolist()
    assert [row[:4] + row[8:9] for row in images] == [[*drawn(seed, style_seed=3), 20] for seed in range(1, 6)]
    assert ganserve("reproduce", data, address=shown.address).returncode == 0
    walk = tmp_path / "walk.webp"
    flags = ("--steps", "3", "--label", "1", "--attribute", "age=20,40", "--input-seed", "style=3")
    done = ganserve("interpolate", "all", "1", "2", "-o", walk, *flags, address=shown.address)
    assert done.returncode == 0, done.stderr
    assert (read_provenance(walk).attributes or {})["age"] == (20, 30, 40)


def test_the_open_inference_protocol_takes_and_lists_the_inputs(shown: RunningServer) -> None:
    def infer(**tensors: Any) -> list[list[int]]:
        request = grpc_service_pb2.ModelInferRequest(model_name="all")
        for name, values in tensors.items():
            datatype = {"seed": "UINT32", "label": "INT64"}.get(name, "FP32")
            kind = {"UINT32": np.uint32, "INT64": np.int64}.get(datatype, np.float32)
            array = np.array(values, kind)
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        answer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=grpc_service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=grpc_service_pb2.ModelInferResponse.FromString,
        )(request)
        return np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(-1, 11).tolist()  # type: ignore[no-any-return]

    with grpc.insecure_channel(shown.address) as channel:
        assert infer(seed=[1]) == [[*drawn(1), 0, 100, 0, 0, 40, 0, 100]]
        assert infer(seed=[1], attributes=[[1, 20, 1]], label=[2])[0][4:10] == [0, 0, 100, 1, 20, 1]
        own = infer(latent=[[[0.5], [-0.5]]], style=[[0.1]], noise=[[1]], label=[0])
        assert own == [[125, 75, 105, 150, 100, 0, 0, 0, 40, 0, 100]]
        with pytest.raises(grpc.RpcError, match="'age' is 5"):
            infer(seed=[1], attributes=[[1, 5, 1]])


def test_truncation_without_effect_is_refused(tmp_path: Path, start_server: Any) -> None:
    repository = tmp_path / "models"
    plain: Inputs = [{"name": "latent", "latent": {"shape": [2]}}]
    save(model_of(plain, []), repository, "plain")
    save(model_of(plain, [], scale=0.0), repository, "normalised")
    sphere: Inputs = [{"name": "latent", "latent": {"shape": [2], "distribution": "DISTRIBUTION_SPHERE"}}]
    save(model_of(sphere, []), repository, "sphere")
    server = start_server(f"--models={repository}", "--workers=1")
    with Client(server.address) as client:
        assert {model.name: model.truncation for model in client.models()} == {
            "plain": "latent",
            "normalised": "none",
            "sphere": "none",
        }
        normal = np.random.RandomState(1).standard_normal(2)
        assert pixels(client.generate("plain", seed=1, truncation=0.5)) == [np.rint(100 + 25 * normal).tolist()]
        circle = normal * np.sqrt(2) / np.hypot(*normal)
        assert pixels(client.generate("sphere", seed=1)) == [np.rint(100 + 50 * circle).tolist()]
        for name in ("normalised", "sphere"):
            with pytest.raises(InvalidRequestError, match="changes no image of model") as caught:
                client.generate(name, seed=1, truncation=0.5)
            assert caught.value.field == "truncation"


def test_the_truncated_normal_distribution_draws_large_values_again() -> None:
    # Of ten numbers of this seed, those at 4 and 6 are above 2; the first number that replaces them is, too.
    random = np.random.RandomState(217)
    wanted = random.standard_normal(10)
    replacing = random.standard_normal(3)
    assert np.round(replacing, 3).tolist() == [2.086, -0.219, 0.656]
    wanted[[4, 6]] = replacing[2], replacing[1]
    assert np.array_equal(latents([217], 10, "truncated_normal")[0], wanted.astype(np.float32))


@pytest.mark.parametrize(
    ("inputs", "classes", "text"),
    [
        ([{"name": "z", "latent": {"shape": [2]}}], [], "'latent'"),
        ([{"name": "latent", "latent": {"shape": [2], "defaultSeed": 1}}], [], "without a default seed"),
        ([ALL[0], ALL[0]], [], "twice"),
        ([ALL[0], {"name": "classes", "label": {}}], CLASSES, "its name must be 'label'"),
        ([ALL[0]], CLASSES, "class names"),
        ([ALL[0], {"name": "label", "label": {}}], [], "class names"),
        ([ALL[0], {"name": "picture"}], [], "nothing that this server knows"),
        ([{"name": "latent", "latent": {"shape": [4000, 4000]}}], [], "1 to 8388608 values"),
        ([ALL[0], {"name": "attributes", "attributes": {}}], [], "1 to 256 attributes"),
        ([ALL[0], {"name": "attributes", "attributes": {"attributes": [AGE, AGE]}}], [], "different names"),
        ([ALL[0], {"name": "attributes", "attributes": {"attributes": [{**AGE, "defaultValue": 9}]}}], [], "default 9"),
        ([ALL[0], {"name": "attributes", "attributes": {"attributes": [{"name": "a=b"}]}}], [], "no '='"),
        (
            [ALL[0], {"name": "attributes", "attributes": {"attributes": [{**GLASSES, "defaultValue": 0.5}]}}],
            [],
            "binary",
        ),
        ([ALL[0], ALL[1]], [], "no input style.*must have it, float32"),  # the file has one input
    ],
)
def test_a_card_whose_inputs_are_wrong_is_rejected(
    inputs: Inputs, classes: list[str], text: str, tmp_path: Path
) -> None:
    model = model_of([ALL[0]], [])
    (entry,) = model.metadata_props
    card = {**json_format.MessageToDict(json_format.Parse(entry.value, pb.ModelCard())), "inputs": inputs}
    entry.value = json_format.MessageToJson(json_format.ParseDict({**card, "classNames": classes}, pb.ModelCard()))
    with pytest.raises(ModelRejected, match=text):
        load(save(model, tmp_path, "m"))
