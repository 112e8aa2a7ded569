"""Metrics on features and labels of real and generated images: pure functions for the features of any network.

Features are float [n, d], labels int64 [n], counts int64 [classes]. Distances are Euclidean.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

_ROWS_AT_ONCE = 1000  # rows of distances that are computed at a time: 10,000 x 10,000 would take 400 MB


class _Features(nn.Module):
    """The feature network that torchmetrics expects, as the identity: the inputs are already features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of the Gaussians that are fitted to the features (Heusel et al., 2017), by torchmetrics.

    It is 0 for identical Gaussians. It falls with the number of images, so compare only values for equal numbers.
    """
    metric = FrechetInceptionDistance(_Features(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def kid(real: Tensor, generated: Tensor, subsets: int = 100, subset_size: int = 1000) -> float:
    """Squared maximum mean discrepancy under the kernel (x·y/d + 1)³ (Bińkowski et al., 2018), by torchmetrics.

    It is the mean over random subsets, drawn with a fixed seed; its expectation does not depend on the number of
    images.
    """
    size = min(subset_size, len(real), len(generated))
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        torch.manual_seed(0)
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets, size)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, _ = metric.compute()
    return float(mean)


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    The ball of a real image reaches to its k-th nearest real neighbour. Precision is the share of generated images that
    lie in the ball of any real image. Recall is the same with real and generated images exchanged.
    """
    real_radius, generated_radius = _squared_radii(real, k), _squared_radii(generated, k)
    covered = torch.zeros(len(real), dtype=torch.bool)
    precise = []
    for start, distance in _squared_distances(generated, real):
        precise.append((distance <= real_radius).any(1))
        covered |= (distance <= generated_radius[start : start + len(distance), None]).any(0)
    return _share(torch.cat(precise)), _share(covered)


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al., 2020), with the paper's k.

    Density is the average number of real images' balls that contain a generated image, divided by k; it may exceed 1.
    Coverage is the share of real images whose ball contains a generated image; unlike recall, outliers do not raise it.
    """
    radius = _squared_radii(real, k)
    covered = torch.zeros(len(real), dtype=torch.bool)
    within = 0
    for _, distance in _squared_distances(generated, real):
        inside = distance <= radius
        within += int(inside.sum())
        covered |= inside.any(0)
    return within / (k * len(generated)), _share(covered)


def nearest(points: Tensor, among: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return the distances and the indices of each point's k nearest `among` points (or all), nearest first: [n, k]."""
    found = [distance.topk(min(k, len(among)), largest=False) for _, distance in _squared_distances(points, among)]
    return torch.cat([part.values for part in found]).sqrt(), torch.cat([part.indices for part in found])


def data_copying(generated_to_train: Tensor, test_to_train: Tensor) -> float:
    """Return how often a generated image is nearer to its nearest training image than a test image is to its nearest.

    This is the statistic of the data-copying test of Meehan et al. (2020), over all pairs; ties count half. New real
    images get 0.5. A generator that copies training images is near 1; one whose images are far from real ones is near
    0.

    Args:
        generated_to_train: the distance of each generated image to its nearest training image, [n].
        test_to_train: the distance of each test image to its nearest training image, [m].
    """
    test = test_to_train.sort().values
    below = torch.searchsorted(test, generated_to_train)
    up_to = torch.searchsorted(test, generated_to_train, right=True)
    return 1 - float((below + up_to).double().mean()) / (2 * len(test))


def label_accuracy(asked: Tensor, recognised: Tensor) -> float:
    """Return the share of images that are recognised as the requested class."""
    return _share(asked == recognised)


def class_histogram(labels: Tensor, classes: int) -> Tensor:
    """Count the images of each class."""
    return labels.bincount(minlength=classes)


def kl_divergence(counts: Tensor, reference: Tensor) -> float:
    """Kullback-Leibler divergence of the classes' distribution from a reference, in nats.

    It is infinite if a class occurs that the reference lacks. On stacked MNIST this is the "KL" of VEEGAN (Srivastava
    et al., 2017) and PacGAN (Lin et al., 2018): the modes of generated images against those of the data.
    """
    share, expected = counts.double() / counts.sum(), reference.double() / reference.sum()
    there = share > 0
    return float((share[there] * (share[there] / expected[there]).log()).sum())


def _squared_distances(points: Tensor, among: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the squared distances of some rows at a time, [rows, len(among)], with the first row's index."""
    # Centred, because the rounding error of |a|² + |b|² - 2ab grows with the norms. torch.cdist takes 3 x as long.
    centre = among.mean(0)
    points, among = points - centre, among - centre
    norm = among.square().sum(1)
    for start in range(0, len(points), _ROWS_AT_ONCE):
        rows = points[start : start + _ROWS_AT_ONCE]
        yield start, torch.addmm(norm, rows, among.T, alpha=-2).add_(rows.square().sum(1, keepdim=True)).clamp_(min=0)


def _squared_radii(points: Tensor, k: int) -> Tensor:
    """Return each point's squared distance to its k-th nearest other point, [n]."""
    k = min(k, len(points) - 1)
    radii = []
    for start, distance in _squared_distances(points, points):
        row = torch.arange(len(distance))
        distance[row, start + row] = torch.inf
        # topk, because kthvalue takes 20 x as long.
        radii.append(distance.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def _share(right: Tensor) -> float:
    return float(right.double().mean())
