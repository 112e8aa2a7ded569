"""Data sets as whole tensors: images uint8, labels int64. Training uses only the training part."""

import gzip
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from ganserve_trainer.data.cache import digest_of
from ganserve_trainer.data.folders import read_folder
from ganserve_trainer.data.reading import Reading
from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.errors import TrainerError


@dataclass(frozen=True, slots=True)
class _Source:
    """A data set that torchvision can read and download."""

    reader: Any  # a class of torchvision.datasets
    folder: str  # below the data root
    files: str  # the files in it, for error messages
    class_names: tuple[str, ...]


_IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
_SOURCES = {
    "mnist": _Source(torchvision.datasets.MNIST, "MNIST/raw", _IDX_FILES, tuple("0123456789")),
    "fashion-mnist": _Source(
        torchvision.datasets.FashionMNIST,
        "FashionMNIST/raw",
        _IDX_FILES,
        tuple(torchvision.datasets.FashionMNIST.classes),
    ),
    "cifar10": _Source(
        torchvision.datasets.CIFAR10,
        "cifar-10-batches-py",
        "data_batch_1 to data_batch_5, test_batch and batches.meta",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}
DATASETS = (*_SOURCES, "stacked-mnist")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

_STACKED_TRAIN_IMAGES = 128_000
_STACKED_TEST_IMAGES = 26_000


@dataclass(frozen=True, slots=True)
class Dataset:
    """One part (train or test) of a data set."""

    name: str
    images: Tensor  # uint8 [n, channels, height, width]
    labels: Tensor  # int64 [n]
    spec: ImageSpec
    skipped: int = 0  # the number of files of this part that were skipped
    _digest: str = field(default="", init=False, compare=False)  # not copied by dataclasses.replace

    def digest(self) -> str:
        """Return the SHA-256 of images and labels, without shape and class names, which identifies the content."""
        return self._digest or digest_of(self.images.numpy(), self.labels.numpy())


def load_dataset(
    name: str, data_root: Path, *, train: bool, image_size: int | None = None, reading: Reading = Reading()
) -> Dataset:
    """Read one part of a built-in data set, or of a data set of files, whose images are mapped from the disk.

    Built-in data sets are read from `data_root`, from Debian's package, or from their download, in this order.

    Args:
        name: one of `DATASETS`, or the path of a folder, an archive or a file of arrays: `./photos`, `./photos.zip`.
        data_root: the folder of the built-in data sets, to which they are also downloaded.
        train: whether to read the training part or the test part; the parts share no image.
        image_size: resize to squares of this many pixels a side; images that are not square are cropped to the centre.
            None keeps the images' size; the images of a folder must then all have the same size. Images are resized
            with Pillow's antialiased bicubic filter, or its equivalent in torch: without antialiasing, FID changes by
            points (Parmar et al., 2022).
        reading: which images of a data set of files train, and what becomes of their pixels.

    Raises:
        TrainerError: there is no such data set, its files are missing or damaged, or memory runs out; for files, as
            `read_folder`.
    """
    try:
        return _load(name, data_root, train, image_size, reading)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise TrainerError(
            f"out of memory while reading the data set {name}: end other programs, use a smaller --image-size, or give "
            "a data set of files (a folder, a zip or a tar), which is not held in memory"
        ) from error


def _load(name: str, data_root: Path, train: bool, image_size: int | None, reading: Reading) -> Dataset:
    if "/" in name or name.startswith(".") or (name not in DATASETS and Path(name).exists()):
        path = Path(name).expanduser()
        title, pixels, numbers, class_names, skipped, digest = read_folder(
            path, train=train, image_size=image_size, reading=reading
        )
        images, labels = torch.from_numpy(pixels), torch.from_numpy(numbers)
        dataset = Dataset(title, images, labels, _spec(images, class_names), skipped)
        object.__setattr__(dataset, "_digest", digest)
        return dataset
    if name not in DATASETS:
        raise TrainerError(
            f"there is no data set {name!r}; choose one of {', '.join(DATASETS)}, or give the path of a folder or "
            "archive of images, such as ./photos or ./photos.zip"
        )
    if reading != Reading():
        raise TrainerError(
            f"{name} is a built-in data set with parts and colours of its own: leave out train_folder, test_folder, "
            "split, train_on_all, channels and background, which are for data sets of files"
        )
    source = "mnist" if name == "stacked-mnist" else name
    images, labels = _load_source(source, data_root, train)
    class_names = _SOURCES[source].class_names
    if image_size is not None:
        side = (image_size, image_size)  # all images of the built-in data sets are square
        images = F.interpolate(images, side, mode="bicubic", antialias=True).contiguous()
    if name == "stacked-mnist":
        images, labels = _stack(images, labels, _STACKED_TRAIN_IMAGES if train else _STACKED_TEST_IMAGES)
        class_names = tuple(f"{digits:03}" for digits in range(1000))
    return Dataset(name, images, labels, _spec(images, class_names))


def _spec(images: Tensor, class_names: tuple[str, ...]) -> ImageSpec:
    return ImageSpec(images.shape[1], images.shape[2], images.shape[3], class_names)


def _stack(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Stack three random digits as red, green and blue, with label 100 r + 10 g + b: 1000 modes (Metz et al., 2017).

    PacGAN (Lin et al., 2018), in VEEGAN's setting, trains on 128,000 such images and counts modes in 26,000 generated
    images; the test part has the same number, for comparison. PacGAN stacks digits from all 70,000; here each part
    stacks its own digits.
    """
    # RandomState: its numbers never change between versions of NumPy (NEP 19).
    index = torch.from_numpy(np.random.RandomState(0).randint(len(images), size=(count, 3)))
    return images.squeeze(1)[index], labels[index] @ torch.tensor([100, 10, 1])


def _load_source(name: str, data_root: Path, train: bool) -> tuple[Tensor, Tensor]:
    source = _SOURCES[name]
    place = data_root / source.folder
    debian = name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir()
    if place.is_dir() and any(place.iterdir()):
        debian = False
    elif not debian:
        _download(source, data_root)
    try:
        part = _read_debian_fashion_mnist(train) if debian else source.reader(str(data_root), train=train)
        images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets).long()
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        if images.shape[0] != labels.shape[0] or images.shape[0] == 0:
            raise ValueError(f"{images.shape[0]} images and {labels.shape[0]} labels")
        if int(labels.max()) >= len(source.class_names):
            raise ValueError(f"label {int(labels.max())} of {len(source.class_names)} classes")
    except Exception as error:  # torchvision's readers raise anything on damaged files
        raise TrainerError(
            f"{name}: the files in {DEBIAN_FASHION_MNIST if debian else place} are missing, incomplete or damaged "
            f"({type(error).__name__}: {error}). {_layout(source)}"
        ) from error
    return images.contiguous(), labels


def _layout(source: _Source) -> str:
    return f"--data-root DIR expects DIR/{source.folder}/ with {source.files}, unpacked, in torchvision's layout."


def _download(source: _Source, data_root: Path) -> None:
    """Download to a temporary folder, then move that into place, so that an interrupted download leaves nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            source.reader(scratch, train=True, download=True)
        except Exception as error:  # URLError, IncompleteRead, RuntimeError, …: the download failed
            debian = (
                "Install Debian's package dataset-fashion-mnist, which the trainer finds by itself."
                if source.reader is torchvision.datasets.FashionMNIST
                else (
                    "Or use --dataset fashion-mnist: the trainer finds Debian's package dataset-fashion-mnist by "
                    "itself."
                )
            )
            raise TrainerError(
                f"{source.reader.__name__} is not in {data_root} and cannot be downloaded.\n  - Provide the files: "
                f"{_layout(source)}\n  - {debian}"
            ) from error
        place = data_root / source.folder
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_root, prefix=".download-") as beside:
            shutil.copytree(Path(scratch) / source.folder, Path(beside) / "complete")
            (Path(beside) / "complete").rename(place)


def _read_debian_fashion_mnist(train: bool) -> torchvision.datasets.FashionMNIST:
    """Unpack Debian's files for torchvision to read."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for packed in DEBIAN_FASHION_MNIST.glob("*.gz"):
            (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        return torchvision.datasets.FashionMNIST(scratch, train=train)
