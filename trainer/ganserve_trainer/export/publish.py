"""From a checkpoint to a published model: fold, export, check, compare with PyTorch, describe, publish.

Inputs of the file: `latent` float32 [N, latent_dim] and, for a conditional model, `label` int64 [N]. Its output:
`image` uint8 [N, height, width, channels]; the model card as JSON in its metadata.
"""

import copy
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf import json_format
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.networks.generator import Generator, parameter_count
from ganserve_trainer.networks.layers import UnflattenPixels
from ganserve_trainer.settings import ExportPrecision
from ganserve_trainer.train.checkpoints import Checkpoint, load_checkpoint, run_folder, sync_directory

CARD_KEY = "ganserve.model_card"
MODEL_FILE_NAME = "model.onnx"
EVALUATION_FILE_NAME = "evaluation.json"

_COMPARED_BATCH_SIZES = (1, 3, 64)
_GOLDEN_SEEDS = range(10)
_OPSET = 18
# The server looks for these names and no others.
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class UInt8Generator(nn.Module):
    """A generator whose images are uint8 [n, height, width, channels], as they are served."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Map tanh's -1…1 to 0…255, rounded half to even."""
        image = self.generator(latent, label)
        grey = torch.round((image + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return grey.permute(0, 2, 3, 1).contiguous()


def fold_batch_norm(layers: nn.Module) -> nn.Module:
    """Merge every BatchNorm of a stack into the dense or transposed convolutional layer before it, for evaluation.

    Dense features are brought into the order of the ONNX operators, channels first, so that nothing is transposed.
    """
    folded: list[nn.Module] = []
    layers = copy.deepcopy(layers).eval()
    if not isinstance(layers, nn.Sequential):
        return layers  # a progressive generator, which has no BatchNorm
    for layer in layers:
        before = folded[-1] if folded else None
        if isinstance(layer, nn.BatchNorm1d) and isinstance(before, nn.Linear):
            folded[-1] = fuse_linear_bn_eval(before, layer)
        elif isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.ConvTranspose2d):
            folded[-1] = fuse_conv_bn_eval(before, layer, transpose=True)
        elif isinstance(layer, UnflattenPixels):
            dense = next(module for module in reversed(folded) if isinstance(module, nn.Linear))
            for parameter in dense.parameters():
                parameter.data = layer.channels_first(parameter.data)
            folded.append(nn.Unflatten(1, layer.shape))
        else:
            folded.append(layer)
    return nn.Sequential(*folded)


def latents(seeds: NDArray[np.int64], latent_dim: int) -> NDArray[np.float32]:
    """Draw the latents of these seeds, [n, latent_dim], by the contract of generation.proto."""
    rows = [np.random.RandomState(seed).standard_normal(latent_dim) for seed in seeds]
    return np.stack(rows).astype(np.float32)


def load_session(model: bytes | str) -> onnxruntime.InferenceSession:
    """Open a model on the CPU."""
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def run_session(
    session: onnxruntime.InferenceSession, latent: NDArray[np.float32], label: NDArray[np.int64] | None
) -> NDArray[np.uint8]:
    """Make images, [n, height, width, channels]; `label` is None for an unconditional model."""
    feeds = {"latent": latent} if label is None else {"latent": latent, "label": label}
    (image,) = session.run(["image"], feeds)
    pixels: NDArray[np.uint8] = image
    return pixels


def export(checkpoint_path: Path, repository: Path, name: str) -> Path:
    """Publish a checkpoint's EMA generator, in fp32, as the next version of model `name`; return the file.

    Raises:
        TrainerError: the name is not allowed, the checkpoint unreadable, or the exported model differs from PyTorch's.
    """
    check_name(name)
    checkpoint = load_checkpoint(checkpoint_path)
    model = to_onnx(checkpoint)
    card = card_of(model, checkpoint, ExportPrecision.FP32)
    card.metrics.extend(_read_evaluation(checkpoint_path, checkpoint))
    return publish(with_card(model, card), repository, name)


def export_module(
    module: nn.Module,
    repository: Path,
    name: str,
    *,
    latent_dim: int,
    class_names: Sequence[str] = (),
    architecture: str = "",
    dataset: str = "",
) -> Path:
    """Publish a generator of any kind as the next version of model `name`, in evaluation mode; return the file.

    Args:
        module: its forward takes `latent`, float32 [n, latent_dim], and, with class names, `label`, int64 [n]; it
            returns uint8 [n, height, width, channels], of 1 or 3 channels.
        repository: where to publish.
        name: the model's.
        latent_dim: the length of a latent.
        class_names: what the labels 0, 1, … mean; without any the model takes none.
        architecture: for its card.
        dataset: for its card: what it was trained on.

    Raises:
        TrainerError: the name is not allowed, the images are not as above, or the exported model's differ from them.
    """
    check_name(name)
    module = copy.deepcopy(module).cpu().eval()
    classes = len(class_names)
    labels = {"label": torch.zeros(2, dtype=torch.int64)} if classes else {}
    with torch.no_grad():
        images = module(latent=torch.zeros(2, latent_dim), **labels)
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != 2 or images.shape[3] not in (1, 3):
        raise TrainerError(
            f"of 2 latents the module made {images.dtype} {list(images.shape)}; "
            "it must make torch.uint8 [2, height, width, 1 or 3]: see examples/bring_a_generator.py"
        )
    model = _trace(module, latent_dim, conditional=classes > 0)
    session = load_session(model.SerializeToString())
    _compare_with_pytorch(session, module, latent_dim, classes)
    _, height, width, channels = images.shape
    card = pb.ModelCard(
        architecture=architecture,
        dataset=dataset,
        latent_dim=latent_dim,
        height=height,
        width=width,
        channels=channels,
        class_names=class_names,
        generator_parameters=parameter_count(module),
        golden_images=_golden_images(session, latent_dim, classes),
        trainer_version=importlib.metadata.version("ganserve"),
    )
    card.created_at.GetCurrentTime()
    return publish(with_card(model, card), repository, name)


def check_name(name: str) -> None:
    """Refuse a model name that no server would find."""
    if not _NAME.fullmatch(name) or name.endswith(".tmp"):
        raise TrainerError(
            f"{name!r} is no model name: 1 to 64 lower-case letters, digits, '-', '_' and '.', "
            "a letter or digit first, and not .tmp at its end"
        )


def to_onnx(checkpoint: Checkpoint) -> onnx.ModelProto:
    """Export the EMA generator in fp32, compared with PyTorch's images."""
    generator = checkpoint.ema_generator()
    folded = copy.deepcopy(generator)
    folded.layers = fold_batch_norm(generator.layers)
    settings = checkpoint.settings
    classes = len(checkpoint.spec.class_names) if settings.conditional else 0
    model = _trace(UInt8Generator(folded).eval(), settings.latent_dim, conditional=settings.conditional)
    session = load_session(model.SerializeToString())
    _compare_with_pytorch(session, UInt8Generator(generator).eval(), settings.latent_dim, classes)
    return model


def to_onnx_in_fp16(checkpoint: Checkpoint) -> onnx.ModelProto:
    """Export the EMA generator with layers in fp16; what decides the cluster and what makes grey levels stays fp32."""
    folded = checkpoint.ema_generator()
    folded.layers = nn.Sequential(_To(torch.float16), fold_batch_norm(folded.layers).half(), _To(torch.float32))
    settings = checkpoint.settings
    return _trace(UInt8Generator(folded).eval(), settings.latent_dim, conditional=settings.conditional)


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def with_card(model: onnx.ModelProto, card: pb.ModelCard) -> bytes:
    """Return the file's content: the checked model, with the card in its metadata."""
    entry = model.metadata_props.add()
    entry.key = CARD_KEY
    entry.value = json_format.MessageToJson(card)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _trace(module: nn.Module, latent_dim: int, *, conditional: bool) -> onnx.ModelProto:
    batch = torch.export.Dim("N", min=1)
    arguments: dict[str, Tensor] = {"latent": torch.zeros(3, latent_dim)}
    if conditional:
        arguments["label"] = torch.zeros(3, dtype=torch.int64)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # The exporter warns of its own internals, and says what it is doing on standard output.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        path = Path(scratch) / MODEL_FILE_NAME
        torch.onnx.export(
            module,
            kwargs=arguments,
            f=str(path),
            dynamo=True,
            opset_version=_OPSET,
            input_names=list(arguments),
            output_names=["image"],
            dynamic_shapes={key: {0: batch} for key in arguments},
            external_data=False,
            verbose=False,
        )
        model = onnx.load(path)
    _strip_exporter_notes(model)
    return model


def _strip_exporter_notes(model: onnx.ModelProto) -> None:
    """Leave out the exporter's stack traces: they are half the size of a small graph, and paths of this machine."""
    graph = model.graph
    del graph.metadata_props[:]
    parts: tuple[Any, ...] = (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in parts:
        del part.metadata_props[:]
        part.doc_string = ""


def _compare_with_pytorch(
    session: onnxruntime.InferenceSession, module: nn.Module, latent_dim: int, classes: int
) -> None:
    for batch_size in _COMPARED_BATCH_SIZES:
        latent = latents(np.arange(batch_size), latent_dim)
        label = np.arange(batch_size) % classes if classes else None
        got = run_session(session, latent, label)
        with torch.no_grad():
            wanted = module(torch.from_numpy(latent), None if label is None else torch.from_numpy(label)).numpy()
        difference = int(np.abs(got.astype(np.int16) - wanted).max()) if got.shape == wanted.shape else None
        if difference is None or difference > 1:
            raise TrainerError(
                f"the exported model differs from PyTorch at batch size {batch_size}: shapes {got.shape} and "
                f"{wanted.shape}, largest difference {difference} grey levels (allowed: 1); nothing was published"
            )


def card_of(model: onnx.ModelProto, checkpoint: Checkpoint, precision: ExportPrecision) -> pb.ModelCard:
    """Describe an exported model, golden images and all, but for how good it is."""
    session = load_session(model.SerializeToString())
    settings, spec = checkpoint.settings, checkpoint.spec
    configuration = {key: str(value) for key, value in dataclasses.asdict(settings).items()}
    configuration["dataset_digest"] = checkpoint.dataset_digest
    card = pb.ModelCard(
        architecture=settings.preset,
        dataset=settings.dataset,
        latent_dim=settings.latent_dim,
        height=spec.height,
        width=spec.width,
        channels=spec.channels,
        class_names=spec.class_names if settings.conditional else (),
        generator_parameters=parameter_count(checkpoint.ema_generator()),
        training=pb.Training(images_seen=checkpoint.images_seen, device=checkpoint.device, configuration=configuration),
        golden_images=_golden_images(
            session, settings.latent_dim, len(spec.class_names) if settings.conditional else 0
        ),
        trainer_version=importlib.metadata.version("ganserve"),
        precision=precision,
    )
    card.training.duration.FromMilliseconds(round(checkpoint.elapsed_s * 1000))
    card.created_at.GetCurrentTime()
    return card


def _golden_images(session: onnxruntime.InferenceSession, latent_dim: int, classes: int) -> list[pb.GoldenImage]:
    golden = []
    for seed in _GOLDEN_SEEDS:
        label = np.array([seed % classes]) if classes else None
        pixels = run_session(session, latents(np.array([seed]), latent_dim), label)[0]
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, format="PNG", optimize=True)
        digest = f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"
        golden.append(
            pb.GoldenImage(seed=seed, label=None if label is None else label[0], digest=digest, png=file.getvalue())
        )
    return golden


def _read_evaluation(checkpoint_path: Path, checkpoint: Checkpoint) -> list[pb.QualityMetric]:
    """Find what `evaluate` measured on this very checkpoint; nothing if it was not called."""
    path = run_folder(checkpoint_path) / EVALUATION_FILE_NAME
    try:
        evaluation = json.loads(path.read_text())
        metrics = [json_format.ParseDict(metric, pb.QualityMetric()) for metric in evaluation["metrics"]]
        measured = evaluation["checkpoint"]
    except FileNotFoundError:
        print(
            f"the card is written without quality figures: ganserve-trainer evaluate {checkpoint_path} measures them",
            file=sys.stderr,
        )
        return []
    except (ValueError, KeyError, TypeError, json_format.ParseError) as error:
        raise TrainerError(f"{path} cannot be read; delete it, or evaluate again") from error
    if measured != checkpoint.digest():
        print(f"{path} is of another checkpoint: the card is written without it; evaluate again", file=sys.stderr)
        return []
    return metrics


def publish(model: bytes, repository: Path, name: str) -> Path:
    """Write the file as the model's next version, atomically: a half-written file is never a version."""
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
            taken = (int(path.name) for path in folder.iterdir() if _VERSION.fullmatch(path.name))
            version = 1 + max(taken, default=0)
            if not _VERSION.fullmatch(str(version)):
                raise TrainerError(
                    f"{folder} has version {version - 1}, the last that there can be; choose another name"
                )
            try:
                beside.rename(folder / str(version))
            except OSError:
                # Another export has just taken this number; anything else is a real failure.
                if not (folder / str(version)).exists():
                    raise
            else:
                sync_directory(folder)
                return folder / str(version) / MODEL_FILE_NAME
    finally:
        shutil.rmtree(beside, ignore_errors=True)
