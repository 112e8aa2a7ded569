"""Turns modules of torch into ONNX: traces the call that makes their images."""

import contextlib
import dataclasses
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ganserve_trainer.errors import TrainerError, one_line
from ganserve_trainer.export.graph import trace, write_fixed, write_torchscript
from ganserve_trainer.export.inputs import Inputs, tensors
from ganserve_trainer.importing.calling import Call, find_call, named_tensors
from ganserve_trainer.importing.looking import choose_output
from ganserve_trainer.importing.onnx_file import source_of
from ganserve_trainer.importing.project import on_cpu
from ganserve_trainer.importing.source import Arrays, Source, Wishes
from ganserve_trainer.model_file import MODEL_FILE_NAME
from ganserve_trainer.networks.architecture import parameter_count

_OPSET = 18


class _Called(nn.Module):
    """A module with the inputs of a served model, and one output: the images as the module makes them."""

    def __init__(self, module: nn.Module, call: Call, output: str) -> None:
        super().__init__()
        self.module, self.call, self.output = module, call, output

    def forward(self, latent: Tensor, label: Tensor | None = None, truncation: Tensor | None = None) -> Tensor:
        made, _ = self.call(self.module, latent, label, truncation)
        return named_tensors(made)[self.output].float()


def source_of_module(module: nn.Module, wishes: Wishes, arguments: Mapping[str, Any]) -> Source:
    """Find out how a module is called, and trace it.

    Args:
        module: the generator.
        wishes: what the user set.
        arguments: what it was built with, among which may be the size of a latent.

    Raises:
        TrainerError: no usual call gives images, or the module cannot be traced.
    """
    module = _in_fp32(module.cpu().eval())
    with on_cpu():
        call, outputs, drawn = find_call(module, wishes, arguments)
        output = choose_output({name: each.numpy() for name, each in outputs.items()}, wishes).name
        called = _Called(module, call, output)
        try:
            model = trace(called, call.inputs)
        except TrainerError as error:
            # Code that needs the number of images, as grouped convolutions do, may be traced for one.
            model = _trace_for_one_image(called, call.inputs, error)

    def run(feeds: Arrays) -> Arrays:
        with torch.no_grad(), on_cpu():
            images: Tensor = called(**{name: torch.from_numpy(np.asarray(rows)) for name, rows in feeds.items()})
        return {"image": images.numpy()}

    known = {each.name: each.name for each in model.graph.input}  # without what the network does not use
    # What the call says, the graph need not be asked.
    names = wishes.class_names or tuple(map(str, range(call.inputs.classes)))
    source = source_of(model, dataclasses.replace(wishes, roles=known, output=None, class_names=names))
    notes = (
        f"{type(module).__name__} is called as {call}",
        *([f"{output} of {', '.join(outputs)}"] if len(outputs) > 1 else []),
        *(["the network draws noise, which is now constant: the same for all images"] if drawn else []),
    )
    return dataclasses.replace(
        source, run=run, parameters=parameter_count(module), architecture=type(module).__name__, notes=notes
    )


def _in_fp32(module: nn.Module) -> nn.Module:
    """Let a module compute in fp32, also where its parts have the type that they convert to."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.dtype) and value.is_floating_point:
                setattr(part, name, torch.float32)
    return module.float()


def source_of_program(path: Path, wishes: Wishes) -> Source:
    """Read a file of torch.export.save.

    Raises:
        TrainerError: it is no such file, or it cannot be converted to ONNX.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            program = torch.export.load(path)
            exported = torch.onnx.export(program, dynamo=True, opset_version=_OPSET, verbose=False)
        assert exported is not None
        model = exported.model_proto
    except OSError:
        raise
    except Exception as error:  # torch's errors have no common root
        raise TrainerError(f"torch cannot read {path} and export it to ONNX: {one_line(error)}") from error
    return source_of(model, wishes)


def _trace_for_one_image(called: nn.Module, inputs: Inputs, failure: TrainerError) -> onnx.ModelProto:
    """Export a module that cannot be exported for any number of images, because of `failure`.

    Raises:
        TrainerError: neither can it be exported for one.
    """
    arguments = tensors(inputs.values(np.zeros(1, np.int64)))
    with (
        tempfile.TemporaryDirectory() as scratch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        path = Path(scratch) / MODEL_FILE_NAME
        for write in (write_fixed, functools.partial(write_torchscript, fixed=True)):
            try:
                write(called, arguments, path)
                return onnx.load(path)
            except Exception:  # torch's exporters have no common root of their exceptions
                continue
    raise failure
