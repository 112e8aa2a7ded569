"""The latents of seeds, as the server draws them, and the ways between them."""

import operator
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ganserve.errors import InvalidRequestError

_PARALLEL = 1e-6  # radians: nearer than this, or to opposite, there is no one great circle
_UINT32_LIMIT = 1 << 32


def latents(seeds: Iterable[int], latent_dim: int) -> NDArray[np.float32]:
    """Return the latents of seeds before truncation, float32 [n, latent_dim]: the same in every process, for good.

    NumPy froze RandomState's stream (NEP 19).

    >>> latents([1, 2], 64).shape
    (2, 64)

    Raises:
        InvalidRequestError: a seed is not from 0 to 2^32-1, or latent_dim is below 1.
    """
    uint32("latent_dim", latent_dim, least=1)
    rows = [np.random.RandomState(uint32("seed", seed)).standard_normal(latent_dim) for seed in seeds]
    return np.array(rows, np.float32).reshape(len(rows), latent_dim)


def uint32(field: str, value: object, least: int = 0) -> int:
    """Return a number that the wire can hold.

    Raises:
        InvalidRequestError: it is none; the error's `field` says which.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if least <= number < _UINT32_LIMIT:
        return number
    error = InvalidRequestError(f"{field} is {value!r}; it must be an integer from {least} to {_UINT32_LIMIT - 1}")
    error.field = field
    raise error


def slerp(a: ArrayLike, b: ArrayLike, t: ArrayLike) -> NDArray[np.float32]:
    """Go from latent a to latent b on the great circle between them.

    Returns float32 [latent_dim], or [n, latent_dim] for n of t.

    Points of a straight line are too near the origin for a generator, which learned on normal latents, whose lengths
    hardly vary (White, "Sampling Generative Networks", 2016). t = 0 gives a, and t = 1 gives b, to the bit.

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
    """Go from latent a to latent b on a straight line, as `slerp` does on a great circle.

    >>> linear([1.0, 0.0], [0.0, 1.0], [0.0, 0.25]).tolist()
    [[1.0, 0.0], [0.75, 0.25]]
    """
    start, end = np.asarray(a, np.float64), np.asarray(b, np.float64)
    way = np.asarray(t, np.float64)[..., None]
    return _exact_ends((1 - way) * start + way * end, start, end, way)


WAYS: dict[str, Callable[[ArrayLike, ArrayLike, ArrayLike], NDArray[np.float32]]] = {"slerp": slerp, "linear": linear}


def between(seed_a: int, seed_b: int, at: ArrayLike, kind: str, latent_dim: int) -> NDArray[np.float32]:
    """Return the latents [n, latent_dim] at n places of the way from one seed's, at 0, to the other's, at 1."""
    start, end = latents((seed_a, seed_b), latent_dim)
    return WAYS[kind](start, end, at)


def _exact_ends(
    mixed: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64], way: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Undo rounding at the ends: their images must be those of the seeds."""
    ends: NDArray[np.float64] = np.where(way == 0, start, np.where(way == 1, end, mixed))
    return ends.astype(np.float32)
