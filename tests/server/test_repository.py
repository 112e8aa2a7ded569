"""Every rule for a model file: what breaks one stays out, with the rule's name."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import json_format
from onnx import TensorProto, helper, numpy_helper
from tests.conftest import RunningServer, ordinary_user

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute import cuda
from ganserve_server.compute.engine import Engine, ProviderUnavailable
from ganserve_server.compute.inputs import Inputs
from ganserve_server.compute.model import ModelVersion
from ganserve_server.repository import verify
from ganserve_server.repository.scan import find_misplaced, find_versions, look
from ganserve_server.repository.verify import CARD_KEY, ModelRejected, load_version
from ganserve_server.settings import BUNDLED_MODELS

GOOD = BUNDLED_MODELS / "cdcgan-mnist" / "1" / "model.onnx"


def load(path: Path, max_model_mib: int = 512) -> ModelVersion:
    return load_version("name", 1, path, max_model_mib=max_model_mib, provider="cpu", threads=1)


def change(edit: Callable[[onnx.ModelProto], object], path: Path) -> Path:
    model = onnx.load(GOOD)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


def change_card(edit: Callable[[pb.ModelCard], object]) -> Callable[[onnx.ModelProto], None]:
    def edit_model(model: onnx.ModelProto) -> None:
        (entry,) = [entry for entry in model.metadata_props if entry.key == CARD_KEY]
        card = json_format.Parse(entry.value, pb.ModelCard())
        edit(card)
        entry.value = json_format.MessageToJson(card)

    return edit_model


def use_custom_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.evil", 1))
    model.graph.node[0].domain = "com.evil"


def point_outside(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")


def point_outside_in_a_sparse_constant(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    values.data_location = TensorProto.EXTERNAL
    values.external_data.add(key="location", value="weights")
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    sparse = helper.make_sparse_tensor(values, indices, [4])
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], sparse_value=sparse))


def break_weights(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    array = np.full(numpy_helper.to_array(tensor).shape, np.nan, np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def fix_batch_size(model: onnx.ModelProto) -> None:
    for tensor in model.graph.input:
        tensor.type.tensor_type.shape.dim[0].dim_value = 1


def add_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["image"], ["second"]))
    model.graph.output.append(helper.make_tensor_value_info("second", TensorProto.UINT8, ["n", 28, 28, 1]))


def misspell(model: onnx.ModelProto) -> None:
    (entry,) = [entry for entry in model.metadata_props if entry.key == CARD_KEY]
    entry.value = entry.value.replace('"classNames"', '"classnames"')


RULES: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "custom operator": (use_custom_operator, "com.evil"),
    "external data": (point_outside, "external data"),
    "external data in a sparse constant": (point_outside_in_a_sparse_constant, "external data"),
    "not a graph": (lambda model: model.graph.node[0].output.append("image"), "onnx's checker"),
    "no card": (lambda model: model.metadata_props.pop(), "no model card"),
    "card is not JSON": (lambda model: setattr(model.metadata_props[0], "value", "{"), "not the JSON"),
    "card without a size": (change_card(lambda card: setattr(card, "height", 0)), "height"),
    "several outputs": (add_output, r"2 outputs \(image, second\); .*one, image: export it with this output only"),
    "other latents": (
        change_card(lambda card: setattr(card, "latent_dim", 65)),
        r"input latent is float32 \[.*, 64\]; .* must be float32 \[N, 65\]: .*latent_dim .*64",
    ),
    "other size": (change_card(lambda card: setattr(card, "width", 30)), r"\[28, 28, 1\]; .* \[28, 30, 1\]"),
    "unconditional card": (
        change_card(lambda card: card.ClearField("class_names")),
        "input label, int64 .*class_names",
    ),
    "misspelt card": (
        misspell,
        "input label, .*; 'classnames' is not a key of a model card; did you mean 'classNames'",
    ),
    "fixed batch size": (fix_batch_size, "input latent .*first dimension is fixed at 1, .* must be dynamic"),
    "wrong golden image": (
        change_card(
            lambda card: (
                card.golden_images[1].CopyFrom(card.golden_images[2]),
                setattr(card.golden_images[1], "label", 1),
            )
        ),
        "golden image of seed 2",
    ),
    "golden image that is none": (
        change_card(
            lambda card: (setattr(card.golden_images[0], "png", b"x"), setattr(card.golden_images[0], "digest", ""))
        ),
        "not a PNG",
    ),
    "golden label out of range": (
        change_card(lambda card: setattr(card.golden_images[0], "label", 10)),
        "10 classes",
    ),
    "weights not a number": (break_weights, "golden image"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_file_that_breaks_a_rule_is_rejected_by_its_name(rule: str, tmp_path: Path) -> None:
    edit, text = RULES[rule]
    with pytest.raises(ModelRejected, match=text) as caught:
        load(change(edit, tmp_path / "model.onnx"))
    assert "\n" not in str(caught.value)


def model_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Return a model of images of 2 x 2 pixels, whose nodes turn `latent`, [N, 4], into `mixed`, of that size, too."""
    graph = helper.make_graph(
        [
            *nodes,
            helper.make_node("Constant", [], ["scale"], value_float=50.0),
            helper.make_node("Mul", ["mixed", "scale"], ["scaled"]),
            helper.make_node("Abs", ["scaled"], ["positive"]),
            helper.make_node("Constant", [], ["size"], value_ints=[-1, 2, 2, 1]),
            helper.make_node("Reshape", ["positive", "size"], ["pixels"]),
            helper.make_node("Cast", ["pixels"], ["image"], to=TensorProto.UINT8),
        ],
        "graph",
        [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 2, 2, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {CARD_KEY: '{"latentDim": 4, "height": 2, "width": 2, "channels": 1}'})
    return model


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_what_fails_inside_the_libraries_is_told_in_one_line(tmp_path: Path) -> None:
    fixed = [
        helper.make_node("Constant", [], ["one"], value_ints=[1, 4]),
        helper.make_node("Reshape", ["latent", "one"], ["mixed"]),
    ]
    with pytest.raises(ModelRejected, match="fails when it runs") as caught:
        load(saved(model_of(*fixed), tmp_path / "model.onnx"))
    assert "\n" not in str(caught.value)


def added(kind: str, *inputs: str, **attributes: Any) -> list[onnx.NodeProto]:
    """Add a thousandth of a node's output to the latent."""
    return [
        helper.make_node(kind, inputs, ["noise"], **attributes),
        helper.make_node("Constant", [], ["little"], value_float=0.001),
        helper.make_node("Mul", ["noise", "little"], ["small"]),
        helper.make_node("Add", ["latent", "small"], ["mixed"]),
    ]


def constant(name: str, value: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value)))


