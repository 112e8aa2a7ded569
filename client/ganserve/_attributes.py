"""The attributes of several images: for each name, a number for all images or a tuple with one for each."""

from collections.abc import Mapping, Sequence

Values = Mapping[str, float | tuple[float, ...]]


def of_image(values: Values, index: int) -> dict[str, float]:
    """Return the attributes of one image. The values may be a caller's own, in a list."""
    return {name: each[index] if isinstance(each, Sequence) else each for name, each in values.items()}


def part(values: Values | None, index: slice) -> Values | None:
    """Return the attributes of some of the images."""
    if values is None:
        return None
    return {name: each[index] if isinstance(each, tuple) else each for name, each in values.items()}


def joined(parts: Sequence[tuple[Values | None, int]]) -> Values | None:
    """Return the attributes of several parts together, each given with its number of images."""
    first, _ = parts[0]
    if first is None:
        return None
    return {name: _joined([((values or {})[name], count) for values, count in parts]) for name in first}


def _joined(parts: Sequence[tuple[float | tuple[float, ...], int]]) -> float | tuple[float, ...]:
    first, _ = parts[0]
    if not isinstance(first, tuple) and all(value == first for value, _ in parts):
        return first
    return tuple(one for value, count in parts for one in (value if isinstance(value, tuple) else (value,) * count))
