"""How good a generator is, measured on images of fixed seeds, by a judge trained on the real training images.

The real images that generated ones are compared with are the test part's, which no generator has seen; the floor of a
distance is what real training images get. `metrics` has the figures, `judge` the network.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from google.protobuf import json_format
from numpy.typing import NDArray
from torch import Tensor

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.data.datasets import Dataset, load_dataset
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import metrics as figures
from ganserve_trainer.evaluation.judge import Judge, judge_of, train_network
from ganserve_trainer.export.publish import (
    CARD_KEY,
    EVALUATION_FILE_NAME,
    UInt8Generator,
    latents,
    load_session,
    run_session,
)
from ganserve_trainer.networks.generator import Generator
from ganserve_trainer.report.page import report_on
from ganserve_trainer.report.pictures import save_contact_sheet
from ganserve_trainer.settings import Settings
from ganserve_trainer.train.checkpoints import Checkpoint, load_checkpoint, replace_atomically, run_folder
from ganserve_trainer.train.devices import best_device

# latent [n, latent_dim], label [n], which unconditional generators overlook -> uint8 [n, height, width, channels]
Generate = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.uint8]]

Report = Callable[[str], None]

JUDGE = "; judge: "  # stands before the part of a method's text that all metrics have in common
NEIGHBOURS_FILE_NAME = "neighbours.png"

_DEFAULT_IMAGES = 10_000
_GENERATED_AT_ONCE = 500
_TEST_IMAGES = 10_000  # that generated ones are compared with, at most
_TRAINING_IMAGES = 60_000  # that neighbours are looked for among, at most
_QUERIES = 5_000  # that neighbours are looked for, at most
# Images of the classification accuracy score come from seeds that no other figure uses.
_FIRST_TRAINING_SEED = 2**20
# As many as VEEGAN (Srivastava et al., 2017) and PacGAN (Lin et al., 2018) count modes in.
_STACKED_IMAGES = 26_000
_SHOWN_SAMPLES = 10
_SHOWN_NEIGHBOURS = 9


class Metric(TypedDict):
    """One figure of a model card."""

    name: str
    value: float
    method: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured; `details` says on what, and holds what is no single figure."""

    metrics: list[Metric]
    details: dict[str, Any]
    neighbours: Tensor  # uint8 [rows, columns, channels, height, width]: a sample and its nearest training images


