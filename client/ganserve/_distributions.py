"""The distributions of latents: how the random numbers of one image are drawn. Server and SDK draw the same numbers."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_LARGEST_NORMAL = 2.0  # of the truncated normal distribution

Shape = tuple[int, ...]


def _uniform(random: np.random.RandomState, shape: Shape) -> NDArray[np.float64]:
    values: NDArray[np.float64] = random.uniform(-1.0, 1.0, shape)
    return values


def _sphere(random: np.random.RandomState, shape: Shape) -> NDArray[np.float64]:
    values: NDArray[np.float64] = random.standard_normal(shape)
    values *= np.sqrt(values.size / np.sum(values * values))
    return values


def _truncated_normal(random: np.random.RandomState, shape: Shape) -> NDArray[np.float64]:
    values = random.standard_normal(shape)
    while (outside := np.abs(values) > _LARGEST_NORMAL).any():
        values[outside] = random.standard_normal(np.count_nonzero(outside))
    return values


# For each distribution of the protocol: how the values of one latent are drawn.
DISTRIBUTIONS: dict[str, Callable[[np.random.RandomState, Shape], NDArray[np.float64]]] = {
    "normal": np.random.RandomState.standard_normal,
    "uniform": _uniform,
    "sphere": _sphere,
    "truncated_normal": _truncated_normal,
}
