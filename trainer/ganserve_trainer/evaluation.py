"""How good a generator is, by networks trained on the real training images.

Label accuracy: the share of generated images that a classifier takes for the class they were asked to be. The
classifier is a small CNN, trained here with a fixed seed; its own accuracy on the real test images is given beside.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from google.protobuf import json_format
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.checkpoints import Checkpoint, load_checkpoint, replace_atomically
from ganserve_trainer.datasets import Dataset, load_dataset
from ganserve_trainer.devices import best_device, bf16_is_fast
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.exporting import (
    CARD_KEY,
    EVALUATION_FILE_NAME,
    UInt8Generator,
    latents,
    load_session,
    run_session,
)

Generate = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.uint8]]

_BATCH_SIZE = 128
_EPOCHS = 5
_GENERATED_AT_ONCE = 500


class Metric(TypedDict):
    """One figure of a model card."""

    name: str
    value: float
    method: str


def evaluate(model: Path, dataset_name: str | None, data_root: Path, images: int) -> list[Metric]:
    """Measure a run, a checkpoint or an exported model; keep a checkpoint's figures beside it.

    Args:
        model: the folder of a run, a checkpoint, or a `model.onnx`.
        dataset_name: the data set to judge by; None takes what the model says it was trained on.
        data_root: where the data set lies.
        images: how many images to generate, from seeds 0, 1, …; image i is asked to be of class i modulo the classes.

    Raises:
        TrainerError: the model is not conditional, or model or data set cannot be read.
    """
    if model.suffix == ".onnx":
        generate, card = _from_onnx(model)
        checkpoint = None
    else:
        checkpoint = load_checkpoint(model)
        generate, card = _from_checkpoint(checkpoint)
    if not card.class_names:
        raise TrainerError(f"{model} is unconditional: label accuracy needs a conditional model, such as cdcgan's")
    name = dataset_name or card.dataset
    train_part = load_dataset(name, data_root, train=True)
    test_part = load_dataset(name, data_root, train=False)
    if len(card.class_names) != len(train_part.spec.class_names):
        raise TrainerError(
            f"{model} has {len(card.class_names)} classes and {name} has {len(train_part.spec.class_names)}: "
            "judge it by the data set it was trained on (--dataset)"
        )
    classifier = train_classifier(train_part)
    real_accuracy = accuracy_on(classifier, test_part)
    value = label_accuracy(classifier, generate, card.latent_dim, len(card.class_names), images)
    method = (
        f"{images} images of seeds 0 to {images - 1}, labels seed modulo {len(card.class_names)}; judged by a CNN "
        f"trained on the training part of {name} ({train_part.digest()[:19]}…), "
        f"right on {real_accuracy:.4f} of the test images"
    )
    metrics = [Metric(name="label_accuracy", value=round(value, 6), method=method)]
    if checkpoint is not None:
        _keep(model, checkpoint, metrics)
    return metrics


def _keep(path: Path, checkpoint: Checkpoint, metrics: list[Metric]) -> None:
    """Write the figures beside the checkpoint, for its export to find; without a place for them, only say so."""
    file_path = (path if path.is_dir() else path.parent) / EVALUATION_FILE_NAME
    try:
        with replace_atomically(file_path) as file:
            file.write(json.dumps({"checkpoint": checkpoint.digest(), "metrics": metrics}, indent=2).encode())
    except OSError as error:
        print(
            f"{file_path} cannot be written ({error.strerror}): an export will not know these figures", file=sys.stderr
        )


def label_accuracy(classifier: nn.Module, generate: Generate, latent_dim: int, classes: int, images: int) -> float:
    """Return the share of generated images that the classifier takes for the class asked for."""
    right = 0
    for start in range(0, images, _GENERATED_AT_ONCE):
        seeds = np.arange(start, min(start + _GENERATED_AT_ONCE, images))
        label = seeds % classes
        pixels = torch.from_numpy(generate(latents(seeds, latent_dim), label)).permute(0, 3, 1, 2)
        right += int((_predict(classifier, pixels) == torch.from_numpy(label)).sum())
    return right / images


def train_classifier(dataset: Dataset, epochs: int = _EPOCHS) -> nn.Module:
    """Train the CNN that judges, on all images of the data set, with a fixed seed."""
    device = best_device()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = _classifier(dataset).to(device).to(memory_format=torch.channels_last).train()
        steps = epochs * (len(dataset.images) // _BATCH_SIZE)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=max(steps, 1))
        images, labels = dataset.images.to(device), dataset.labels.to(device)
        for _ in range(epochs):
            for index in torch.randperm(len(images)).to(device).split(_BATCH_SIZE):
                if len(index) < _BATCH_SIZE:
                    continue
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
                    loss = F.cross_entropy(classifier(_normalised(images[index])), labels[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    return classifier.eval().requires_grad_(False)


def accuracy_on(classifier: nn.Module, dataset: Dataset) -> float:
    """Return the share of real images that the classifier gets right."""
    predicted = torch.cat([_predict(classifier, part) for part in dataset.images.split(_GENERATED_AT_ONCE)])
    return float((predicted == dataset.labels).float().mean())


def _predict(classifier: nn.Module, images: Tensor) -> Tensor:
    device = next(classifier.parameters()).device
    predicted: Tensor = classifier(_normalised(images.to(device))).argmax(1).cpu()
    return predicted


def _normalised(images: Tensor) -> Tensor:
    return images.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def _classifier(dataset: Dataset) -> nn.Sequential:
    spec = dataset.spec
    flat = 64 * (spec.height // 4) * (spec.width // 4)
    return nn.Sequential(
        nn.Conv2d(spec.channels, 32, 5, stride=2, padding=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(flat, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, len(spec.class_names)),
    )


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
    return lambda latent, label: run_session(session, latent, label), card


def _from_checkpoint(checkpoint: Checkpoint) -> tuple[Generate, pb.ModelCard]:
    module = UInt8Generator(checkpoint.ema_generator()).eval()

    def generate(latent: NDArray[np.float32], label: NDArray[np.int64]) -> NDArray[np.uint8]:
        with torch.no_grad():
            pixels: NDArray[np.uint8] = module(torch.from_numpy(latent), torch.from_numpy(label)).numpy()
        return pixels

    settings, spec = checkpoint.settings, checkpoint.spec
    class_names = spec.class_names if settings.conditional else ()
    return generate, pb.ModelCard(dataset=settings.dataset, latent_dim=settings.latent_dim, class_names=class_names)
