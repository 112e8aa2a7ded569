"""Opens a file of any kind as a `Source`."""

import dataclasses
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ganserve_trainer.errors import TrainerError, one_line
from ganserve_trainer.importing.checkpoint import load_file
from ganserve_trainer.importing.onnx_file import read_onnx
from ganserve_trainer.importing.project import build_module
from ganserve_trainer.importing.source import Source, Wishes
from ganserve_trainer.importing.torch_module import source_of_module, source_of_program
from ganserve_trainer.weights_file import load_weights, pickled_module

# Keras exports only a model that has run.
_KERAS = """
import sys, keras, numpy
model = keras.models.load_model(sys.argv[1], compile=False)
model([numpy.zeros([1 if size is None else size for size in each.shape], each.dtype) for each in model.inputs]
      if len(model.inputs) > 1 else numpy.zeros([1, *model.inputs[0].shape[1:]], model.inputs[0].dtype))
model.export(sys.argv[2], format="onnx", verbose=False)
"""


def read(
    path: Path,
    wishes: Wishes,
    *,
    module: str | None,
    arguments: Mapping[str, Any],
    trusted: bool,
    script_arguments: str = "",
) -> Source:
    """Open an ONNX file, or a checkpoint, a TorchScript module or an exported program of torch.

    Args:
        path: the file.
        wishes: what the user set.
        module: `module:Class` of a checkpoint's network.
        arguments: keyword arguments of the class.
        trusted: whether code in the file may run.
        script_arguments: of the command line of a script that has the class.

    Raises:
        TrainerError: the file is of no such kind, or is damaged.
    """
    if not path.exists():
        raise TrainerError(f"there is no file {path}")
    if (convert := _convert(path)) is not None:
        return _read_converted(path, *convert, wishes)
    if path.suffix == ".onnx":
        return read_onnx(path, wishes)
    inside = _names_inside(path)
    if any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in inside):
        return source_of_program(path, wishes)
    if any(name.endswith("/constants.pkl") for name in inside):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit is deprecated
                script = torch.jit.load(path, map_location="cpu")
        except Exception as error:  # torch raises RuntimeError for anything
            raise TrainerError(f"torch cannot read {path}: {one_line(error)}") from error
        return source_of_module(script, wishes, arguments)
    content = load_file(path, trusted=trusted, weights_only=module is not None)
    if module is None:
        generator, note = pickled_module(content, path)
    else:
        generator = build_module(module, arguments, script_arguments)
        note = load_weights(generator, content)
    source = source_of_module(generator, wishes, arguments)
    return dataclasses.replace(source, notes=(note, *source.notes))


def _names_inside(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _convert(path: Path) -> tuple[list[str], str] | None:
    """Return the command that writes ONNX to its last argument, and the packages that it needs; None if there is none.

    Raises:
        TrainerError: the path is a folder of another kind.
    """
    if path.is_dir() and (path / "saved_model.pb").exists():
        return ["-m", "tf2onnx.convert", "--saved-model", str(path), "--output"], "tensorflow tf2onnx"
    if path.suffix == ".tflite":
        return ["-m", "tf2onnx.convert", "--tflite", str(path), "--output"], "tensorflow tf2onnx"
    if path.suffix in (".keras", ".h5", ".hdf5"):
        return ["-c", _KERAS, str(path)], "keras"
    if path.is_dir():
        raise TrainerError(f"{path} is a folder; name the file of the generator in it")
    return None


def _read_converted(path: Path, command: list[str], packages: str, wishes: Wishes) -> Source:
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "generator.onnx"
        environment = {"KERAS_BACKEND": "torch", **os.environ}  # Keras computes with the torch that is there
        done = subprocess.run(
            [sys.executable, *command, str(made)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and made.exists():
            source = read_onnx(made, wishes)
            return dataclasses.replace(source, notes=(f"{path}, converted to ONNX", *source.notes))
    lines = done.stderr.strip().splitlines() or ["it wrote no file"]
    if "No module named" in lines[-1]:
        remedy = f"install what converts it, and run the command again: pip install {packages}"
    else:
        remedy = (
            f"convert it with the program that made it, and import the ONNX file: python {shlex.join(command)} FILE"
        )
    raise TrainerError(f"{path} is a model of TensorFlow or Keras that cannot be converted: {lines[-1]}; {remedy}")
