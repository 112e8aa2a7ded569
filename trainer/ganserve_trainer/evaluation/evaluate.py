"""Evaluates a run, a checkpoint or a model file on images of fixed seeds; stores the metrics in the run's folder."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import json_format
from numpy.typing import NDArray

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.data.datasets import Dataset, load_dataset
from ganserve_trainer.data.reading import Reading
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation.features import JUDGE, feature_networks
from ganserve_trainer.evaluation.kept import (
    EVALUATION_FILE_NAME,
    Evaluation,
    images_evaluated,
    write_evaluation,
)
from ganserve_trainer.evaluation.measure import Generate, QuickEvaluation, measure
from ganserve_trainer.evaluation.progress import Report, silent
from ganserve_trainer.model_file import CARD_KEY, load_session, run_session
from ganserve_trainer.networks.generator import Generator, UInt8Generator
from ganserve_trainer.settings import Settings
from ganserve_trainer.train.best import Choice, load_chosen
from ganserve_trainer.train.checkpoints import Checkpoint, load_checkpoint, run_folder
from ganserve_trainer.train.devices import best_device
from ganserve_trainer.train.reporting import report_on


def evaluate(
    model: Path,
    dataset_name: str | None,
    data_root: Path,
    images: int,
    out: Path | None = None,
    report: Report = silent,
    features: Sequence[str] = (JUDGE,),
    choice: Choice = Choice.BEST,
) -> Evaluation:
    """Measure a run, a checkpoint or an exported model; store a run's metrics in its folder.

    Args:
        model: the folder of a run, a checkpoint, or a `model.onnx`.
        dataset_name: the data set to compare with; None takes the data set that the model was trained on.
        data_root: the folder of the data set.
        images: the number of images to generate, from seeds 0, 1, …; image i has class i modulo the number of classes.
        out: the folder for evaluation.json and neighbours.png, instead of the run's folder.
        report: called with the progress.
        features: the networks whose features are compared, as for `feature_networks`; the judge is always one.
        choice: the checkpoint of a run's folder to measure.

    Raises:
        TrainerError: the model, the data set or a network cannot be read, or images of model and data set differ in
            shape.
    """
    networks = feature_networks(features)
    if model.suffix == ".onnx":
        generate, card = _from_onnx(model)
        checkpoint = None
        identity = hashlib.sha256(model.read_bytes()).hexdigest()
    else:
        checkpoint = load_chosen(model, choice)
        identity = checkpoint.digest()
        generate, card = _from_checkpoint(checkpoint)
    train, test = load_parts(model, card, dataset_name or card.dataset, data_root)
    evaluation = measure(generate, card, train, test, data_root, images, report, networks, identity)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_evaluation(evaluation, checkpoint, out)
    elif checkpoint is not None:
        _keep(evaluation, checkpoint, model)
    return evaluation


def load_parts(model: Path, card: pb.ModelCard, name: str, data_root: Path) -> tuple[Dataset, Dataset]:
    """Read both parts of the data set to compare a model with, in the model's image size.

    Raises:
        TrainerError: the data set cannot be read, or its images or classes do not match the model's.
    """
    configured = card.training.configuration.get("image_size", "")  # "None" for the data set's own
    size = int(configured) if configured.isdecimal() else None
    reading = _reading_of(card, whole=name == card.dataset)
    train = load_dataset(name, data_root, train=True, image_size=size, reading=reading)
    test = load_dataset(name, data_root, train=False, image_size=size, reading=reading)
    spec = train.spec
    made, real = (card.channels, card.height, card.width), (spec.channels, spec.height, spec.width)
    if made != real:
        raise TrainerError(
            f"{model} makes images of {made[0]} channels, {made[1]}x{made[2]}, but those of {name} have {real[0]}, "
            f"{real[1]}x{real[2]}: measure it with the data set it was trained on (--dataset)"
        )
    if card.class_names and len(card.class_names) != len(spec.class_names):
        raise TrainerError(
            f"{model} has {len(card.class_names)} classes, but {name} has {len(spec.class_names)}: measure it with "
            "the data set it was trained on (--dataset)"
        )
    return train, test


def _reading_of(card: pb.ModelCard, *, whole: bool) -> Reading:
    """Return how the model's data set was read; of another data set, only what its images become."""
    configured = card.training.configuration
    values: dict[str, Any] = {
        "channels": int(configured["channels"]) if configured.get("channels", "None") != "None" else None,
        "background": configured.get("background", "white"),
    }
    if whole:
        values |= {name: configured.get(name, "") for name in ("train_folder", "test_folder")}
        values["split"] = float(configured["split"]) if configured.get("split", "None") != "None" else None
        values["train_on_all"] = configured.get("train_on_all") == "True"
    return Reading(**values)


def _keep(evaluation: Evaluation, checkpoint: Checkpoint, path: Path) -> None:
    """Write the metrics into the run's folder, for its export, unless it has metrics on more images."""
    folder = run_folder(path)
    file = folder / EVALUATION_FILE_NAME
    if evaluation.details["dataset_digest"] != checkpoint.dataset_digest:
        reason = "the run was trained on other data"
    elif (kept := images_evaluated(file, checkpoint)) > evaluation.details["images"]:
        reason = f"it already has the metrics of {kept} images"
    else:
        try:
            write_evaluation(evaluation, checkpoint, folder)
            if path.is_dir():
                report_on(load_checkpoint(path), folder, best=checkpoint.digest())
        except OSError as error:
            reason = f"{error.strerror}; an export will not have these metrics"
        else:
            return
    print(f"{file} is not written: {reason}. To write elsewhere, add --out DIR", file=sys.stderr)


def _from_onnx(path: Path) -> tuple[Generate, pb.ModelCard]:
    try:
        session = load_session(str(path))
    except Exception as error:  # onnxruntime's own exceptions have no common root
        raise TrainerError(f"{path} is missing or is not an ONNX model that onnxruntime can load: {error}") from error
    metadata = session.get_modelmeta().custom_metadata_map
    if CARD_KEY not in metadata:
        raise TrainerError(f"{path} has no model card (metadata {CARD_KEY}); export it with ganserve-trainer export")
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
        training=pb.Training(configuration={key: str(value) for key, value in asdict(settings).items()}),
    )
    return generate, card


def quick_measure(
    settings: Settings, train: Dataset, data_root: Path, *, images: int = 2000, report: Report = silent
) -> Callable[[Generator], dict[str, float]]:
    """Return a function that measures a generator with QuickEvaluation, and adds its FID as a multiple of the floor."""
    test = load_dataset(
        settings.dataset, data_root, train=False, image_size=settings.image_size, reading=settings.reading()
    )
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
