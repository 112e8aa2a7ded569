"""Converts a generator to an ONNX graph: folds BatchNorm, traces, removes the exporter's notes."""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export.comparing import compare_with_pytorch, open_session
from ganserve_trainer.export.diagnosis import all_nodes, random_numbers, summary, why_not_exported
from ganserve_trainer.export.inputs import Inputs, tensors
from ganserve_trainer.export.modules import check_finite
from ganserve_trainer.model_file import MODEL_FILE_NAME
from ganserve_trainer.networks.generator import UInt8Generator
from ganserve_trainer.networks.layers import UnflattenPixels
from ganserve_trainer.train.checkpoints import Checkpoint

_OPSET = 18
_TRACED = 3  # images


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
        TrainerError: the images differ, or weights are not finite.
    """
    generator = checkpoint.ema_generator()
    check_finite(generator)
    folded = copy.deepcopy(generator)
    folded.layers = fold_batch_norm(generator.layers)
    settings = checkpoint.settings
    classes = len(checkpoint.spec.class_names) if settings.conditional else 0
    inputs = Inputs.plain(settings.latent_dim, classes)
    model = trace(UInt8Generator(folded).eval(), inputs)
    compare_with_pytorch(open_session(model), UInt8Generator(generator).eval(), inputs)
    return model


def to_onnx_in_fp16(checkpoint: Checkpoint) -> onnx.ModelProto:
    """Export the EMA generator with layers in fp16; choosing the cluster and rounding to grey levels stay in fp32."""
    folded = checkpoint.ema_generator()
    folded.layers = nn.Sequential(_To(torch.float16), fold_batch_norm(folded.layers).half(), _To(torch.float32))
    settings = checkpoint.settings
    classes = len(checkpoint.spec.class_names) if settings.conditional else 0
    return trace(UInt8Generator(folded).eval(), Inputs.plain(settings.latent_dim, classes))


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def trace(module: nn.Module, inputs: Inputs) -> onnx.ModelProto:
    """Export a module that returns uint8 images, for batches of any size.

    Raises:
        TrainerError: torch cannot export it, or for one batch size only, or it draws random numbers.
    """
    arguments = tensors(inputs.values(np.arange(_TRACED)))
    dynamic_shapes = inputs.dynamic(torch.export.Dim("N", min=1))
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())
    printed = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
    ):
        # The exporter warns about its internals, and prints its progress and what it failed on.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        path = Path(scratch) / MODEL_FILE_NAME
        try:
            if scripted:
                write_torchscript(module, arguments, path)
            else:
                _write(module, arguments, path, dynamic_shapes)
        except Exception as error:  # torch's exporters have no common root of their exceptions
            if scripted:
                raise TrainerError(
                    f"torch cannot write the TorchScript module as ONNX: {summary(error)}; export the Python module "
                    "that it was made of"
                ) from None
            raise TrainerError(why_not_exported(module, arguments, dynamic_shapes, error)) from None
        model = onnx.load(path)
        if any(each.dim_value for value in model.graph.input for each in value.type.tensor_type.shape.dim[:1]):
            raise TrainerError(why_not_exported(module, arguments, dynamic_shapes, None))
    if reason := random_numbers(model):
        raise TrainerError(reason)
    strip_exporter_notes(model)
    return model


def write_fixed(module: nn.Module, arguments: dict[str, Tensor], path: Path) -> None:
    """Export for the number of images of the arguments only."""
    _write(module, arguments, path, None)


def _write(module: nn.Module, arguments: dict[str, Tensor], path: Path, dynamic_shapes: Any) -> None:
    torch.onnx.export(
        module,
        kwargs=arguments,
        f=str(path),
        dynamo=True,
        opset_version=_OPSET,
        input_names=list(arguments),
        output_names=["image"],
        dynamic_shapes=dynamic_shapes,
        external_data=False,
        verbose=False,
    )


class _Positional(nn.Module):
    """A module whose forward takes its arguments in an order."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *given: Tensor) -> Tensor:
        images: Tensor = self.module(**dict(zip(self.names, given, strict=True)))
        return images


def write_torchscript(module: nn.Module, arguments: dict[str, Tensor], path: Path, *, fixed: bool = False) -> None:
    """Export by the operators that a run uses, as TorchScript does; `fixed`: for this number of images only."""
    inputs = tuple(arguments.values())
    dynamic = ["image", *(name for name, each in arguments.items() if each.ndim)]
    with torch.no_grad():
        traced = torch.jit.trace(_Positional(module, list(arguments)), inputs, check_trace=False)
    torch.onnx.export(
        traced,
        inputs,
        str(path),
        dynamo=False,
        opset_version=_OPSET,
        input_names=list(arguments),
        output_names=["image"],
        dynamic_axes={} if fixed else {name: {0: "N"} for name in dynamic},
        verbose=False,
    )


def strip_exporter_notes(model: onnx.ModelProto) -> None:
    """Remove the exporter's stack traces, which are half the size of a small graph and contain this machine's paths."""
    graph = model.graph
    del graph.metadata_props[:]
    parts: tuple[Any, ...] = (*all_nodes(model), *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in parts:
        del part.metadata_props[:]
        part.doc_string = ""
