"""Counts the modes of the data that a generator makes: its classes or, without usable labels, clusters of images.

Images are described by 40 principal components of their pixels, averaged down to at most 16 a side. A quadratic
discriminant recognises classes in them. If it is right on fewer than 40 % of held-out images, if there are no
classes, or more than 50, k-means clusters replace the classes. All of this has a closed form and takes about two
seconds of CPU time, once. Nothing here uses torch's global random state.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ganserve_trainer.data.clustering import k_means
from ganserve_trainer.data.datasets import Dataset
from ganserve_trainer.metrics import density_coverage, nearest
from ganserve_trainer.report.history import Modes

IMAGES = 1000  # generated for each count
EVERY_IMAGES = 20_000  # a forward pass of 1,000 images for each 20,000 takes about 1 % of the training time

_LARGEST_SIDE = 16
_COMPONENTS = 40
_FITTED_IMAGES = 20_000
_SEARCHED_IMAGES = 60_000
_MOST_HELD_OUT = 2000
_POOLED_COVARIANCE = 0.5  # its share in the covariance of each class (Friedman, 1989)
_CLUSTERS = 20
_LEAST_OF_CLUSTER = 50
_MOST_CLASSES = 50
_LEAST_ACCURACY = 0.4
_LEAST_IMAGES = 100
_AT_ONCE = 100
_QUERIES = 200
_ESTIMATION_STEPS = 100


class ModeCounter:
    """Counts the groups of a training part in generated images."""

    def __init__(self, dataset: Dataset, *, conditional: bool) -> None:
        """Analyse a training part.

        Args:
            dataset: the training part.
            conditional: whether the generator is asked for the data set's classes.
        """
        order = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(0))[:_SEARCHED_IMAGES]
        pixels = torch.cat([_reduced(dataset.images[part]) for part in order.split(10_000)])
        fitted = pixels[:_FITTED_IMAGES]
        self._mean = fitted.mean(0)
        centred = fitted - self._mean
        self._axes = torch.linalg.eigh(centred.T @ centred / len(fitted)).eigenvectors[:, -_COMPONENTS:]
        points = (pixels - self._mean) @ self._axes
        held_out = min(_MOST_HELD_OUT, len(fitted) // 4)
        self._real, self._training = points[:held_out], points[held_out:]
        self._usual_distance = nearest(self._real[:_QUERIES], self._training)[0].median()
        labels = dataset.labels[order]
        self._asked = dataset.labels.sort().values[torch.linspace(0, len(labels) - 1, IMAGES).round().long()]
        self._is_asked = False
        self.names: tuple[str, ...] = ()
        self._recognise: Callable[[Tensor], Tensor]
        if 2 <= len(dataset.spec.class_names) <= _MOST_CLASSES:
            self._recognise_classes(labels[: len(fitted)], held_out, dataset.spec.class_names)
            self._is_asked = conditional and bool(self.names)
        if not self.names:
            # Clusters of 20 images miss new images: of 100 real test images, a cluster had none.
            clusters = min(_CLUSTERS, max(len(fitted) // _LEAST_OF_CLUSTER, 2))
            groups = k_means(dataset.images[order[: len(fitted)]], clusters)
            members = [groups == group for group in groups.unique()]
            centres = torch.stack([points[: len(fitted)][member].mean(0) for member in members])
            self._recognise = lambda points: nearest(points, centres)[1][:, 0]
            self.names = tuple(f"cluster {number + 1}" for number in range(len(members)))
            self._confusion = torch.eye(len(members), dtype=torch.float64)
            self._share = self._recognise(points).bincount(minlength=len(members)).double() / len(points)

    def count(self, images_seen: int, generate: Callable[[Tensor], Tensor]) -> Modes:
        """Count the groups in generated images.

        Args:
            images_seen: the progress of the run.
            generate: makes images in -1…1, [n, channels, height, width], of the labels [n] if it is conditional. The
                labels are those of evenly spaced training images, 1,000 in all.
        """
        parts = [generate(label).float().cpu().add(1).mul(127.5) for label in self._asked.split(_AT_ONCE)]
        points = torch.cat([(_reduced(part) - self._mean) @ self._axes for part in parts])
        recognised, groups = self._recognise(points), len(self.names)
        if self._is_asked:
            expected = self._asked.bincount(minlength=groups).double()
            shares = [self._shares(recognised[self._asked == group])[group] for group in range(groups)]
            generated = torch.stack(shares) * expected
        else:
            expected, generated = self._share * len(points), self._shares(recognised) * len(points)
        distance = nearest(points[:: IMAGES // _QUERIES], self._training)[0].median() / self._usual_distance
        return Modes(
            images_seen,
            self.names,
            tuple(round(value, 1) for value in generated.tolist()),
            tuple(round(value, 1) for value in expected.tolist()),
            density_coverage(self._real[:IMAGES], points)[1],
            float(distance),
        )

    def _recognise_classes(self, labels: Tensor, held_out: int, names: tuple[str, ...]) -> None:
        """Fit the quadratic discriminant on the images that are not held out, and use it if it is good enough."""
        true, label = labels[:held_out], labels[held_out:]
        points = self._training[: len(label)].double()
        members = [points[label == group] for group in range(len(names))]
        if held_out < _LEAST_IMAGES or min(map(len, members)) < 2:
            return
        means = torch.stack([member.mean(0) for member in members])
        covariances = torch.stack([member.T.cov(correction=0) for member in members])
        shares = torch.tensor([len(member) / len(points) for member in members], dtype=torch.float64)
        pooled = (shares[:, None, None] * covariances).sum(0)
        floor = 1e-6 * (pooled.diagonal().mean() + 1e-12) * torch.eye(len(pooled), dtype=torch.float64)
        factors = torch.linalg.cholesky(torch.lerp(covariances, pooled, _POOLED_COVARIANCE) + floor)
        constant = shares.log() - factors.diagonal(dim1=1, dim2=2).log().sum(1)

        def recognise(points: Tensor) -> Tensor:
            offset = (points.double() - means[:, None]).transpose(1, 2)  # [groups, components, n]
            square = torch.linalg.solve_triangular(factors, offset, upper=False).square().sum(1)
            group: Tensor = (constant[:, None] - square / 2).argmax(0)
            return group

        found = recognise(self._real)
        if (found == true).double().mean() < _LEAST_ACCURACY:
            return
        self._recognise = recognise
        self.names = names
        # Smoothed, because a class that was never mistaken in few images may be mistaken in others.
        confusion = F.one_hot(true * len(names) + found, len(names) ** 2).sum(0).view(len(names), -1) + 1e-3
        self._confusion = confusion.double() / confusion.sum(1, keepdim=True)
        self._share = labels.bincount(minlength=len(names)).double() / len(labels)

    def _shares(self, recognised: Tensor) -> Tensor:
        """Estimate the groups' shares, [groups], from the recognised groups [n] and how often each is mistaken.

        This is the maximum-likelihood estimate by expectation maximisation (Saerens et al., 2002).
        """
        counts = recognised.bincount(minlength=len(self.names)).double()
        share = torch.full_like(counts, 1 / len(counts))
        for _ in range(_ESTIMATION_STEPS):
            joint = share[:, None] * self._confusion
            share = joint / joint.sum(0).clamp(min=1e-300) @ counts / counts.sum().clamp(min=1)
        return share


def _reduced(images: Tensor) -> Tensor:
    """Average images in 0…255 down to at most 16 pixels a side: float32 in 0…1, [n, values]."""
    size = (min(images.shape[2], _LARGEST_SIDE), min(images.shape[3], _LARGEST_SIDE))
    return F.adaptive_avg_pool2d(images.float().div(255), size).flatten(1)
