"""Opens a file of any kind as a `Source`."""

import dataclasses
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.importing.checkpoint import build_module, load_file, load_weights, pickled_module
from ganserve_trainer.importing.onnx_file import read_onnx
from ganserve_trainer.importing.source import Source, Wishes, one_line
from ganserve_trainer.importing.torch_module import source_of_module, source_of_program


def read(path: Path, wishes: Wishes, *, module: str | None, arguments: Mapping[str, Any], trusted: bool) -> Source:
    """Open an ONNX file, or a checkpoint, a TorchScript module or an exported program of torch.

    Args:
        path: the file.
        wishes: what the user set.
        module: `module:Class` of a checkpoint's network.
        arguments: keyword arguments of the class.
        trusted: whether code in the file may run.

    Raises:
        TrainerError: the file is of no such kind, or is damaged.
    """
    if not path.exists():
        raise TrainerError(f"there is no file {path}")
    _refuse_tensorflow(path)
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
    content = load_file(path, trusted=trusted)
    if module is None:
        generator, note = pickled_module(content, path)
    else:
        generator = build_module(module, arguments)
        note = load_weights(generator, content)
    source = source_of_module(generator, wishes, arguments)
    return dataclasses.replace(source, notes=(note, *source.notes))


def _names_inside(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _refuse_tensorflow(path: Path) -> None:
    convert = None
    if path.is_dir() and (path / "saved_model.pb").exists():
        convert = f"python -m tf2onnx.convert --saved-model {path} --output generator.onnx"
    elif path.suffix == ".tflite":
        convert = f"python -m tf2onnx.convert --tflite {path} --output generator.onnx"
    elif path.suffix in (".keras", ".h5", ".hdf5"):
        convert = (
            f'python -c \'import keras; keras.models.load_model("{path}").export("generator.onnx", format="onnx")\''
        )
    if convert:
        raise TrainerError(f"{path} is a model of TensorFlow or Keras; convert it to ONNX, and import that: {convert}")
    if path.is_dir():
        raise TrainerError(f"{path} is a folder; name the file of the generator in it")
