"""Explains why a module cannot be exported, in one sentence: the construct, the line of the user's code, the remedy."""

import contextlib
import itertools
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import (
    ConstraintViolationError,
    GuardOnDataDependentSymNode,
    ShapeEnv,
)

_MOST_CHARACTERS = 200  # of another library's message
_NOISE = re.compile(r"\x1b\[[0-9;]*m|\[ONNXRuntimeError\] : \d+ : \w+ : ")  # colours, and a prefix
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_LIBRARIES = (*torch.__path__, *np.__path__, str(Path(__file__).parent.parent))
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")

_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
NUMBER_OF_IMAGES = (
    "Python code of the module depends on the number of images{where}, but the file must work for any number: use no "
    "`if`, loop or int() on the first dimension, reshape with -1, and compute all images at once"
)
_GROUPED = (
    "a convolution has a number of groups that depends on the number of images{where}, which ONNX lacks. If it "
    "modulates weights (groups=batch, as in StyleGAN2), multiply its input by the styles and its output by the "
    "demodulation instead, and convolve with the plain weights; some implementations have fused_modconv=False for this"
)


def summary(error: BaseException) -> str:
    """Return the kind and the first line of the error that caused this one."""
    cause = list(_causes(error))[-1]
    lines = [line.strip() for line in _NOISE.sub("", str(cause)).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(cause).__name__}: {text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + '…'}"


def frames_of(error: BaseException) -> list[tuple[str, int]]:
    """Return the files and the lines of an error's stack, from the outside in."""
    return [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]


def line_of(frames: Iterable[tuple[str, int]]) -> str:
    """Return the innermost line of the user's code, as " (generator.py:12)"; "" if there is none."""
    own = [(file, line) for file, line in frames if _is_users(file)]
    return f" ({Path(own[-1][0]).name}:{own[-1][1]})" if own else ""


def _is_users(file: str) -> bool:
    standard = file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
    return not standard and not file.startswith((*_LIBRARIES, "<"))


def random_numbers(model: onnx.ModelProto) -> str | None:
    """Return why a model draws random numbers, by its operators at any depth; None if it does not.

    The server has the same rule.
    """
    for node in all_nodes(model):
        # Outside of training, the exporter writes no training_mode, the third input.
        if node.op_type == "Dropout" and len(node.input) > 2:
            return (
                f"dropout is on{_line_of_node(node)}, and draws random numbers, so no image can be made again: pass "
                "training=self.training, which is false at the export; if it stays on by design, multiply by a fixed "
                "mask, a buffer, instead"
            )
        if node.op_type in _RANDOM:
            return _noise(node.op_type, _line_of_node(node))
    return None


def _noise(operator: str, where: str) -> str:
    return (
        f"the module draws random numbers by {operator}{where}, so no image can be made again: make the noise a buffer "
        "(register_buffer), or take it from further values of the latent"
    )


def why_not_exported(
    module: nn.Module, arguments: Mapping[str, Any], dynamic_shapes: Mapping[str, Any], error: Exception | None
) -> str:
    """Return why `torch.onnx.export` failed, or, without an error, exported one batch size only."""
    try:
        program = torch.export.export(module, (), dict(arguments), dynamic_shapes=dict(dynamic_shapes), strict=False)
    except Exception as cause:  # torch.export has no root of its exceptions, and runs the user's code
        return _why_not_traced(module, arguments, cause)
    return NUMBER_OF_IMAGES.format(where="") if error is None else _why_not_converted(program, error)


def _why_not_traced(module: nn.Module, arguments: Mapping[str, Any], error: Exception) -> str:
    causes = list(_causes(error))
    if any(isinstance(cause, ConstraintViolationError) for cause in causes):
        where = line_of_branch(lambda size: module(**{name: value[:size] for name, value in arguments.items()}))
        return NUMBER_OF_IMAGES.format(where=where or _line_of_guard(error))
    where = line_of(frames_of(error))
    if any(isinstance(cause, GuardOnDataDependentSymNode) for cause in causes):
        return (
            f"Python code of the module depends on values of a tensor{where}, which are unknown at the export: use "
            "torch.where instead of `if`, and tensors instead of .item()"
        )
    return (
        f"torch.export cannot trace the module{where}: {summary(error)}; compute with torch's functions on tensors "
        "alone, without NumPy and .item()"
    )


def _why_not_converted(program: torch.export.ExportedProgram, error: Exception) -> str:
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in nodes:
        # After the input, the weights and the bias: lists, and the number of groups.
        if "conv" in str(node.target) and any(isinstance(argument, torch.fx.Node) for argument in node.args[3:]):
            return _GROUPED.format(where=_line_of_text(node.stack_trace))
    found = re.search(r"(?:target=torch\.ops\.|op=')(aten\.\w+)", " ".join(str(cause) for cause in _causes(error)))
    if not found:
        return f"torch cannot write the module as ONNX: {summary(error)}"
    for node in nodes:
        if str(node.target).startswith(f"{found[1]}."):
            where = _line_of_text(node.stack_trace)
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                return _noise(found[1], where)
            break
    else:
        where = ""
    return f"torch cannot write the operator {found[1]} as ONNX{where}: use others instead"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def line_of_branch(run: Callable[[int], object]) -> str:
    """Return the last line of the user's code that 1, 2 and 3 images have in common before they take other ways."""
    ways: list[list[tuple[str, int]]] = []

    def follow(frame: FrameType, event: str, _: Any) -> Any:
        if not _is_users(frame.f_code.co_filename):
            return None
        if event == "line":
            ways[-1].append((frame.f_code.co_filename, frame.f_lineno))
        return follow

    before = sys.gettrace()
    for size in (1, 2, 3):
        ways.append([])
        sys.settrace(follow)
        try:
            with torch.no_grad(), contextlib.suppress(Exception):
                run(size)
        finally:
            sys.settrace(before)
    for step, lines in enumerate(itertools.zip_longest(*ways)):
        if len(set(lines)) > 1:
            return line_of(ways[0][:step])
    return ""


def _line_of_guard(error: BaseException) -> str:
    """Return the line that fixed the number of images; torch keeps it with the shapes, not in the error."""
    for cause in _causes(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            for value in frame.f_locals.values():
                if isinstance(value, ShapeEnv):
                    found = re.findall(r"([\w.-]+\.py):(\d+)", " ".join(str(guard.sloc) for guard in value.guards))
                    return f" ({found[-1][0]}:{found[-1][1]})" if found else ""
    return ""


def _line_of_text(stack: str | None) -> str:
    return line_of((file, int(line)) for file, line in _FRAME.findall(stack or ""))


def _line_of_node(node: onnx.NodeProto) -> str:
    """Return the line that the exporter noted."""
    return _line_of_text(" ".join(entry.value for entry in node.metadata_props))


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a model, also those inside others and in functions."""
    yield from _inner(model.graph.node)
    for function in model.functions:
        yield from _inner(function.node)


def _inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _inner(graph.node)