def evaluate(
    model: Path,
    dataset_name: str | None,
    data_root: Path,
    images: int,
    out: Path | None = None,
    report: Report = lambda _: None,
) -> list[Metric]:
    """Measure a run, a checkpoint or an exported model; keep a checkpoint's figures beside it.

    Args:
        model: the folder of a run, a checkpoint, or a `model.onnx`.
        dataset_name: the data set to judge by; None takes what the model says it was trained on.
        data_root: where the data set lies.
        images: how many images to generate, from seeds 0, 1, …; image i is asked to be of class i modulo the classes.
        out: a folder for evaluation.json and neighbours.png, instead of the run's.
        report: told what is being done.

    Raises:
        TrainerError: model or data set cannot be read, or the images of one are not like the other's.
    """
    if model.suffix == ".onnx":
        generate, card = _from_onnx(model)
        checkpoint = None
    else:
        checkpoint = load_checkpoint(model)
        generate, card = _from_checkpoint(checkpoint)
    train, test = load_parts(model, card, dataset_name or card.dataset, data_root)
    evaluation = measure(generate, card, train, test, data_root, images, report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        _write(evaluation, checkpoint, out)
    elif checkpoint is not None:
        _keep(evaluation, checkpoint, model)
    return evaluation.metrics


def measure(
    generate: Generate,
    card: pb.ModelCard,
    train: Dataset,
    test: Dataset,
    data_root: Path,
    images: int,
    report: Report = lambda _: None,
) -> Evaluation:
    """Measure a generator by both parts of a data set; see `evaluate`. Of the card, latent_dim and classes count."""
    judge = judge_of(train, data_root, report)
    judge_accuracy = judge.accuracy(test)
    judged_by = _described(judge, judge_accuracy, train)
    classes = len(train.spec.class_names)
    conditional = bool(card.class_names)
    # Modes are counted in as many images as the literature takes, unless a quick answer is wanted.
    count = _STACKED_IMAGES if judge.stacked and images >= _DEFAULT_IMAGES else images
    metrics: list[Metric] = []

    def add(name: str, value: float, how: str) -> None:
        metrics.append(Metric(name=name, value=round(value, 6), method=f"{how}{JUDGE}{judged_by}"))

    report(f"generating {count} images")
    asked = torch.arange(count) % (classes if conditional else 1)
    samples = _images(generate, 0, asked, card.latent_dim)
    features = judge.features(samples)
    generated = features[:images]
    if conditional:
        accuracy = figures.label_accuracy(asked[:images], judge.labels(generated))
        how = f"{_seeds(images)}, labels seed modulo {classes}; the share that the judge takes for the class asked for"
        add("label_accuracy", accuracy, how)

    report("comparing them with real images")
    real = _test_features(judge, test)
    training_images = _some(train.images, _TRAINING_IMAGES)
    training = judge.features(training_images)
    ours, floor = _compare(real, generated), _compare(real, training[:images])
    for name, value in ours.items():
        how = f"{_seeds(images)} against {len(real)} test images; training images get {floor[name]:.4f}"
        add(name, value, how)
        if name == "fid":
            trained = f"{len(training[:images])} training images against {len(real)} test images"
            add("fid_floor", floor[name], f"FID of {trained}")
            add("fid_over_floor", value / max(floor[name], 1e-9), f"{_seeds(images)}; FID over that of {trained}")

    report("looking for copies of training images")
    found = figures.nearest(generated[:_QUERIES], training)[0][:, 0]
    usual = figures.nearest(real[:_QUERIES], training)[0][:, 0]
    how = (
        f"how often one of {_seeds(len(found))} is nearer to its nearest of {len(training)} training images than one "
        f"of {len(usual)} test images is; without copying 0.5"
    )
    add("data_copying", figures.data_copying(found, usual), how)
    _, neighbours = figures.nearest(generated[:_SHOWN_SAMPLES], training, _SHOWN_NEIGHBOURS)
    rows = [torch.cat([sample[None], training_images[row]]) for sample, row in zip(samples, neighbours, strict=False)]

    details: dict[str, Any] = {
        "dataset": train.name,
        "dataset_digest": train.digest(),
        "images": images,
        "first_seed": 0,
        "test_images": len(real),
        "judge": {"task": judge.task, "digest": judge.digest(), "accuracy": judge_accuracy},
        "of_training_images": floor,
    }
    if classes:
        histogram = figures.class_histogram(judge.labels(features), classes)
        expected = torch.ones(classes) if conditional else figures.class_histogram(train.labels, classes)
        of_what = "labels asked for, all as often" if conditional else "training part's"
        how = f"{_seeds(count)}; Kullback-Leibler divergence of the judged classes from the {of_what}, in nats"
        add("class_kl", figures.kl_divergence(histogram, expected), how)
        if judge.stacked:
            add("modes", int((histogram > 0).sum()), f"{_seeds(count)}; distinct classes of {classes}")
        details["class_histogram"] = dict(zip(train.spec.class_names, histogram.tolist(), strict=True))
    if conditional and not judge.stacked:
        report(f"training a classifier on {len(train.labels)} generated images")
        score = classification_accuracy_score(generate, card.latent_dim, train, test)
        how = (
            f"{len(test.images)} test images, recognised by a CNN like the judge that was trained on "
            f"{_seeds(len(train.labels), _FIRST_TRAINING_SEED)}, of the training part's labels"
        )
        add("classification_accuracy_score", score, how)
    return Evaluation(metrics, details, torch.stack(rows))


def compare(
    variant: Generate,
    fp32: Generate,
    card: pb.ModelCard,
    train: Dataset,
    test: Dataset,
    data_root: Path,
    images: int,
    report: Report = lambda _: None,
) -> list[Metric]:
    """Measure a model of lower precision beside the one in fp32, on images of the same seeds and labels.

    Returns label_accuracy and fid of the variant, label_accuracy_loss (fp32's minus its own), fid_over_fp32, and how
    far its pixels are from fp32's, of 255 grey levels; the accuracies only of a conditional model.
    """
    judge = judge_of(train, data_root, report)
    judged_by = _described(judge, judge.accuracy(test), train)
    conditional = bool(card.class_names)
    asked = torch.arange(images) % (len(train.spec.class_names) if conditional else 1)
    report(f"generating {images} images in fp32 and in {card.precision}")
    wanted, made = (_images(generate, 0, asked, card.latent_dim) for generate in (fp32, variant))
    metrics: list[Metric] = []

    def add(name: str, value: float, how: str) -> None:
        method = f"{card.precision}: {_seeds(images)}{how}{JUDGE}{judged_by}"
        metrics.append(Metric(name=name, value=round(value, 6), method=method))

    report("comparing them with real images")
    real = _test_features(judge, test)
    wanted_features, made_features = judge.features(wanted), judge.features(made)
    if conditional:
        before, now = (figures.label_accuracy(asked, judge.labels(each)) for each in (wanted_features, made_features))
        how = f", labels seed modulo {len(train.spec.class_names)}; the share that the judge takes for the class asked"
        add("label_accuracy", now, f"{how} for; fp32 gets {before:.4f}")
        add("label_accuracy_loss", before - now, f"{how} for, {now:.4f}, subtracted from that of fp32, {before:.4f}")
    before, now = (figures.fid(real, each) for each in (wanted_features, made_features))
    add("fid", now, f" against {len(real)} test images; fp32 gets {before:.4f}")
    add(
        "fid_over_fp32",
        now / max(before, 1e-9),
        f" against {len(real)} test images, {now:.4f}, over fp32's {before:.4f}",
    )
    difference = torch.maximum(made, wanted) - torch.minimum(made, wanted)
    mean = int(difference.sum(dtype=torch.int64)) / difference.numel()
    add("grey_level_difference_mean", mean, "; how far a pixel's value is from fp32's on average")
    add("grey_level_difference_max", int(difference.max()), "; how far the farthest pixel's value is from fp32's")
    return metrics


def classification_accuracy_score(generate: Generate, latent_dim: int, train: Dataset, test: Dataset) -> float:
    """Train on generated images alone, as many and of the classes of the training part; return the test accuracy.

    The measure of Ravuri & Vinyals (2019), with the judge's network and recipe instead of their ResNet-50.
    """
    images = _images(generate, _FIRST_TRAINING_SEED, train.labels, latent_dim)
    return Judge(train_network(dataclasses.replace(train, images=images)), "").accuracy(test)


def _compare(real: Tensor, others: Tensor) -> dict[str, float]:
    precision, recall = figures.precision_recall(real, others)
    density, coverage = figures.density_coverage(real, others)
    return {
        "fid": figures.fid(real, others),
        "kid": figures.kid(real, others),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


class QuickEvaluation:
    """Some of the metrics on few images, for a look at a generator in training; of the test part, the same each time.

    Nothing here draws from torch's global random state: a run with a look ends with the weights of one without.

    Args:
        train: the training part, which the judge is trained on if it is not in the cache.
        test: the test part, which generated images are compared with.
        data_root: where MNIST is, for stacked MNIST.
        latent_dim: the generator's.
        conditional: whether it takes labels; then label accuracy is measured too.
        images: how many images a look generates, from seeds 0, 1, …
        report: told when a judge is trained.
    """

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        data_root: Path,
        *,
        latent_dim: int,
        conditional: bool,
        images: int = 2000,
        report: Report = lambda _: None,
    ) -> None:
        self._judge = judge_of(train, data_root, report)
        self._latent_dim = latent_dim
        self._conditional = conditional
        self._asked = torch.arange(images) % (len(train.spec.class_names) if conditional else 1)
        # All test images for FID, whose estimate they steady; as many as are generated for the rest.
        self._real = _test_features(self._judge, test)
        self.fid_floor = figures.fid(self._real, self._judge.features(_some(train.images, images)))

    def measure(self, generate: Generate) -> dict[str, float]:
        """Return fid, precision and recall and, if the generator is conditional, label_accuracy."""
        images = _images(generate, 0, self._asked, self._latent_dim)
        generated = self._judge.features(images)
        precision, recall = figures.precision_recall(self._real[: len(images)], generated)
        found = {"fid": figures.fid(self._real, generated), "precision": precision, "recall": recall}
        if self._conditional:
            found["label_accuracy"] = figures.label_accuracy(self._asked, self._judge.labels(generated))
        return found


def _test_features(judge: Judge, test: Dataset) -> Tensor:
    if len(test.images) < 2:
        raise TrainerError(f"{test.name} has {len(test.images)} test image: a comparison needs 2 at the least")
    return judge.features(_some(test.images, _TEST_IMAGES))


def _images(generate: Generate, first_seed: int, labels: Tensor, latent_dim: int) -> Tensor:
    """Make one image a label, of consecutive seeds; uint8 [n, channels, height, width]."""
    parts = []
    for start in range(0, len(labels), _GENERATED_AT_ONCE):
        label = labels[start : start + _GENERATED_AT_ONCE].numpy()
        seeds = first_seed + start + np.arange(len(label))
        parts.append(torch.from_numpy(generate(latents(seeds, latent_dim), label)).permute(0, 3, 1, 2))
    return torch.cat(parts)


def _some(images: Tensor, count: int) -> Tensor:
    """Choose images at random, always the same ones: a folder's are sorted by class."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def _seeds(count: int, first: int = 0) -> str:
    return f"{count} images of seeds {first} to {first + count - 1}"


def _described(judge: Judge, accuracy: float, train: Dataset) -> str:
    return (
        f"a CNN trained to tell {judge.task} on the training part of {train.name} ({_short(train.digest())}), "
        f"right on {accuracy:.4f} of its test images, weights {_short(judge.digest())}"
    )


def _short(digest: str) -> str:
    return f"{digest[:19]}…"


def load_parts(model: Path, card: pb.ModelCard, name: str, data_root: Path) -> tuple[Dataset, Dataset]:
    """Read both parts of the data set that a model is judged by, in the model's size."""
    configured = card.training.configuration.get("image_size", "")  # "None" for the data set's own
    size = int(configured) if configured.isdecimal() else None
    train = load_dataset(name, data_root, train=True, image_size=size)
    test = load_dataset(name, data_root, train=False, image_size=size)
    spec = train.spec
    made, real = (card.channels, card.height, card.width), (spec.channels, spec.height, spec.width)
    if made != real:
        raise TrainerError(
            f"{model} makes images of {made[0]} channels, {made[1]}x{made[2]}, and those of {name} have {real[0]}, "
            f"{real[1]}x{real[2]}: judge it by the data set it was trained on (--dataset)"
        )
    if card.class_names and len(card.class_names) != len(spec.class_names):
        raise TrainerError(
            f"{model} has {len(card.class_names)} classes and {name} has {len(spec.class_names)}: "
            "judge it by the data set it was trained on (--dataset)"
        )
    return train, test


def _keep(evaluation: Evaluation, checkpoint: Checkpoint, path: Path) -> None:
    """Write the figures beside the checkpoint, for its export to find, unless better ones are there."""
    folder = run_folder(path)
    file = folder / EVALUATION_FILE_NAME
    if evaluation.details["dataset_digest"] != checkpoint.dataset_digest:
        reason = "the run was trained on other data"
    elif (kept := _images_of(file, checkpoint)) > evaluation.details["images"]:
        reason = f"it has the figures of {kept} images"
    else:
        try:
            _write(evaluation, checkpoint, folder)
            if path.is_dir():
                report_on(checkpoint, folder)
        except OSError as error:
            reason = f"{error.strerror}; an export will not know these figures"
        else:
            return
    print(f"{file} is not written: {reason}. --out DIR writes elsewhere", file=sys.stderr)


def _images_of(path: Path, checkpoint: Checkpoint) -> int:
    """Tell on how many images an evaluation of this checkpoint was made; 0 if there is none that can be read."""
    try:
        kept = json.loads(path.read_text())
        return int(kept["images"]) if kept["checkpoint"] == checkpoint.digest() else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _write(evaluation: Evaluation, checkpoint: Checkpoint | None, folder: Path) -> None:
    content: dict[str, Any] = {"checkpoint": checkpoint.digest()} if checkpoint else {}
    content |= {**evaluation.details, "metrics": evaluation.metrics}
    neighbours = evaluation.neighbours.float() / 127.5 - 1
    save_contact_sheet(neighbours.flatten(0, 1), neighbours.shape[1], folder / NEIGHBOURS_FILE_NAME)
    with replace_atomically(folder / EVALUATION_FILE_NAME) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode())


