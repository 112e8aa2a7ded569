"""The network that judges images: a small CNN that the trainer trains on a data set's training part, with a fixed seed.

Its penultimate layer gives the features for FID, recall and similar metrics; its last layer predicts the class.
Metrics are comparable only if they come from the same judge, so each is published with the judge's digest and accuracy.
A judge is cached in the user's cache folder, and is trained again if it is missing, damaged or of an older recipe.
"""

import contextlib
import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganserve_trainer.data.datasets import Dataset, load_dataset
from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.evaluation import cache
from ganserve_trainer.evaluation.progress import Report, silent
from ganserve_trainer.files import cache_folder
from ganserve_trainer.train.devices import best_device, bf16_is_fast

FEATURES = 128
STACKED_MNIST = "stacked-mnist"

# Increase this with every change below that changes the weights.
_RECIPE = 3
_BATCH_SIZE = 256
_EPOCHS = 6
_LEAST_STEPS = 150  # a small data set is repeated up to this many steps
_LEARNING_RATE = 5e-3  # the peak; the first step has a tenth of it
_LABEL_SMOOTHING = 0.1
_SHIFT_PIXELS = 1
_MIRRORED = ("fashion-mnist", "cifar10")  # data sets whose images keep their meaning when mirrored
_JUDGED_AT_ONCE = 500
_SAVED_EVERY_S = 5.0
_ONE_SIDED_95_PERCENT = 1.645  # standard deviations


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Judge:
    """A trained network. For stacked MNIST, it is the judge of MNIST, applied to each of the three channels."""

    network: nn.Sequential
    task: str  # what the network was trained to recognise
    stacked: bool = False

    def features(self, images: Tensor) -> Tensor:
        """Return the features of images, uint8 [n, channels, height, width]: the penultimate layer, float32 [n, d]."""
        device = next(self.network.parameters()).device
        parts = []
        with torch.no_grad():
            for part in images.split(_JUDGED_AT_ONCE):
                alone = part.flatten(0, 1).unsqueeze(1) if self.stacked else part
                parts.append(self.network[:-1](_normalised(alone.to(device))).cpu().view(len(part), -1))
        return torch.cat(parts)

    def labels(self, features: Tensor) -> Tensor:
        """Predict the classes of images, int64 [n], from their features."""
        device = next(self.network.parameters()).device
        with torch.no_grad():
            label: Tensor = self.network[-1](features.to(device).view(-1, FEATURES)).argmax(1).cpu()
        return label.view(-1, 3) @ torch.tensor([100, 10, 1]) if self.stacked else label

    def right(self, test: Dataset) -> Tensor:
        """Return whether the judge predicts each test image's class (without classes: its orientation), bool [n]."""
        if test.spec.class_names:
            return self.labels(self.features(test.images)) == test.labels
        way = torch.arange(len(test.images)) % _ways_up(test.spec)
        turned = _turned(test.images, way, _ways_up(test.spec))
        return self.labels(self.features(turned)) == way

    def accuracy(self, test: Dataset) -> float:
        """Return the share of test images that the judge predicts correctly."""
        return _share(self.right(test))

    def digest(self) -> str:
        """Return the SHA-256 of the weights, which identifies the judge."""
        return _digest(self.network.state_dict())


def unfit(right: Tensor, test: Dataset) -> str | None:
    """Return why a judge is too poor to measure with, or None.

    Its accuracy must reach halfway from chance, the share of the largest class, to 1: then it recognises half of what
    cannot be guessed. The lower end of the 95 % confidence interval counts (Wilson, 1927), as few test images may be
    right by luck.

    Args:
        right: whether the judge predicts each test image correctly, [n].
        test: the test part.
    """
    count, hits = len(right), int(right.sum())
    labels = test.labels if test.spec.class_names else torch.arange(count) % _ways_up(test.spec)
    chance = int(labels.bincount().max()) / count
    square = _ONE_SIDED_95_PERCENT**2
    share = hits / count
    root = _ONE_SIDED_95_PERCENT * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    lower = (share + square / (2 * count) - root) / (1 + square / count)
    least = (1 + chance) / 2
    if lower >= least:
        return None
    return (
        f"the judge is right on {hits} of {count} test images, {share:.2f}, which means at least {lower:.2f} with 95 % "
        f"confidence; it must reach {least:.2f}, halfway from chance ({chance:.2f}) to 1"
    )


def judge_of(train: Dataset, data_root: Path, report: Report = silent) -> Judge:
    """Load the judge of a data set from the cache, or train it on the data set's training part and cache it.

    Args:
        train: the training part.
        data_root: the folder of MNIST, for stacked MNIST.
        report: called with the progress of the training.
    """
    stacked = train.name == STACKED_MNIST
    if stacked:
        train = load_dataset("mnist", data_root, train=True, image_size=train.spec.height)
    network = _build(train.spec)
    path = cache_folder("judges") / f"{train.digest().removeprefix('sha256:')[:32]}-{_RECIPE}.pt"
    if not _load(network, path):
        stage = f"training the judge of {train.name}, once: it is stored as {path}"
        unfinished = path.with_suffix(".unfinished")
        network = train_network(train, unfinished, report, stage)
        _scale(network, train)
        cache.store(path, {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()})
        with contextlib.suppress(OSError):
            unfinished.unlink()
    network = network.to(best_device()).to(memory_format=torch.channels_last)
    if stacked:
        task = "the digit of each channel"
    else:
        classes = len(train.spec.class_names)
        task = f"the class of {classes}" if classes else f"which of {_ways_up(train.spec)} ways up an image is"
    return Judge(network.eval().requires_grad_(False), task, stacked)


