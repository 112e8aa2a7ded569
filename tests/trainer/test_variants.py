"""Models below fp32: what they contain, that a batch does not matter, and what the gate keeps out."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.repository.verify import load_version
from ganserve_trainer import cli
from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import judge as judge_module
from ganserve_trainer.export import variants
from ganserve_trainer.export.graph import to_onnx
from ganserve_trainer.export.publish import export
from ganserve_trainer.export.quantising import to_int8
from ganserve_trainer.export.variants import calibration
from ganserve_trainer.model_file import CARD_KEY, latents, load_session, run_session
from ganserve_trainer.settings import ExportPrecision, from_preset
from ganserve_trainer.train.checkpoints import load_checkpoint
from ganserve_trainer.train.loop import train

INT8, FP16 = ExportPrecision.INT8, ExportPrecision.FP16
Published = Callable[[str, ExportPrecision], tuple[Path, Path]]
IMAGES = 200


@pytest.fixture(scope="module", autouse=True)
def short_training(data_root: Path) -> Iterator[None]:
    """Train the judge of the digits in few steps, and whatever else in two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "_EPOCHS", 0)
        patch.setattr(judge_module, "_LEAST_STEPS", 60)
        judge_module.judge_of(load_dataset("mnist", data_root, train=True), data_root)
        patch.setattr(judge_module, "_LEAST_STEPS", 2)
        yield


def run(preset: str, data_root: Path, out: Path, images: int = 640, **changes: object) -> Path:
    settings = from_preset(preset, {"width": 8, "batch_size": 32, "images": images, "precision": "fp32", **changes})
    dataset = load_dataset("mnist", data_root, train=True, image_size=settings.image_size)
    assert train(settings, dataset, out, resume=False, report=lambda *_: None)
    return out


