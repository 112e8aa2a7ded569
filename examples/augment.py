"""Augments a training set: a classifier learns from 100 real digits alone, then from these and generated ones.

python examples/augment.py --data-root data

Both train for the same number of steps and are tested on the real test images. The generator has seen all 60,000
training images: it adds what it learned from the others to the 100, in a file of 1.7 MB.

Needs torch (pip install '.[trainer]') and MNIST: DIR/MNIST/raw in torchvision's layout, or DIR with the IDX files.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ganserve import Client

MODEL = "cdcgan-mnist"
REAL_PER_CLASS = 10
BATCH_SIZE = 64


def read_idx(data_root: Path, name: str) -> NDArray[np.uint8]:
    """Read one of MNIST's files, compressed or not (yann.lecun.com/exdb/mnist, 1998)."""
    for folder in (data_root / "MNIST" / "raw", data_root):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
                return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
    raise SystemExit(f"{name} is neither in {data_root}/MNIST/raw nor in {data_root}")


def few_of_each(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the first ten of each class."""
    kept = np.concatenate([np.flatnonzero(labels == label)[:REAL_PER_CLASS] for label in range(10)])
    return images[kept], labels[kept]


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Return float32 [n, 1, 28, 28] from -1 to 1."""
    return torch.from_numpy(images.reshape(-1, 1, 28, 28).astype(np.float32) / 127.5 - 1)


def train(images: NDArray[np.uint8], labels: NDArray[np.uint8], steps: int) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10)),
    )
    inputs, targets = to_tensor(images), torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(steps):
        index = torch.randint(len(inputs), (BATCH_SIZE,))
        optimizer.zero_grad()
        F.cross_entropy(network(inputs[index]), targets[index]).backward()
        optimizer.step()
    return network.eval()


def accuracy(network: nn.Sequential, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> float:
    with torch.no_grad():
        said = network(to_tensor(images)).argmax(1).numpy()
    return float((said == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="HOST:PORT of the server; default: GANSERVE_ADDRESS, or 127.0.0.1:50051")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--generated", type=int, default=10_000, help="number of images to add")
    parser.add_argument("--steps", type=int, default=1000, help="training steps, in batches of 64")
    options = parser.parse_args()

    read = [
        read_idx(options.data_root, f"{part}-{kind}")
        for part in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    images, labels = few_of_each(*read[:2])
    test_images, test_labels = read[2:]
    alone = accuracy(train(images, labels, options.steps), test_images, test_labels)
    print(f"{len(images)} real images: {alone:.4f} of {len(test_images)} test images are right")

    # Without labels the server takes the classes in turn, so each class has the same number of images.
    with Client(options.address) as client:
        made = client.generate(MODEL, count=options.generated, seed=1)
    images = np.concatenate([images, made.pixels[..., 0]])
    labels = np.concatenate([labels, np.array(made.labels, np.uint8)])
    augmented = accuracy(train(images, labels, options.steps), test_images, test_labels)
    print(f"and {len(made)} generated ones: {augmented:.4f}")


if __name__ == "__main__":
    main()
