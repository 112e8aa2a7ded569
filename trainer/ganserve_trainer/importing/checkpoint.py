"""Reads files of torch, pickle and safetensors whose code the user may trust."""

import pickle
from pathlib import Path
from typing import Any

import torch

from ganserve_trainer.errors import TrainerError, one_line
from ganserve_trainer.importing.project import in_project
from ganserve_trainer.weights_file import load_tensors


def load_file(path: Path, *, trusted: bool, weights_only: bool) -> Any:
    """Return what torch.save, pickle or safetensors wrote, on the CPU.

    Args:
        path: the file.
        trusted: whether code in the file may run.
        weights_only: whether only tensors matter, so that other objects may be left out.

    Raises:
        TrainerError: the file has other objects than tensors and is not trusted, or it is no such file.
    """
    try:
        return load_tensors(path, leave_out=weights_only)
    except TrainerError as error:
        if path.suffix == ".safetensors":
            raise
        if not trusted:
            raise TrainerError(f"{error}: if you trust it, add --trust") from error
    failures = []
    with in_project(Path.cwd()):
        for load in (_load_all, _unpickle):  # pickle wrote StyleGAN's files
            try:
                return load(path)
            except Exception as error:
                failures.append(error)
    # If a module is missing, the other reader only reports that the file is not its own.
    failure = next((error for error in failures if isinstance(error, ImportError)), failures[-1])
    remedy = "run the command in the folder of the project that wrote it, so that Python finds its modules"
    if isinstance(failure, ImportError):
        remedy += ", and install the packages that it imports"
    raise TrainerError(f"{path} cannot be loaded: {one_line(failure)}; {remedy}") from failure


def _load_all(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def _unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)