def branch(*nodes: onnx.NodeProto, result: str) -> onnx.GraphProto:
    value = helper.make_tensor_value_info(result, TensorProto.FLOAT, ["N", 4])
    return helper.make_graph(list(nodes), "branch", [], [value])


def either(then: onnx.GraphProto, otherwise: onnx.GraphProto) -> list[onnx.NodeProto]:
    node = helper.make_node("If", ["true"], ["mixed"], then_branch=then, else_branch=otherwise)
    return [constant("true", True), node]


RANDOM = helper.make_node("RandomNormalLike", ["latent"], ["drawn"])
SAME = branch(helper.make_node("Identity", ["latent"], ["same"]), result="same")
DRAWING: dict[str, list[onnx.NodeProto]] = {
    "Bernoulli": [
        helper.make_node("Sigmoid", ["latent"], ["chance"]),
        helper.make_node("Bernoulli", ["chance"], ["noise"]),
        helper.make_node("Add", ["latent", "noise"], ["mixed"]),
    ],
    "Multinomial": [
        helper.make_node("Multinomial", ["latent"], ["index"], sample_size=4),
        helper.make_node("Cast", ["index"], ["mixed"], to=TensorProto.FLOAT),
    ],
    "RandomNormal": added("RandomNormal", shape=[4]),
    "RandomNormalLike": added("RandomNormalLike", "latent", scale=1e-6),
    "RandomUniform": added("RandomUniform", shape=[4]),
    "RandomUniformLike": added("RandomUniformLike", "latent", seed=1.0),
    "RandomNormalLike in a branch that is not taken": either(SAME, branch(RANDOM, result="drawn")),
    "Dropout": [constant("on", True), *added("Dropout", "latent", "", "on")],
    "Dropout whose mode is computed": [
        constant("off", False),
        helper.make_node("Not", ["off"], ["on"]),
        *added("Dropout", "latent", "", "on"),
    ],
    "Dropout in two branches with modes of one name": either(
        branch(constant("on", False), helper.make_node("Dropout", ["latent", "", "on"], ["a"]), result="a"),
        branch(constant("on", True), helper.make_node("Dropout", ["latent", "", "on"], ["b"]), result="b"),
    ),
}


@pytest.mark.parametrize("case", DRAWING)
def test_operators_that_draw_random_numbers_are_rejected_by_name(case: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match=f"the operator {case.split(maxsplit=1)[0]} .*random numbers.*constant"):
        load(saved(model_of(*DRAWING[case]), tmp_path / "model.onnx"))


