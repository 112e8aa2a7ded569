import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import json_format
from numpy.typing import NDArray
from PIL import Image
from tests.programs import Program, ended, installed
from tests.programs import run as program
from torch import Tensor

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.cli import main
from ganserve_trainer.data.datasets import Dataset, load_dataset
from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import evaluate as evaluation_module
from ganserve_trainer.evaluation import judge as judge_module
from ganserve_trainer.evaluation import measure as measure_module
from ganserve_trainer.evaluation.evaluate import evaluate
from ganserve_trainer.evaluation.judge import FEATURES, Judge, judge_of, train_network
from ganserve_trainer.evaluation.measure import Generate, QuickEvaluation, classification_accuracy, measure
from ganserve_trainer.export.publish import export
from ganserve_trainer.settings import from_preset
from ganserve_trainer.train.checkpoints import checkpoint_files, load_checkpoint
from ganserve_trainer.train.loop import train

FIDS = {"fid", "fid_floor", "fid_over_floor"}
# Without those of FID, for which the digits are too few.
ALL_METRICS = {"kid", "precision", "recall", "density", "coverage", "data_copying", "class_kl"}


@contextmanager
def steps(count: int) -> Iterator[None]:
    """Train networks in so many steps: 60 teach them the digits, 2 cost next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "_LEAST_STEPS", count)
        patch.setattr(judge_module, "_EPOCHS", 0)
        yield


@pytest.fixture(scope="module", autouse=True)
def short_training(train_part: Dataset, data_root: Path) -> Iterator[None]:
    """Train the judge of the digits, and whatever else hardly at all; measure on few images."""
    with steps(60):
        judge_of(train_part, data_root)
    with steps(2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_module, "_LEAST_IMAGES", 10)
        yield


@pytest.fixture(scope="module")
def train_part(data_root: Path) -> Dataset:
    return load_dataset("mnist", data_root, train=True)


@pytest.fixture(scope="module")
def test_part(data_root: Path) -> Dataset:
    return load_dataset("mnist", data_root, train=False)


@pytest.fixture(scope="module")
def judge(train_part: Dataset, data_root: Path) -> Judge:
    return judge_of(train_part, data_root)


@pytest.fixture(scope="module")
def quick(train_part: Dataset, test_part: Dataset, data_root: Path) -> QuickEvaluation:
    return QuickEvaluation(train_part, test_part, data_root, latent_dim=1, conditional=True, images=100)


def run(preset: str, data_root: Path, out: Path) -> Path:
    settings = from_preset(preset, {"width": 8, "batch_size": 32, "images": 64, "precision": "fp32"})
    dataset = load_dataset("mnist", data_root, train=True)
    assert train(settings, dataset, out, resume=False, report=lambda *_: None)
    return out


@pytest.fixture(scope="module")
def evaluated(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a conditional run's folder with its evaluation on 50 images."""
    out = run("cdcgan", data_root, tmp_path_factory.mktemp("evaluated") / "run")
    evaluate(out, None, data_root, 50)
    return out


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Dataset) -> None:
        raise AssertionError("a network is trained")

    monkeypatch.setattr(judge_module, "train_network", refuse)


