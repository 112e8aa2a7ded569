"""Measures a function that generates images: in full, against the fp32 model, or quickly during training.

Generated images are compared with the real images of the test part, which no generator has seen. The floor of a
distance is its value for real training images. `metrics` computes the metrics, and `judge` the features.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.data.datasets import Dataset
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import metrics as figures
from ganserve_trainer.evaluation.judge import Judge, judge_of, train_network
from ganserve_trainer.evaluation.kept import Evaluation, Metric
from ganserve_trainer.model_file import latents

# latent [n, latent_dim], label [n] (ignored by unconditional generators) -> uint8 [n, height, width, channels]
Generate = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.uint8]]

Report = Callable[[str], None]

JUDGE = "; judge: "  # precedes the part of a method's text that all metrics share

_DEFAULT_IMAGES = 10_000
_GENERATED_AT_ONCE = 500
_TEST_IMAGES = 10_000  # the most test images to compare generated images with
_TRAINING_IMAGES = 60_000  # the most training images to search for neighbours
_QUERIES = 5_000  # the most images whose neighbours are computed
# The images for the classification accuracy score come from seeds that no other metric uses.
_FIRST_TRAINING_SEED = 2**20
# VEEGAN (Srivastava et al., 2017) and PacGAN (Lin et al., 2018) count modes in this many images.
_STACKED_IMAGES = 26_000
_SHOWN_SAMPLES = 10
_SHOWN_NEIGHBOURS = 9


def measure(
    generate: Generate,
    card: pb.ModelCard,
    train: Dataset,
    test: Dataset,
    data_root: Path,
    images: int,
    report: Report = lambda _: None,
) -> Evaluation:
    """Measure a generator on both parts of a data set, as for `evaluate`; of the card, uses latent_dim and classes."""
    judge = judge_of(train, data_root, report)
    judge_accuracy = judge.accuracy(test)
    judged_by = _described(judge, judge_accuracy, train)
    classes = len(train.spec.class_names)
    conditional = bool(card.class_names)
    # Count modes in as many images as the literature does, unless the caller asks for fewer than the default.
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
    """Compare a model of lower precision with the fp32 model, on images of the same seeds and labels.

    Returns:
        label_accuracy and fid of the variant; label_accuracy_loss (fp32's accuracy minus the variant's); fid_over_fp32;
        and the mean and maximum difference of the pixels in grey levels, 0 to 255. The accuracies are only for
        conditional models.
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
    """Train a classifier only on generated images, with the labels of the training part; return its test accuracy.

    This is the metric of Ravuri & Vinyals (2019), with the judge's network and recipe instead of their ResNet-50.
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
    """Measures some metrics on few images during training, always against the same test images.

    Nothing here uses torch's global random state, so measuring does not change the weights that a run ends with.

    Args:
        train: the training part, on which the judge is trained if it is not in the cache.
        test: the test part, with which generated images are compared.
        data_root: the folder of MNIST, for stacked MNIST.
        latent_dim: the number of values in a latent.
        conditional: whether the generator takes labels; if so, label accuracy is also measured.
        images: the number of images to generate, from seeds 0, 1, …
        report: called when a judge is trained.
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
        # FID uses all test images, which reduces its variance; the other metrics use as many as are generated.
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
        raise TrainerError(f"{test.name} has {len(test.images)} test image: a comparison needs at least 2")
    return judge.features(_some(test.images, _TEST_IMAGES))


def _images(generate: Generate, first_seed: int, labels: Tensor, latent_dim: int) -> Tensor:
    """Generate one image for each label, from consecutive seeds: uint8 [n, channels, height, width]."""
    parts = []
    for start in range(0, len(labels), _GENERATED_AT_ONCE):
        label = labels[start : start + _GENERATED_AT_ONCE].numpy()
        seeds = first_seed + start + np.arange(len(label))
        parts.append(torch.from_numpy(generate(latents(seeds, latent_dim), label)).permute(0, 3, 1, 2))
    return torch.cat(parts)


def _some(images: Tensor, count: int) -> Tensor:
    """Choose images at random, with a fixed seed, because the images of a folder are sorted by class."""
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
