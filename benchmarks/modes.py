"""Prints which alarms for modes ring for generators of known faults, and for healthy ones: the bundled models.

A faulty generator draws real images: of one class, of 60 % of the classes, of the training part. Usage:

    .venv/bin/python -m benchmarks.modes --data-root DIR [DATASET …]
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from ganserve_trainer.data.datasets import Dataset, load_dataset
from ganserve_trainer.train.modes import EVERY_IMAGES, ModeCounter
from ganserve_trainer.train.monitoring import Monitor

MODELS = Path(__file__).parents[1] / "server" / "ganserve_server" / "models"


def row(name: str, counter: ModeCounter, generate: Callable[[Tensor], Tensor]) -> None:
    """Print the smallest share of a group, coverage, distance and the alarms of three counts."""
    monitor, alarms = Monitor(), []
    for number in (1, 2, 3):
        count = counter.count(number * EVERY_IMAGES, generate)
        alarms += [alarm.name for alarm in monitor.observe_modes(count)]
    shares = [made / wanted for made, wanted in zip(count.generated, count.expected, strict=True) if wanted >= 40]
    figures = f"{min(shares):.2f} | {count.coverage:.2f} | {count.distance:.2f}"
    print(f"| {name} | {figures} | {', '.join(alarms) or 'none'} |", flush=True)


def drawn(images: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a generator that draws from real images."""
    generator = torch.Generator().manual_seed(0)
    return lambda label: images[torch.randint(len(images), label.shape, generator=generator)].float() / 127.5 - 1


def model(name: str) -> tuple[bool, Callable[[Tensor], Tensor]]:
    """Return whether a bundled model takes labels, and a function that runs it."""
    session = onnxruntime.InferenceSession(str(MODELS / name / "1" / "model.onnx"))
    shapes = {each.name: each.shape for each in session.get_inputs()}
    random = np.random.default_rng(0)

    def generate(label: Tensor) -> Tensor:
        inputs = {"latent": random.standard_normal((len(label), shapes["latent"][1]), dtype=np.float32)}
        if "label" in shapes:
            inputs["label"] = label.numpy()
        return torch.from_numpy(session.run(None, inputs)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1

    return "label" in shapes, generate


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--image-size", type=int)
    parser.add_argument("datasets", nargs="*", default=["mnist", "fashion-mnist"])
    asked = parser.parse_args()
    print("| generator | least share | coverage | distance | alarms |\n|---|---|---|---|---|")
    for name in asked.datasets:
        train, test = (
            load_dataset(name, asked.data_root, train=part, image_size=asked.image_size) for part in (True, False)
        )
        for kind in ("classes", "no classes"):
            faults(f"{name}, {kind}", train, test, labelled=kind == "classes")
        for path in sorted(MODELS.iterdir()):
            if path.name.partition("-")[2] == name:
                conditional, generate = model(path.name)
                row(path.name, ModeCounter(train, conditional=conditional), generate)


def faults(name: str, train: Dataset, test: Dataset, *, labelled: bool) -> None:
    """Print a row for each generator that draws real images, and for noise."""
    spec = train.spec if labelled else dataclasses.replace(train.spec, class_names=())
    counter = ModeCounter(dataclasses.replace(train, spec=spec), conditional=False)
    classes = len(train.spec.class_names)
    row(f"{name}: test images", counter, drawn(test.images))
    row(f"{name}: training images", counter, drawn(train.images))
    row(f"{name}: 60 % of the classes", counter, drawn(test.images[test.labels < 0.6 * classes]))
    for label, of_class in enumerate(train.spec.class_names):
        row(f"{name}: only {of_class}", counter, drawn(test.images[test.labels == label]))
    row(f"{name}: noise", counter, lambda label: 2 * torch.rand(len(label), *train.images.shape[1:]) - 1)


if __name__ == "__main__":
    main()