def test_random_numbers_inside_a_function_are_rejected(tmp_path: Path) -> None:
    model = model_of(helper.make_node("Softplus", ["latent"], ["mixed"]))
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("", "Softplus", ["latent"], ["drawn"], [RANDOM], opset))
    with pytest.raises(ModelRejected, match="the operator RandomNormalLike"):
        load(saved(model, tmp_path / "model.onnx"))


@pytest.mark.parametrize("inputs", [["latent"], ["latent", "", "off"]])
def test_dropout_that_is_off_is_served(inputs: list[str], tmp_path: Path) -> None:
    nodes = [constant("off", False), helper.make_node("Dropout", inputs, ["mixed"])]
    model = load(saved(model_of(*nodes), tmp_path / "model.onnx"))
    wanted = load(saved(model_of(helper.make_node("Identity", ["latent"], ["mixed"])), tmp_path / "same.onnx"))
    batch = model.engine.inputs.probes(np.arange(3, dtype=np.uint32))
    assert np.array_equal(model.engine.run([batch]), wanted.engine.run([batch]))


def test_random_numbers_of_an_operator_that_is_not_known_are_found_by_running_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_RANDOM", set())
    nodes = [
        helper.make_node("RandomUniformLike", ["latent"], ["noise"], seed=1.0),
        helper.make_node("Add", ["latent", "noise"], ["mixed"]),
    ]
    with pytest.raises(ModelRejected, match="a different image each time"):
        load(saved(model_of(*nodes), tmp_path / "model.onnx"))


MEAN = [
    helper.make_node("Constant", [], ["axis"], value_ints=[0]),
    helper.make_node("ReduceMean", ["latent", "axis"], ["mean"], keepdims=1),
    helper.make_node("Add", ["latent", "mean"], ["mixed"]),
]
FIRST = [
    *(helper.make_node("Constant", [], [name], value_ints=[at]) for name, at in (("from", 0), ("to", 1))),
    helper.make_node("Slice", ["latent", "from", "to"], ["mixed"]),
]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (MEAN, "differs by up to .* grey levels if it is made in a batch with others"),
        (FIRST, r"3 latents in one batch, the model makes 1 images of \[2, 2, 1\]; it must make 3"),
    ],
)
def test_a_model_whose_images_cannot_be_made_again_is_rejected(
    nodes: list[onnx.NodeProto], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelRejected, match=reason):
        load(saved(model_of(*nodes), tmp_path / "model.onnx"))


def test_a_model_with_no_more_than_the_least_card_is_served(tmp_path: Path) -> None:
    model = load(saved(model_of(helper.make_node("Identity", ["latent"], ["mixed"])), tmp_path / "model.onnx"))
    assert model.pixel_bytes == 4


@pytest.mark.parametrize("size", [None, -1])
def test_the_number_of_images_may_be_nameless_or_negative_in_the_file(size: int | None, tmp_path: Path) -> None:
    model = model_of(helper.make_node("Identity", ["latent"], ["mixed"]))
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        first.Clear()
        if size is not None:
            first.dim_value = size
    assert load(saved(model, tmp_path / "model.onnx")).pixel_bytes == 4


def test_a_newer_trainers_card_is_read_and_what_is_not_known_of_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add_keys(model: onnx.ModelProto) -> None:
        (entry,) = [entry for entry in model.metadata_props if entry.key == CARD_KEY]
        entry.value = json.dumps(json.loads(entry.value) | {"licence": "CC0", "latent_dims": 3})

    assert load(change(add_keys, tmp_path / "model.onnx")).card.latent_dim == 64
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "'latent_dims' is not a key of a model card; did you mean 'latentDim'?" in record.__dict__["reason"]
    assert "'licence' is not a key" in record.__dict__["reason"]


