"""Converts a generator to an ONNX graph: folds BatchNorm, traces, removes exporter notes, compares with PyTorch."""

import copy
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.model_file import MODEL_FILE_NAME, latents, load_session, run_session
from ganserve_trainer.networks.generator import UInt8Generator
from ganserve_trainer.networks.layers import UnflattenPixels
from ganserve_trainer.train.checkpoints import Checkpoint

_COMPARED_BATCH_SIZES = (1, 3, 64)
_OPSET = 18


def fold_batch_norm(layers: nn.Module) -> nn.Module:
    """Merge each BatchNorm of a stack into the dense or transposed convolutional layer before it, for evaluation.

    Also reorders dense features to channels first, the order of the ONNX operators, so that the graph needs no
    transpose.
    """
    folded: list[nn.Module] = []
    layers = copy.deepcopy(layers).eval()
    if not isinstance(layers, nn.Sequential):
        return layers  # a progressive generator has no BatchNorm
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


def to_onnx(checkpoint: Checkpoint) -> onnx.ModelProto:
    """Export the EMA generator in fp32, and compare its images with PyTorch's.

    Raises:
        TrainerError: the images differ.
    """
    generator = checkpoint.ema_generator()
    folded = copy.deepcopy(generator)
    folded.layers = fold_batch_norm(generator.layers)
    settings = checkpoint.settings
    classes = len(checkpoint.spec.class_names) if settings.conditional else 0
    model = trace(UInt8Generator(folded).eval(), settings.latent_dim, conditional=settings.conditional)
    session = load_session(model.SerializeToString())
    compare_with_pytorch(session, UInt8Generator(generator).eval(), settings.latent_dim, classes)
    return model


def to_onnx_in_fp16(checkpoint: Checkpoint) -> onnx.ModelProto:
    """Export the EMA generator with layers in fp16; choosing the cluster and rounding to grey levels stay in fp32."""
    folded = checkpoint.ema_generator()
    folded.layers = nn.Sequential(_To(torch.float16), fold_batch_norm(folded.layers).half(), _To(torch.float32))
    settings = checkpoint.settings
    return trace(UInt8Generator(folded).eval(), settings.latent_dim, conditional=settings.conditional)


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def trace(module: nn.Module, latent_dim: int, *, conditional: bool) -> onnx.ModelProto:
    """Export a module that returns uint8 images, for batches of any size."""
    batch = torch.export.Dim("N", min=1)
    arguments: dict[str, Tensor] = {"latent": torch.zeros(3, latent_dim)}
    if conditional:
        arguments["label"] = torch.zeros(3, dtype=torch.int64)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # The exporter warns about its internals, and prints its progress on standard output.
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
    """Remove the exporter's stack traces, which are half the size of a small graph and contain this machine's paths."""
    graph = model.graph
    del graph.metadata_props[:]
    parts: tuple[Any, ...] = (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in parts:
        del part.metadata_props[:]
        part.doc_string = ""


def compare_with_pytorch(
    session: onnxruntime.InferenceSession, module: nn.Module, latent_dim: int, classes: int
) -> None:
    """Compare an exported model's images with the module's, for several batch sizes.

    Raises:
        TrainerError: the shapes differ, or a pixel differs by more than one grey level.
    """
    for batch_size in _COMPARED_BATCH_SIZES:
        latent = latents(np.arange(batch_size), latent_dim)
        label = np.arange(batch_size) % classes if classes else None
        got = run_session(session, latent, label)
        arguments = {"latent": torch.from_numpy(latent)}
        if label is not None:  # as at the export: a module without classes takes no label
            arguments["label"] = torch.from_numpy(label)
        with torch.no_grad():
            wanted = module(**arguments).numpy()
        difference = int(np.abs(got.astype(np.int16) - wanted).max()) if got.shape == wanted.shape else None
        if difference is None or difference > 1:
            raise TrainerError(
                f"the exported model differs from PyTorch at batch size {batch_size}: shapes {got.shape} and "
                f"{wanted.shape}, largest difference {difference} grey levels (allowed: 1); nothing was published"
            )
