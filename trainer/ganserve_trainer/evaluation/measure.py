"""Measures a function that generates images: in full, against the fp32 model, or quickly during training.

Generated images are compared with the real images of the test part, which no generator has seen. The floor of a
distance is its value for real training images. `metrics` computes the metrics, and `judge` the features.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer import metrics as figures
from ganserve_trainer.data.datasets import Dataset
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import cache
from ganserve_trainer.evaluation.features import FeatureNetwork, FileNetwork, kept_features
from ganserve_trainer.evaluation.judge import Judge, judge_of, train_network, unfit
from ganserve_trainer.evaluation.kept import Evaluation, Metric, Withheld
from ganserve_trainer.evaluation.progress import Report, silent
from ganserve_trainer.files import cache_folder
from ganserve_trainer.metrics import Estimate, with_standard_errors
from ganserve_trainer.model_file import latents

# latent [n, latent_dim], label [n] (ignored by unconditional generators) -> uint8 [n, height, width, channels]
Generate = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.uint8]]

# Each precedes the part of a method's text that all metrics of the same features share.
JUDGE, FEATURES = "; judge: ", "; features: "

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
# The least real and the least generated images of a figure. With fewer, the standard errors of the shares are above
# 3.5 %, and the k-th neighbour, k = 5, is beyond the nearest 2.5 % of the images: "near" means nothing.
_LEAST_IMAGES = 200


class _Found:
    """Collects the metrics, and those that are withheld."""

    def __init__(self) -> None:
        self.metrics: list[Metric] = []
        self.withheld: list[Withheld] = []

    def withhold(self, reason: str | None, *names: str) -> bool:
        """Withhold these metrics if there is a reason; return whether there is."""
        if reason:
            self.withheld += [Withheld(name=name, reason=reason) for name in names]
        return bool(reason)

    def add(self, name: str, estimate: Estimate, method: str) -> None:
        self.metrics.append(
            Metric(
                name=name,
                value=round(estimate.value, 6),
                standard_error=round(estimate.standard_error, 6),
                method=method,
            )
        )


def measure(
    generate: Generate,
    card: pb.ModelCard,
    train: Dataset,
    test: Dataset,
    data_root: Path,
    images: int,
    report: Report = silent,
    networks: Sequence[FileNetwork] = (),
    identity: str | None = None,
) -> Evaluation:
    """Measure a generator on both parts of a data set, as for `evaluate`; of the card, uses latent_dim and classes.

    A metric is withheld if there are too few images for it, or if its judge is unfit.

    Args:
        generate: the generator.
        card: the model's card.
        train: the training part.
        test: the test part.
        data_root: the folder of MNIST, for stacked MNIST.
        images: the number of images to generate.
        report: called with the progress.
        networks: the networks, besides the judge, whose features are compared.
        identity: the digest of the generator, under which the results of stages are kept until the end: a killed
            evaluation resumes from them. None keeps nothing.
    """
    if len(test.images) < 2:
        raise TrainerError(f"{test.name} has {len(test.images)} test image: a comparison needs at least 2")
    judge = judge_of(train, data_root, report)
    classes = len(train.spec.class_names)
    conditional = bool(card.class_names)
    # Count modes in as many images as the literature does, unless the caller asks for fewer than the default.
    count = _STACKED_IMAGES if judge.stacked and images >= _DEFAULT_IMAGES else images
    asked = torch.arange(count) % (classes if conditional else 1)
    data = (train.digest(), test.digest(), tuple(train.images.shape))
    unfinished = identity and cache.unfinished(cache.key(identity, *data, images))
    real_kept = cache_folder("features") / cache.key(*data, _TEST_IMAGES)

    def make(start: int, end: int) -> Tensor:
        return _images(generate, start, asked[start:end], card.latent_dim)

    def generated_by(network: FeatureNetwork, count: int, what: str) -> Tensor:
        kept = unfinished / "generated" if unfinished else None
        return kept_features(network, make, count, kept, report, f"generating {count} images{what}")

    def real_by(network: FeatureNetwork, part: str, images: Tensor) -> Tensor:
        stage = f"computing the features of {len(images)} {part} images"
        return kept_features(
            network, lambda start, end: images[start:end], len(images), real_kept / part, report, stage
        )

    found = _Found()
    right = _right(judge, test, real_kept)
    judge_accuracy = float(right.double().mean())
    judged_by = JUDGE + _described(judge, judge_accuracy, train)
    poor = unfit(right, test)
    few_generated = _too_few(images, "generated images: set --images higher")
    features = generated_by(judge, count, "")
    labels = judge.labels(features)
    if conditional and not found.withhold(poor or few_generated, "label_accuracy"):
        how = f"{_seeds(images)}, labels seed modulo {classes}; the share that the judge takes for the class asked for"
        found.add("label_accuracy", _mean((labels == asked)[:images]), how + judged_by)

    report("comparing them with real images")
    shuffled = _some(test.images, _TEST_IMAGES)
    training_images = _some(train.images, _TRAINING_IMAGES)
    real, training = real_by(judge, "test", shuffled), real_by(judge, "training", training_images)
    few = few_generated or _too_few(len(real), "test images")
    floor = _add_comparison(found, "", features[:images], real, training[:images], poor or few, judged_by)
    for network in networks:
        described = f"{FEATURES}{network.described}, file {_short(network.digest())}"
        if few:
            _add_comparison(found, f"_{network.kind}", features, real, training, few, described)
            continue
        made = generated_by(network, images, f" and computing their features by {network.kind}")
        compared = real_by(network, "test", shuffled), real_by(network, "training", training_images[:images])
        _add_comparison(found, f"_{network.kind}", made, *compared, None, described)
        if network.classify:
            how = f"{_seeds(images)}, the mean of 10 parts; by the logits without bias"
            found.add("inception_score", _inception_score(network.classify(made)), how + described)

    report("looking for copies of training images")
    if not found.withhold(poor or few, "data_copying"):
        nearest = figures.nearest(features[: min(images, _QUERIES)], training)[0][:, 0]
        usual = figures.nearest(real[:_QUERIES], training)[0][:, 0]
        how = (
            f"how often one of {_seeds(len(nearest))} is nearer to its nearest of {len(training)} training images than "
            f"one of {len(usual)} test images is; without copying 0.5"
        )
        copying = with_standard_errors(
            lambda ours, theirs: {"copying": figures.data_copying(nearest[ours], usual[theirs])},
            len(nearest),
            len(usual),
        )
        found.add("data_copying", copying["copying"], how + judged_by)
    _, neighbours = figures.nearest(features[:_SHOWN_SAMPLES], training, _SHOWN_NEIGHBOURS)
    samples = make(0, min(_SHOWN_SAMPLES, count))
    rows = [torch.cat([sample[None], training_images[row]]) for sample, row in zip(samples, neighbours, strict=True)]

    details: dict[str, Any] = {
        "dataset": train.name,
        "dataset_digest": train.digest(),
        "images": images,
        "first_seed": 0,
        "test_images": len(real),
        "judge": {"task": judge.task, "digest": judge.digest(), "accuracy": judge_accuracy},
        "of_training_images": floor,
    }
    if classes and not found.withhold(poor or few_generated, "class_kl", *(["modes"] if judge.stacked else [])):
        expected = torch.ones(classes) if conditional else figures.class_histogram(train.labels, classes)
        of_what = "labels asked for, all as often" if conditional else "training part's"
        estimates = with_standard_errors(lambda index: _of_classes(labels[index], expected), count)
        how = f"{_seeds(count)}; Kullback-Leibler divergence of the judged classes from the {of_what}, in nats"
        found.add("class_kl", estimates["class_kl"], how + judged_by)
        if judge.stacked:
            found.add("modes", estimates["modes"], f"{_seeds(count)}; distinct classes of {classes}{judged_by}")
        histogram = figures.class_histogram(labels, classes)
        details["class_histogram"] = dict(zip(train.spec.class_names, histogram.tolist(), strict=True))
    few_test = _too_few(len(test.images), "test images")
    if conditional and not judge.stacked and not found.withhold(poor or few_test, "classification_accuracy_score"):
        kept = unfinished / "classifier" if unfinished else None
        correct = classification_accuracy(generate, card.latent_dim, train, test, kept, report)
        how = (
            f"{len(test.images)} test images, recognised by a CNN like the judge that was trained on "
            f"{_seeds(len(train.labels), _FIRST_TRAINING_SEED)}, of the training part's labels"
        )
        found.add("classification_accuracy_score", _mean(correct), how + judged_by)
    if unfinished:
        with contextlib.suppress(OSError):
            shutil.rmtree(unfinished)
    return Evaluation(found.metrics, found.withheld, details, torch.stack(rows))


def _add_comparison(
    found: _Found, suffix: str, generated: Tensor, real: Tensor, training: Tensor, reason: str | None, described: str
) -> dict[str, float]:
    """Add the metrics that compare features; return their values for real training images, the floor."""
    fids = ("fid", "fid_floor", "fid_over_floor")
    others = ("kid", "precision", "recall", "density", "coverage")
    if found.withhold(reason, *(name + suffix for name in (*fids, *others))):
        return {}
    dimensions, fewest = real.shape[1], min(len(real), len(generated), len(training))
    singular = fewest <= dimensions and (
        f"{fewest} images; FID needs more than the {dimensions} features, or the covariance is singular"
    )
    with_fid = not found.withhold(singular or None, *(name + suffix for name in fids))

    def compared(ours: Tensor, theirs: Tensor, floor: Tensor) -> dict[str, float]:
        values = _compare(real[theirs], generated[ours])
        if with_fid:
            values["fid"] = figures.fid(real[theirs], generated[ours])
            values["fid_floor"] = figures.fid(real[theirs], training[floor])
            values["fid_over_floor"] = values["fid"] / max(values["fid_floor"], 1e-9)
        return values

    estimates = with_standard_errors(compared, len(generated), len(real), len(training))
    floor = _compare(real, training)
    if with_fid:
        floor["fid"] = estimates["fid_floor"].value
    measured = f"{_seeds(len(generated))} against {len(real)} test images"
    trained = f"{len(training)} training images against {len(real)} test images"
    how = {
        "fid_floor": f"FID of {trained}",
        "fid_over_floor": f"{_seeds(len(generated))}; FID over that of {trained}",
    }
    for name in (*fids, *others):
        if name in estimates:
            method = how.get(name) or f"{measured}; training images get {floor[name]:.4f}"
            found.add(name + suffix, estimates[name], method + described)
    return floor


def _of_classes(labels: Tensor, expected: Tensor) -> dict[str, float]:
    histogram = figures.class_histogram(labels, len(expected))
    return {"class_kl": figures.kl_divergence(histogram, expected), "modes": float((histogram > 0).sum())}


def _inception_score(logits: Tensor) -> Estimate:
    return with_standard_errors(lambda index: {"score": figures.inception_score(logits[index])}, len(logits))["score"]


def _mean(values: Tensor) -> Estimate:
    return with_standard_errors(lambda index: {"mean": float(values[index].double().mean())}, len(values))["mean"]


def _too_few(count: int, of_what: str) -> str | None:
    return f"it needs at least {_LEAST_IMAGES} and there are {count} {of_what}" if count < _LEAST_IMAGES else None


def _right(judge: Judge, test: Dataset, kept: Path) -> Tensor:
    """Return whether the judge is right on each test image, from the cache if it has that."""
    path = kept / f"right-{judge.digest().removeprefix('sha256:')[:32]}"
    right: Tensor | None = cache.load(path)
    if right is None:
        right = judge.right(test)
        cache.store(path, right)
    return right


def compare(
    variant: Generate,
    fp32: Generate,
    card: pb.ModelCard,
    train: Dataset,
    test: Dataset,
    data_root: Path,
    images: int,
    report: Report = silent,
) -> list[Metric]:
    """Compare a model of lower precision with the fp32 model, on images of the same seeds and labels.

    Returns:
        label_accuracy and fid of the variant; label_accuracy_loss (fp32's accuracy minus the variant's); fid_over_fp32;
        and the mean and maximum difference of the pixels in grey levels, 0 to 255. The accuracies are only for
        conditional models. The variant's own label_accuracy and fid are left out where `measure` withholds them.
    """
    judge = judge_of(train, data_root, report)
    right = judge.right(test)
    judged_by = _described(judge, float(right.double().mean()), train)
    conditional = bool(card.class_names)
    asked = torch.arange(images) % (len(train.spec.class_names) if conditional else 1)
    report(f"generating {images} images in fp32 and in {card.precision}")
    wanted, made = (_images(generate, 0, asked, card.latent_dim) for generate in (fp32, variant))
    report("comparing them with real images")
    real = _test_features(judge, test)
    wanted_features, made_features = judge.features(wanted), judge.features(made)
    wanted_right, made_right = (judge.labels(each) == asked for each in (wanted_features, made_features))
    difference = torch.maximum(made, wanted) - torch.minimum(made, wanted)
    differences = difference.flatten(1).sum(1, dtype=torch.int64).double() / difference[0].numel()

    def compared(index: Tensor, real_index: Tensor) -> dict[str, float]:
        before, now = (figures.fid(real[real_index], each[index]) for each in (wanted_features, made_features))
        found = {"fid": now, "fid_over_fp32": now / max(before, 1e-9)}
        if conditional:
            accuracy, of_fp32 = (float(right[index].double().mean()) for right in (made_right, wanted_right))
            found = {"label_accuracy": accuracy, "label_accuracy_loss": of_fp32 - accuracy, **found}
        return {**found, "grey_level_difference_mean": float(differences[index].mean())}

    estimates = with_standard_errors(compared, images, len(real))
    accuracy, loss = (
        estimates[name].value if conditional else 0.0 for name in ("label_accuracy", "label_accuracy_loss")
    )
    fid, fp32_fid = estimates["fid"].value, estimates["fid"].value / max(estimates["fid_over_fp32"].value, 1e-9)
    classes = len(train.spec.class_names)
    by_label = f", labels seed modulo {classes}; the share that the judge takes for the class asked for"
    against = f" against {len(real)} test images"
    how = {
        "label_accuracy": f"{by_label}; fp32 gets {accuracy + loss:.4f}",
        "label_accuracy_loss": f"{by_label}, {accuracy:.4f}, subtracted from that of fp32, {accuracy + loss:.4f}",
        "fid": f"{against}; fp32 gets {fp32_fid:.4f}",
        "fid_over_fp32": f"{against}, {fid:.4f}, over fp32's {fp32_fid:.4f}",
        "grey_level_difference_mean": "; how far a pixel's value is from fp32's on average",
        "grey_level_difference_max": "; how far the farthest pixel's value is from fp32's",
    }

    def metric(name: str, value: float) -> Metric:
        method = f"{card.precision}: {_seeds(images)}{how[name]}{JUDGE}{judged_by}"
        return Metric(name=name, value=round(value, 6), method=method)

    metrics = []
    withheld = ("label_accuracy", "fid") if unfit(right, test) or _too_few(len(real), "") else ()
    for name, estimate in estimates.items():
        if name in withheld:
            continue
        metrics.append(metric(name, estimate.value))
        metrics[-1]["standard_error"] = round(estimate.standard_error, 6)
    return [*metrics, metric("grey_level_difference_max", int(difference.max()))]


def classification_accuracy(
    generate: Generate,
    latent_dim: int,
    train: Dataset,
    test: Dataset,
    unfinished: Path | None = None,
    report: Report = silent,
) -> Tensor:
    """Train a classifier only on generated images, with the labels of the training part.

    The share of test images that it recognises is the classification accuracy score of Ravuri & Vinyals (2019), here
    with the judge's network, and its recipe in half the epochs, instead of their ResNet-50.

    Returns:
        Whether it recognises each test image, bool [n].
    """
    count = len(train.labels)
    images = _images(
        generate, _FIRST_TRAINING_SEED, train.labels, latent_dim, report, f"generating {count} more images"
    )
    stage = f"training a classifier on {count} generated images"
    network = train_network(dataclasses.replace(train, images=images), unfinished, report, stage, share=0.5)
    return Judge(network, "").right(test)


def _compare(real: Tensor, others: Tensor) -> dict[str, float]:
    return {"kid": figures.kid(real, others), **figures.neighbourhoods(real, others)}


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
        report: Report = silent,
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


def _images(
    generate: Generate, first_seed: int, labels: Tensor, latent_dim: int, report: Report = silent, stage: str = ""
) -> Tensor:
    """Generate one image for each label, from consecutive seeds: uint8 [n, channels, height, width]."""
    parts = []
    report(stage)
    for start in range(0, len(labels), _GENERATED_AT_ONCE):
        label = labels[start : start + _GENERATED_AT_ONCE].numpy()
        seeds = first_seed + start + np.arange(len(label))
        parts.append(torch.from_numpy(generate(latents(seeds, latent_dim), label)).permute(0, 3, 1, 2))
        report(stage, (start + len(label)) / len(labels))
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
