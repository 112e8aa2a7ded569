"""Says what each input of a graph is: by its name, its type and its shape, unless the user sets it by `--input`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import onnx

from ganserve._distributions import DISTRIBUTIONS
from ganserve_trainer.errors import TrainerError

Kind = Literal["latent", "label", "truncation", "noise", "attributes", "constant"]
ROLES = "latent, label, truncation, noise, attributes, attributes:NAME,NAME, latent:uniform, constant:VALUE"
_LABEL = re.compile(r"label|class|cond|target|categor|one_?hot|^[cy]$|[_.][cy]$", re.IGNORECASE)
_PSI = re.compile(r"trunc|psi", re.IGNORECASE)
_TRAINING = re.compile(r"train|learning_phase|noise_mode|randomi", re.IGNORECASE)
_BLEND = re.compile(r"alpha|fade|blend", re.IGNORECASE)
_NOISE = re.compile(r"noise", re.IGNORECASE)
_ATTRIBUTES = re.compile(r"attr|tags?$|features?$", re.IGNORECASE)
_CODE = re.compile(r"code|cont(inuous)?$", re.IGNORECASE)
# The names of latents, the likeliest first.
_LATENT = [re.compile(pattern, re.IGNORECASE) for pattern in (r"^z\d*$|latent", r"^z|noise|input|style|^x$", "")]
_INTEGERS = {onnx.TensorProto.INT32, onnx.TensorProto.INT64}
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}


@dataclass(frozen=True, slots=True)
class Role:
    """What an input is."""

    kind: Kind
    reason: str
    detail: str = ""  # of a latent, its distribution; of attributes, their names; of a constant, its value
    further: bool = False  # whether it is none of the two that a seed and a class determine


def roles(graph: onnx.GraphProto, wanted: Mapping[str, str]) -> list[tuple[onnx.ValueInfoProto, Role]]:
    """Return the inputs of a graph and what they are; one is the latent, and at most one the label.

    Args:
        graph: the graph.
        wanted: what the user set, by the name of an input.

    Raises:
        TrainerError: what an input is cannot be guessed, or the user names one that there is not.
    """
    inputs = {value.name: value for value in graph.input}
    shown = ", ".join(map(_described, inputs.values())) or "none"
    for name in wanted:
        if name not in inputs:
            raise TrainerError(f"there is no input {name!r}; the inputs are {shown}")
    found = {name: _parsed(name, wanted[name]) if name in wanted else _guess(inputs[name]) for name in inputs}
    unset = [name for name in inputs if name not in wanted]
    free = [name for name in unset if found[name] is None]
    set_latents = [name for name, role in found.items() if role and role.kind == "latent"]
    labels = [name for name, role in found.items() if role and role.kind == "label"]
    if not labels and len(free) + len(set_latents) > 1:
        likely = [name for name in free if _is_label(inputs[name])]
        likely = [name for name in likely if _LABEL.search(name)] or likely
        labels = likely if len(likely) == 1 else []
    latents = [name for name in free if name not in labels and type_and_sizes(inputs[name])[0] in _FLOATS]
    latents = [name for name in latents if len(type_and_sizes(inputs[name])[1]) > 1]
    if not set_latents and not latents:  # it may be called noise
        latents = [name for name in unset if (role := found[name]) and role.kind == "noise"][:1]
    if len(inputs) == 1 and not wanted:
        latents = list(inputs)
    latents = sorted(latents, key=_rank) if not set_latents else latents
    first = (set_latents or latents or [""])[0]
    alike = [name for name in latents if _rank(name) == _rank(first)] if not set_latents else []
    chosen: list[tuple[onnx.ValueInfoProto, Role]] = []
    for name, value in inputs.items():
        role = found[name]
        if name == first:
            role = Role("latent", "", role.detail if role and role.kind == "latent" else "")
        elif name in labels and role is None:
            role = Role("label", "")
        elif role is None and name in latents and (_CODE.search(name) or name not in alike):
            uniform = bool(_CODE.search(name))
            role = Role("latent", "a further latent by its shape", "uniform" if uniform else "", further=True)
        elif role is not None and role.kind == "latent":
            role = Role("latent", role.reason, role.detail, further=True)
        if role is None or not first or len(labels) > 1:
            raise TrainerError(
                f"the inputs are {shown}; what {name!r} is cannot be guessed: add --input {name}=ROLE, where ROLE is "
                f"one of {ROLES}"
            )
        chosen.append((value, role))
    kind, _ = type_and_sizes(inputs[first])
    if kind not in _FLOATS:
        text = onnx.TensorProto.DataType.Name(kind).lower()
        raise TrainerError(f"the latent {first!r} is {text}; it must be a float input, such as --input NAME=latent")
    return chosen


def type_and_sizes(value: onnx.ValueInfoProto) -> tuple[int, list[int | None]]:
    """Return ONNX's type of an input, and its sizes, the first of which is usually the batch's; None is not fixed."""
    tensor = value.type.tensor_type
    return tensor.elem_type, [size.dim_value if size.dim_value > 0 else None for size in tensor.shape.dim]


def _parsed(name: str, text: str) -> Role:
    kind, _, detail = text.partition(":")
    valid = kind in get_args(Kind)
    if kind == "constant":
        try:
            float(detail)
        except ValueError:
            valid = False
    elif kind == "latent" and detail:
        valid = detail in DISTRIBUTIONS
    elif kind != "attributes" and detail:
        valid = False
    if not valid:
        raise TrainerError(
            f"--input {name}={text} has no role that there is: it must be one of {ROLES}; distributions of a latent "
            f"are {', '.join(DISTRIBUTIONS)}, and a VALUE is a number"
        )
    role: Kind = kind  # type: ignore[assignment]
    return Role(role, "by --input", detail, further=role not in ("latent", "label"))


def _guess(value: onnx.ValueInfoProto) -> Role | None:
    """Return what an input is if its name, its type and its shape say so, beside latents and labels."""
    kind, sizes = type_and_sizes(value)
    single = all(size == 1 for size in sizes[1:])  # one value for each image, or one for all
    name = value.name
    if kind == onnx.TensorProto.BOOL or (single and _TRAINING.search(name)):
        return Role("constant", "a switch, which is off for inference", "0", further=True)
    if kind not in _FLOATS:
        return None
    if single and _PSI.search(name):
        return Role("truncation", "by its name", further=True)
    if single and _BLEND.search(name):
        return Role("constant", "a blend of two resolutions, of which the last one counts", "1", further=True)
    if len(sizes) == 2 and _ATTRIBUTES.search(name):
        return Role("attributes", "by its name; each from 0 to 1, or as a request sets it", further=True)
    plane = len(sizes) == 4 and sizes[1] == 1 and None not in sizes[2:] and sizes[2] != 1
    if plane or (len(sizes) == 4 and _NOISE.search(name) and sizes[2] != 1):
        return Role("noise", "noise by its shape, the same unless a request gives another seed", further=True)
    return None


def _is_label(value: onnx.ValueInfoProto) -> bool:
    kind, sizes = type_and_sizes(value)
    return kind in _INTEGERS or bool(_LABEL.search(value.name)) or all(size == 1 for size in sizes[1:])


def _rank(name: str) -> int:
    """Return how likely a name is that of the latent; 0 is the most likely."""
    if _CODE.search(name):
        return len(_LATENT)
    return next(rank for rank, pattern in enumerate(_LATENT) if pattern.search(name))


def _described(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = ", ".join(str(size.dim_value or size.dim_param or "?") for size in tensor.shape.dim)
    return f"{value.name!r} {onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{sizes}]"
