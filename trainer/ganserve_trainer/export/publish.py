"""Publishes models: a run's averaged generator, or any torch module, as the next version in a model repository."""

import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from torch import nn

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation.kept import read_metrics
from ganserve_trainer.export.card import card_of, golden_images, with_card
from ganserve_trainer.export.comparing import check_effect_of_latent, compare_with_pytorch, open_session
from ganserve_trainer.export.graph import to_onnx, trace
from ganserve_trainer.export.inputs import Input, Inputs, tensors
from ganserve_trainer.export.modules import check_output, prepare, run_module
from ganserve_trainer.files import sync_directory
from ganserve_trainer.model_file import MODEL_FILE_NAME
from ganserve_trainer.networks.architecture import parameter_count
from ganserve_trainer.settings import ExportPrecision
from ganserve_trainer.train.best import Choice, load_chosen

# The server finds only these names.
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_MOST_VERSIONS = 999_999_999
# An empty file for the highest number ever given, so that no number names two models, even if versions are removed. A
# name, not a content: creating a file is atomic on every file system, and a copy of the repository has it too.
_MARK = ".highest-version-"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def export(checkpoint_path: Path, repository: Path, name: str, choice: Choice = Choice.BEST) -> Path:
    """Publish a checkpoint's EMA generator, in fp32, as the next version of model `name`; return the file.

    Of a run's folder, `choice` says which checkpoint.

    Raises:
        TrainerError: the name is not allowed, the checkpoint is unreadable, or the exported model differs from
            PyTorch's.
    """
    check_name(name)
    checkpoint = load_chosen(checkpoint_path, choice)
    model = to_onnx(checkpoint)
    card = card_of(model, checkpoint, ExportPrecision.FP32)
    card.metrics.extend(read_metrics(checkpoint_path, checkpoint))
    return publish(with_card(model, card), repository, name)


def export_module(
    module: nn.Module,
    repository: Path,
    name: str,
    *,
    latent_dim: int | None = None,
    class_names: Sequence[str] = (),
    inputs: Mapping[str, Input] | None = None,
    architecture: str = "",
    dataset: str = "",
) -> Path:
    """Publish a generator of any kind as the next version of model `name`, in evaluation mode; return the file.

    Args:
        module: its forward takes `latent`, float32 [n, latent_dim], and, with class names, `label`, int64 [n], by these
            names or in this order; it returns uint8 [n, height, width, channels], of 1 (grey), 3
            (colour) or 4 (colour and alpha) channels, with height and width up to 4096.
        repository: the model repository.
        name: the name of the model.
        latent_dim: the number of values in a latent; None if `inputs` has the latent.
        class_names: the names of the labels 0, 1, …; if empty, the model takes no labels.
        inputs: all inputs by the names of forward's arguments, if there are others than `latent`, normal, [n,
            latent_dim], and `label`: see `ganserve_trainer.export.inputs`.
        architecture: the architecture, for the model card.
        dataset: the data set that the model was trained on, for the model card.

    Raises:
        TrainerError: the name is not allowed, the images are not as above, torch cannot export the module, those of
            the exported model differ, or the server would reject them. The text names the construct, the line of the
            module's code where it is known, and what to do.

    Warns:
        UserWarning: the images hardly differ.
    """
    check_name(name)
    if (latent_dim is None) == (inputs is None):
        raise TrainerError("give latent_dim, or all inputs, of which one is the latent")
    classes = len(class_names)
    known = Inputs.plain(latent_dim or 0, classes) if inputs is None else Inputs(inputs, classes)
    prepared = prepare(module, known)
    height, width, channels = check_output(run_module(prepared, tensors(known.values(np.arange(2)))), 2)
    model = trace(prepared, known)
    session = open_session(model)
    compare_with_pytorch(session, prepared, known)
    check_effect_of_latent(session, known)
    return publish_with_card(
        model,
        session,
        repository,
        name,
        inputs=known,
        shape=(height, width, channels),
        class_names=class_names,
        architecture=architecture,
        dataset=dataset,
        parameters=parameter_count(module),
    )


def publish_with_card(
    model: onnx.ModelProto,
    session: onnxruntime.InferenceSession,
    repository: Path,
    name: str,
    *,
    inputs: Inputs,
    shape: Sequence[int],
    class_names: Sequence[str],
    architecture: str,
    dataset: str,
    parameters: int,
) -> Path:
    """Publish a graph without a card, which was not trained here, as the model's next version; return the file.

    Args:
        model: the graph.
        session: the graph, open.
        repository: the model repository.
        name: the name of the model.
        inputs: the inputs of the graph.
        shape: height, width and channels of an image.
        class_names: the names of the labels 0, 1, …; if empty, the model takes no labels.
        architecture: the architecture, for the card.
        dataset: the data set that it was trained on, for the card.
        parameters: the number of its parameters, for the card.
    """
    height, width, channels = shape
    card = pb.ModelCard(
        architecture=architecture,
        dataset=dataset,
        latent_dim=inputs.latent_dim,
        height=height,
        width=width,
        channels=channels,
        class_names=class_names,
        generator_parameters=parameters,
        golden_images=golden_images(session, inputs),
        inputs=inputs.of_card(),
        trainer_version=importlib.metadata.version("ganserve"),
    )
    card.created_at.GetCurrentTime()
    return publish(with_card(model, card), repository, name)


def check_name(name: str) -> None:
    """Reject a model name that no server would find.

    Raises:
        TrainerError: the name is not allowed.
    """
    if not _NAME.fullmatch(name) or name.endswith(".tmp"):
        raise TrainerError(
            f"{name!r} is not a model name: it must be 1 to 64 lower-case letters, digits, '-', '_' and '.', begin "
            "with a letter or digit, and not end in .tmp"
        )


def publish(model: bytes, repository: Path, name: str) -> Path:
    """Write the file as the model's next version, atomically: a version never has a partly written file.

    The number is higher than that of any version that is or was in the model's folder.
    """
    folder = repository / name
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".publishing-", dir=folder))
    try:
        beside.chmod(0o755)
        with (beside / MODEL_FILE_NAME).open("wb") as file:
            file.write(model)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(beside)
        while True:
            version = _take_number(folder)
            try:
                beside.rename(folder / str(version))
            except OSError:
                # If the version exists now, somebody has just put it there; otherwise the failure is real.
                if not (folder / str(version)).exists():
                    raise
            else:
                sync_directory(folder)
                return folder / str(version) / MODEL_FILE_NAME
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _take_number(folder: Path) -> int:
    """Return a version number that no version in a model's folder has or had, and that no other export gets."""
    while True:
        version = 1 + max(_numbers(folder), default=0)
        if version > _MOST_VERSIONS:
            raise TrainerError(f"{folder} has version {version - 1}, the highest possible one; choose another name")
        mark = folder / f"{_MARK}{version}"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:  # another export has just taken it
            continue
        if max(_numbers(folder)) == version:
            break
        mark.unlink(missing_ok=True)  # another export has taken a higher number meanwhile, perhaps after this one
    for path in folder.glob(f"{_MARK}*"):
        if (number := path.name.removeprefix(_MARK)).isdecimal() and int(number) < version:
            path.unlink(missing_ok=True)
    return version


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of the versions in a model's folder, and of its marks."""
    names = (name.removeprefix(_MARK) for name in os.listdir(folder))
    return [int(name) for name in names if _VERSION.fullmatch(name)]
