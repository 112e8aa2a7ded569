"""Metrics on features and labels of real and generated images: pure functions for the features of any network.

Features are float [n, d], labels int64 [n], counts int64 [classes]. Distances are Euclidean.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS_AT_ONCE = 1000  # rows of distances that are computed at a time: 10,000 x 10,000 would take 400 MB
_HALVES = 16  # the standard error then has an error of 18 % itself


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    standard_error: float


def with_standard_errors(figures: Callable[..., dict[str, float]], *sizes: int) -> dict[str, Estimate]:
    """Compute figures of samples, and their standard errors by resampling.

    The standard error is the standard deviation of a figure over 16 random halves of each sample, drawn with a fixed
    seed: the delete-d jackknife with d = n/2, where no factor remains (Shao & Wu, 1989). An ordinary bootstrap draws
    images twice, and an image's copy would be its nearest neighbour. The error of an FID or a KID of nearly equal
    distributions, which is not linear in the images, comes out up to 1.7 times too large.

    Args:
        figures: computes figures by name, from one index for each sample, int64 [n or n/2].
        sizes: the number of images of each sample, at least 4.
    """
    generator = torch.Generator().manual_seed(0)
    values = figures(*(torch.arange(size) for size in sizes))
    halves = [
        figures(*(torch.randperm(size, generator=generator)[: size // 2] for size in sizes)) for _ in range(_HALVES)
    ]
    return {name: Estimate(value, statistics.stdev(half[name] for half in halves)) for name, value in values.items()}


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of the Gaussians that are fitted to the features (Heusel et al., 2017).

    It is 0 for identical Gaussians. It falls with the number of images, so compare only values for equal numbers.
    """
    (real_mean, real_covariance), (generated_mean, generated_covariance) = _moments(real), _moments(generated)
    # The trace of (A B)^½ from the symmetric S B S with S S = A. For 2,048 features, torch's eigenvalues of A B itself,
    # which is not symmetric, take several times as long.
    values, vectors = torch.linalg.eigh(real_covariance)
    root = vectors * values.clamp(min=0).sqrt()
    product = torch.linalg.eigvalsh(root.T @ generated_covariance @ root).clamp(min=0).sqrt().sum()
    spread = real_covariance.trace() + generated_covariance.trace() - 2 * product
    return float((real_mean - generated_mean).square().sum() + spread)


def kid(real: Tensor, generated: Tensor) -> float:
    """Squared maximum mean discrepancy under the kernel (x·y/d + 1)³ (Bińkowski et al., 2018), over all pairs.

    It is the unbiased estimate: its expectation does not depend on the number of images. The paper averages it over
    random subsets, which has the same expectation and a larger variance.
    """
    within = [_kernel_sum(points, points, own=True) / (len(points) * (len(points) - 1)) for points in (real, generated)]
    return sum(within) - 2 * _kernel_sum(real, generated) / (len(real) * len(generated))


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    The ball of a real image reaches to its k-th nearest real neighbour. Precision is the share of generated images that
    lie in the ball of any real image. Recall is the same with real and generated images exchanged.
    """
    found = neighbourhoods(real, generated, k, k)
    return found["precision"], found["recall"]


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al., 2020), with the paper's k.

    Density is the average number of real images' balls that contain a generated image, divided by k; it may exceed 1.
    Coverage is the share of real images whose ball contains a generated image; unlike recall, outliers do not raise it.
    """
    found = neighbourhoods(real, generated, k, k)
    return found["density"], found["coverage"]


def neighbourhoods(real: Tensor, generated: Tensor, k: int = 3, density_k: int = 5) -> dict[str, float]:
    """Return precision and recall with `k`, and density and coverage with `density_k`, from the same distances."""
    real_radius, density_radius = _squared_radii(real, k, density_k)
    (generated_radius,) = _squared_radii(generated, k)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    precise = within = 0
    for start, distance in _squared_distances(generated, real):
        precise += int((distance <= real_radius).any(1).sum())
        recalled |= (distance <= generated_radius[start : start + len(distance), None]).any(0)
        inside = distance <= density_radius
        within += int(inside.sum())
        covered |= inside.any(0)
    return {
        "precision": precise / len(generated),
        "recall": _share(recalled),
        "density": within / (density_k * len(generated)),
        "coverage": _share(covered),
    }


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """Inception Score (Salimans et al., 2016): exp of the mean divergence of an image's classes from those of all.

    Like the paper, it is the mean over 10 parts of the images, in their order.

    Args:
        logits: the classifier's outputs for generated images, [n, classes].
        splits: the number of parts, at most one for each image.
    """
    entropy, scores = torch.special.entr, []
    for part in logits.double().tensor_split(min(splits, len(logits))):
        share = part.softmax(1)
        # The mean divergence is the entropy of the mean less the mean of the entropies. A share may be 0 here.
        scores.append((entropy(share.mean(0)).sum() - entropy(share).sum(1).mean()).exp())
    return float(torch.stack(scores).mean())


def nearest(points: Tensor, among: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return the distances and the indices of each point's k nearest `among` points (or all), nearest first: [n, k]."""
    k = min(k, len(among))
    parts = (distance for _, distance in _squared_distances(points, among))
    # For k = 1 because topk takes several times as long.
    found = [part.min(1, keepdim=True) if k == 1 else part.topk(k, largest=False) for part in parts]
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


def _squared_radii(points: Tensor, *ks: int) -> list[Tensor]:
    """Return, for each k, each point's squared distance to its k-th nearest other point, [n]."""
    radii = []
    for start, distance in _squared_distances(points, points):
        row = torch.arange(len(distance))
        distance[row, start + row] = torch.inf
        # topk, because kthvalue takes 20 x as long.
        radii.append(distance.topk(min(max(ks), len(points) - 1), largest=False).values)
    nearest_first = torch.cat(radii)
    return [nearest_first[:, min(k, nearest_first.shape[1]) - 1] for k in ks]


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [d] and the covariance [d, d], in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def _kernel_sum(left: Tensor, right: Tensor, *, own: bool = False) -> float:
    """Sum KID's kernel over all pairs of rows; `own`: leave out the pairs of a row with itself."""
    total = 0.0
    for rows in left.split(_ROWS_AT_ONCE):
        total += float(_kernel(rows @ right.T, left.shape[1]).sum(dtype=torch.float64))
    if own:
        total -= float(_kernel(left.square().sum(1), left.shape[1]).sum(dtype=torch.float64))
    return total


def _kernel(products: Tensor, dimensions: int) -> Tensor:
    base = products.div_(dimensions).add_(1)
    return base.square().mul_(base)


def _share(right: Tensor) -> float:
    return float(right.double().mean())
