"""`ganserve-server check`: all that is wrong with model files of a few bytes, and how those run that are served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.programs import run

from ganserve_server.repository.verify import CARD_KEY, ModelRejected, load_version
from ganserve_server.settings import BUNDLED_MODELS

Edit = Callable[[onnx.ModelProto, dict[str, Any]], object]
FLOAT, INT32, UINT8 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT8


def model_file(path: Path, *edits: Edit, nodes: tuple[onnx.NodeProto, ...] = ()) -> Path:
    """Write a model whose image of 2x3 pixels, [2, 3, 1], is 100 + 20 times its latent; the edits make it another.

    Args:
        path: the file.
        edits: change the model, or the card, which is JSON.
        nodes: what makes `mixed` of `latent`; none: it is the latent.
    """
    graph = helper.make_graph(
        [
            *(nodes or [helper.make_node("Identity", ["latent"], ["mixed"])]),
            helper.make_node("Mul", ["mixed", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "hundred"], ["grey"]),
            helper.make_node("Reshape", ["grey", "size"], ["pixels"]),
            helper.make_node("Cast", ["pixels"], ["image"], to=UINT8),
        ],
        "grey",
        [helper.make_tensor_value_info("latent", FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("image", UINT8, ["N", 2, 3, 1])],
        [
            numpy_helper.from_array(np.float32(20), "scale"),
            numpy_helper.from_array(np.float32(100), "hundred"),
            numpy_helper.from_array(np.array([-1, 2, 3, 1]), "size"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    card: dict[str, Any] = {"latentDim": 6, "height": 2, "width": 3, "channels": 1}
    for edit in edits:
        edit(model, card)
    if card:
        helper.set_model_props(model, {CARD_KEY: json.dumps(card)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def check(*arguments: str | Path, code: int) -> list[dict[str, Any]]:
    """Check files; return the reports."""
    done = run("ganserve-server", *arguments, "--json")
    assert done.returncode == code, done.stderr
    reports: list[dict[str, Any]] = json.loads(done.stdout)
    return reports


def of_card(**values: Any) -> Edit:
    return lambda _, card: card.update(values)


def retyped(name: str, kind: int, *shape: int | str) -> Edit:
    """Give an input or output a type, and add the input if there is none."""

    def edit(model: onnx.ModelProto, _: dict[str, Any]) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if value.name == name:
                value.CopyFrom(helper.make_tensor_value_info(name, kind, shape))
                return
        model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))

    return edit


def renamed(model: onnx.ModelProto, _: dict[str, Any]) -> None:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "pixels\x1b[2J"


def two_outputs(model: onnx.ModelProto, _: dict[str, Any]) -> None:
    model.graph.output.append(helper.make_tensor_value_info("grey", FLOAT, ["N", 6]))


def floats(model: onnx.ModelProto, _: dict[str, Any]) -> None:
    model.graph.node[-1].CopyFrom(helper.make_node("Identity", ["pixels"], ["image"]))
    model.graph.output[0].type.tensor_type.elem_type = FLOAT


def channels_first(model: onnx.ModelProto, _: dict[str, Any]) -> None:
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.array([-1, 1, 2, 3]), "size"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("image", UINT8, ["N", 1, 2, 3]))


def one_image(model: onnx.ModelProto, _: dict[str, Any]) -> None:
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.array([1, 2, 3, 1]), "size"))


def custom(model: onnx.ModelProto, _: dict[str, Any]) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node[0].op_type, model.graph.node[0].domain = "FastGelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("org.example", 1))
    model.graph.node[3].op_type, model.graph.node[3].domain = "Shape", "org.example"


def outside(model: onnx.ModelProto, _: dict[str, Any]) -> None:
    for tensor in model.graph.initializer[:2]:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights")


def drawing(model: onnx.ModelProto, _: dict[str, Any]) -> None:
    model.graph.node[0].CopyFrom(helper.make_node("RandomNormalLike", ["latent"], ["mixed"]))


def golden(seed: int, label: int | None = None) -> dict[str, Any]:
    return {"seed": seed, "digest": "sha256:0", "png": "eA=="} | ({} if label is None else {"label": label})


MEAN = (
    helper.make_node("Constant", [], ["axis"], value_ints=[0]),
    helper.make_node("ReduceMean", ["latent", "axis"], ["mean"]),
    helper.make_node("Add", ["latent", "mean"], ["mixed"]),
)
NODES = {"a mean over the batch": MEAN}
# Of each file: what makes it from the good one, and for each of its problems texts that must be in it.
FAULTS: dict[str, tuple[list[Edit], list[tuple[str, ...]]]] = {
    "no card": ([lambda _, card: card.clear()], [(CARD_KEY, '"latentDim"')]),
    "card of texts": (
        [of_card(latentDim="six", classNames=3, dataset=5)],
        [('latentDim is "six"', "from 0 to 4294967295"), ("classNames",), ("dataset is 5", "a text")],
    ),
    "card that is an array": (
        [lambda model, card: (card.clear(), helper.set_model_props(model, {CARD_KEY: "[6, 2, 3, 1]"}))],
        [("not the JSON", "must be an object")],
    ),
    "card without sizes": ([of_card(latentDim=0, height=0, width=0)], [("latent_dim, height, width", "above 0")]),
    "channels": ([of_card(channels=2)], [("2 channels", "must have 1, 3 or 4")]),
    "large images": ([of_card(height=4097)], [("4097x3", "at most 4096", "smaller images")]),
    "other height": ([of_card(height=5)], [("[2, 3, 1]", "[5, 3, 1]", "height 2, width 3 and channels 1")]),
    "channels first": ([channels_first], [("[1, 2, 3]", "[2, 3, 1]", "transpose", "(0, 2, 3, 1)")]),
    "floats, channels first": (
        [floats, channels_first, retyped("image", FLOAT, "N", 1, 2, 3)],
        [("float32 [N, 1, 2, 3]", "uint8 [N, 2, 3, 1]", "cast", "(0, 2, 3, 1)")],
    ),
    "output name": ([renamed], [("'pixels", "must be 'image'")]),
    "two outputs": ([two_outputs], [("2 outputs", "image, grey", "one, image")]),
    "latent_dim": ([of_card(latentDim=7)], [("latent is float32 [N, 6]", "[N, 7]", "latent_dim", "6 for this file")]),
    "latent of 4 dimensions": (
        [retyped("latent", FLOAT, "N", 6, 1, 1)],
        [("[N, 6, 1, 1]", "must be float32 [N, 6]", '{"name": "latent", "latent": {"shape": [6, 1, 1]}}')],
    ),
    "batch of one": ([retyped("latent", FLOAT, 1, 6)], [("float32 [1, 6]", "fixed at 1", "dynamic batch dimension")]),
    "dynamic latent": ([retyped("latent", FLOAT, "N", "D")], [("[N, D]", "only the first dimension may be dynamic")]),
    "latent of integers": ([retyped("latent", INT32, "N", 6)], [("int32 [N, 6]", "float32 [N, 6]", "cast")]),
    "label of int32": (
        [retyped("label", INT32, "N"), of_card(classNames=["a", "b"])],
        [("label is int32 [N]", "must be int64 [N]", "cast")],
    ),
    "one-hot label": (
        [retyped("label", FLOAT, "N", 2), of_card(classNames=["a", "b"])],
        [("float32 [N, 2]", "int64 [N]", '{"oneHot": true}')],
    ),
    "label without names": ([retyped("label", TensorProto.INT64, "N")], [("label, int64 [N]", "class_names")]),
    "no label": ([of_card(classNames=["a"])], [("no input label", "int64 [N]", "class_names")]),
    "noise": (
        [retyped("noise", FLOAT, "N", 4, 4)],
        [("input noise, float32 [N, 4, 4]", "constant", '{"name": "noise", "latent": {"shape": [4, 4]}}')],
    ),
    "custom operators": (
        [custom],
        [("FastGelu of com.microsoft, Shape of org.example", "standard ONNX operators")],
    ),
    "external data": ([outside], [("scale, hundred", "external data", "onnx.save(")]),
    "newer IR": (
        [lambda model, _: setattr(model, "ir_version", 99)],
        [("IR version 99", f"at most {onnx.IR_VERSION}")],
    ),
    "newer opset": ([lambda model, _: setattr(model.opset_import[0], "version", 99)], [("opset 99", "at most")]),
    "random numbers": ([drawing], [("RandomNormalLike", "random numbers", "constant")]),
    "one image at a time": ([one_image], [("fails when it runs on 3 at once", "Reshape", "use -1")]),
    "a mean over the batch": ([], [("grey levels", "in a batch with others", "BatchNorm")]),
    "golden images": (
        [of_card(goldenImages=[golden(4), golden(5)])],
        [("golden image of seed 4", "not a PNG"), ("golden image of seed 5", "not a PNG")],
    ),
    "golden label": (
        [retyped("label", TensorProto.INT64, "N"), of_card(classNames=["a"], goldenImages=[golden(0, 3)])],
        [("label 3", "1 classes")],
    ),
    "inputs of the card": (
        [of_card(inputs=[{"name": "z", "latent": {"shape": [5]}}, {"name": "y"}])],
        [("'y'", "latent, label, attributes"), ("'z'", "must be the latent"), ("5 values", "latent_dim is 6")],
    ),
    "three of the file": (
        [custom, renamed, retyped("noise", FLOAT, "N", 4), of_card(hight=2)],
        [("com.microsoft",), ("input noise",), ("must be 'image'",)],
    ),
    "three of the card": (
        [of_card(latentDim=0, channels=7, goldenImages=[golden(0)] * 65)],
        [("latent_dim",), ("7 channels",), ("65 golden_images", "at most 64")],
    ),
    "three of running": (
        [of_card(goldenImages=[golden(1), golden(2)]), one_image],
        [("on 3 at once",), ("seed 1",), ("seed 2",)],
    ),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The report of each file of `FAULTS`."""
    folder = tmp_path_factory.mktemp("files")
    files = [
        model_file(folder / str(number), *edits, nodes=NODES.get(name, ()))
        for number, (name, (edits, _)) in enumerate(FAULTS.items())
    ]
    return dict(zip(FAULTS, check("check", *files, code=1), strict=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_each_problem_of_a_file_is_reported_with_what_to_do(fault: str, reports: dict[str, dict[str, Any]]) -> None:
    wanted, found = FAULTS[fault][1], reports[fault]["problems"]
    assert len(found) == len(wanted), found
    for texts, problem in zip(wanted, found, strict=True):
        assert [text for text in texts if text not in problem] == [], problem
    assert not reports[fault]["served"]


def test_checks_that_a_problem_prevents_are_named(reports: dict[str, dict[str, Any]]) -> None:
    runs, golden_images, card, inputs = "the model runs", "golden images", "model card", "the inputs"
    for fault, missing in {
        "three of the file": [runs],
        "three of the card": [inputs, runs, golden_images],
        "no card": [card, inputs, runs, golden_images],
        "card of texts": [card, inputs, runs, golden_images],
        "golden images": [],
        "golden label": [golden_images],
        "three of running": [],
        "channels first": ["in a batch"],
    }.items():
        unchecked = "; ".join(reports[fault]["unchecked"])
        assert [each for each in missing if each not in unchecked] == [], fault
        assert (runs in unchecked, golden_images in unchecked) == (runs in missing, golden_images in missing), fault


def test_unknown_keys_of_a_card_are_reported_at_any_depth(tmp_path: Path) -> None:
    training = {"configuration": {"any": "key"}, "imagesSen": 5}
    edit = of_card(hieght=2, training=training, createdAt="2026-01-02T03:04:05Z")
    (report,) = check("check", model_file(tmp_path / "m.onnx", edit), code=0)
    first, second = report["unknown_keys"]
    assert "'hieght' is not a key" in first
    assert "'height'" in first
    assert "'training.imagesSen' is not a key" in second
    assert "'imagesSeen'" in second


def test_a_file_that_would_be_served_is_reported_with_how_it_runs(tmp_path: Path) -> None:
    file = model_file(tmp_path / "m.onnx", of_card(dataset="grey"))
    sum_of_three = (
        helper.make_node("Softplus", ["latent"], ["mixed"]),  # 6 values, no multiple of 16
    )
    singles = model_file(tmp_path / "singles.onnx", nodes=sum_of_three)
    flags = ("--provider=cpu", "--threads=2", "--max-batch-size=5")
    report, other = check(*flags, "check", file, singles, code=0)
    assert (report["served"], report["problems"], report["unchecked"]) == (True, [], [])
    assert (report["inputs"], report["outputs"]) == ({"latent": "float32 [N, 6]"}, {"image": "uint8 [N, 2, 3, 1]"})
    assert (report["size_bytes"], report["digest"][:7]) == (file.stat().st_size, "sha256:")
    assert (report["provider"], report["threads"], report["batch_images"]) == ("CPU", 2, 5)
    assert report["image_s"] > 0
    assert report["images_per_s"] > 0
    # At the end, two float32 values for each of six pixels, and at most as much again for the operators' own buffers.
    assert 6 * 4 <= report["image_bytes"] <= 4096
    assert (report["batching"], report["batching_operator"], report["one_thread_operator"]) == ("together", "", "")
    assert (other["batching"], other["batching_operator"]) == ("one by one", "Softplus")
    assert other["one_thread_operator"] == "Softplus"
    assert (report["batch_difference"], report["truncation"]) == (0, "latent")
    assert (report["golden_images"], report["exact_golden_images"]) == (0, 0)
    assert report["good_to_have"] == ["golden_images", "architecture", "training", "metrics", "created_at"]


def test_the_report_for_people_is_a_row_for_each_figure() -> None:
    done = run("ganserve-server", "--provider=cpu", "check", BUNDLED_MODELS / "cdcgan-mnist")
    first, *rows = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert first == f"{BUNDLED_MODELS}/cdcgan-mnist/1/model.onnx would be served"
    assert "  input          label: int64 [N]" in rows
    assert "  golden images  all 10 agree: 10 to the byte, 0 within one grey level" in rows
    assert "  batches        images are computed together" in rows
    assert not [row for row in rows if "good to have" in row]


def test_names_in_a_file_cannot_control_the_terminal(tmp_path: Path) -> None:
    done = run("ganserve-server", "check", model_file(tmp_path / "m.onnx", renamed))
    assert done.returncode == 1
    assert "would be rejected, for 1 problem\n" in done.stdout
    assert "pixels" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_file_may_be_given_by_its_folders(tmp_path: Path) -> None:
    for version in ("2", "10"):
        model_file(tmp_path / "grey" / version / "model.onnx")
    model_file(tmp_path / "staging" / "generator.onnx")
    files = [report["file"] for report in check("check", tmp_path / "grey", tmp_path / "grey" / "10", code=0)]
    assert files == [f"{tmp_path}/grey/{version}/model.onnx" for version in ("2", "10", "10")]
    (report,) = check("check", tmp_path / "staging", code=1)
    assert "rename generator.onnx to model.onnx" in report["problems"][0]
    (report,) = check("check", tmp_path / "nothing.onnx", code=1)
    assert "is missing" in report["problems"][0]


def test_the_settings_decide_as_they_do_for_the_server(tmp_path: Path) -> None:
    large = lambda model, _: setattr(model, "doc_string", "x" * (1 << 20))  # noqa: E731
    file = model_file(tmp_path / "m.onnx", large)
    (report,) = check("--max-model-mib", "1", "check", file, code=1)
    assert report["problems"] == ["the file has more than 1 MiB, the limit set by --max-model-mib"]
    assert "--max-model-mib 2" not in report["problems"]
    check("--max-model-mib", "2", "check", file, code=0)


def test_the_log_names_the_first_problems_in_one_short_line(tmp_path: Path) -> None:
    def load(*edits: Edit) -> str:
        with pytest.raises(ModelRejected) as caught:
            load_version("m", 1, model_file(tmp_path / "m", *edits), max_model_mib=1, provider="cpu", threads=1)
        return str(caught.value)

    three = load(*FAULTS["three of the file"][0])
    assert all(text in three for text in ("com.microsoft", "input noise", "must be 'image'", "did you mean 'height'"))
    assert "ganserve-server check" not in three
    many = load(of_card(goldenImages=[golden(seed) for seed in range(60)]))
    assert "golden image of seed 2 " in many
    assert "golden image of seed 3 " not in many
    assert "`ganserve-server check FILE` reports 57 more" in many
    long = load(retyped("x" * 10_000, FLOAT, "N", 4))
    assert "\n" not in long
    assert len(long) < 600