def _from_onnx(path: Path) -> tuple[Generate, pb.ModelCard]:
    try:
        session = load_session(str(path))
    except Exception as error:  # onnxruntime's own exceptions have no common root
        raise TrainerError(f"{path} is missing or is no ONNX model that onnxruntime can load: {error}") from error
    metadata = session.get_modelmeta().custom_metadata_map
    if CARD_KEY not in metadata:
        raise TrainerError(f"{path} has no model card (metadata {CARD_KEY}); export it by ganserve-trainer export")
    try:
        card = json_format.Parse(metadata[CARD_KEY], pb.ModelCard(), ignore_unknown_fields=True)
    except json_format.ParseError as error:
        raise TrainerError(f"{path}: the model card cannot be read: {error}") from error
    conditional = bool(card.class_names)
    return lambda latent, label: run_session(session, latent, label if conditional else None), card


def _generate_by(generator: Generator, *, conditional: bool) -> Generate:
    device = next(generator.parameters()).device
    module = UInt8Generator(generator).eval()

    def generate(latent: NDArray[np.float32], label: NDArray[np.int64]) -> NDArray[np.uint8]:
        asked = torch.from_numpy(label).to(device) if conditional else None
        with torch.no_grad():
            pixels: NDArray[np.uint8] = module(torch.from_numpy(latent).to(device), asked).cpu().numpy()
        return pixels

    return generate