def real_images(dataset: Dataset, shift: int = 0, wrong_from: int = 10) -> Generate:
    """Answer with real images of the class asked for plus `shift`; classes from `wrong_from` on get a zero."""
    by_class = [dataset.images[dataset.labels == label] for label in range(10)]

    def generate(latent: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        wanted = [(label + shift) % 10 if label < wrong_from else 0 for label in labels.tolist()]
        choice = np.abs(latent[:, 0] * 1e6).astype(int).tolist()
        images = [by_class[label][index % len(by_class[label])] for label, index in zip(wanted, choice, strict=True)]
        pixels: NDArray[np.uint8] = torch.stack(images).permute(0, 2, 3, 1).numpy()
        return pixels

    return generate


def one_image(image: Tensor) -> Generate:
    pixels = image.permute(1, 2, 0).numpy()
    return lambda _, labels: np.stack([pixels] * len(labels))


def test_label_accuracy_is_the_share_of_images_of_the_class_asked_for(
    quick: QuickEvaluation, train_part: Dataset
) -> None:
    assert quick.measure(real_images(train_part))["label_accuracy"] > 0.9
    assert quick.measure(real_images(train_part, shift=1))["label_accuracy"] < 0.1
    assert quick.measure(real_images(train_part, wrong_from=5))["label_accuracy"] == pytest.approx(0.5, abs=0.05)


def test_a_quick_look_tells_real_images_from_a_collapsed_generator(quick: QuickEvaluation, train_part: Dataset) -> None:
    real, collapsed = quick.measure(real_images(train_part)), quick.measure(one_image(train_part.images[0]))
    assert real["fid"] < 2 * quick.fid_floor < collapsed["fid"]
    assert real["recall"] > 0.5
    assert collapsed["recall"] < 0.1


def test_a_quick_look_leaves_the_random_state_alone(quick: QuickEvaluation, train_part: Dataset) -> None:
    before = torch.random.get_rng_state()
    first = quick.measure(real_images(train_part))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert quick.measure(real_images(train_part)) == first


def test_the_classification_accuracy_score_of_real_images_is_high_and_of_one_image_is_chance(
    train_part: Dataset, test_part: Dataset
) -> None:
    def score(generate: Generate) -> float:
        return float(classification_accuracy(generate, 1, train_part, test_part).double().mean())

    with steps(60):
        assert score(real_images(train_part)) > 0.9
        # Right labels on all but half of the classes: the classifier never learns the other half.
        assert score(real_images(train_part, wrong_from=5)) == pytest.approx(0.5, abs=0.15)
    with steps(10):
        assert score(one_image(train_part.images[0])) < 0.3


def test_a_generator_that_copies_training_images_is_found_out(
    train_part: Dataset, test_part: Dataset, data_root: Path
) -> None:
    card = pb.ModelCard(latent_dim=1)

    def data_copying(source: Dataset) -> float:
        copies = [source.images[index % len(source.images)].permute(1, 2, 0).numpy() for index in range(100)]
        evaluation = measure(
            lambda _, labels: np.stack(copies)[: len(labels)], card, train_part, test_part, data_root, 100
        )
        return {metric["name"]: metric["value"] for metric in evaluation.metrics}["data_copying"]

    assert data_copying(train_part) == 1.0
    assert data_copying(test_part) == 0.5


def test_every_figure_has_a_standard_error_and_the_card_too(train_part: Dataset, data_root: Path) -> None:
    card = pb.ModelCard(latent_dim=1, class_names=train_part.spec.class_names)
    with steps(60), pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_module, "_LEAST_IMAGES", 200)
        # The training part in place of the test part, which is too small.
        found = measure(real_images(train_part, wrong_from=5), card, train_part, train_part, data_root, 200)
    assert not found.withheld
    estimates = {metric["name"]: (metric["value"], metric["standard_error"]) for metric in found.metrics}
    assert estimates.keys() == ALL_METRICS | FIDS | {"label_accuracy", "classification_accuracy_score"}
    accuracy, error = estimates["label_accuracy"]
    assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 200), rel=0.5)
    assert all(estimates[name][1] > 0 for name in (*FIDS, "kid", "recall", "coverage", "class_kl"))
    ratio = estimates["fid"][0] / estimates["fid_floor"][0]
    assert estimates["fid_over_floor"][0] == pytest.approx(ratio, rel=1e-3)
    message = json_format.ParseDict(dict(found.metrics[0]), pb.QualityMetric())
    assert message.standard_error == pytest.approx(error)