def test_files_that_are_no_model_are_rejected(tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(GOOD.read_bytes()[:-1000])
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    empty = tmp_path / "empty.onnx"
    empty.touch()
    with pytest.raises(ModelRejected, match="empty"):
        load(empty)
    for path in (truncated, text):
        with pytest.raises(ModelRejected):
            load(path)
    with pytest.raises(ModelRejected, match="cannot be read"):
        load(tmp_path / "missing.onnx")
    with pytest.raises(ModelRejected, match="more than 1 MiB"):
        load(GOOD, max_model_mib=1)


def test_a_pipe_is_no_model_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(ModelRejected, match="regular file"):
        load(tmp_path / "model.onnx")


def test_damaged_files_are_rejected_or_work_and_never_raise_anything_else(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    content = np.frombuffer(GOOD.read_bytes(), np.uint8)
    # The bytes before and after the weights, where the structure is.
    structure = [*range(2000), *range(len(content) - 20000, len(content))]
    for _ in range(150):
        damaged = content.copy()
        for place in random.choice(structure, 3):
            damaged[place] = random.randint(256)
        (tmp_path / "model.onnx").write_bytes(damaged.tobytes())
        with contextlib.suppress(ModelRejected):
            load(tmp_path / "model.onnx")


def test_versions_are_found_in_numerical_order_and_other_files_passed_over(tmp_path: Path) -> None:
    for name in ("b/10", "b/9", "b/latest", "b/.publishing-x", "b/0", "a/1", ".hidden/1", "Upper/1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "notes.txt").touch()
    assert [(name, version) for name, version, _ in find_versions(tmp_path)] == [("a", 1), ("b", 9), ("b", 10)]


@pytest.mark.parametrize(
    ("file", "place", "reason"),
    [
        ("mlp/v3/model.onnx", "mlp/v3", "'v3' is not a version: .* from 1 to 999999999"),
        ("mlp/03/model.onnx", "mlp/03", "'03' is not a version: .*leading zeros"),
        ("mlp/0/model.onnx", "mlp/0", "'0' is not a version"),
        ("mlp/v3/generator.ONNX", "mlp/v3", "'v3' is not a version"),
        ("MLP/3/model.onnx", "MLP", "'MLP' is not a model name: .*1 to 64 of a-z"),
        ("my model/model.onnx", "my model", "'my model' is not a model name"),
        ("model.onnx", "model.onnx", "expected {repository}/NAME/VERSION/model.onnx"),
        ("mlp/model.onnx", "mlp/model.onnx", "expected {repository}/NAME/VERSION/model.onnx"),
        ("team/mlp/3/model.onnx", "team/mlp", "expected {repository}/NAME/VERSION/model.onnx"),
    ],
)
def test_a_model_in_the_wrong_place_or_under_a_wrong_name_is_told_of(
    file: str, place: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    ((path, told),) = find_misplaced(tmp_path)
    assert path == tmp_path / place
    assert re.match(reason.format(repository=re.escape(str(tmp_path))), told)


def test_a_folder_that_cannot_be_read_is_told_of_if_its_name_is_a_models(open_folder: Path) -> None:
    for name in ("mlp", "lost+found"):
        (open_folder / name).mkdir(mode=0)
    with ordinary_user():
        assert list(find_misplaced(open_folder)) == [(open_folder / "mlp", "cannot be read: Permission denied")]
        assert list(find_versions(open_folder)) == []
        assert look(open_folder).unreadable_paths == {open_folder / "mlp": "Permission denied"}


def test_files_that_nobody_means_to_be_served_are_not_told_of(tmp_path: Path) -> None:
    for name in (
        "README.md",
        ".git/3/model.onnx",
        ".hidden/model.onnx",
        "__MACOSX/mlp/3/._model.onnx",
        "lost+found/x",
        "Docs/images/a.png",
        "mlp/config.pbtxt",
        "mlp/labels.txt",
        "mlp/.publishing-x/model.onnx",
        "mlp/4.tmp/model.onnx",
        "digits.tmp/1/model.onnx",
        "mlp/warmup/latent",
        "mlp/3/model.onnx",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "mlp" / "latest").symlink_to("3")
    (tmp_path / "mlp" / "loop").symlink_to("loop")
    assert list(find_misplaced(tmp_path)) == []
    assert [(name, version) for name, version, _ in find_versions(tmp_path)] == [("mlp", 3)]


def test_a_model_file_of_another_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "generator.onnx").touch()
    with pytest.raises(ModelRejected, match=r"missing.*; rename generator\.onnx to model\.onnx"):
        load(tmp_path / "model.onnx")


def test_the_server_keeps_a_bad_version_out_and_serves_the_good_ones(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    for version in (1, 2, 3):
        (tmp_path / "digits" / str(version)).mkdir(parents=True)
        shutil.copy(GOOD, tmp_path / "digits" / str(version) / "model.onnx")
    change(use_custom_operator, tmp_path / "digits" / "3" / "model.onnx")
    running = start_server("--models", tmp_path)
    with Client(running.address) as client:
        assert client.model("digits").versions == (1, 2)
        assert client.generate("digits", seed=1).version == 2
        assert client.generate("digits", seed=1, version=1).version == 1


def test_cuda_that_is_missing_is_not_replaced_in_silence() -> None:
    with pytest.raises(ProviderUnavailable, match="--provider") as caught:
        Engine(GOOD.read_bytes(), Inputs.of(pb.ModelCard(latent_dim=64)), "cuda", 1)
    assert cuda.why_no_cuda() in str(caught.value)
