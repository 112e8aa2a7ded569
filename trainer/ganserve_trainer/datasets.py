"""Data sets as whole tensors: images uint8, labels int64. Training sees the training part only."""

import gzip
import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torchvision
from torch import Tensor

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.networks import ImageSpec

_SOURCES = {
    "mnist": (torchvision.datasets.MNIST, tuple(str(digit) for digit in range(10))),
    "fashion-mnist": (torchvision.datasets.FashionMNIST, tuple(torchvision.datasets.FashionMNIST.classes)),
}
DATASETS = tuple(_SOURCES)
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True, slots=True)
class Dataset:
    """One part (train or test) of a data set."""

    name: str
    images: Tensor  # uint8 [n, channels, height, width]
    labels: Tensor  # int64 [n]
    spec: ImageSpec

    def digest(self) -> str:
        """Name the content: sha256 over images and labels."""
        content = hashlib.sha256(self.images.numpy().tobytes())
        content.update(self.labels.numpy().tobytes())
        return f"sha256:{content.hexdigest()}"


def load_dataset(name: str, data_root: Path, *, train: bool) -> Dataset:
    """Read a data set from `data_root`, from where Debian keeps it, or from its download, in this order.

    Raises:
        TrainerError: there is no such data set, it is nowhere to be found, or its files are damaged.
    """
    if name not in _SOURCES:
        raise TrainerError(f"there is no data set {name!r}; choose one of {', '.join(DATASETS)}")
    source, class_names = _SOURCES[name]
    raw = data_root / source.__name__ / "raw"
    debian = name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir()
    if raw.is_dir() and any(raw.iterdir()):
        debian = False
    elif not debian:
        _download(source, data_root)
    try:
        part = _read_debian_fashion_mnist(train) if debian else source(str(data_root), train=train)
        images, labels = part.data.unsqueeze(1), part.targets
        if images.shape[0] != labels.shape[0] or images.shape[0] == 0:
            raise ValueError(f"{images.shape[0]} images and {labels.shape[0]} labels")
        if int(labels.max()) >= len(class_names):
            raise ValueError(f"label {int(labels.max())} of {len(class_names)} classes")
    except Exception as error:  # torchvision's readers raise whatever the bytes lead them to
        raise TrainerError(
            f"{name}: the files in {DEBIAN_FASHION_MNIST if debian else raw} are missing, incomplete or damaged "
            f"({type(error).__name__}: {error}). {_layout(source.__name__)}"
        ) from error
    spec = ImageSpec(images.shape[1], images.shape[2], images.shape[3], class_names)
    return Dataset(name, images.contiguous(), labels.long(), spec)


def _layout(folder: str) -> str:
    return (
        f"--data-root DIR expects DIR/{folder}/raw/ with train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, unpacked, as torchvision lays them out."
    )


def _download(source: type[torchvision.datasets.MNIST], data_root: Path) -> None:
    """Download beside, then move into place: a download that broke off leaves nothing behind."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            source(scratch, train=True, download=True)
        except Exception as error:  # URLError, IncompleteRead, RuntimeError, …: all mean that there is no data
            debian = (
                "Install Debian's package dataset-fashion-mnist, which is found by itself."
                if source is torchvision.datasets.FashionMNIST
                else "Or take --dataset fashion-mnist: Debian's package dataset-fashion-mnist is found by itself."
            )
            raise TrainerError(
                f"{source.__name__} is not in {data_root} and cannot be downloaded.\n"
                f"  - Say where it is: {_layout(source.__name__)}\n  - {debian}"
            ) from error
        data_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_root, prefix=".download-") as beside:
            shutil.copytree(Path(scratch) / source.__name__, Path(beside) / source.__name__)
            (data_root / source.__name__).mkdir(exist_ok=True)
            (Path(beside) / source.__name__ / "raw").rename(data_root / source.__name__ / "raw")


def _read_debian_fashion_mnist(train: bool) -> torchvision.datasets.FashionMNIST:
    """Unpack Debian's files for torchvision to read."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for packed in DEBIAN_FASHION_MNIST.glob("*.gz"):
            (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        return torchvision.datasets.FashionMNIST(scratch, train=train)
