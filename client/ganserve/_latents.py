"""The latents of seeds, as the server draws them, and interpolations between them."""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ganserve._arguments import invalid, uint32
from ganserve._distributions import DISTRIBUTIONS

_PARALLEL = 1e-6  # radians: vectors within this angle of parallel or opposite have no unique great circle


def latents(seeds: Iterable[int], latent_dim: int, distribution: str = "normal") -> NDArray[np.float32]:
    """Return the latents of seeds before truncation, float32 [n, latent_dim].

    They are the same in every process, permanently, because NumPy froze RandomState's stream (NEP 19).

    >>> latents([1, 2], 64).shape
    (2, 64)

    Args:
        seeds: the seed of each latent.
        latent_dim: the number of values of a latent.
        distribution: "normal", "uniform", "sphere" or "truncated_normal", as `Model.distribution` says.

    Raises:
        InvalidRequestError: a seed is not from 0 to 2^32-1, latent_dim is below 1, or there is no such distribution.
    """
    uint32("latent_dim", latent_dim, least=1)
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise invalid("distribution", f"distribution is {distribution!r}; it must be one of {known}")
    draw = DISTRIBUTIONS[distribution]
    rows = [draw(np.random.RandomState(uint32("seed", seed)), (latent_dim,)) for seed in seeds]
    return np.array(rows, np.float32).reshape(len(rows), latent_dim)


def slerp(a: ArrayLike, b: ArrayLike, t: ArrayLike) -> NDArray[np.float32]:
    """Interpolate between the latents a and b on the great circle through them.

    Returns float32 [latent_dim], or [n, latent_dim] for n values of t.

    Points on a straight line are too near the origin for a generator that was trained on normal latents, whose lengths
    hardly vary (White, "Sampling Generative Networks", 2016). t = 0 gives exactly a, and t = 1 gives exactly b.

    >>> slerp([1.0, 0.0], [0.0, 1.0], 0.5)
    array([0.70710677, 0.70710677], dtype=float32)
    """
    start, end = np.asarray(a, np.float64), np.asarray(b, np.float64)
    way = np.asarray(t, np.float64)[..., None]
    lengths = np.linalg.norm(start) * np.linalg.norm(end)
    cosine = start @ end / lengths if lengths else 1.0
    angle = np.arccos(np.clip(cosine, -1, 1))
    if not _PARALLEL < angle < np.pi - _PARALLEL:
        return linear(a, b, t)
    mixed = (np.sin((1 - way) * angle) * start + np.sin(way * angle) * end) / np.sin(angle)
    return _exact_ends(mixed, start, end, way)


def linear(a: ArrayLike, b: ArrayLike, t: ArrayLike) -> NDArray[np.float32]:
    """Interpolate between the latents a and b on a straight line, as `slerp` does on a great circle.

    >>> linear([1.0, 0.0], [0.0, 1.0], [0.0, 0.25]).tolist()
    [[1.0, 0.0], [0.75, 0.25]]
    """
    start, end = np.asarray(a, np.float64), np.asarray(b, np.float64)
    way = np.asarray(t, np.float64)[..., None]
    return _exact_ends((1 - way) * start + way * end, start, end, way)


WAYS: dict[str, Callable[[ArrayLike, ArrayLike, ArrayLike], NDArray[np.float32]]] = {"slerp": slerp, "linear": linear}


def between(
    seed_a: int, seed_b: int, at: ArrayLike, kind: str, latent_dim: int, distribution: str = "normal"
) -> NDArray[np.float32]:
    """Return the latents [n, latent_dim] at n positions between those of seed_a (at 0) and seed_b (at 1)."""
    start, end = latents((seed_a, seed_b), latent_dim, distribution)
    return WAYS[kind](start, end, at)


def _exact_ends(
    mixed: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64], way: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Remove rounding errors at the ends, whose images must equal those of the seeds."""
    ends: NDArray[np.float64] = np.where(way == 0, start, np.where(way == 1, end, mixed))
    return ends.astype(np.float32)