@pytest.fixture(scope="module")
def runs(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {preset: run(preset, data_root, folder / preset) for preset in ("mlp", "cdcgan")}


@pytest.fixture(scope="module")
def published(runs: dict[str, Path], data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Publish a run in fp32, and then in a lower precision; return the two files."""

    @functools.cache
    def fp32(preset: str) -> Path:
        return export(runs[preset], tmp_path_factory.mktemp("models"), "digits")

    @functools.cache
    def both(preset: str, precision: ExportPrecision) -> tuple[Path, Path]:
        repository = shutil.copytree(fp32(preset).parents[2], tmp_path_factory.mktemp("models") / "models")
        with pytest.MonkeyPatch.context() as patch:
            # A generator that has hardly been trained makes images between classes.
            patch.setitem(variants.LIMITS, "label_accuracy_loss", 0.1)
            return fp32(preset), variants.export(runs[preset], repository, "digits", precision, data_root, IMAGES)

    return both


def card_of(file: Path) -> pb.ModelCard:
    properties = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    return json_format.Parse(properties[CARD_KEY], pb.ModelCard())


def images_of(file: Path, card: pb.ModelCard, count: int, batch_size: int) -> NDArray[np.uint8]:
    session = load_session(str(file))
    latent, label = latents(np.arange(count), card.latent_dim), np.arange(count) % max(len(card.class_names), 1)
    parts = []
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        parts.append(run_session(session, latent[part], label[part] if card.class_names else None))
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("preset", "precision"),
    [
        ("cdcgan", INT8),
        ("cdcgan", FP16),
        pytest.param("mlp", INT8, marks=pytest.mark.slow),
        pytest.param("mlp", FP16, marks=pytest.mark.slow),
    ],
)
def test_what_passes_the_gate_is_served_and_says_what_it_is(
    preset: str, precision: ExportPrecision, published: Published
) -> None:
    first, file = published(preset, precision)
    assert file.parts[-3:] == ("digits", "2", "model.onnx")
    version = load_version("digits", 2, file, max_model_mib=64, provider="cpu", threads=1)
    assert version.card.precision == precision
    assert card_of(first).precision == "fp32"
    metrics = {metric.name: metric for metric in version.card.metrics}
    grey_levels = {"grey_level_difference_mean", "grey_level_difference_max"}
    accuracy = {"label_accuracy_loss"} if preset == "cdcgan" else set()
    # Of 100 test images, only what compares the two is said.
    assert metrics.keys() == {"fid_over_fp32"} | grey_levels | accuracy
    assert all(metric.HasField("standard_error") for name, metric in metrics.items() if not name.endswith("_max"))
    assert all(f"{precision}: {IMAGES} images of seeds 0 to {IMAGES - 1}" in each.method for each in metrics.values())
    assert all("weights sha256:" in each.method for each in metrics.values())
    # What the card says is what the files make.
    card = version.card
    far = np.abs(images_of(file, card, IMAGES, 50).astype(int) - images_of(first, card, IMAGES, 50))
    assert metrics["grey_level_difference_max"].value == far.max() > 0
    assert metrics["grey_level_difference_mean"].value == pytest.approx(far.mean(), abs=1e-5)
    assert far.mean() < 1


def test_int8_is_in_the_file(published: Published) -> None:
    model = onnx.load(published("cdcgan", INT8)[1])
    kinds = [node.op_type for node in model.graph.node]
    # The transposed convolution to the image stays in fp32.
    assert (kinds.count("Conv"), kinds.count("ConvTranspose")) == (1, 1)
    assert "DynamicQuantizeLinear" not in kinds
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert max(np.prod(tensor.dims) for tensor in weights) == 16 * 7 * 7 * 256
    assert not model.graph.node[0].domain
    assert [entry.domain for entry in model.opset_import] == [""]


@pytest.mark.parametrize("preset", ["cdcgan", pytest.param("mlp", marks=pytest.mark.slow)])
def test_in_int8_an_image_does_not_depend_on_its_batch(preset: str, published: Published) -> None:
    _, file = published(preset, INT8)
    card = card_of(file)
    together = images_of(file, card, 256, 256)
    for batch_size in (1, 3, 17, 64):
        assert np.array_equal(images_of(file, card, 256, batch_size), together), batch_size


def test_the_gate_keeps_out_a_variant_with_wrong_scales(
    runs: dict[str, Path], data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_nothing(latent_dim: int, classes: int) -> list[dict[str, NDArray[Any]]]:
        return [{name: values * 0 for name, values in feeds.items()} for feeds in calibration(latent_dim, classes)]

    monkeypatch.setattr(variants, "calibration", of_nothing)
    with pytest.raises(TrainerError, match=r"grey_level_difference_mean is .*the limit is 2.0.*nothing was pub"):
        variants.export(runs["mlp"], tmp_path, "digits", INT8, data_root, IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "passes", "fails"),
    [
        ("label_accuracy_loss", (-0.1, 0.002), (0.0021, float("nan"))),
        ("fid_over_fp32", (0.5, 1.02), (1.03, float("nan"))),
        ("grey_level_difference_mean", (0.0, 2.0), (2.1, float("nan"))),
    ],
)
def test_the_gate_has_a_limit_for(name: str, passes: tuple[float, ...], fails: tuple[float, ...]) -> None:
    for value in passes:
        variants.check_gate([{"name": name, "value": value, "method": ""}], INT8)
    for value in fails:
        with pytest.raises(TrainerError, match=f"{name} is"):
            variants.check_gate([{"name": name, "value": value, "method": ""}], INT8)


def test_every_limit_is_of_a_figure_that_is_measured(
    runs: dict[str, Path], data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "LIMITS", dict.fromkeys(variants.LIMITS, -1.0))
    with pytest.raises(TrainerError) as refused:
        variants.export(runs["cdcgan"], tmp_path, "digits", INT8, data_root, IMAGES)
    assert all(f"{name} is" in str(refused.value) for name in variants.LIMITS)


def test_without_the_data_it_was_trained_on_nothing_is_published(
    runs: dict[str, Path],
    tmp_path: Path,
    data_root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damaged = tmp_path / "data" / "MNIST" / "raw"
    damaged.mkdir(parents=True)
    (damaged / "train-images-idx3-ubyte").write_bytes(b"no images")
    flags = ["--repository", str(tmp_path / "models"), "--name", "digits", "--precision", "int8"]
    command = ["ganserve-trainer", "export", str(runs["mlp"]), *flags, "--data-root", str(tmp_path / "data")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "the data set it was trained on (--data-root)" in capsys.readouterr().err
    monkeypatch.setattr(variants, "load_parts", lambda *_: (load_dataset("mnist", data_root, train=False),) * 2)
    with pytest.raises(TrainerError, match="trained on other data than mnist"):
        variants.export(runs["mlp"], tmp_path / "models", "digits", INT8, data_root)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"attention": True}, id="attention"),
        pytest.param({"conditional": False, "clusters": 3}, id="clusters", marks=pytest.mark.slow),
    ],
)
def test_int8_makes_nearly_the_same_images(changes: dict[str, object], data_root: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(run("cdcgan", data_root, tmp_path, images=64, **changes))
    fp32 = to_onnx(checkpoint)
    latent_dim, conditional = checkpoint.settings.latent_dim, checkpoint.settings.conditional
    int8 = to_int8(fp32, calibration(latent_dim, 10 if conditional else 0))
    label = np.arange(50) % 10 if conditional else None
    latent = latents(np.arange(50), latent_dim)
    wanted, made = (run_session(load_session(each.SerializeToString()), latent, label) for each in (fp32, int8))
    assert 0 < np.abs(made.astype(int) - wanted).mean() < 0.05 * wanted.std()


@pytest.fixture(scope="module")
def grown(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a progressive generator."""
    out = tmp_path_factory.mktemp("grown")
    return run("pggan", data_root, out, images=64, image_size=16, growth_images=40)


def test_a_progressive_generator_is_refused_in_int8(grown: Path, data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"int8.*--precision fp16"):
        variants.export(grown, tmp_path / "models", "grown", INT8, data_root, IMAGES)


@pytest.mark.slow
def test_a_progressive_generator_is_exported_in_fp16(grown: Path, data_root: Path, tmp_path: Path) -> None:
    file = variants.export(grown, tmp_path / "models", "grown", FP16, data_root, IMAGES)
    types = {tensor.data_type for tensor in onnx.load(file).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