def test_figures_of_few_images_or_of_a_poor_judge_are_withheld_with_the_reason(
    train_part: Dataset, test_part: Dataset, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 test images, of which the judge recognises 15 of two classes; blurry noise once had a precision of 1.0."""
    monkeypatch.setattr(measure_module, "_LEAST_IMAGES", 200)

    def two_classes(part: Dataset, count: int) -> Dataset:
        spec = dataclasses.replace(part.spec, class_names=("a", "b"))
        images = part.images[:count]
        return dataclasses.replace(part, name="two", images=images, labels=torch.arange(len(images)) % 2, spec=spec)

    noise = torch.rand(300, 1, 7, 7, generator=torch.Generator().manual_seed(0)) * 255
    blurry = torch.nn.functional.interpolate(noise, 28, mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    card = pb.ModelCard(latent_dim=1, class_names=("a", "b"))

    def reasons(test: Dataset, right: int) -> dict[str, str]:
        hits = torch.arange(len(test.images)) < right
        monkeypatch.setattr(Judge, "right", lambda *_: hits)
        evaluation = measure(lambda _, labels: blurry[: len(labels)], card, train, test, data_root, 250)
        named = {each["name"]: each["reason"] for each in evaluation.withheld}
        assert not named.keys() & {metric["name"] for metric in evaluation.metrics}
        return named

    train = two_classes(train_part, 300)
    everything = ALL_METRICS | FIDS | {"label_accuracy", "classification_accuracy_score"}
    poor = reasons(two_classes(test_part, 23), 15)
    assert poor.keys() == everything
    assert "right on 15 of 23 test images, 0.65" in poor["precision"]
    assert "must reach 0.76, halfway from chance (0.52) to 1" in poor["precision"]
    # With a good judge, what needs no test image remains.
    few = reasons(two_classes(test_part, 24), 24)
    assert few.keys() == everything - {"label_accuracy", "class_kl"}
    assert few["precision"] == "it needs at least 200 and there are 24 test images"
    # With enough images, a poor judge is enough of a reason.
    assert reasons(two_classes(train_part, 240), 120).keys() == everything


def test_the_picture_shows_samples_and_their_nearest_training_images(
    train_part: Dataset, test_part: Dataset, data_root: Path
) -> None:
    generate = one_image(train_part.images[7])
    shown = measure(generate, pb.ModelCard(latent_dim=1), train_part, test_part, data_root, 20).neighbours
    assert shown.shape == (10, 10, 1, 28, 28)
    # The nearest is the very image; none of the others is.
    assert all(torch.equal(row[1], train_part.images[7]) for row in shown)
    assert not any(torch.equal(row[2], train_part.images[7]) for row in shown)


def test_the_judge_is_trained_once(judge: Judge, train_part: Dataset, data_root: Path, no_training: None) -> None:
    again = judge_of(train_part, data_root)
    assert again.digest() == judge.digest()
    assert torch.equal(again.features(train_part.images[:9]), judge.features(train_part.images[:9]))


class KilledError(Exception):
    pass


def test_a_training_that_was_killed_ends_with_the_same_weights(
    train_part: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_module, "_SAVED_EVERY_S", 0.0)
    fashion = dataclasses.replace(few(train_part), name="fashion-mnist")  # its images are mirrored at random
    with steps(6):
        whole = train_network(fashion).state_dict()

        def killed_at(share: float) -> Callable[..., None]:
            def report(_: str, done: float = 0.0) -> None:
                if done > share:
                    raise KilledError

            return report

        for share in (0.3, 0.6):
            with pytest.raises(KilledError):
                train_network(fashion, tmp_path / "state", killed_at(share))
        done: list[float] = []
        resumed = train_network(fashion, tmp_path / "state", lambda _, share=0.0: done.append(share)).state_dict()
    assert done == pytest.approx([0, 5 / 6, 1])
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.slow  # evaluates three times
def test_an_evaluation_that_was_killed_resumes_with_the_same_command(
    evaluated: Path, data_root: Path, tmp_path: Path
) -> None:
    def command(out: str) -> list[str]:
        flags = ["--data-root", str(data_root), "--images", "200", "--out", str(tmp_path / out)]
        return [installed("ganserve-trainer"), "evaluate", str(evaluated), *flags]

    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with ended(Program(command("resumed"), stderr=subprocess.PIPE, text=True, env=environment)) as process:
        assert process.stderr is not None
        before = list(iter(process.stderr.readline, "looking for copies of training images …\n"))
        process.kill()
    assert "generating 200 images …\n" in before
    assert not (tmp_path / "resumed").exists()
    kept = tmp_path / "cache" / "ganserve" / "evaluations"
    assert list(kept.iterdir())
    after = program("ganserve-trainer", *command("resumed")[1:], env=environment)
    assert after.returncode == 0, after.stderr
    assert not re.search("training the judge|generating|computing", after.stderr)
    assert not list(kept.iterdir())
    shutil.rmtree(tmp_path / "cache" / "ganserve" / "features")
    assert program("ganserve-trainer", *command("unbroken")[1:], env=environment).returncode == 0
    files = [tmp_path / out / "evaluation.json" for out in ("resumed", "unbroken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "label_accuracy" in [metric["name"] for metric in json.loads(files[0].read_text())["metrics"]]


def foreign(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"digest": "sha256:", "network": [1, 2]}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-100],
        lambda _: b"",
        lambda content: content[:9000] + bytes([content[9000] ^ 4]) + content[9001:],
        foreign,
    ],
    ids=["cut", "empty", "flipped bit", "foreign"],
)
def test_a_damaged_judge_is_trained_again(
    damage: Callable[[bytes], bytes],
    train_part: Dataset,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []

    def report(stage: str, done: float = 0.0) -> None:
        said.extend([] if done else [stage])

    digest = judge_of(few(train_part), data_root, report).digest()
    (file,) = tmp_path.rglob("*.pt")
    file.write_bytes(damage(file.read_bytes()))
    for _ in range(2):
        assert judge_of(few(train_part), data_root, report).digest() == digest
    assert len(said) == 2


def test_without_a_place_for_the_judge_it_is_trained_and_that_is_said(
    train_part: Dataset,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert judge_of(few(train_part), data_root)
    assert "cannot be written" in capsys.readouterr().err


def few(dataset: Dataset) -> Dataset:
    return dataclasses.replace(dataset, images=dataset.images[:20], labels=dataset.labels[:20])


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 20, 45), (3, 8, 5)]
)
def test_images_of_any_size_have_features_of_mean_square_one(
    channels: int, height: int, width: int, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(256, (30, channels, height, width), generator=torch.Generator().manual_seed(0)).byte()
    spec = ImageSpec(channels, height, width, ("a", "b"))
    judge = judge_of(Dataset("noise", images, torch.arange(30) % 2, spec), data_root)
    features = judge.features(images)
    assert features.shape == (30, FEATURES)
    assert features.square().mean().item() == pytest.approx(1, abs=1e-3)
    assert set(judge.labels(features).tolist()) <= {0, 1}


@pytest.mark.parametrize(("width", "ways"), [(28, 4), (20, 2)])
def test_without_classes_the_judge_learns_which_way_up_an_image_is(
    width: int, ways: int, train_part: Dataset, test_part: Dataset, data_root: Path
) -> None:
    def classless(part: Dataset) -> Dataset:
        spec = ImageSpec(1, 28, width, ())
        return Dataset("folder", part.images[..., :width].contiguous(), torch.zeros_like(part.labels), spec)

    with steps(40):
        judge = judge_of(classless(train_part), data_root)
    assert judge.task == f"which of {ways} ways up an image is"
    assert judge.accuracy(classless(test_part)) > 0.65
    generate = one_image(classless(train_part).images[0])
    evaluation = measure(
        generate, pb.ModelCard(latent_dim=1), classless(train_part), classless(test_part), data_root, 20
    )
    assert {metric["name"] for metric in evaluation.metrics} == ALL_METRICS - {"class_kl"}
    assert "ways up" in evaluation.metrics[0]["method"]


def test_modes_of_stacked_mnist_are_counted_channel_by_channel(
    judge: Judge, train_part: Dataset, data_root: Path, no_training: None
) -> None:
    first = [int((train_part.labels == digit).nonzero()[0, 0]) for digit in range(10)]
    by_digit = train_part.images[first, 0]

    def stacked(*triples: str) -> Dataset:
        images = torch.stack([by_digit[[int(digit) for digit in triple]] for triple in triples])
        spec = ImageSpec(3, 28, 28, tuple(f"{index:03}" for index in range(1000)))
        return Dataset("stacked-mnist", images, torch.tensor([int(triple) for triple in triples]), spec)

    real = stacked(*(5 * ["012", "345", "678", "901"]))
    of_stacked = judge_of(real, data_root)
    features = of_stacked.features(real.images)
    assert torch.allclose(features[1, FEATURES : 2 * FEATURES], judge.features(by_digit[4][None, None])[0], atol=1e-5)
    assert of_stacked.labels(features).tolist() == real.labels.tolist()
    made = stacked("012", "345", "901").images.permute(0, 2, 3, 1).numpy()
    evaluation = measure(
        lambda _, labels: made[np.arange(len(labels)) % 3], pb.ModelCard(latent_dim=1), real, real, data_root, 30
    )
    values = {metric["name"]: metric["value"] for metric in evaluation.metrics}
    assert values["modes"] == 3
    assert values["class_kl"] == pytest.approx(math.log(4 / 3), abs=1e-5)
    histogram = evaluation.details["class_histogram"]
    assert {name: count for name, count in histogram.items() if count} == {"012": 10, "345": 10, "901": 10}


def test_an_evaluation_says_what_was_measured_on_what(evaluated: Path, judge: Judge, test_part: Dataset) -> None:
    kept = json.loads((evaluated / "evaluation.json").read_text())
    assert kept["checkpoint"] == load_checkpoint(evaluated).digest()
    assert (kept["dataset"], kept["images"], kept["first_seed"], kept["test_images"]) == ("mnist", 50, 0, 100)
    assert kept["judge"]["digest"] == judge.digest()
    assert kept["judge"]["accuracy"] == judge.accuracy(test_part) > 0.9
    assert list(kept["class_histogram"]) == list("0123456789")
    assert sum(kept["class_histogram"].values()) == 50
    metrics = {metric["name"]: metric for metric in kept["metrics"]}
    assert metrics.keys() == ALL_METRICS | {"label_accuracy", "classification_accuracy_score"}
    assert all(judge.digest()[:19] in metric["method"] for metric in metrics.values())
    assert {each["name"] for each in kept["withheld"]} == FIDS
    assert "more than the 128 features" in kept["withheld"][0]["reason"]
    with Image.open(evaluated / "neighbours.png") as picture:
        assert picture.size == (10 * 30 + 2, 10 * 30 + 2)


def test_an_exported_model_carries_the_figures_and_gets_the_same_ones(
    evaluated: Path, data_root: Path, tmp_path: Path
) -> None:
    kept = json.loads((evaluated / "evaluation.json").read_text())
    model = export(evaluated, tmp_path / "models", "measured")
    card = json_format.Parse(onnx.load(model).metadata_props[0].value, pb.ModelCard())
    assert [metric.name for metric in card.metrics] == [metric["name"] for metric in kept["metrics"]]
    again = evaluate(model, None, data_root, 50, tmp_path / "out")
    for metric, before in zip(again.metrics, kept["metrics"], strict=True):
        # BatchNorm is folded: a few grey levels differ by one.
        assert metric["value"] == pytest.approx(before["value"], rel=0.05, abs=0.1), metric["name"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "neighbours.png"]
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


def test_two_evaluations_give_the_same_figures_which_are_printed(
    evaluated: Path,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--data-root", str(data_root), "--images", "50", "--out", str(tmp_path / "again")]
    monkeypatch.setattr(sys, "argv", ["ganserve-trainer", "evaluate", str(evaluated), *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    for metric in json.loads((evaluated / "evaluation.json").read_text())["metrics"]:
        assert f"{metric['name']} {metric['value']:.4f} ± {metric['standard_error']:.2g}  (" in printed
    assert "fid is withheld: 50 images; FID needs more than the 128 features" in printed
    assert printed.endswith(f"next: ganserve-trainer export {evaluated} --repository DIR --name NAME\n")
    for name in ("evaluation.json", "neighbours.png"):
        assert (tmp_path / "again" / name).read_bytes() == (evaluated / name).read_bytes()


def test_unconditional_models_get_all_but_what_needs_labels(data_root: Path, tmp_path: Path) -> None:
    metrics = evaluate(run("mlp", data_root, tmp_path), None, data_root, 20).metrics
    assert {metric["name"] for metric in metrics} == ALL_METRICS


def test_a_smaller_evaluation_does_not_take_the_place_of_a_larger_one(
    evaluated: Path, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluated, tmp_path / "run")
    file = tmp_path / "run" / "evaluation.json"
    before = file.read_bytes()
    evaluate(tmp_path / "run", None, data_root, 20)
    assert file.read_bytes() == before
    assert "metrics of 50 images" in capsys.readouterr().err
    # Of another checkpoint it is worth nothing.
    file.write_text(json.dumps(json.loads(before) | {"checkpoint": "sha256:other"}))
    evaluate(tmp_path / "run" / "checkpoints" / "000000000064.pt", None, data_root, 20)
    assert json.loads(file.read_text())["images"] == 20


def test_figures_are_kept_in_the_run_and_its_report_or_beside_a_lone_checkpoint(
    evaluated: Path, data_root: Path, tmp_path: Path
) -> None:
    page = (evaluated / "report.html").read_text()
    (copying,) = [
        each
        for each in json.loads((evaluated / "evaluation.json").read_text())["metrics"]
        if each["name"] == "data_copying"
    ]
    assert f"{copying['value']:.6g} ± {copying['standard_error']:.2g}" in page
    assert "withheld" in page
    (file,) = checkpoint_files(evaluated)
    shutil.copy(file, tmp_path / "lone.pt")
    evaluate(tmp_path / "lone.pt", None, data_root, 20)
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"] == 20
    assert not (tmp_path / "report.html").exists()


def test_an_evaluation_on_other_data_is_not_kept(
    evaluated: Path, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluated, tmp_path / "run")
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(data_root / "MNIST" / "raw", raw)
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1] + b"\x07")
    before = (tmp_path / "run" / "evaluation.json").read_bytes()
    evaluate(tmp_path / "run", "fashion-mnist", tmp_path, 60)
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == before
    assert "trained on other data" in capsys.readouterr().err


def test_images_of_another_kind_are_refused(
    evaluated: Path, train_part: Dataset, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(colours: int, class_names: tuple[str, ...]) -> Callable[..., Dataset]:
        images = train_part.images.expand(-1, colours, -1, -1)
        spec = ImageSpec(colours, 28, 28, class_names)
        return lambda *_, **__: dataclasses.replace(train_part, images=images, spec=spec)

    monkeypatch.setattr(evaluation_module, "load_dataset", load(3, tuple("0123456789")))
    with pytest.raises(TrainerError, match="1 channels, 28x28, but those of mnist have 3"):
        evaluate(evaluated, None, data_root, 20)
    monkeypatch.setattr(evaluation_module, "load_dataset", load(1, ("a", "b")))
    with pytest.raises(TrainerError, match="has 10 classes, but mnist has 2"):
        evaluate(evaluated, None, data_root, 20)


def test_an_evaluation_of_another_checkpoint_stays_out_of_the_card(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluated, tmp_path / "run")
    file = tmp_path / "run" / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"checkpoint": "sha256:other"}))
    published = onnx.load(export(tmp_path / "run", tmp_path / "models", "measured")).metadata_props[0].value
    assert "label_accuracy" not in published
    assert "another checkpoint" in capsys.readouterr().err
    file.write_text("[]")
    with pytest.raises(TrainerError, match="evaluate again"):
        export(tmp_path / "run", tmp_path / "models", "measured")