def _from_checkpoint(checkpoint: Checkpoint) -> tuple[Generate, pb.ModelCard]:
    settings, spec = checkpoint.settings, checkpoint.spec
    generate = _generate_by(checkpoint.ema_generator().to(best_device()), conditional=settings.conditional)
    card = pb.ModelCard(
        dataset=settings.dataset,
        latent_dim=settings.latent_dim,
        height=spec.height,
        width=spec.width,
        channels=spec.channels,
        class_names=spec.class_names if settings.conditional else (),
        training=pb.Training(configuration={"image_size": str(settings.image_size)}),
    )
    return generate, card


def quick_measure(
    settings: Settings, train: Dataset, data_root: Path, *, images: int = 2000, report: Report = lambda _: None
) -> Callable[[Generator], dict[str, float]]:
    """Return what measures a run's generator as QuickEvaluation does, with its FID as a multiple of the floor."""
    test = load_dataset(settings.dataset, data_root, train=False, image_size=settings.image_size)
    quick = QuickEvaluation(
        train,
        test,
        data_root,
        latent_dim=settings.latent_dim,
        conditional=settings.conditional,
        images=images,
        report=report,
    )

    def measure(generator: Generator) -> dict[str, float]:
        found = quick.measure(_generate_by(generator, conditional=settings.conditional))
        return found | {"fid_over_floor": found["fid"] / quick.fid_floor}

    return measure
