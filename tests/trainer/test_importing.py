"""`ganserve-trainer import`: files of other programs become models that the server accepts, with the same pixels."""

import argparse
import dataclasses
import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import json_format
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tests.conftest import RunningServer
from torch import Tensor, nn

from ganserve import Client
from ganserve_server.compute.model import ModelVersion
from ganserve_server.repository.verify import load_version
from ganserve_trainer.cli import main
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.importing.command import prepare
from ganserve_trainer.importing.onnx_file import source_of
from ganserve_trainer.importing.source import Arrays, Wishes

# The latents of seeds 0, 1, 2, 3 begin with 1.76, 1.62, -0.42 and 1.79.
SEEDS = np.arange(4, dtype=np.uint32)


def picture(seed: int, blue: int = 0) -> list[list[list[int]]]:
    """Return the image of a foreign generator: its first pixel's red says whether the latent's first value is positive.

    As values of tanh, red is 0.5 or -0.5, -1, -0.5, 0; green is 1; blue is -1, or -1, 0 and 1 for the labels 0, 1, 2.
    """
    first = 64 if seed == 2 else 191  # 63.75 and 191.25, rounded
    return [[[first, 255, blue], [0, 255, blue]], [[64, 255, blue], [128, 255, blue]]]


@dataclasses.dataclass
class Foreign:
    """An ONNX file of another exporter, which makes `picture`s."""

    values: str = "tanh"
    channels_last: bool = False
    latent: tuple[Any, ...] = ("N", 4)
    latent_type: int = TensorProto.FLOAT
    label: tuple[Any, ...] = ()
    label_type: int = TensorProto.INT64
    one_hot: bool = False
    names: tuple[str, str, str] = ("z", "y", "out")
    out_type: int = TensorProto.FLOAT
    reshape: tuple[int, ...] | None = None
    opset: int = 18
    nodes: tuple[onnx.NodeProto, ...] = ()  # from "flat" to "changed"
    outputs: tuple[str, ...] = ()
    inputs: tuple[onnx.ValueInfoProto, ...] = ()

    def model(self) -> onnx.ModelProto:
        order = (0, 2, 3, 1) if self.channels_last else (0, 1, 2, 3)
        shape = [(-1, 3, 2, 2)[axis] for axis in order]

        def grid(values: list[list[float]]) -> NDArray[np.float32]:
            return np.array(values, np.float32).reshape(1, 3, 2, 2).transpose(order).reshape(1, 12)

        sign = grid([[1, 0, 0, 0], [0] * 4, [0] * 4])
        level = grid([[0, -1, -0.5, 0], [1] * 4, [-1] * 4])
        offset, factor = {"tanh": (0, 1), "sigmoid": (1, 0.5), "byte": (1, 127.5)}[self.values]
        weights = {
            "pick": np.concatenate([sign, np.zeros((3, 12), np.float32)]),
            "half": np.array(0.5, np.float32),
            "level": level,
            "flat_shape": np.array([-1, 4], np.int64),
            "offset": np.array(offset, np.float32),
            "factor": np.array(factor, np.float32),
            "shape": np.array(self.reshape or shape, np.int64),
            # By label, what is added to blue.
            "table": np.concatenate([grid([[0] * 4, [0] * 4, [blue] * 4]) for blue in (0, 1, 2)]),
            "label_shape": np.array([-1], np.int64),
        }
        latent, label, out = self.names
        nodes = [
            helper.make_node("Cast", [latent], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["floats", "flat_shape"], ["flat"]),
            *self.nodes,
            helper.make_node("MatMul", ["changed" if self.nodes else "flat", "pick"], ["first"]),
            helper.make_node("Sign", ["first"], ["sign"]),
            helper.make_node("Mul", ["sign", "half"], ["halves"]),
            helper.make_node("Add", ["halves", "level"], ["levels"]),
        ]
        inputs = [helper.make_tensor_value_info(latent, self.latent_type, self.latent)]
        last = "levels"
        if self.label:
            inputs.append(helper.make_tensor_value_info(label, self.label_type, self.label))
            if self.one_hot:
                nodes.append(helper.make_node("Cast", [label], ["rows"], to=TensorProto.FLOAT))
                nodes.append(helper.make_node("MatMul", ["rows", "table"], ["added"]))
            else:
                nodes.append(helper.make_node("Cast", [label], ["whole"], to=TensorProto.INT64))
                nodes.append(helper.make_node("Reshape", ["whole", "label_shape"], ["index"]))
                nodes.append(helper.make_node("Gather", ["table", "index"], ["added"], axis=0))
            nodes.append(helper.make_node("Add", [last, "added"], ["labelled"]))
            last = "labelled"
        nodes += [
            helper.make_node("Add", [last, "offset"], ["moved"]),
            helper.make_node("Mul", ["moved", "factor"], ["scaled"]),
            helper.make_node("Reshape", ["scaled", "shape"], ["shaped"]),
        ]
        if self.out_type == TensorProto.UINT8:
            nodes.append(helper.make_node("Round", ["shaped"], ["rounded"]))
            nodes.append(helper.make_node("Cast", ["rounded"], [out], to=TensorProto.UINT8))
        else:
            nodes.append(helper.make_node("Identity", ["shaped"], [out]))
        outputs = [helper.make_tensor_value_info(out, self.out_type, None)]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs]
        graph = helper.make_graph(
            nodes,
            "foreign",
            [*inputs, *self.inputs],
            outputs,
            [numpy_helper.from_array(values, name) for name, values in weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


@pytest.fixture
def bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelVersion]:
    """Run `import --yes`, and load what it publishes as a server does."""

    def bring(file: object, *options: object) -> ModelVersion:
        assert run(monkeypatch, file, "--name", "faces", "--models", tmp_path / "models", "--yes", *options) == 0
        published = tmp_path / "models" / "faces" / "1" / "model.onnx"
        return load_version("faces", 1, published, max_model_mib=1, provider="cpu", threads=1)

    monkeypatch.chdir(tmp_path)
    return bring


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ganserve-trainer", "import", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "foreign.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def made(model: ModelVersion) -> list[Any]:
    engine = model.engine
    pixels: list[Any] = engine.run([engine.inputs.probes(SEEDS)]).tolist()
    return pixels


FLOAT, UINT8, INT32 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT32
UNCONDITIONAL: dict[str, tuple[Foreign, tuple[object, ...]]] = {
    "tanh, channels first": (Foreign(), ()),
    "tanh, channels last": (Foreign(channels_last=True, reshape=(-1, 2, 2, 3)), ("--layout", "NHWC")),
    "sigmoid, channels last": (Foreign(values="sigmoid", channels_last=True), ()),
    "0 to 255, channels first": (Foreign(values="byte"), ()),
    "uint8, channels first": (Foreign(values="byte", out_type=UINT8), ()),
    "uint8, channels last": (Foreign(values="byte", out_type=UINT8, channels_last=True), ()),
    "a vector of pixels": (Foreign(reshape=(-1, 12)), ()),
    "a latent of one pixel": (Foreign(latent=("N", 4, 1, 1)), ()),
    "a latent of two axes": (Foreign(latent=("N", 2, 2)), ()),
    "a latent in fp16": (Foreign(latent_type=TensorProto.FLOAT16), ()),
    "a latent in fp64": (Foreign(latent_type=TensorProto.DOUBLE), ()),
    "a latent of unknown size": (Foreign(latent=("N", "D")), ()),
    "one image at a time": (Foreign(latent=(1, 4)), ()),
    "six images at a time": (Foreign(latent=(6, 4), reshape=(6, 3, 2, 2)), ()),
    "a Reshape to one image": (Foreign(reshape=(1, 3, 2, 2)), ()),
    "a Reshape to one image, its channels left open": (Foreign(latent=(1, 4), reshape=(1, -1, 2, 2)), ()),
    "names of a served model for other things": (Foreign(names=("image", "latent", "label")), ()),
    "opset 9": (Foreign(opset=9, values="sigmoid"), ()),
    "several outputs": (Foreign(outputs=("levels",)), ()),
    "several outputs with images": (Foreign(outputs=("levels",)), ("--output", "out")),
}


@pytest.mark.parametrize("kind", UNCONDITIONAL)
def test_a_foreign_file_is_served_with_its_pixels(
    kind: str, bring: Callable[..., ModelVersion], tmp_path: Path
) -> None:
    foreign, options = UNCONDITIONAL[kind]
    model = bring(saved(foreign.model(), tmp_path), *options)
    assert model.card.latent_dim == 4
    assert made(model) == [picture(seed) for seed in range(4)]


CONDITIONAL: dict[str, tuple[Foreign, tuple[object, ...]]] = {
    "int64": (Foreign(label=("N",)), ()),
    "int32": (Foreign(label=("N",), label_type=INT32), ()),
    "a column of floats, as of Keras": (Foreign(label=("N", 1), label_type=FLOAT), ()),
    "one-hot": (Foreign(label=("N", 3), label_type=FLOAT, one_hot=True), ()),
    "one-hot, in integers": (Foreign(label=("N", 3), label_type=INT32, one_hot=True), ()),
    "one-hot, by names that say nothing": (
        Foreign(label=("N", 3), label_type=FLOAT, one_hot=True, names=("input_1", "input_2", "o")),
        ("--input", "input_2=label"),
    ),
    "one image at a time": (Foreign(latent=(1, 4), label=(1,), reshape=(1, 3, 2, 2)), ()),
}


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_the_label_of_a_foreign_file_becomes_an_index(
    kind: str, bring: Callable[..., ModelVersion], tmp_path: Path
) -> None:
    foreign, options = CONDITIONAL[kind]
    model = bring(saved(foreign.model(), tmp_path), *options)
    assert list(model.card.class_names) == ["0", "1", "2"]
    # The label of a seed is the seed modulo 3: blue is -1, 0, 1.
    assert made(model) == [picture(0, 0), picture(1, 128), picture(2, 255), picture(3, 0)]


ONLY_ONE = (
    helper.make_node("Constant", [], ["first_axis"], value_ints=[0]),
    helper.make_node("Squeeze", ["flat", "first_axis"], ["vector"]),
    helper.make_node("Unsqueeze", ["vector", "first_axis"], ["changed"]),
)


def test_a_graph_for_one_image_only_is_repeated_for_each(
    bring: Callable[..., ModelVersion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = Foreign(latent=(1, 4), label=(1, 3), label_type=FLOAT, one_hot=True, nodes=ONLY_ONE)
    model = bring(saved(foreign.model(), tmp_path))
    assert "Scan" in capsys.readouterr().err
    assert made(model) == [picture(0, 0), picture(1, 128), picture(2, 255), picture(3, 0)]


def test_weights_beside_the_file_are_brought_inside(bring: Callable[..., ModelVersion], tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    onnx.save(Foreign().model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = bring(path)
    assert (tmp_path / "weights.bin").exists()
    assert made(model) == [picture(seed) for seed in range(4)]
    (tmp_path / "weights.bin").unlink()


def test_an_imported_model_is_served(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_server: Callable[..., RunningServer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = saved(Foreign(label=("N",), latent=("N", 4, 1, 1)).model(), tmp_path)
    models = tmp_path / "models"
    for version in (1, 2):
        assert run(monkeypatch, file, "--name", "faces", "--models", models, "--yes", "--classes", "no,some,all") == 0
        out, told = capsys.readouterr()
        assert out == f"{models}/faces/{version}/model.onnx\n"
    # What was understood.
    assert "'z', float32 [N, 4, 1, 1]: 4 values" in told
    assert "'y', int64 [N]: 3 classes, no, some, all" in told
    assert "'out', float32 NCHW: 2x2, 3 channels, values of tanh" in told
    with Image.open(tmp_path / "faces-import.png") as sheet:
        # Four images in a row, between lines of two pixels: the second pixel of the third image is of seed 2.
        assert sheet.size == (4 * (2 + 2) + 2, 4 * (2 + 2) + 2)
        assert [sheet.getpixel((10, 2)), sheet.getpixel((11, 3))] == [(64, 255, 255), (128, 255, 255)]
    running = start_server("--models", models)
    with Client(running.address) as client:
        batch = client.generate("faces", seed=2, label="some")
        assert (batch.version, batch.pixels.tolist()) == (2, [picture(2, 128)])


def test_nothing_is_published_without_a_yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    file = saved(Foreign().model(), tmp_path)
    for answer, status in (("n", 1), ("", 1), ("y", 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{answer}\n" if answer else ""))
        assert run(monkeypatch, file, "--name", "faces", "--models", "models", "--sheet", "look.png") == status
        assert Path("look.png").exists()
        assert Path("models").exists() == (status == 0)


def test_classes_are_named_by_a_file_or_by_the_file_s_own_card(
    bring: Callable[..., ModelVersion], tmp_path: Path
) -> None:
    model = Foreign(label=("N",)).model()
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    assert list(bring(saved(model, tmp_path), "--class-names", tmp_path / "names.txt").card.class_names) == [
        *("cat", "dog", "owl"),
    ]


def test_the_card_of_a_file_names_its_classes(bring: Callable[..., ModelVersion], tmp_path: Path) -> None:
    model = Foreign(label=("N", 3), label_type=FLOAT, one_hot=True).model()
    helper.set_model_props(model, {"ganserve.model_card": '{"latentDim": 9, "classNames": ["a", "b", "c"]}'})
    card = bring(saved(model, tmp_path)).card
    assert (card.latent_dim, list(card.class_names)) == (4, ["a", "b", "c"])


RANDOM = (
    helper.make_node("RandomNormalLike", ["flat"], ["noise"]),
    helper.make_node("Add", ["flat", "noise"], ["changed"]),
)
STATISTICS = (
    helper.make_node("ReduceMean", ["flat"], ["mean"], axes=[0], keepdims=1),
    helper.make_node("Sub", ["flat", "mean"], ["changed"]),
)
TRAINING = (
    *(helper.make_node("Constant", [], [name], value_floats=[1.0] * 4) for name in ("s", "b", "m", "v")),
    helper.make_node("BatchNormalization", ["flat", "s", "b", "m", "v"], ["changed", "m1", "v1"], training_mode=1),
)
ONLY_TWO = (
    helper.make_node("Split", ["flat"], ["one", "other"], axis=0, num_outputs=2),
    helper.make_node("Add", ["one", "other"], ["both"]),
    helper.make_node("Sub", ["both", "one"], ["second"]),
    helper.make_node("Concat", ["one", "second"], ["changed"], axis=0),
)
CUSTOM = (helper.make_node("FastGelu", ["flat"], ["changed"], domain="com.microsoft"),)


def replaced(model: onnx.ModelProto, **constants: Any) -> onnx.ModelProto:
    """Return a model with other constants."""
    for tensor in model.graph.initializer:
        if tensor.name in constants:
            tensor.CopyFrom(numpy_helper.from_array(np.array(constants[tensor.name], np.float32), tensor.name))
    return model


REJECTED: dict[str, tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]] = {
    "random numbers": (Foreign(nodes=RANDOM).model(), (), ("draws random numbers", "RandomNormalLike", "constant")),
    "means over the batch": (Foreign(nodes=STATISTICS, opset=17).model(), (), ("means over the batch", "eval()")),
    "BatchNorm in training": (Foreign(nodes=TRAINING).model(), (), ("BatchNormalization", "training mode", "eval()")),
    "custom operators": (Foreign(nodes=CUSTOM).model(), (), ("FastGelu", "'com.microsoft'", "export it again")),
    "another input": (
        Foreign(label=("N",), inputs=(helper.make_tensor_value_info("steps", INT32, ["N", 2]),)).model(),
        (),
        ("'steps' int32 [N, 2]", "--input steps=ROLE", "constant:VALUE"),
    ),
    "no such role": (Foreign().model(), ("--input", "z=seed"), ("--input z=seed", "latent, label", "uniform")),
    "no such input": (Foreign().model(), ("--input", "x=latent"), ("no input 'x'", "'z' float [N, 4]")),
    "two inputs that may be the latent": (
        Foreign(label=("N", 3), label_type=FLOAT, one_hot=True, names=("a", "b", "o")).model(),
        (),
        ("'a' float [N, 4], 'b' float [N, 3]", "--input b=ROLE"),
    ),
    "no such output": (Foreign().model(), ("--output", "x"), ("'x' is not an output", "'out' float32 [3, 2, 2]")),
    "an output that is no image": (
        Foreign(reshape=(-1, 2, 6)).model(),
        ("--output", "levels"),
        ("'levels' is not an output", "[2, 6]"),
    ),
    "four channels": (Foreign(reshape=(-1, 4, 3, 1)).model(), ("--layout", "NCHW"), ("1 or 3 channels", "[4, 3, 1]")),
    "an unusual range": (replaced(Foreign(values="byte").model(), factor=4.0), (), ("from 0 to 8", "--range tanh")),
    "not a number": (replaced(Foreign().model(), factor=np.nan), (), ("not finite",)),
    "another size of the latent": (Foreign().model(), ("--latent-dim", "5"), ("--latent-dim is 5", "has 4 values")),
    "classes without a label": (Foreign().model(), ("--classes", "2"), ("--classes", "no label")),
    "another number of classes": (
        Foreign(label=("N", 3), label_type=FLOAT, one_hot=True).model(),
        ("--classes", "a,b"),
        ("names 2 classes", "has 3"),
    ),
    "a class named twice": (Foreign(label=("N",)).model(), ("--classes", "a,b,a"), ("a, b, a",)),
    "two images at a time": (Foreign(latent=(2, 4), nodes=ONLY_TWO).model(), (), ("2 images at once only", "dynamic")),
    "a new opset": (Foreign(opset=99).model(), (), ("onnxruntime cannot open", "Opset 99", "opset 18")),
}


@pytest.mark.parametrize("reason", REJECTED)
def test_what_cannot_be_imported_is_refused_with_a_remedy(
    reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, options, texts = REJECTED[reason]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, saved(model, tmp_path), "--name", "faces", "--models", "models", "--yes", *options) == 2
    told = capsys.readouterr().err
    assert told.startswith("ganserve-trainer: ")
    assert told.count("\n") == 1
    for text in texts:
        assert text in told
    assert not Path("models").exists()


def with_input(name: str, kind: int, shape: tuple[Any, ...], factor: float = 1e-9) -> Foreign:
    """Return a file with a further input, whose values of an image, times a factor, are added to its latent."""
    nodes = [helper.make_node("Cast", [name], ["floats_"], to=FLOAT)]
    if len(shape) > 1:
        nodes += [
            helper.make_node("Flatten", ["floats_"], ["rows_"]),
            helper.make_node("Constant", [], ["axis_"], value_ints=[1]),
            helper.make_node("ReduceSum", ["rows_", "axis_"], ["sum_"], keepdims=1),
        ]
    elif shape == ("N",):
        nodes.append(helper.make_node("Constant", [], ["column_"], value_ints=[-1, 1]))
        nodes.append(helper.make_node("Reshape", ["floats_", "column_"], ["sum_"]))
    nodes.append(helper.make_node("Constant", [], ["factor_"], value_float=factor))
    nodes.append(helper.make_node("Mul", [nodes[-2].output[0] if len(shape) else "floats_", "factor_"], ["little_"]))
    nodes.append(helper.make_node("Add", ["flat", "little_"], ["changed"]))
    value = helper.make_tensor_value_info(name, kind, shape)
    return Foreign(nodes=tuple(nodes), inputs=(value,))


FURTHER: dict[str, tuple[Foreign, tuple[str, ...], str, str]] = {
    "psi of each image": (
        with_input("truncation_psi", FLOAT, ("N",)),
        (),
        "truncation: 'truncation_psi', float32 [N]: by its name",
        '{"name": "truncation", "truncation": {}}',
    ),
    "psi of all images": (
        with_input("psi", TensorProto.DOUBLE, ()),
        (),
        "truncation: 'psi', float64 []",
        '{"name": "truncation", "truncation": {"scalar": true}}',
    ),
    "noise": (
        with_input("noise_4", FLOAT, ("N", 1, 2, 2)),
        (),
        "noise: 'noise_4', float32 [N, 1, 2, 2]: noise by its shape",
        '{"name": "noise_4", "latent": {"shape": [1, 2, 2], "distribution": "DISTRIBUTION_NORMAL", "defaultSeed": 0}}',
    ),
    "noise of all images": (
        with_input("noise", FLOAT, (1, 1, 2, 2)),
        (),
        "constant: 'noise', float32 [1, 1, 2, 2]",
        "",
    ),
    "attributes": (
        with_input("attributes", FLOAT, ("N", 2)),
        ("--input", "attributes=attributes:smile,age"),
        "attributes: 'attributes', float32 [N, 2]: by --input",
        '{"name": "attributes", "attributes": {"attributes": [{"name": "smile", "maximum": 1.0}, '
        '{"name": "age", "maximum": 1.0}]}}',
    ),
    "codes": (
        with_input("code", FLOAT, ("N", 2)),
        (),
        "latent 'code', uniform: 'code', float32 [N, 2]",
        '{"name": "code", "latent": {"shape": [2], "distribution": "DISTRIBUTION_UNIFORM"}}',
    ),
    "a switch": (with_input("training", TensorProto.BOOL, ()), (), "constant 0: 'training', bool []: a switch", ""),
    "a constant": (
        with_input("steps", INT32, (1,)),
        ("--input", "steps=constant:3"),
        "constant 3: 'steps', int32 [1]: by --input",
        "",
    ),
}


@pytest.mark.parametrize("kind", FURTHER)
def test_further_inputs_of_a_file_are_proposed_or_set(
    kind: str, bring: Callable[..., ModelVersion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, options, line, listed = FURTHER[kind]
    model = bring(saved(foreign.model(), tmp_path), *options)
    assert line in capsys.readouterr().err
    inputs = [json_format.MessageToDict(each) for each in model.card.inputs]
    assert inputs[1:] == ([json.loads(listed)] if listed else [])
    assert made(model) == [picture(seed) for seed in range(4)]


def test_the_truncation_of_a_file_for_one_image_is_that_of_the_request(
    bring: Callable[..., ModelVersion], tmp_path: Path
) -> None:
    foreign = dataclasses.replace(with_input("psi", FLOAT, (1, 1), factor=-1.7), latent=(1, 4), reshape=(1, 3, 2, 2))
    model = bring(saved(foreign.model(), tmp_path))
    engine = model.engine
    by_truncation = {psi: engine.run([engine.inputs.probes(SEEDS[1:2], psi)]).tolist() for psi in (1.0, 0.5)}
    assert by_truncation == {1.0: [picture(2)], 0.5: [picture(0)]}  # 1.62 - 1.7 < 0, and 1.62 - 0.85 > 0


def test_a_generator_that_draws_random_numbers_outside_the_graph_is_refused() -> None:
    source = source_of(Foreign().model(), Wishes())

    def run(feeds: Arrays) -> Arrays:
        return {name: values + np.float32(np.random.rand()) for name, values in source.run(feeds).items()}

    with pytest.raises(TrainerError, match=r"different image each time.*noise_mode='const'"):
        prepare(dataclasses.replace(source, run=run))


def test_files_of_other_kinds_are_refused_with_what_converts_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("saved").mkdir()
    for name in ("saved/saved_model.pb", "generator.keras", "damaged.onnx", "damaged.pt", "damaged.safetensors"):
        Path(name).write_text("x")
    Path("names").write_bytes(b"\xff\xfe")
    arguments = (saved(Foreign().model(), tmp_path), "--class-names", "names", "--name", "faces", "--models", "models")
    assert run(monkeypatch, *arguments) == 2
    assert "names is not a text file" in capsys.readouterr().err
    for name, text in (
        ("saved", "pip install tensorflow tf2onnx"),
        ("generator.keras", "pip install keras"),
        ("damaged.onnx", "is not an ONNX file"),
        ("damaged.pt", "--trust"),
        ("damaged.safetensors", "is not a safetensors file"),
        ("missing.onnx", "there is no file"),
    ):
        assert run(monkeypatch, name, "--name", "faces", "--models", "models", "--yes") == 2
        assert text in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_keras_model_is_imported_where_keras_is_installed(
    bring: Callable[..., ModelVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    model = keras.Sequential(
        [layers.Input((4,)), layers.Dense(12, "tanh", kernel_initializer="he_normal"), layers.Reshape((2, 2, 3))]
    )
    model.save(tmp_path / "generator.keras")
    card = bring(tmp_path / "generator.keras", "--layout", "NHWC").card
    assert (card.latent_dim, card.height, card.width, card.channels) == (4, 2, 2, 3)


class Network(nn.Module):
    """A generator of `picture`s: a convolutional one, whose weights are the levels."""

    def __init__(self, nz: int = 4, pixels: int = 12) -> None:
        super().__init__()
        self.nz = nz
        self.register_buffer("first", torch.eye(nz)[:, :1].clone(), persistent=False)
        self.level = nn.Parameter(torch.zeros(pixels))
        self.register_buffer("step", torch.zeros(pixels))

    def forward(self, z: Tensor) -> Tensor:
        return (self.level + torch.sign(z[:, :, 0, 0] @ self.first) * self.step).reshape(-1, 3, 2, 2)


class OneHotNetwork(Network):
    """The same, with one-hot labels; in 0 to 1, as a part of what it returns."""

    def __init__(self, nz: int = 4, classes: int = 3) -> None:
        super().__init__(nz)
        self.table = nn.Parameter(torch.zeros(classes, 12))

    def forward(self, noise: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        images = super().forward(noise[:, :, None, None]) + (labels @ self.table).reshape(-1, 3, 2, 2)
        return {"mask": images[:, :1], "rgb": (images + 1) / 2}


class IndexNetwork(Network):
    """The same, with a row of a table for each label."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 12))

    def forward(self, z: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z) + self.table[label].reshape(-1, 3, 2, 2)


class GroupedNetwork(Network):
    """The same, by a convolution with one group for each image, as in StyleGAN."""

    def forward(self, z: Tensor) -> Tensor:
        images = super().forward(z)
        weights = torch.eye(3)[:, :, None, None].repeat(len(z), 1, 1, 1)
        return nn.functional.conv2d(images.reshape(1, -1, 2, 2), weights, groups=len(z)).reshape(-1, 3, 2, 2)


class ClassesNetwork(Network):
    """The same, with an embedding of the labels, which tells how many there are; it draws noise."""

    def __init__(self) -> None:
        super().__init__()
        self.label_emb = nn.Embedding.from_pretrained(TABLE)
        self.cuda()
        self.kind = torch.float16

    @classmethod
    def make(cls) -> nn.Module:
        return cls()

    def forward(self, z: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        noise = torch.randn(len(z), 3, 2, 2) * 1e-4
        return (super().forward(z) + self.label_emb(label).reshape(-1, 3, 2, 2)).to(self.kind) + noise


class Autoencoder(Network):
    """The same, as a decoder; forward takes vectors of pixels."""

    def decode(self, z: Tensor) -> Tensor:
        return super().forward(z[:, :, None, None])

    def forward(self, z: Tensor) -> Tensor:
        return z.reshape(-1, 3, 2, 2)


class Stylish(Network):
    """The same, of a mapping and a synthesis network; the latent's first value is moved to -1 by the truncation."""

    class Mapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w_avg", torch.tensor([-1.0, 0, 0, 0]))

        def forward(self, z: Tensor, c: None) -> Tensor:
            return z

    class Synthesis(Network):
        def forward(self, ws: Tensor, noise_mode: str = "random", fused_modconv: bool = True) -> Tensor:  # type: ignore[override]
            noise = 0.0 if noise_mode == "const" else torch.ones(len(ws), 3, 2, 2)
            return super().forward(ws[:, :, None, None]) + noise

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.z_dim = 4
        self.mapping, self.synthesis = self.Mapping(), self.Synthesis()

    def forward(self, z: Tensor, c: None, truncation_psi: float = 1, **synthesis: Any) -> Tensor:  # type: ignore[override]
        raise AssertionError


LEVEL = torch.tensor([0, -1, -0.5, 0, 1, 1, 1, 1, -1, -1, -1, -1])
STEP = torch.tensor([0.5] + [0] * 11)
TABLE = torch.tensor([[0.0] * 8 + [blue] * 4 for blue in (0.0, 1.0, 2.0)])
HERE = f"{Path(__file__)}"


def test_a_checkpoint_s_averaged_weights_are_imported(
    bring: Callable[..., ModelVersion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "g": {"module.level": torch.zeros(12), "module.step": STEP},
        "g_ema": {"module._orig_mod.level": LEVEL, "module.step": STEP, "module.decay": torch.zeros(1)},
        "d": {"module.weight": torch.zeros(2, 2)},
        "g_optim": {"state": {0: {"exp_avg": torch.zeros(12)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 24,
    }
    torch.save(content, tmp_path / "checkpoint.pt")
    model = bring(tmp_path / "checkpoint.pt", "--module", f"{HERE}:Network", "--arguments", '{"nz": 4}')
    assert (model.card.architecture, model.card.generator_parameters) == ("Network", 12)
    assert made(model) == [picture(seed) for seed in range(4)]
    told = capsys.readouterr().err
    assert "weights 'g_ema', 2 of 2; not in Network: g_ema.module.decay\n" in told
    assert "g(as_map(z))  (z: latents [n, 4])" in told


def test_one_hot_labels_and_one_of_several_outputs_of_a_module(
    bring: Callable[..., ModelVersion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {
        "netG.level": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]},
        "netG.table": {"dtype": "F32", "shape": [3, 12], "data_offsets": [48, 192]},
        "netG.step": {"dtype": "F64", "shape": [12], "data_offsets": [192, 288]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    values = LEVEL.numpy().tobytes() + TABLE.numpy().tobytes() + STEP.double().numpy().tobytes()
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    model = bring(path, "--module", f"{HERE}:OneHotNetwork", "--latent-dim", "4", "--classes", "a,b,c")
    assert made(model) == [picture(0, 0), picture(1, 128), picture(2, 255), picture(3, 0)]
    assert "g(z, one_hot(y, 3))" in capsys.readouterr().err


def test_the_class_of_a_training_script_is_found_without_training(
    bring: Callable[..., ModelVersion], tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(
        "import argparse\nimport torch\nfrom torch import nn\nimport a_library_that_only_training_needs\n"
        "parser = argparse.ArgumentParser()\nparser.add_argument('--side', type=int, required=True)\n"
        "options = parser.parse_args()\nif options.side:\n    pixels = 3 * options.side**2\n"
        "class Generator(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.level = nn.Parameter(torch.zeros(pixels))\n"
        "        self.register_buffer('step', torch.zeros(pixels))\n"
        "    def forward(self, z):\n"
        "        return (self.level + torch.sign(z[:, :1]) * self.step).reshape(-1, *shape(options))\n"
        "def shape(options):\n    return 3, options.side, options.side\n"
        "data = open('a data set')\nfor step in range(10**9):\n    parser = 1 / 0\n"
    )
    torch.save({"level": LEVEL, "step": STEP}, tmp_path / "generator.pth")
    options = ("--module", "train.py:Generator", "--latent-dim", 4, "--script-arguments", "--side 2")
    assert made(bring(tmp_path / "generator.pth", *options)) == [picture(seed) for seed in range(4)]


def test_a_file_that_demands_a_gpu_is_imported_without_one(
    bring: Callable[..., ModelVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "demanding.py").write_text(
        "import torch\n"
        "assert torch.cuda.is_available(), 'You need a GPU with CUDA'\n"
        "class Generator(torch.nn.Module):\n    def __init__(self, nz):\n        super().__init__()\n"
        "        self.nz, self.level = nz, torch.nn.Parameter(torch.zeros(12))\n"
        "        self.register_buffer('step', torch.zeros(12))\n"
        "    def forward(self, z):\n"
        "        return (self.level + torch.sign(z[:, :1]) * self.step).reshape(-1, 3, 2, 2)\n"
    )
    torch.save({"level": LEVEL, "step": STEP}, tmp_path / "generator.pth")
    options = ("--module", "demanding.py:Generator", "--arguments", '{"nz": 4}')
    assert made(bring(tmp_path / "generator.pth", *options)) == [picture(seed) for seed in range(4)]


def test_a_network_that_draws_noise_in_fp16_and_wants_a_gpu_is_imported(
    bring: Callable[..., ModelVersion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"g": {"level": LEVEL, "step": STEP, "label_emb.weight": TABLE}, "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "checkpoint.pt")  # which holds an object beside the weights
    model = bring(tmp_path / "checkpoint.pt", "--module", f"{HERE}:ClassesNetwork.make")
    wanted = [picture(0, 0), picture(1, 128), picture(2, 255), picture(3, 0)]
    np.testing.assert_allclose(made(model), wanted, atol=1)  # of the noise
    assert "draws noise, which is now constant" in capsys.readouterr().err


def test_psi_of_a_mapping_network_is_the_truncation_of_requests(
    bring: Callable[..., ModelVersion], tmp_path: Path
) -> None:
    torch.save({"synthesis.level": LEVEL, "synthesis.step": STEP}, tmp_path / "checkpoint.pt")
    engine = bring(tmp_path / "checkpoint.pt", "--module", f"{HERE}:Stylish").engine
    by_truncation = {psi: engine.run([engine.inputs.probes(SEEDS[:1], psi)]).tolist() for psi in (1.0, 0.3)}
    assert by_truncation == {1.0: [picture(0)], 0.3: [picture(2)]}  # 1.76, and 0.3 * 2.76 - 1 = -0.17


def test_the_decoder_of_an_autoencoder_is_imported(bring: Callable[..., ModelVersion], tmp_path: Path) -> None:
    torch.save({"level": LEVEL, "step": STEP}, tmp_path / "checkpoint.pt")
    model = bring(tmp_path / "checkpoint.pt", "--module", f"{HERE}:Autoencoder")
    assert made(model) == [picture(seed) for seed in range(4)]


def test_a_call_is_set_as_an_expression(
    bring: Callable[..., ModelVersion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"level": LEVEL, "step": STEP}, tmp_path / "checkpoint.pt")
    call = "-g(as_map(-psi[:, None] * z))"
    bring(tmp_path / "checkpoint.pt", "--module", f"{HERE}:Network", "--call", call)
    assert f"Network is called as {call}  (z: latents [n, 4]; psi: truncation)" in capsys.readouterr().err


def test_a_network_that_is_exported_for_one_image_only_is_repeated_for_each(
    bring: Callable[..., ModelVersion], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"level": LEVEL, "step": STEP}}, tmp_path / "checkpoint.pt")
    model = bring(tmp_path / "checkpoint.pt", "--module", f"{HERE}:GroupedNetwork", "--latent-dim", "4")
    assert "changed: " in capsys.readouterr().err
    assert made(model) == [picture(seed) for seed in range(4)]


def test_a_pickled_network_is_imported_if_the_user_trusts_it(
    bring: Callable[..., ModelVersion], tmp_path: Path
) -> None:
    network = Network()
    network.load_state_dict({"level": LEVEL, "step": STEP})
    (tmp_path / "network.pkl").write_bytes(pickle.dumps({"G": Network(), "G_ema": network, "D": None}))
    assert made(bring(tmp_path / "network.pkl", "--trust")) == [picture(seed) for seed in range(4)]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_torchscript_module_is_imported(bring: Callable[..., ModelVersion], tmp_path: Path) -> None:
    network = IndexNetwork()
    network.load_state_dict({"level": LEVEL, "step": STEP, "table": TABLE})
    traced = torch.jit.trace(network, (torch.zeros(2, 4, 1, 1), torch.zeros(2, dtype=torch.int64)), check_trace=False)
    torch.jit.save(traced, tmp_path / "generator.pt")
    model = bring(tmp_path / "generator.pt", "--latent-dim", 4)
    assert list(model.card.class_names) == ["0", "1", "2"]
    assert made(model) == [picture(0, 0), picture(1, 128), picture(2, 255), picture(3, 0)]


def test_an_exported_program_is_imported(bring: Callable[..., ModelVersion], tmp_path: Path) -> None:
    network = Network()
    network.load_state_dict({"level": LEVEL, "step": STEP})
    torch.export.save(torch.export.export(network, (torch.zeros(1, 4, 1, 1),)), tmp_path / "generator.pt2")
    assert made(bring(tmp_path / "generator.pt2")) == [picture(seed) for seed in range(4)]


REFUSED: dict[str, tuple[object, tuple[str, ...], tuple[str, ...]]] = {
    "no network": ({"level": LEVEL}, (), ("not the network", "--module MODULE:CLASS")),
    "no class": ({"level": LEVEL}, ("--module", f"{HERE}:Missing"), ("--module", "has no attribute 'Missing'")),
    "no module": ({"level": LEVEL}, ("--module", "Network"), ("'Network'", "MODULE:CLASS")),
    "another argument": (
        {"level": LEVEL},
        ("--module", f"{HERE}:Network", "--arguments", '{"z": 1}'),
        ("unexpected keyword argument 'z'",),
    ),
    "arguments that are no JSON": (
        {"level": LEVEL},
        ("--module", f"{HERE}:Network", "--arguments", "nz=1"),
        ("--arguments is not JSON",),
    ),
    "no weight of it": ({"conv.weight": LEVEL}, ("--module", f"{HERE}:Network"), ("conv.weight", "has level, step")),
    "weights that are missing": (
        {"level": LEVEL, "step": STEP},
        ("--module", f"{HERE}:IndexNetwork"),
        ("missing", "table"),
    ),
    "weights of another shape": (
        {"level": LEVEL[:3]},
        ("--module", f"{HERE}:Network"),
        ("level has shape [3] in the file, and [12]", "--arguments"),
    ),
    "another size of the latent": (
        {"level": LEVEL, "step": STEP},
        ("--module", f"{HERE}:Network", "--latent-dim", "5"),
        ("z: latents [n, 5]", "--latent-dim", "docs/bring-a-generator.md"),
    ),
    "a call that fails": (
        {"level": LEVEL, "step": STEP},
        ("--module", f"{HERE}:Network", "--call", "g(y)"),
        ("g(y)", "check --call", "--latent-dim"),
    ),
    "a call that is no expression": (
        {"level": LEVEL, "step": STEP},
        ("--module", f"{HERE}:Network", "--call", "g(z"),
        ("--call 'g(z' is not a Python expression",),
    ),
    "a network in the file": (Network(), (), ("Network", "--trust")),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_checkpoint_that_cannot_be_imported_is_refused_with_a_remedy(
    reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, options, texts = REFUSED[reason]
    monkeypatch.chdir(tmp_path)
    torch.save(content, "checkpoint.pt")
    assert run(monkeypatch, "checkpoint.pt", "--name", "faces", "--models", "models", "--yes", *options) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for text in texts:
        assert text in told
