"""Prepares any torch module for the export, and runs it: a failure is one sentence with the line of the user's code."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from ganserve._formats import LARGEST_SIDE, MODES
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export.diagnosis import frames_of, line_of, summary
from ganserve_trainer.export.inputs import Inputs

_ARGUMENTS = "forward must take latent, float32 [n, latent_dim], and, only with class names, label, int64 [n]"
_LABELS = {
    "label",
    "labels",
    "c",
    "y",
}  # of an argument that may be left out; another one may be a truncation, or noise


class Prepared(nn.Module):
    """A module whose forward takes `latent`, and `label` if the model has classes, whatever their names inside."""

    def __init__(self, module: nn.Module, *, by_name: bool) -> None:
        super().__init__()
        self.module = module
        self.by_name = by_name

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Any:
        """Return what the module returns."""
        given = {"latent": latent} if label is None else {"latent": latent, "label": label}
        return self.module(**given) if self.by_name else self.module(*given.values())


def prepare(module: nn.Module, inputs: Inputs) -> nn.Module:
    """Copy a module to the CPU, in evaluation mode, without DataParallel and torch.compile.

    The arguments of the result's forward have the names of the inputs.

    Raises:
        TrainerError: the module cannot be copied, its forward takes other arguments, or its weights are not finite.
    """
    module = _unwrapped(module)
    by_name = _called_by_name(module, inputs)
    # What an older spectral_norm or weight_norm computes from the weights is no parameter, which deepcopy refuses.
    computed = [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]
    try:
        with torch.no_grad():
            module = copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})
    except Exception as error:  # what an object that cannot be copied raises
        raise TrainerError(f"the module cannot be copied: {summary(error)}; remove that object from it") from None
    for part in list(module.modules()):
        for name, child in part.named_children():
            if (inner := _unwrapped(child)) is not child:
                setattr(part, name, inner)
    module.cpu()
    check_finite(module)
    return Prepared(module, by_name=by_name).eval() if inputs.is_plain else module


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, which needs its GPUs, and torch.compile, which needs a compiler."""
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | OptimizedModule):
        module = module._orig_mod if isinstance(module, OptimizedModule) else module.module
    return module


def _called_by_name(module: nn.Module, inputs: Inputs) -> bool:
    """Return whether forward has arguments of the inputs' names; otherwise latent and label are given in this order.

    Raises:
        TrainerError: forward cannot be called with them.
    """
    names = list(inputs)
    try:
        signature = inspect.signature(module.forward)
    except ValueError:  # a traced TorchScript module has none
        return False
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {each.name for each in signature.parameters.values() if each.kind not in several}
    others = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    by_name = set(names) <= named or (others and not inputs.is_plain)
    try:
        bound = signature.bind(**dict.fromkeys(names)) if by_name else signature.bind(*names)
    except TypeError as error:
        raise TrainerError(
            f"{type(module).__name__}.forward{_bare(signature)} cannot be called with {' and '.join(names)}: {error}. "
            f"{_ARGUMENTS}: wrap the module in one that does"
        ) from None
    if not by_name and not inputs.is_plain:
        raise TrainerError(
            f"{type(module).__name__}.forward{_bare(signature)} lacks arguments of the names {', '.join(names)}: wrap "
            "the module in one whose forward has them, as the inputs are called"
        )
    last = signature.parameters[list(bound.arguments)[-1]]
    if inputs.classes and not by_name and last.default is not last.empty and last.name not in _LABELS:
        raise TrainerError(
            f"{type(module).__name__}.forward{_bare(signature)} takes no label, but there are class names: leave them "
            f"out, or call the argument label. {_ARGUMENTS}"
        )
    return by_name


def _bare(signature: inspect.Signature) -> inspect.Signature:
    """Remove the annotations."""
    parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=signature.empty)


def check_finite(module: nn.Module) -> None:
    """Reject weights that are NaN or infinite; a buffer may be infinite, as the mask of an attention.

    Raises:
        TrainerError: a weight is; the text names its tensor.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    parameters = {name for name, _ in module.named_parameters()}
    for name, tensor in named:
        bad = ~tensor.isfinite() if name in parameters else tensor.isnan()
        if bad.any():
            raise TrainerError(
                f"{int(bad.sum())} of the {tensor.numel()} values of {name} are NaN or infinite: export an earlier "
                "checkpoint"
            )


def run_module(module: nn.Module, given: dict[str, Tensor]) -> Any:
    """Return what a module makes, without gradients.

    Raises:
        TrainerError: it fails.
    """
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return module(**given)
    except TrainerError:
        raise
    except Exception as error:  # what a user's code raises
        kinds = {parameter.dtype for parameter in module.parameters()} - {torch.float32}
        remedy = f"; it has weights of {kinds.pop()}, and latents are float32: call .float() on it" if kinds else ""
        where = f"on {len(given['latent'])} latents on the CPU{line_of(frames_of(error))}"
        raise TrainerError(f"the module fails {where}: {summary(error)}{remedy}") from None


def check_output(images: Any, count: int) -> tuple[int, int, int]:
    """Return the height, the width and the channels of what a module made of some latents.

    Raises:
        TrainerError: these are no images as a server returns them; the text says how to make them so.
    """
    if not isinstance(images, Tensor):
        raise TrainerError(
            f"the module returns a {type(images).__name__}; it must return one tensor, the images: wrap it in a module "
            "that returns them alone"
        )
    shape, remedies = list(images.shape), []
    if len(shape) != 4 or shape[0] != count:
        remedies.append("return one image for each latent")
    if images.dtype != torch.uint8:
        remedies.append(
            "convert images from -1 to 1 by torch.round((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)"
        )
    if len(shape) == 4 and shape[3] not in MODES:
        remedies.append("move the channels to the end by .permute(0, 2, 3, 1)")
    if remedies:
        raise TrainerError(
            f"from {count} latents the module made {images.dtype} {shape}; it must make torch.uint8 [{count}, height, "
            f"width, 1, 3 or 4]: {', and '.join(remedies)}; see examples/bring_a_generator.py"
        )
    height, width, channels = shape[1:]
    if max(height, width) > LARGEST_SIDE:
        raise TrainerError(
            f"the module makes images of {height}x{width} pixels; a server takes at most {LARGEST_SIDE} on each side"
        )
    return height, width, channels
