"""Exports models in fp16 and int8, which are published only if their images are as good as in fp32.

The quality gate makes images of the same seeds in both precisions, and measures them as `evaluate` does. A model that
passes is published with these metrics in its card; a model that fails is not published.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import json_format
from numpy.typing import NDArray

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation.evaluate import load_parts
from ganserve_trainer.evaluation.kept import Metric
from ganserve_trainer.evaluation.measure import Generate, compare
from ganserve_trainer.evaluation.progress import Report, silent
from ganserve_trainer.export.card import card_of, with_card
from ganserve_trainer.export.graph import to_onnx, to_onnx_in_fp16
from ganserve_trainer.export.publish import check_name, publish
from ganserve_trainer.export.quantising import to_int8
from ganserve_trainer.model_file import latents, load_session, run_session
from ganserve_trainer.settings import ExportPrecision
from ganserve_trainer.train.best import Choice, load_chosen

# The largest values of the metrics that pass the gate. A variant may be better than fp32: there is no lower limit.
LIMITS = {"label_accuracy_loss": 0.002, "fid_over_fp32": 1.02, "grey_level_difference_mean": 2.0}

# Seeds that no metric uses.
_FIRST_CALIBRATION_SEED = 2**21
_CALIBRATION_IMAGES = 1024
_CALIBRATED_AT_ONCE = 64


def export(
    checkpoint_path: Path,
    repository: Path,
    name: str,
    precision: ExportPrecision,
    data_root: Path,
    images: int = 10_000,
    report: Report = silent,
    choice: Choice = Choice.BEST,
) -> Path:
    """Publish a checkpoint's EMA generator in fp16 or int8 as the next version of `name`, if it passes the gate.

    Args:
        checkpoint_path: a run's folder, or a checkpoint.
        repository: the model repository.
        name: the name of the model.
        precision: fp16 or int8.
        data_root: the folder of the data set that the run was trained on.
        images: the number of images of each precision to compare.
        report: called with the progress.
        choice: the checkpoint of a run's folder to publish.

    Raises:
        TrainerError: as `publish.export`; or the data set is missing or not the run's; or the gate rejects the model.
    """
    check_name(name)
    checkpoint = load_chosen(checkpoint_path, choice)
    fp32 = to_onnx(checkpoint)
    if precision is ExportPrecision.FP16:
        variant = to_onnx_in_fp16(checkpoint)
    else:
        classes = len(checkpoint.spec.class_names) if checkpoint.settings.conditional else 0
        variant = to_int8(fp32, calibration(checkpoint.settings.latent_dim, classes))
    card = card_of(variant, checkpoint, precision)
    try:
        train, test = load_parts(checkpoint_path, card, card.dataset, data_root)
    except TrainerError as error:
        raise TrainerError(
            f"a model in {precision} is published only if its images are measured to be as good as in fp32, which "
            f"needs the data set it was trained on (--data-root): {error}"
        ) from error
    if train.digest() != checkpoint.dataset_digest:
        raise TrainerError(
            f"the run was trained on other data than {card.dataset} in {data_root}: set --data-root to the folder of "
            f"its own data, which is needed to check that the images in {precision} are as good as in fp32"
        )
    conditional = checkpoint.settings.conditional
    metrics = compare(
        _generate_by(variant, conditional=conditional),
        _generate_by(fp32, conditional=conditional),
        card,
        train,
        test,
        data_root,
        images,
        report,
    )
    for metric in metrics:
        limit = LIMITS.get(metric["name"])
        allowed = "" if limit is None else f"  (at most {limit})"
        print(f"{metric['name']} {metric['value']:.4f}{allowed}", file=sys.stderr)
    check_gate(metrics, precision)
    card.metrics.extend(json_format.ParseDict(dict(metric), pb.QualityMetric()) for metric in metrics)
    return publish(with_card(variant, card), repository, name)


def check_gate(metrics: list[Metric], precision: ExportPrecision) -> None:
    """Reject a variant whose images are worse than fp32's.

    Raises:
        TrainerError: a metric exceeds its limit; the text lists all such metrics.
    """
    # Negated, so that NaN fails.
    failed = [
        f"{metric['name']} is {metric['value']:.4f}, the limit is {LIMITS[metric['name']]}"
        for metric in metrics
        if metric["name"] in LIMITS and not metric["value"] <= LIMITS[metric["name"]]
    ]
    if failed:
        raise TrainerError(
            f"in {precision} the images are not as good as in fp32: {'; '.join(failed)}; nothing was published"
        )


def calibration(latent_dim: int, classes: int) -> list[dict[str, NDArray[Any]]]:
    """Make the inputs that determine the scales: latents of fixed seeds; for a conditional model, classes in turn."""
    batches = []
    for start in range(0, _CALIBRATION_IMAGES, _CALIBRATED_AT_ONCE):
        number = np.arange(start, start + _CALIBRATED_AT_ONCE)
        feeds: dict[str, NDArray[Any]] = {"latent": latents(_FIRST_CALIBRATION_SEED + number, latent_dim)}
        if classes:
            feeds["label"] = number % classes
        batches.append(feeds)
    return batches


def _generate_by(model: onnx.ModelProto, *, conditional: bool) -> Generate:
    session = load_session(model.SerializeToString())
    return lambda latent, label: run_session(session, latent, label if conditional else None)
