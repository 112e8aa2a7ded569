"""Checks of arguments: each error names the argument, its value, and what it must be."""

import operator
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ganserve.errors import InvalidRequestError

Label = SupportsIndex | str
Labels = Label | Sequence[Label] | NDArray[Any]  # one for all images, or one for each
Attributes = Mapping[str, SupportsFloat | Sequence[SupportsFloat] | NDArray[Any]]  # one for all images, or one for each

UINT32_LIMIT = 1 << 32
MOST_PIXELS = 178_956_970  # of a picture: programs that use Pillow refuse larger ones
_A_LABEL = "it must be an index, 0 or more, or a name of a class"


def invalid(field: str, text: str) -> InvalidRequestError:
    """Return an error about the argument `field`."""
    error = InvalidRequestError(text)
    error.field = field
    return error


def integer(field: str, value: object, least: int, most: int) -> int:
    """Return an integer from `least` to `most`.

    Raises:
        InvalidRequestError: the value is not one; the error's `field` names it.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if least <= number <= most:
        return number
    raise invalid(field, f"{field} is {reprlib.repr(value)}; it must be an integer from {least} to {most}")


def uint32(field: str, value: object, least: int = 0) -> int:
    """Return an integer that a uint32 field of a message can hold.

    Raises:
        InvalidRequestError: the value is not one; the error's `field` names it.
    """
    return integer(field, value, least, UINT32_LIMIT - 1)


def check_picture_size(width: int, height: int) -> None:
    """Reject a picture that programs that use Pillow refuse to read.

    Raises:
        InvalidRequestError: it has too many pixels.
    """
    if width * height > MOST_PIXELS:
        raise invalid(
            "scale",
            f"the picture would be {width}x{height} pixels; it may have at most {MOST_PIXELS} in total: reduce scale, "
            "or the number of images",
        )


def model_name(model: Any) -> str:
    """Return the name of a model.

    Raises:
        InvalidRequestError: a message cannot hold it.
    """
    try:
        model.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise invalid("model", f"model is {model!a}; it must be a name, as models() lists them") from error
    return str(model)


def seed_iterator(seeds: Iterable[SupportsIndex]) -> Iterator[SupportsIndex]:
    """Return an iterator over seeds.

    Raises:
        InvalidRequestError: they are not iterable, or their items are not seeds.
    """
    try:
        if isinstance(seeds, str | bytes | bytearray | Mapping):
            raise TypeError
        return iter(seeds)
    except TypeError as error:
        text = f"seeds is {reprlib.repr(seeds)}; it must be an iterable of integers"
        raise invalid("seeds", text) from error


def latent_rows(latents: ArrayLike) -> NDArray[np.float32]:
    """Return one latent or several as [count, latent_dim].

    Raises:
        InvalidRequestError: they are not an array of numbers of one or two dimensions.
    """
    try:
        if np.asarray(latents).dtype.kind not in "fiu":
            raise TypeError
        with np.errstate(over="ignore"):  # the server refuses infinities
            rows = np.asarray(latents, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: of torch's tensors with gradients
        raise invalid(
            "latents", "latents is not an array of numbers; it must be an array [count, latent_dim]"
        ) from error
    if rows.ndim not in (1, 2) or not rows.size:
        raise invalid("latents", f"latents is {list(rows.shape)}; it must be [count, latent_dim]")
    return np.atleast_2d(rows)


def attribute_values(name: str, values: Any) -> list[float]:
    """Return the values of one attribute: one for all images, or one for each.

    Raises:
        InvalidRequestError: they are not numbers.
    """
    try:
        numbers = np.atleast_1d(np.asarray(values))
        if numbers.dtype.kind not in "bfiu" or numbers.ndim > 1 or not numbers.size:
            raise TypeError
        with np.errstate(over="ignore"):
            return numbers.astype(np.float32).tolist()  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError) as error:
        text = f"attributes[{name!r}] is {reprlib.repr(values)}; it must be a number, or a list with one for each image"
        raise invalid("attributes", text) from error


def items_of(field: str, values: Any) -> list[tuple[str, Any]]:
    """Return the items of a mapping from names.

    Raises:
        InvalidRequestError: it is not a mapping, or a message cannot hold one of its names.
    """
    try:
        items = [] if values is None else list(values.items())
        for name, _ in items:
            name.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise invalid(field, f"{field} is {reprlib.repr(values)}; it must be a mapping from names") from error
    return items


def label_value(label: Any) -> int | str:
    """Return one label.

    Raises:
        InvalidRequestError: it is neither an index nor a name.
    """
    try:
        if isinstance(label, str):
            label.encode()
            return str(label)  # of NumPy's strings, too
        return uint32("label", label)
    except (UnicodeEncodeError, InvalidRequestError) as error:  # half of a surrogate pair is no text
        text = ascii(label) if isinstance(label, str) else reprlib.repr(label)
        raise invalid("label", f"label is {text}; {_A_LABEL}") from error


def label_list(label: Any) -> list[Any]:
    """Return a list of labels, or one label as a list.

    Raises:
        InvalidRequestError: `label` is a container that cannot hold labels in order.
    """
    check_label_container(label)
    alone = isinstance(label, str) or not hasattr(label, "__len__")
    return [label] if alone or getattr(label, "ndim", 1) == 0 else list(label)


def check_label_container(label: Any) -> None:
    """Reject an iterable that does not give one label after the other.

    Raises:
        InvalidRequestError: `label` is such an iterable, for example bytes, a set or a mapping.
    """
    if isinstance(label, bytes | bytearray | memoryview | Set | Mapping) or getattr(label, "ndim", 1) > 1:
        raise invalid("label", f"label is {reprlib.repr(label)}; {_A_LABEL}, or a list with one for each image")
