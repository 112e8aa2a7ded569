"""What the steps of an import hand to each other: the generator as it was found, and what the user set."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.wrap import ValueRange

Arrays = dict[str, NDArray[Any]]  # by the name of an input or an output: [n, ...]
Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user set; the rest is guessed."""

    latent_dim: int | None = None
    roles: Mapping[str, str] = field(default_factory=dict)  # by the name of an input: see `looking.ROLES`
    call: str | None = None  # of a module: see `calling`
    output: str | None = None
    values: ValueRange | None = None
    layout: Layout | None = None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """A generator as it was found."""

    model: onnx.ModelProto
    run: Callable[[Arrays], Arrays]  # the original: of the graph's inputs, the graph's outputs
    wishes: Wishes  # for this graph
    parameters: int
    notes: tuple[str, ...]  # how it was read, for the user
    architecture: str = ""


def numpy_type(onnx_type: int) -> np.dtype[Any]:
    """Return NumPy's type for a type of ONNX."""
    return onnx.helper.tensor_dtype_to_np_dtype(onnx_type)


def parse_classes(text: str | None, file: Path | None) -> tuple[str, ...]:
    """Return the names of the classes that the user gave as names or as a number, or in a file; empty for none.

    Raises:
        TrainerError: both are given, the file is no text, or a name is missing or there twice.
    """
    if text is not None and file is not None:
        raise TrainerError("--classes and --class-names are both set; use one of them")
    if text is None and file is None:
        return ()
    if text is not None and text.isdecimal():
        return tuple(map(str, range(int(text))))
    try:
        given = file.read_text("utf-8").splitlines() if file is not None else (text or "").split(",")
    except UnicodeDecodeError as error:
        raise TrainerError(f"{file} is not a text file in UTF-8, with the name of a class on each line") from error
    names = tuple(name.strip() for name in given)
    if not all(names) or len(set(names)) != len(names):
        raise TrainerError(f"of {len(names)} classes, one has no name or the name of another: {', '.join(names)[:200]}")
    return names


def parse_roles(texts: Sequence[str]) -> dict[str, str]:
    """Return what --input says of the inputs, by their names.

    Raises:
        TrainerError: one of them is not NAME=ROLE, or two are of the same input.
    """
    roles: dict[str, str] = {}
    for text in texts:
        name, equals, role = text.rpartition("=")
        if not equals or not name or name in roles:
            raise TrainerError(f"--input is {text!r}; it must be NAME=ROLE, such as y=label, once for each input")
        roles[name] = role
    return roles


def parse_arguments(text: str) -> dict[str, Any]:
    """Return the JSON object of --arguments.

    Raises:
        TrainerError: it is none.
    """
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise TrainerError(f"--arguments is not JSON: {error}; write it as '{{\"nz\": 100}}'") from error
    if not isinstance(arguments, dict):
        raise TrainerError(f"--arguments is {text}; it must be a JSON object, such as '{{\"nz\": 100}}'")
    return arguments
