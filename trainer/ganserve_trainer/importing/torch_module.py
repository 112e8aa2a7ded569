"""Turns modules of torch into ONNX: finds out how to call them, and traces them."""

import dataclasses
import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export.graph import trace, write_torchscript
from ganserve_trainer.export.inputs import Inputs
from ganserve_trainer.importing.looking import LARGEST_LATENT, WRAPPER_ADVICE, as_images, choose_output
from ganserve_trainer.importing.onnx_file import source_of
from ganserve_trainer.importing.source import Arrays, Source, Wishes, one_line
from ganserve_trainer.model_file import MODEL_FILE_NAME
from ganserve_trainer.networks.architecture import parameter_count
from ganserve_trainer.wrap import Served, one_hot

_TRIED = 3  # images
_OPSET = 18


@dataclass(frozen=True, slots=True)
class _Call:
    """How to call a module. A label of "none" is passed as None."""

    shape: tuple[int, ...]  # of one latent
    label: Literal["", "none", "index", "one-hot"]
    classes: int

    def __call__(self, module: nn.Module, latent: Tensor, label: Tensor | None = None) -> Any:
        latent = latent.reshape(-1, *self.shape)
        if label is not None and self.label == "one-hot":
            label = one_hot(label, self.classes)
        return module(latent, label) if self.label else module(latent)

    def __str__(self) -> str:
        sizes = ", ".join(map(str, ("N", *self.shape)))
        label = {"": "", "none": ", None", "index": ", labels", "one-hot": f", one-hot labels of {self.classes}"}
        return f"called with latents [{sizes}]{label[self.label]}"


def source_of_module(module: nn.Module, wishes: Wishes, arguments: Mapping[str, Any]) -> Source:
    """Find out how a module is called, and trace it.

    Args:
        module: the generator.
        wishes: what the user set.
        arguments: what it was built with, among which may be the size of a latent.

    Raises:
        TrainerError: no usual call gives images, or the module cannot be traced.
    """
    module = module.cpu().eval().float()
    call, outputs = _find_call(module, wishes, arguments)
    output = choose_output({name: each.numpy() for name, each in outputs.items()}, wishes).name
    latent, label = _zeros(call)

    def make(module: nn.Module, latent: Tensor, label: Tensor | None = None) -> Tensor:
        return _named(call(module, latent, label))[output]

    served = Served(module, make)
    try:
        model = trace(served, Inputs.plain(latent.shape[1], 0 if label is None else call.classes))
    except TrainerError as error:
        # Code that needs the number of images, as grouped convolutions do, may be traced for one.
        model = _trace_for_one_image(served, latent, label, error)

    def run(feeds: Arrays) -> Arrays:
        with torch.no_grad():
            images: Tensor = served(**{name: torch.from_numpy(np.asarray(rows)) for name, rows in feeds.items()})
        return {"image": images.numpy()}

    source = source_of(model, dataclasses.replace(wishes, latent_input=None, label_input=None, output=None))
    notes = (f"{type(module).__name__}, {call}", *([f"{output} of {', '.join(outputs)}"] if len(outputs) > 1 else []))
    return dataclasses.replace(
        source, run=run, parameters=parameter_count(module), architecture=type(module).__name__, notes=notes
    )


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


def _find_call(module: nn.Module, wishes: Wishes, arguments: Mapping[str, Any]) -> tuple[_Call, dict[str, Tensor]]:
    required, allowed = _parameters(module)
    if required > 2:
        raise TrainerError(
            f"{type(module).__name__}.forward takes {required} arguments; only a latent and a label can be passed: "
            f"{WRAPPER_ADVICE}"
        )
    classes = len(wishes.class_names)
    labels: list[Literal["", "none", "index", "one-hot"]] = ["index", "one-hot"]
    if not classes:
        labels = [""] if required < 2 else ["none", "index"]
    elif allowed < 2:
        raise TrainerError(f"--classes is set, but {type(module).__name__}.forward takes no label")
    failed = "no size of a latent is known"
    for size in _sizes(module, wishes, arguments):
        for shape in ((size,), (size, 1, 1)):
            for label in labels:
                call = _Call(shape, label, classes)
                try:
                    with torch.no_grad():
                        made = _named(call(module, *_zeros(call)))
                except Exception as error:  # a module raises anything for other inputs than it wants
                    failed = f"{call}, it fails: {one_line(error)}"
                    continue
                if any(
                    len(each) == _TRIED and as_images(name, each.numpy(), wishes.layout) for name, each in made.items()
                ):
                    return call, made
                failed = f"{call}, it makes {', '.join(str(list(each.shape)) for each in made.values())}"
    advice = "add --latent-dim" if wishes.latent_dim is None else "check --latent-dim"
    if required == 2 and not classes:
        advice += " and --classes"
    raise TrainerError(f"no usual call of {type(module).__name__} makes images; {failed}; {advice}. {WRAPPER_ADVICE}")


def _zeros(call: _Call) -> tuple[Tensor, Tensor | None]:
    latent = torch.zeros(_TRIED, call.shape[0])
    return latent, torch.zeros(_TRIED, dtype=torch.int64) if call.label in ("index", "one-hot") else None


def _parameters(module: nn.Module) -> tuple[int, float]:
    """Return how many arguments a module's forward must and may have."""
    if isinstance(module, torch.jit.ScriptModule):
        named = module.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        return sum(not each.has_default_value() for each in named), len(named)
    positional = [
        each
        for each in inspect.signature(module.forward).parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    return sum(each.default is each.empty for each in positional), len(positional)


def _sizes(module: nn.Module, wishes: Wishes, arguments: Mapping[str, Any]) -> Iterable[int]:
    """Return the sizes that a latent may have, the likeliest first."""
    if wishes.latent_dim is not None:
        return [wishes.latent_dim]
    named = [value for value in (*arguments.values(), *vars(module).values()) if type(value) is int]
    # The first layers' weights, which may also take the label, are nearest to the latent.
    of_weights = [size for weights in module.parameters() for size in weights.shape]
    of_weights += [size - len(wishes.class_names) for size in of_weights] if wishes.class_names else []
    return dict.fromkeys(size for size in (*named, *of_weights) if 0 < size <= LARGEST_LATENT)


def _named(made: Any) -> dict[str, Tensor]:
    """Return the tensors among what a module returned: by their keys, or by their numbers."""

    def tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name or "0", value
        elif isinstance(value, Mapping):
            for key, each in value.items():
                yield from tensors(each, f"{name}.{key}".lstrip("."))
        elif isinstance(value, list | tuple):
            for index, each in enumerate(value):
                yield from tensors(each, f"{name}.{index}".lstrip("."))

    return dict(tensors(made, ""))


def _trace_for_one_image(
    served: Served, latent: Tensor, label: Tensor | None, failure: TrainerError
) -> onnx.ModelProto:
    """Export a module that cannot be exported for any number of images, because of `failure`.

    Raises:
        TrainerError: neither can it be exported for one.
    """
    try:
        inputs = {"latent": latent[:1]} | ({} if label is None else {"label": label[:1]})
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(scratch) / MODEL_FILE_NAME
            write_torchscript(served, inputs, path, fixed=True)
            return onnx.load(path)
    except Exception:  # torch's exporters have no common root of their exceptions
        raise failure from None