def train_network(
    dataset: Dataset,
    unfinished: Path | None = None,
    report: Report = silent,
    stage: str = "",
    *,
    share: float = 1.0,
) -> nn.Sequential:
    """Train a judge's network on all images of the data set, with a fixed seed.

    Images are shifted by up to a pixel; those of Fashion-MNIST and CIFAR-10 are also mirrored. On images without
    classes, the network learns to predict their orientation (Gidaris et al., 2018, "Unsupervised representation
    learning by predicting image rotations").

    Args:
        dataset: the images and their classes.
        unfinished: the file for the state of the training, every 5 s; if there is one, the training resumes from it,
            and ends with the same weights.
        report: called with `stage` and the progress.
        stage: what the training is for.
        share: the share of a judge's epochs to train.
    """
    device = best_device()
    ways = 0 if dataset.spec.class_names else _ways_up(dataset.spec)
    size = min(_BATCH_SIZE, len(dataset.images))
    steps = max(int(share * _EPOCHS * len(dataset.images)) // size, _LEAST_STEPS)
    report(stage)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        network = _build(dataset.spec).to(device).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _LEARNING_RATE, steps, pct_start=0.2, div_factor=10, cycle_momentum=False
        )
        images, labels = dataset.images.to(device), dataset.labels.to(device)
        epochs = [torch.randperm(len(images)) for _ in range(-(-steps * size // len(images)))]
        order = torch.cat(epochs)[: steps * size].to(device).split(size)
        first = _resume(unfinished, device, network, optimizer, schedule)
        saved = time.monotonic()
        for step, index in enumerate(order[first:], first + 1):
            batch, label = _shifted(images[index]), labels[index]
            if dataset.name in _MIRRORED:
                mirrored = torch.rand(len(batch), 1, 1, 1, device=device) < 0.5
                batch = torch.where(mirrored, batch.flip(3), batch)
            if ways:
                label = torch.randint(ways, label.shape, device=device)
                batch = _turned(batch, label, ways)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
                loss = F.cross_entropy(network(_normalised(batch)), label, label_smoothing=_LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if unfinished and time.monotonic() - saved >= _SAVED_EVERY_S:
                _save(unfinished, step, device, network, optimizer, schedule)
                saved = time.monotonic()
            report(stage, step / steps)
    return network.eval().requires_grad_(False)


def _save(path: Path, step: int, device: torch.device, *parts: _Stateful) -> None:
    random = [torch.get_rng_state()]
    if device.type == "cuda":
        random.append(torch.cuda.get_rng_state(device))
    cache.store(path, {"step": step, "random": random, "states": [part.state_dict() for part in parts]})


def _resume(path: Path | None, device: torch.device, *parts: _Stateful) -> int:
    """Restore the state of an unfinished training; return the number of its steps, 0 without one."""
    if (kept := cache.load(path)) is None:
        return 0
    for part, state in zip(parts, kept["states"], strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(kept["random"][0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(kept["random"][1], device)
    return int(kept["step"])


def _scale(network: nn.Sequential, train: Dataset) -> None:
    """Scale the features to a mean square of 1, which KID's kernel expects, without changing the logits."""
    dense, head = (layer for layer in network if isinstance(layer, nn.Linear))
    scale = Judge(network, "").features(train.images[: 20 * _JUDGED_AT_ONCE]).square().mean().sqrt()
    dense.weight.div_(scale)
    dense.bias.div_(scale)
    head.weight.mul_(scale)


def _build(spec: ImageSpec) -> nn.Sequential:
    """Build convolutions that halve the size until both sides are at most 8, then a dense layer to the features.

    A second dense layer maps the features to the classes.
    """
    layers: list[nn.Module] = []
    channels, height, width = spec.channels, spec.height, spec.width
    kernel, wider = 5, 24
    while max(height, width) > 8:
        layers += _convolution(channels, wider, kernel, stride=2)
        channels, height, width = wider, -(-height // 2), -(-width // 2)
        kernel, wider = 3, 64
    layers += _convolution(channels, wider, kernel, stride=1)
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(wider * height * width, FEATURES),
        nn.ReLU(inplace=True),
        nn.Linear(FEATURES, len(spec.class_names) or _ways_up(spec)),
    )


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _normalised(images: Tensor) -> Tensor:
    return images.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def _shifted(images: Tensor) -> Tensor:
    """Shift each image [n, channels, height, width] by random pixels of its own; repeat the edges to fill the gaps."""
    n, height, width = len(images), images.shape[2], images.shape[3]
    by = torch.randint(-_SHIFT_PIXELS, _SHIFT_PIXELS + 1, (2, n, 1), device=images.device)
    rows = (by[0] + torch.arange(height, device=images.device)).clamp_(0, height - 1)
    columns = (by[1] + torch.arange(width, device=images.device)).clamp_(0, width - 1)
    image = torch.arange(n, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _ways_up(spec: ImageSpec) -> int:
    """Return the number of rotations that keep an image's shape."""
    return 4 if spec.height == spec.width else 2


def _turned(images: Tensor, way: Tensor, ways: int) -> Tensor:
    """Rotate each image by way/ways of a full turn."""
    turned = torch.empty_like(images)
    for index in range(ways):
        turned[way == index] = images[way == index].rot90(index * 4 // ways, (2, 3))
    return turned


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _digest(state: dict[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in state.items():
        content.update(f"{name} {tuple(tensor.shape)}".encode())
        content.update(tensor.contiguous().cpu().numpy().tobytes())
    return f"sha256:{content.hexdigest()}"


def _load(network: nn.Sequential, path: Path) -> bool:
    """Load the weights from the cache; return False if they are missing, damaged or from another network."""
    try:
        network.load_state_dict(cache.load(path))
    except Exception:  # torch raises anything for what are not its weights
        return False
    return True
